//! Whether a node may be replaced: a pure function of what the others registered.

use std::collections::{BTreeMap, BTreeSet};

use super::super::registry::Registration;
use crate::config::cluster::{Cluster, Role};
use crate::error::UserError;

/// Refuse to replace a node where that could cost data or the majority. `answering` are the
/// nodes whose agents answer.
///
/// # Errors
/// A [`UserError`] with the reason, and what to do first.
pub fn judge_replace(
    cluster: &Cluster,
    name: &str,
    registered: &BTreeMap<String, Registration>,
    answering: &BTreeSet<String>,
) -> Result<(), UserError> {
    let refuse = |why: String| UserError::new(format!("{name} cannot be replaced now")).why(why);
    if cluster.is_single() {
        return Err(refuse("it is the only node: nothing else has its data".into())
            .help("form it anew, then `stanchion restore --latest`"));
    }
    let Some(node) = cluster.find_node(name) else {
        return Err(refuse("the cluster file has no such node".into()));
    };
    let own = registered.get(name);
    if own.is_some_and(|own| own.postgres.starts_with("leader ")) {
        return Err(refuse("it is PostgreSQL's leader".into())
            .help(format!("`stanchion switchover` first, then power {name} off")));
    }
    if answering.contains(name) || own.is_some() {
        return Err(refuse("it runs: two machines must not bear one name".into()).help(format!(
            "power {name} off, wait until `stanchion status` misses it, ask again"
        )));
    }
    if !node.has(Role::Db) {
        return Ok(());
    }
    let databases = cluster.list_nodes(Role::Db).count();
    let others = || cluster.list_nodes(Role::Db).filter(|other| other.name != name);
    let views = || others().filter_map(|other| registered.get(&other.name));
    let voters = views().filter(|view| matches!(view.etcd.as_str(), "leader" | "follower")).count();
    if voters <= databases / 2 {
        return Err(refuse(format!(
            "without it, {voters} of {databases} members of etcd are there: no majority"
        ))
        .help("start the others first; for a majority that is lost for ever see docs/operations/etcd-quorum-lost.md"));
    }
    if !views().any(|view| view.postgres == "leader running") {
        return Err(refuse("none of the other nodes is PostgreSQL's leader".into()).help(format!(
            "wait until `stanchion status` shows one: this node may have the newest data; \
                 while a restore is under way boot a fresh machine with a seed of `stanchion seed \
                 {name}`, and go on with the restore"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn cluster() -> Cluster {
        let node = |n: u8| {
            json!({"name": format!("n{n}"), "address": format!("10.0.0.{n}"), "zone": "z",
                   "profile": "node", "roles": ["db", "cache", "edge"]})
        };
        serde_json::from_value(json!({
            "name": "c", "domain": "c.test", "vip": null, "network": "10.0.0.0/24",
            "gateway": null, "dns": [], "ntp": [], "nodes": [node(1), node(2), node(3)],
            "storage": null, "tuning": {}
        }))
        .unwrap()
    }

    fn view(n: u8, etcd: &str, postgres: &str) -> (String, Registration) {
        let registration = serde_json::from_value(json!({
            "name": format!("n{n}"), "address": format!("10.0.0.{n}"), "zone": "z",
            "profile": "node", "roles": ["db"], "ordinal": n, "version": "0", "phase": "main",
            "ready": true, "reasons": [], "etcd": etcd, "postgres": postgres
        }));
        (format!("n{n}"), registration.unwrap())
    }

    fn judge(name: &str, views: &[(String, Registration)]) -> Result<(), String> {
        let registered: BTreeMap<_, _> = views.iter().cloned().collect();
        let answering = registered.keys().cloned().collect();
        judge_replace(&cluster(), name, &registered, &answering).map_err(|e| e.to_string())
    }

    #[test]
    fn a_dead_node_of_a_healthy_cluster_is_replaced() {
        let views =
            [view(1, "leader", "leader running"), view(2, "follower", "sync_standby streaming")];
        assert_eq!(judge("n3", &views), Ok(()));
    }

    #[test]
    fn quorum_leader_and_living_twins_stand_in_its_way() {
        let whole = [
            view(1, "leader", "leader running"),
            view(2, "follower", "sync_standby streaming"),
            view(3, "follower", "replica streaming"),
        ];
        assert!(judge("n1", &whole).unwrap_err().contains("switchover"));
        assert!(judge("n2", &whole).unwrap_err().contains("it runs"));
        assert!(judge("n9", &whole).unwrap_err().contains("no such node"));
        assert!(judge("n3", &whole[..1]).unwrap_err().contains("1 of 3 members"));
        let learning = [whole[0].clone(), view(2, "learner", "replica streaming")];
        assert!(judge("n3", &learning).unwrap_err().contains("no majority"));
        let orphaned =
            [view(1, "leader", "replica running"), view(2, "follower", "replica running")];
        assert!(judge("n3", &orphaned).unwrap_err().contains("none of the other nodes"));
    }

    #[test]
    fn a_lone_node_is_not_replaced() {
        let mut cluster = cluster();
        cluster.nodes.truncate(1);
        let refused = judge_replace(&cluster, "n1", &BTreeMap::new(), &BTreeSet::new());
        assert!(refused.unwrap_err().to_string().contains("the only node"));
    }
}
