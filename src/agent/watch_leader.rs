//! Early failover, carried out: look at the leader, publish what is seen, decide, and
//! delete the key if etcd agrees that nothing has changed since.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;
use reqwest::Client;
use serde_json::Value;

use super::board::{Board, log};
use super::etcd::{Etcd, KeyValue, Outcome};
use super::failover::{Decision, LeaderKey, Observed, Sighting, SyncKey, decide};
use super::node::{Node, lock};
use super::patroni;
use super::registry::Registry;
use crate::config::cluster::{Cluster, Role};
use crate::seed::Seed;

const PAUSE: Duration = Duration::from_millis(500);

/// What this loop needs of the node.
pub struct Watcher {
    seed: Arc<Seed>,
    board: Board,
    http: Client,
    etcd: Etcd,
    registry: Registry,
    /// Under which sightings are published.
    lease: Arc<Mutex<Option<i64>>>,
    service: String,
}

/// Patroni's keys as they are in etcd.
#[derive(Debug, Default, PartialEq)]
struct Keys {
    leader: Option<LeaderKey>,
    sync: Option<(SyncKey, i64)>,
    config_revision: i64,
    failover_revision: i64,
    paused: bool,
    synchronous: bool,
    pending: bool,
}

/// For how long one leader has been out of reach.
#[derive(Default)]
struct Reach {
    term: Option<LeaderKey>,
    since: Option<Instant>,
}

impl Watcher {
    pub fn new(node: &Node, lease: Arc<Mutex<Option<i64>>>) -> Self {
        Watcher {
            seed: node.seed.clone(),
            board: node.board.clone(),
            http: node.http.clone(),
            etcd: node.etcd.clone(),
            registry: node.registry.clone(),
            lease,
            service: format!("/service/{}/", node.seed.cluster.name),
        }
    }

    /// Watch the leader for ever.
    pub async fn run(self) {
        let (mut reach, mut last) = (Reach::default(), Sighting::default());
        loop {
            let begun = Instant::now();
            let told = match self.look(&mut reach, &mut last).await {
                Ok(told) => told,
                Err(error) => format!("etcd: {error:#}"),
            };
            self.board.lock().early_failover = told;
            tokio::time::sleep(PAUSE.saturating_sub(begun.elapsed())).await;
        }
    }

    async fn look(&self, reach: &mut Reach, last: &mut Sighting) -> Result<String> {
        let keys = read_keys(&self.service, &self.etcd.list(&self.service).await?.entries);
        let own = self.own_address();
        let Some(leader) = keys.leader.clone() else {
            *reach = Reach::default();
            return Ok("there is no leader key".to_string());
        };
        if reach.term.as_ref() != Some(&leader) {
            *reach = Reach { term: Some(leader.clone()), since: None };
        }
        let address = find_address(&self.seed.cluster, &leader.name);
        let mine = leader.name == self.seed.node;
        let reached = match address {
            Some(address) if !mine => patroni::is_reachable(&self.http, address).await,
            _ => true,
        };
        if reached {
            reach.since = None;
        } else if reach.since.is_none() {
            reach.since = Some(Instant::now());
        }
        let gone = reach.since.map_or(0, |since| since.elapsed().as_millis() as u64);
        let replica = match own {
            Some(own) if !mine => {
                patroni::read_own(&self.http, own).await.is_ok_and(|own| own.is_running_replica())
            }
            _ => false,
        };
        self.publish(last, &leader, gone, replica).await?;
        if gone == 0 {
            return Ok(format!("{} answers", leader.name));
        }
        self.act(&keys, &leader).await
    }

    /// Others count a sighting only while it is new: while the leader is out of reach it is
    /// published at every look, else when it changes.
    async fn publish(
        &self,
        last: &mut Sighting,
        leader: &LeaderKey,
        unreachable_ms: u64,
        replica: bool,
    ) -> Result<()> {
        let next = Sighting {
            leader: leader.name.clone(),
            revision: leader.mod_revision,
            unreachable_ms,
            replica,
            tick: last.tick,
        };
        if unreachable_ms == 0 && next == *last {
            return Ok(());
        }
        let Some(lease) = *lock(&self.lease) else { return Ok(()) };
        let next = Sighting { tick: last.tick + 1, ..next };
        let key = self.registry.key("seen", &self.seed.node);
        self.etcd.put(&key, &serde_json::to_string(&next)?, Some(lease)).await?;
        *last = next;
        Ok(())
    }

