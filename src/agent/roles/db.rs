//! db: etcd, and PostgreSQL under Patroni.

use super::{Check, OnChange, Service};

const CHECK_YAML: &str = "import sys, yaml; yaml.safe_load(open(sys.argv[1]))['scope']";

pub const SERVICES: &[Service] = &[
    Service {
        unit: "etcd.service",
        files: &["/etc/etcd/"],
        check: None,
        // Most of it counts for the first start only, and a restart costs a vote.
        on_change: OnChange::Nothing,
    },
    Service {
        unit: "patroni.service",
        files: &["/etc/patroni/config.yml"],
        check: Some(Check {
            file: "/etc/patroni/config.yml",
            // Patroni's own check fails while another node is down: it tries to connect.
            program: &["python3", "-I", "-c", CHECK_YAML, "{}"],
        }),
        on_change: OnChange::Reload,
    },
    Service {
        unit: "stanchion-postgres-exporter.service",
        files: &[],
        check: None,
        on_change: OnChange::Nothing,
    },
];
