//! Readiness: is this node well, and is the cluster really highly available? A pure
//! function of what was observed; each reason says what is wrong, in words.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::config::cluster::{Cluster, Role};

use super::pause::describe_pause;
use super::registry::{Maintenance, Registration};

/// Two of two Sentinels agree on nothing when one is dead.
const SENTINELS: u64 = 3;

/// What a cluster of one node always says.
pub const SINGLE: &str = "not HA: this is a development cluster of one node";

/// What the local services and the registry said last. `None`: it does not answer.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    pub name: String,
    pub in_main: bool,
    pub etcd: Option<EtcdView>,
    /// Members of Patroni's cluster by name, and whether it is paused.
    pub patroni: Option<PatroniView>,
    pub sentinel: Option<SentinelCount>,
    /// Of this node's own Redis: it is master, or its link to the master is up.
    pub redis_linked: Option<bool>,
    /// It is taking over the master's data.
    pub redis_syncing: bool,
    /// Why NetBox on this node does not serve.
    pub web: Vec<String>,
    pub maintenance: Option<Maintenance>,
    pub vip_here: bool,
    pub registered: BTreeMap<String, Registration>,
    /// What the board holds: refused files, units that do not start, failed checks.
    pub problems: BTreeMap<String, String>,
    /// Units of this node that should run and do not.
    pub stopped: Vec<String>,
}

#[derive(Debug, Clone, Default)]
pub struct EtcdView {
    /// Voting members.
    pub voters: usize,
    pub learners: usize,
    /// Names of members whose agent has no pulse.
    pub silent: Vec<String>,
    pub alarms: Vec<String>,
}

#[derive(Debug, Clone, Default)]
pub struct PatroniView {
    pub leader: Option<String>,
    pub synchronous: Vec<String>,
    /// Replicas that run, the synchronous ones among them.
    pub running: Vec<String>,
    /// For how long `patronictl pause` has been on.
    pub paused: Option<Duration>,
}

#[derive(Debug, Clone, Default)]
pub struct SentinelCount {
    /// Sentinels that know of each other, this one among them.
    pub known: u64,
    pub master_down: bool,
}

/// Why this node is not ready; empty when it is.
pub fn judge(cluster: &Cluster, seen: &Observed) -> Vec<String> {
    let mut reasons = Vec::new();
    if !seen.in_main {
        reasons.push("the node has not yet reached the main phase".to_string());
    }
    judge_cluster(cluster, seen, &mut reasons);
    let roles = cluster.find_node(&seen.name).map(|node| node.roles.as_slice()).unwrap_or_default();
    if roles.contains(&Role::Db) || !seen.in_main {
        judge_etcd(cluster, seen, &mut reasons);
    }
    if roles.contains(&Role::Db) {
        judge_database(cluster, seen, &mut reasons);
    }
    if roles.contains(&Role::Cache) {
        judge_cache(cluster, seen, &mut reasons);
    }
    if roles.contains(&Role::Web) {
        reasons.extend(seen.web.iter().cloned());
    }
    if let Some(maintenance) = &seen.maintenance {
        reasons.push(describe_maintenance(maintenance));
    }
    judge_vip(cluster, seen, &mut reasons);
    reasons.extend(seen.stopped.iter().map(|unit| format!("{unit} does not run")));
    reasons.extend(seen.problems.iter().map(|(thing, problem)| format!("{thing}: {problem}")));
    reasons
}

fn describe_maintenance(maintenance: &Maintenance) -> String {
    let mut text = "maintenance: users are asked to wait, and no jobs are taken".to_string();
    if !maintenance.by.is_empty() {
        text += &format!(", by {}", maintenance.by);
    }
    if !maintenance.reason.is_empty() {
        text += &format!(": {}", maintenance.reason);
    }
    text
}

fn judge_cluster(cluster: &Cluster, seen: &Observed, reasons: &mut Vec<String>) {
    if cluster.is_single() {
        reasons.push(SINGLE.to_string());
        return;
    }
    match (cluster.find_fatal_zone(), cluster.list_nodes(Role::Db).count()) {
        (Some((_, count)), members) if count == members => {
            reasons.push("not HA: all db nodes are in one zone, which fails as one".to_string());
        }
        (Some((zone, count)), members) => reasons.push(format!(
            "not HA: {count} of {members} db nodes are in the zone {zone}: its loss stops the \
             database"
        )),
        (None, _) => {}
    }
    for (role, loss) in [(Role::Web, "NetBox"), (Role::Edge, "the way to the services")] {
        let mut nodes = cluster.list_nodes(role);
        if let (Some(node), None) = (nodes.next(), nodes.next()) {
            let name = &node.name;
            reasons
                .push(format!("not HA: {name} alone has the role {role}: {loss} is gone with it"));
        }
    }
    if cluster.storage.is_none() && cluster.list_nodes(Role::Web).next().is_some() {
        reasons.push("not HA: there is no object storage for media".to_string());
    }
    let missing: Vec<&str> = cluster
        .nodes
        .iter()
        .map(|node| node.name.as_str())
        .filter(|name| !seen.registered.contains_key(*name))
        .collect();
    if !missing.is_empty() {
        reasons.push(format!(
            "not HA: {} of {} nodes are not there: {}",
            missing.len(),
            cluster.nodes.len(),
            missing.join(", ")
        ));
    }
}

