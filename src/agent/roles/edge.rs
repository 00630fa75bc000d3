//! edge: HAProxy, keepalived, dnsmasq.

use super::{Check, OnChange, Service};

pub const SERVICES: &[Service] = &[
    Service {
        unit: "haproxy.service",
        files: &["/etc/haproxy/"],
        check: Some(Check {
            file: "/etc/haproxy/haproxy.cfg",
            program: &["haproxy", "-c", "-f", "{}"],
        }),
        on_change: OnChange::Reload,
    },
    Service {
        unit: "keepalived.service",
        files: &["/etc/keepalived/"],
        check: Some(Check {
            file: "/etc/keepalived/keepalived.conf",
            program: &["/usr/libexec/stanchion/check-keepalived", "{}"],
        }),
        on_change: OnChange::Reload,
    },
    Service {
        unit: "dnsmasq.service",
        files: &["/etc/stanchion-dns/"],
        check: Some(Check {
            file: "/etc/stanchion-dns/dnsmasq.conf",
            program: &["dnsmasq", "--test", "--conf-file={}"],
        }),
        on_change: OnChange::Restart,
    },
];
