//! db: etcd, and PostgreSQL under Patroni.

use super::{Check, OnChange, Service};

pub const SERVICES: &[Service] = &[
    Service {
        unit: "etcd.service",
        files: &["/etc/default/etcd"],
        check: None,
        // Most of it counts for the first start only, and a restart costs a vote.
        on_change: OnChange::Nothing,
    },
    Service {
        unit: "patroni.service",
        files: &["/etc/patroni/config.yml"],
        check: Some(Check {
            file: "/etc/patroni/config.yml",
            program: &["patroni", "--validate-config", "--ignore-listen-port", "{}"],
        }),
        on_change: OnChange::Reload,
    },
    Service {
        unit: "stanchion-postgres-exporter.service",
        files: &["/etc/default/stanchion-postgres-exporter"],
        check: None,
        on_change: OnChange::Restart,
    },
];