fn judge_etcd(cluster: &Cluster, seen: &Observed, reasons: &mut Vec<String>) {
    let Some(etcd) = &seen.etcd else {
        reasons.push("etcd has no quorum: nothing can be written or elected".to_string());
        return;
    };
    let wanted = cluster.list_nodes(Role::Db).count();
    if etcd.voters < wanted {
        reasons.push(format!("not HA: etcd has {} voting members of {wanted}", etcd.voters));
    }
    if etcd.learners > 0 {
        reasons.push(format!("{} members of etcd are still learning", etcd.learners));
    }
    for alarm in &etcd.alarms {
        reasons.push(match alarm.as_str() {
            "NOSPACE" => "etcd's alarm NOSPACE: its quota is full and it takes no writes".into(),
            other => format!("etcd's alarm {other}"),
        });
    }
    if !etcd.silent.is_empty() && wanted > 1 {
        reasons.push(format!("not HA: no sign of life from {}", etcd.silent.join(", ")));
    }
}

fn judge_database(cluster: &Cluster, seen: &Observed, reasons: &mut Vec<String>) {
    let Some(patroni) = &seen.patroni else {
        reasons.push("Patroni does not answer on this node".to_string());
        return;
    };
    if patroni.leader.is_none() {
        reasons.push("PostgreSQL has no leader: no writes".to_string());
    }
    reasons.extend(patroni.paused.map(describe_pause));
    if cluster.is_single() {
        return;
    }
    if patroni.synchronous.is_empty() {
        reasons.push(
            "not HA: there is no synchronous standby; what is written now is on one node only"
                .to_string(),
        );
    }
    let is_here = |name: &str| {
        patroni.leader.as_deref() == Some(name) || patroni.running.iter().any(|r| r == name)
    };
    let absent: Vec<&str> = cluster
        .list_nodes(Role::Db)
        .map(|node| node.name.as_str())
        .filter(|name| !is_here(name))
        .collect();
    if !absent.is_empty() {
        reasons.push(format!("PostgreSQL does not run on {}", absent.join(", ")));
    }
}

fn judge_cache(cluster: &Cluster, seen: &Observed, reasons: &mut Vec<String>) {
    match seen.redis_linked {
        None => reasons.push("Redis does not answer on this node".to_string()),
        Some(false) if seen.redis_syncing => {
            reasons.push("Redis takes over the master's data".to_string());
        }
        Some(false) => reasons.push("Redis has lost its link to the master".to_string()),
        Some(true) => {}
    }
    let masters: Vec<&str> = seen
        .registered
        .values()
        .filter(|node| node.redis == "master")
        .map(|node| node.node.name.as_str())
        .collect();
    if masters.len() > 1 {
        reasons.push(format!(
            "{} nodes are Redis masters ({}): Sentinel makes one of them follow the other",
            masters.len(),
            masters.join(", ")
        ));
    }
    let wanted = cluster.list_nodes(Role::Cache).count() as u64;
    if !cluster.is_single() && wanted < SENTINELS {
        reasons.push(format!("not HA: {wanted} of the {SENTINELS} Sentinels that a vote needs"));
    }
    match &seen.sentinel {
        None => reasons.push("Sentinel does not answer on this node".to_string()),
        Some(sentinel) => {
            if sentinel.known < wanted {
                reasons.push(format!(
                    "not HA: {} of {wanted} Sentinels know of each other",
                    sentinel.known
                ));
            }
            if sentinel.known > wanted {
                reasons.push(format!(
                    "{} Sentinels are counted, there are {wanted}: reset with `SENTINEL RESET *`",
                    sentinel.known
                ));
            }
            if sentinel.master_down {
                reasons.push("the Redis master is down".to_string());
            }
        }
    }
}

fn judge_vip(cluster: &Cluster, seen: &Observed, reasons: &mut Vec<String>) {
    let Some(vip) = cluster.vip.filter(|_| cluster.list_nodes(Role::Edge).next().is_some()) else {
        return;
    };
    let mut holders: BTreeSet<&str> = seen
        .registered
        .values()
        .filter(|node| node.vip && node.node.name != seen.name)
        .map(|node| node.node.name.as_str())
        .collect();
    if seen.vip_here {
        holders.insert(&seen.name);
    }
    match holders.len() {
        1 => {}
        0 => reasons.push(format!("no edge holds the VIP {vip}")),
        _ => reasons.push(format!(
            "the VIP {vip} is held by {} nodes at once ({}): VRRP does not get through between them",
            holders.len(),
            holders.into_iter().collect::<Vec<_>>().join(", ")
        )),
    }
}

#[cfg(test)]
#[path = "ready/tests.rs"]
mod tests;
