//! cache: Redis and Sentinel.

use super::{OnChange, Service};

pub const SERVICES: &[Service] = &[
    Service {
        unit: "stanchion-redis.service",
        files: &["/etc/redis/"],
        check: None,
        // Sentinel tells a running one whom to follow; the file counts when it starts.
        on_change: OnChange::Nothing,
    },
    Service {
        unit: "stanchion-sentinel.service",
        files: &[],
        check: None,
        on_change: OnChange::Nothing,
    },
    Service {
        unit: "stanchion-redis-exporter.service",
        files: &["/etc/default/stanchion-redis-exporter"],
        check: None,
        on_change: OnChange::Restart,
    },
];
