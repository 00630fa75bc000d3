//! What to look at before a cluster is started: what the file proves, what makes it less
//! than highly available, and what only a person on the spot can see.

use std::collections::BTreeSet;

use serde::Serialize;

use super::{Cluster, Role};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It holds.
    Verified,
    /// It is allowed, and the cluster is weaker for it.
    Warning,
    /// Nothing here can tell: look yourself.
    Open,
}

/// One line of the list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    pub state: State,
    /// What it is about, in a word or two.
    pub subject: &'static str,
    pub text: String,
}

/// The list for a cluster whose rules hold.
pub fn list_checks(cluster: &Cluster) -> Vec<Check> {
    let mut checks = vec![check_size(cluster)];
    checks.extend(Role::ALL.into_iter().filter_map(|role| check_role(cluster, role)));
    checks.push(check_zones(cluster));
    checks.extend([check_addresses(cluster), check_storage(cluster), check_time(cluster)]);
    checks.extend(list_external(cluster));
    checks.extend(check_backup(cluster));
    checks.extend(list_open(cluster));
    checks
}

fn verify(subject: &'static str, text: impl Into<String>) -> Check {
    Check { state: State::Verified, subject, text: text.into() }
}

fn warn(subject: &'static str, text: impl Into<String>) -> Check {
    Check { state: State::Warning, subject, text: text.into() }
}

fn check_size(cluster: &Cluster) -> Check {
    match cluster.nodes.len() {
        1 => warn("nodes", "one node: a development cluster, NOT highly available"),
        count => verify("nodes", format!("{count} nodes, their names and profiles are good")),
    }
}

/// Whether enough nodes have the role; of one node nothing more is expected.
fn check_role(cluster: &Cluster, role: Role) -> Option<Check> {
    let nodes: Vec<&str> = cluster.list_nodes(role).map(|node| node.name.as_str()).collect();
    let (count, names) = (nodes.len(), nodes.join(", "));
    let is_single = cluster.is_single();
    Some(match (role, count) {
        (Role::Db, 0) => return None,
        (Role::Db, 8..) => warn(
            "role db",
            format!("{count} nodes ({names}): etcd grows slower with each; five are enough"),
        ),
        (Role::Db, _) if !is_single => verify(
            "role db",
            format!(
                "{count} nodes ({names}): the database survives the loss of {}",
                (count - 1) / 2
            ),
        ),
        (Role::Cache, 0) if cluster.external.redis.is_some() => return None,
        (Role::Cache, 0) => warn("role cache", "no node: NetBox needs Redis"),
        (Role::Cache, 1) if !is_single => {
            warn("role cache", format!("1 node ({names}): Redis is gone with it"))
        }
        (Role::Cache, _) if count.is_multiple_of(2) => warn(
            "role cache",
            format!("{count} nodes ({names}): Sentinel decides by majority; make it three"),
        ),
        (Role::Web, 0) => return None,
        (Role::Web, 1) if !is_single => {
            warn("role web", format!("1 node ({names}): NetBox is gone with it"))
        }
        (Role::Edge, 0) => warn("role edge", "no node: clients must find the leader themselves"),
        (Role::Edge, 1) if !is_single => {
            warn("role edge", format!("1 node ({names}): the VIP is gone with it"))
        }
        _ => verify(role_subject(role), format!("{count} nodes ({names})")),
    })
}

fn role_subject(role: Role) -> &'static str {
    match role {
        Role::Db => "role db",
        Role::Cache => "role cache",
        Role::Web => "role web",
        Role::Edge => "role edge",
    }
}