    async fn act(&self, keys: &Keys, leader: &LeaderKey) -> Result<String> {
        let cluster = &self.seed.cluster;
        let observed = Observed {
            enabled: cluster.tuning.early_failover,
            paused: keys.paused,
            synchronous: keys.synchronous,
            pending: keys.pending,
            leader: keys.leader.clone(),
            sync: keys.sync.as_ref().map(|(sync, _)| sync.clone()),
            db_nodes: cluster.list_nodes(Role::Db).map(|node| node.name.clone()).collect(),
            pulses: self.registry.list_pulses(),
            sightings: self.registry.list_sightings(),
        };
        let (mod_revision, standby) = match decide(&observed) {
            Decision::Wait(reason) => return Ok(reason),
            Decision::Delete { mod_revision, standby, .. } => (mod_revision, standby),
        };
        // What was decided on must still be so at the moment of the deletion.
        let (leader_key, sync_key) = (self.key("leader"), self.key("sync"));
        let (config_key, failover_key) = (self.key("config"), self.key("failover"));
        let pulse = self.registry.key("pulse", &leader.name);
        let sync_revision = keys.sync.as_ref().map_or(0, |(_, revision)| *revision);
        // A key that does not exist has revision 0.
        let unchanged = [
            (sync_key.as_str(), sync_revision),
            (config_key.as_str(), keys.config_revision),
            (failover_key.as_str(), keys.failover_revision),
        ];
        let outcome = self.etcd.delete_if(&leader_key, mod_revision, &unchanged, &[&pulse]).await?;
        let text = match outcome {
            Outcome::Done => format!(
                "{} is gone: its lease was ended early (revision {mod_revision}), so that {standby} \
                 can take over",
                leader.name
            ),
            Outcome::Refused => "another node was faster, or the leader is back".to_string(),
        };
        log(&format!("early failover: {text}"));
        Ok(text)
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.service)
    }

    fn own_address(&self) -> Option<std::net::Ipv4Addr> {
        self.seed.entry().map(|node| node.address)
    }
}

fn find_address(cluster: &Cluster, name: &str) -> Option<std::net::Ipv4Addr> {
    cluster.find_node(name).map(|node| node.address)
}

fn read_keys(service: &str, entries: &[KeyValue]) -> Keys {
    let mut keys = Keys::default();
    for entry in entries {
        let json = || serde_json::from_str::<Value>(&entry.value).unwrap_or(Value::Null);
        match entry.key.strip_prefix(service) {
            Some("leader") => {
                keys.leader =
                    Some(LeaderKey { name: entry.value.clone(), mod_revision: entry.mod_revision });
            }
            Some("sync") => {
                let value = json();
                let names = value["sync_standby"].as_str().unwrap_or("");
                let names = names.split(',').map(str::trim).filter(|name| !name.is_empty());
                let sync = SyncKey {
                    leader: value["leader"].as_str().unwrap_or("").to_string(),
                    standbys: names.map(String::from).collect(),
                };
                keys.sync = Some((sync, entry.mod_revision));
            }
            Some("config") => {
                let value = json();
                keys.config_revision = entry.mod_revision;
                keys.paused = value["pause"].as_bool().unwrap_or(false);
                keys.synchronous = match &value["synchronous_mode"] {
                    Value::Bool(on) => *on,
                    // In quorum mode the list names candidates, not who has every write.
                    other => other == "on",
                };
            }
            // Patroni empties the key when it is done, or deletes it.
            Some("failover") => {
                keys.failover_revision = entry.mod_revision;
                keys.pending = !matches!(entry.value.trim(), "" | "{}" | "null");
            }
            _ => {}
        }
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patronis_keys_are_read() {
        let entry = |key: &str, value: &str, mod_revision| KeyValue {
            key: format!("/service/c/{key}"),
            value: value.into(),
            mod_revision,
            lease: 0,
        };
        let keys = read_keys(
            "/service/c/",
            &[
                entry("config", r#"{"ttl": 20, "synchronous_mode": true}"#, 3),
                entry("failover", "{}", 4),
                entry("leader", "n1", 5),
                entry("members/n1", "{}", 6),
                entry("sync", r#"{"leader":"n1","sync_standby":"n2, n3"}"#, 7),
            ],
        );
        assert_eq!(keys.leader, Some(LeaderKey { name: "n1".into(), mod_revision: 5 }));
        let (sync, revision) = keys.sync.unwrap();
        assert_eq!((sync.leader.as_str(), revision), ("n1", 7));
        assert_eq!(sync.standbys, ["n2", "n3"]);
        assert!(keys.synchronous && !keys.paused && !keys.pending);
        let paused = read_keys(
            "/service/c/",
            &[
                entry("config", r#"{"pause": true, "synchronous_mode": "off"}"#, 3),
                entry("failover", r#"{"leader":"n1","member":"n2"}"#, 4),
                entry("sync", "not json", 4),
            ],
        );
        assert!(paused.paused && paused.pending && !paused.synchronous);
        assert!(paused.sync.unwrap().0.standbys.is_empty());
    }
}
