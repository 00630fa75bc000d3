//! What a machine of the cluster is for.

use serde::{Deserialize, Serialize};

/// A layer may have one; a profile has those of its layers, a node those of its profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// etcd, and PostgreSQL under Patroni.
    Db,
    /// Redis and Sentinel.
    Cache,
    /// NetBox and its workers.
    Web,
    /// keepalived, HAProxy, dnsmasq.
    Edge,
}

impl Role {
    /// In the order in which they are shown.
    pub const ALL: [Role; 4] = [Role::Db, Role::Cache, Role::Web, Role::Edge];

    /// As it is written in files.
    pub fn name(self) -> &'static str {
        match self {
            Role::Db => "db",
            Role::Cache => "cache",
            Role::Web => "web",
            Role::Edge => "edge",
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
