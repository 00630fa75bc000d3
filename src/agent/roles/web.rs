//! web: the way to the database and Redis, NetBox, its workers, nginx.

use super::{Check, OnChange, Service};

/// NetBox is started behind it, once the database is there.
pub const PROXY: &str = "stanchion-web-proxy.service";
/// It takes jobs, except during maintenance.
pub const WORKER: &str = "stanchion-netbox-worker.service";

pub const SERVICES: &[Service] = &[
    Service {
        unit: PROXY,
        files: &["/etc/stanchion-web-proxy/"],
        check: Some(Check {
            file: "/etc/stanchion-web-proxy/haproxy.cfg",
            program: &["haproxy", "-c", "-f", "{}"],
        }),
        on_change: OnChange::Reload,
    },
    Service {
        unit: "stanchion-netbox.service",
        files: &["/etc/netbox/configuration.py", "/etc/netbox/gunicorn.py"],
        check: None,
        on_change: OnChange::Restart,
    },
    Service {
        unit: WORKER,
        files: &["/etc/netbox/configuration.py"],
        check: None,
        on_change: OnChange::Restart,
    },
    Service {
        unit: "nginx.service",
        files: &["/etc/nginx/"],
        check: None,
        on_change: OnChange::Reload,
    },
];
