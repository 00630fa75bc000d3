//! What must be open between the machines of a cluster, and to whom.

use std::fmt;

use serde::Serialize;

use super::{Cluster, Role};

/// One side of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The nodes with a role.
    Nodes(Role),
    EveryNode,
    /// All machines of the cluster's network, among them nodes that join later.
    Network,
    /// Everybody; of names (port 53) those whose addresses are private.
    Clients,
    Operator,
}

/// What is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    /// IP protocol 112; it has no ports.
    Vrrp,
}

/// A way that must be open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Port {
    /// `None` where the protocol has none.
    pub port: Option<u16>,
    pub protocol: Protocol,
    pub to: Side,
    pub from: Vec<Side>,
    pub purpose: &'static str,
}

use Protocol::{Tcp, Udp, Vrrp};
use Side::{Clients, EveryNode, Network, Nodes, Operator};

const DB: Side = Nodes(Role::Db);
const CACHE: Side = Nodes(Role::Cache);
const WEB: Side = Nodes(Role::Web);
const EDGE: Side = Nodes(Role::Edge);

/// Port (0 for none), protocol, to, from, purpose.
const WAYS: [(u16, Protocol, Side, &[Side], &str); 20] = [
    (2379, Tcp, DB, &[Network], "etcd, for its clients"),
    (2380, Tcp, DB, &[DB], "etcd, among its members"),
    (5432, Tcp, DB, &[DB, WEB, EDGE], "PostgreSQL"),
    (8008, Tcp, DB, &[DB, WEB, EDGE], "Patroni"),
    (6380, Tcp, CACHE, &[CACHE, WEB, EDGE], "Redis"),
    (26379, Tcp, CACHE, &[CACHE], "Sentinel"),
    (8443, Tcp, WEB, &[EDGE], "NetBox, behind the edges"),
    (80, Tcp, EDGE, &[Clients], "HTTP, sent on to 443"),
    (443, Tcp, EDGE, &[Clients], "HTTPS"),
    (5433, Tcp, EDGE, &[Clients], "PostgreSQL: the leader"),
    (5434, Tcp, EDGE, &[Clients], "PostgreSQL: replicas"),
    (5435, Tcp, EDGE, &[Clients], "PostgreSQL: all that live"),
    (6379, Tcp, EDGE, &[Clients], "Redis: the master"),
    (8404, Tcp, EDGE, &[Network], "HAProxy's statistics"),
    (10001, Tcp, EDGE, &[EDGE], "HAProxy's shared tables"),
    (0, Vrrp, EDGE, &[EDGE], "who holds the VIP (unicast)"),
    (53, Udp, EDGE, &[EveryNode, Clients], "DNS of the cluster's domain"),
    (53, Tcp, EDGE, &[EveryNode, Clients], "DNS of the cluster's domain"),
    (123, Udp, EveryNode, &[EveryNode], "time, among the nodes"),
    (7443, Tcp, EveryNode, &[EveryNode, Operator], "the agents"),
];

/// The ways that this cluster needs, those of roles that it does not have left out.
pub fn list_ports(cluster: &Cluster) -> Vec<Port> {
    let exists = |side: &Side| match side {
        Nodes(role) => cluster.list_nodes(*role).next().is_some(),
        _ => true,
    };
    let ways = WAYS.iter().filter(|(_, _, to, ..)| exists(to));
    ways.map(|(port, protocol, to, from, purpose)| Port {
        port: (*port != 0).then_some(*port),
        protocol: *protocol,
        to: *to,
        from: from.iter().copied().filter(exists).collect(),
        purpose,
    })
    .collect()
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Nodes(role) => role.name(),
            EveryNode => "every node",
            Network => "the network",
            Clients => "clients",
            Operator => "operator",
        })
    }
}

impl Serialize for Side {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tcp => "tcp",
            Udp => "udp",
            Vrrp => "vrrp",
        })
    }
}
