//! cache: Redis and Sentinel.

use super::{OnChange, Service};

pub const SERVICES: &[Service] = &[
    Service {
        unit: "stanchion-redis.service",
        files: &["/etc/stanchion-redis/redis.conf"],
        check: None,
        // Sentinel tells a running one whom to follow; the file counts when it starts.
        on_change: OnChange::Nothing,
    },
    Service {
        unit: "stanchion-sentinel.service",
        files: &["/etc/stanchion-sentinel/"],
        check: None,
        on_change: OnChange::Nothing,
    },
    Service {
        unit: "stanchion-redis-exporter.service",
        files: &["/etc/stanchion-redis/exporter.json"],
        check: None,
        on_change: OnChange::Restart,
    },
];
