//! The cluster file: which machines there are and what they share, as it is typed and
//! what it means once validated. A seed carries the validated form to the node.
//!
//! [`load_cluster`] reads `cluster.toml`. The keys are described in `docs/clusters.md`.

pub mod checklist;
mod network;
pub mod ports;
mod raw;
mod read;
mod rules;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use super::role::Role;
pub use network::Ipv4Network;
pub use read::{find_certificate, load_cluster};
pub use rules::check_rules;

/// All machines of one cluster, and what they have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// A DNS label.
    pub name: String,
    /// The DNS domain below which the nodes and services have their names.
    pub domain: String,
    /// The address that the edges hold together; on the network, no node's own.
    pub vip: Option<Ipv4Addr>,
    /// Where all nodes have their addresses.
    pub network: Ipv4Network,
    pub gateway: Option<Ipv4Addr>,
    /// Resolvers for all that is not the cluster's own.
    pub dns: Vec<IpAddr>,
    /// Names or addresses of time servers.
    pub ntp: Vec<String>,
    /// At least one, in the order of the file.
    pub nodes: Vec<Node>,
    pub storage: Option<ObjectStorage>,
    /// Without it there are no backups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<Backup>,
    #[serde(default, skip_serializing_if = "External::is_empty")]
    pub external: External,
    pub tuning: Tuning,
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// A DNS label, once in the cluster.
    pub name: String,
    /// Once in the cluster.
    pub address: Ipv4Addr,
    /// What fails together: a rack, a host, a data centre. A DNS label.
    pub zone: String,
    /// What its image was made of.
    pub profile: String,
    /// The profile's, in the order of [`Role`].
    pub roles: Vec<Role>,
}

/// Where media and backups go: a bucket that speaks S3. Its keys are secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectStorage {
    /// `https://HOST[:PORT]`, or `http://`.
    pub endpoint: String,
    pub bucket: String,
    pub region: String,
}

/// Backups of the databases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backup {
    /// Where they go: what is mounted at this path on every db node, below `/var`; without
    /// it, the object storage.
    pub directory: Option<String>,
    /// Full backups that are kept, each with what came after it; at least one.
    pub keep: u32,
}

impl Backup {
    /// Of weekly full backups, a month.
    pub const KEEP: u32 = 4;
}

/// What runs elsewhere, in place of the cluster's own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct External {
    pub postgres: Option<ExternalPostgres>,
    pub redis: Option<ExternalRedis>,
}

/// A PostgreSQL of somebody else's, over TLS. The password is the secret `postgres_netbox`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExternalPostgres {
    /// A name or an address; its certificate is for it.
    pub host: String,
    pub port: u16,
    pub database: String,
    pub user: String,
    /// Who certifies it, PEM.
    pub ca: String,
}

/// A Redis of somebody else's, over TLS. The password is the secret `redis`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExternalRedis {
    /// A name or an address; its certificate is for it.
    pub host: String,
    pub port: u16,
    /// Who certifies it, PEM.
    pub ca: String,
}

impl External {
    pub fn is_empty(&self) -> bool {
        self.postgres.is_none() && self.redis.is_none()
    }
}

/// Where the certificate is that the operator brings for users. It is no part of the
/// [`Cluster`]: nodes get what is in the files, not their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFiles {
    /// PEM; relative names are beside the cluster file.
    pub chain: PathBuf,
    pub key: PathBuf,
    /// The cluster file, and the line that names the chain.
    pub file: PathBuf,
    pub line: usize,
}

/// How fast the cluster reacts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tuning {
    /// Whether the agents may end a dead leader's lease before its time.
    pub early_failover: bool,
    /// Seconds of the leader's lease.
    pub patroni_ttl: u32,
    /// Seconds between two of Patroni's rounds.
    pub patroni_loop_wait: u32,
    /// Seconds for which Patroni tries again before it gives up on etcd or PostgreSQL.
    pub patroni_retry_timeout: u32,
    /// Once among all users of VRRP on the network; not 0.
    pub vrrp_router_id: u8,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            early_failover: true,
            patroni_ttl: 20,
            patroni_loop_wait: 2,
            patroni_retry_timeout: 3,
            vrrp_router_id: 51,
        }
    }
}

impl Cluster {
    pub fn find_node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The nodes that have a role, in the order of the file.
    pub fn list_nodes(&self, role: Role) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(move |node| node.has(role))
    }

    /// Whether this is a development cluster: one machine, which nothing can take over from.
    pub fn is_single(&self) -> bool {
        self.nodes.len() == 1
    }

    /// The zone whose loss stops the database, since the other db nodes have no majority, and
    /// how many db nodes are in it; `None` when the database outlives each zone.
    pub fn find_fatal_zone(&self) -> Option<(&str, usize)> {
        let mut zones: BTreeMap<&str, usize> = BTreeMap::new();
        for node in self.list_nodes(Role::Db) {
            *zones.entry(&node.zone).or_default() += 1;
        }
        let members: usize = zones.values().sum();
        let largest = zones.into_iter().max_by_key(|(_, count)| *count);
        largest.filter(|(_, count)| members - count <= members / 2)
    }
}

impl Node {
    pub fn has(&self, role: Role) -> bool {
        self.roles.contains(&role)
    }
}