/// Whether the database outlives each zone.
fn check_zones(cluster: &Cluster) -> Check {
    let zones: BTreeSet<&str> =
        cluster.list_nodes(Role::Db).map(|node| node.zone.as_str()).collect();
    let members = cluster.list_nodes(Role::Db).count();
    if members < 2 {
        return warn("zones", "one node cannot be spread");
    }
    if let Some((zone, count)) = cluster.find_fatal_zone() {
        let text = match count == members {
            true => format!(
                "all db nodes are in the zone {zone}: readiness will say not highly available"
            ),
            false => format!(
                "{count} of {members} db nodes are in the zone {zone}: its loss stops the database"
            ),
        };
        return warn("zones", text);
    }
    verify(
        "zones",
        format!("the db nodes are in {} zones; the database outlives each", zones.len()),
    )
}

fn check_addresses(cluster: &Cluster) -> Check {
    let network = cluster.network;
    let shared = match cluster.vip {
        Some(vip) => format!(", and the VIP {vip} is no node's"),
        None => String::new(),
    };
    verify("addresses", format!("each once, all on {network}{shared}"))
}

fn check_storage(cluster: &Cluster) -> Check {
    match &cluster.storage {
        Some(storage) => {
            verify("storage", format!("bucket {} at {}", storage.bucket, storage.endpoint))
        }
        None => warn(
            "storage",
            "no [storage]: media lie on the nodes alone and are not highly available",
        ),
    }
}

/// What the cluster leans on and does not look after.
fn list_external(cluster: &Cluster) -> Vec<Check> {
    let open = |subject, text| Check { state: State::Open, subject, text };
    let mut checks = Vec::new();
    if let Some(postgres) = &cluster.external.postgres {
        let (host, port) = (&postgres.host, postgres.port);
        checks.push(open(
            "PostgreSQL",
            format!("{host}:{port} is highly available by itself, and backed up there"),
        ));
    }
    if let Some(redis) = &cluster.external.redis {
        let (host, port) = (&redis.host, redis.port);
        checks.push(open("Redis", format!("{host}:{port} is highly available by itself")));
    }
    checks
}

/// Of a place for backups nothing is proved here; without any the cluster is no less available.
fn check_backup(cluster: &Cluster) -> Option<Check> {
    cluster.list_nodes(Role::Db).next()?;
    let (state, text) = match cluster.backup.as_ref().map(|backup| &backup.directory) {
        Some(Some(directory)) => {
            (State::Open, format!("the same share is mounted at {directory} on every db node"))
        }
        Some(None) => (State::Verified, "to the bucket, encrypted".to_string()),
        None => {
            let text = "no [backup]: what all nodes lose together is lost for ever";
            (State::Open, text.to_string())
        }
    };
    Some(Check { state, subject: "backup", text })
}

fn check_time(cluster: &Cluster) -> Check {
    match cluster.ntp.as_slice() {
        [] => warn(
            "clocks",
            "no `ntp`: the nodes' clocks agree with each other, but with nobody else's",
        ),
        servers => verify("clocks", format!("kept by {}", servers.join(", "))),
    }
}

fn list_open(cluster: &Cluster) -> Vec<Check> {
    let open = |subject, text| Check { state: State::Open, subject, text };
    let addresses: Vec<String> =
        cluster.nodes.iter().map(|node| node.address.to_string()).collect();
    let mut checks = vec![open("addresses", format!("nothing else uses {}", addresses.join(", ")))];
    if let Some(vip) = cluster.vip {
        let id = cluster.tuning.vrrp_router_id;
        checks.push(open("VIP", format!("nothing else uses {vip}, and nobody's VRRP the id {id}")));
        checks.push(open(
            "VIP",
            format!("the hypervisors let each edge send as {vip}: no filter on its MAC or address"),
        ));
    }
    if let Some(gateway) = cluster.gateway {
        checks.push(open("gateway", format!("{gateway} answers on the network")));
    }
    if let Some(storage) = &cluster.storage {
        let bucket = &storage.bucket;
        checks.push(open("storage", format!("the bucket {bucket} exists and can be written")));
    }
    if !cluster.is_single() {
        checks.push(open("ports", "the ways listed below are open between the machines".into()));
    }
    checks.push(open("clocks", "the hosts' clocks agree with this machine's to the second".into()));
    checks
}
