//! Early failover, carried out: look at the leader, publish what is seen, decide, and
//! delete the key if etcd agrees that nothing has changed since.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;
use reqwest::Client;
use serde_json::Value;

use super::board::{Board, log};
use super::etcd::{Etcd, KeyValue, Outcome};
use super::failover::{Beat, Decision, LeaderKey, Observed, Sighting, SyncKey, decide};
use super::node::{Node, etcd_url, lock};
use super::patroni;
use super::registry::Registry;
use crate::config::cluster::Role;
use crate::seed::Seed;

/// Between two looks, and between two while the leader is out of reach.
const PAUSE: Duration = Duration::from_millis(500);
const HURRY: Duration = Duration::from_millis(250);
/// So long may an endpoint of etcd take: an answer after more is a break.
const PROMPT: Duration = Duration::from_millis(700);

/// What this loop needs of the node.
pub struct Watcher {
    seed: Arc<Seed>,
    board: Board,
    http: Client,
    etcd: Etcd,
    /// Of the present term: it asks the leader's own etcd last.
    hasty: Etcd,
    registry: Registry,
    /// Under which sightings are published.
    lease: Arc<Mutex<Option<i64>>>,
    service: String,
    reach: Arc<Mutex<Reach>>,
    reading: Reading,
    last: Sighting,
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

/// For how long one leader has been out of reach: asked for beside etcd, which stands still
/// itself when its own leader dies.
#[derive(Debug, Default)]
struct Reach {
    term: Option<LeaderKey>,
    address: Option<Ipv4Addr>,
    failed: Option<Failed>,
}

/// Probes that failed without a break.
#[derive(Debug, Clone, Copy)]
struct Failed {
    /// The first of them began, and the last ended.
    since: Instant,
    until: Instant,
    times: u32,
}

impl Reach {
    fn note(&mut self, began: Instant, reached: bool) {
        if reached {
            self.failed = None;
            return;
        }
        let failed = self.failed.get_or_insert(Failed { since: began, until: began, times: 0 });
        failed.until = Instant::now();
        failed.times += 1;
    }

    /// Milliseconds without an answer; one probe that fails is none yet.
    fn measure(&self) -> u64 {
        match &self.failed {
            Some(failed) if failed.times > 1 => (failed.until - failed.since).as_millis() as u64,
            _ => 0,
        }
    }
}

/// Readings of the pulse of one leader's agent.
#[derive(Debug, Default)]
struct Reading {
    revision: Option<i64>,
    /// With this revision.
    since: Option<Instant>,
    /// Since when etcd answers promptly.
    prompt: Option<Instant>,
}

impl Reading {
    /// Take what a look that began at `began` has read.
    fn take(&mut self, revision: Option<i64>, began: Instant) -> Option<Beat> {
        let now = Instant::now();
        if now - began > PROMPT {
            self.prompt = None;
        }
        let prompt = *self.prompt.get_or_insert(now);
        if self.revision != revision || self.since.is_none() {
            (self.revision, self.since) = (revision, Some(now));
        }
        let since = self.since.unwrap_or(now);
        revision.map(|_| Beat { unchanged: now - since, witnessed: now - prompt })
    }
}

impl Watcher {
    pub fn new(node: &Node, lease: Arc<Mutex<Option<i64>>>) -> Self {
        Watcher {
            seed: node.seed.clone(),
            board: node.board.clone(),
            http: node.http.clone(),
            etcd: node.etcd.clone(),
            hasty: node.etcd.make_hasty(PROMPT, None),
            registry: node.registry.clone(),
            lease,
            service: format!("/service/{}/", node.seed.cluster.name),
            reach: Arc::default(),
            reading: Reading::default(),
            last: Sighting::default(),
        }
    }

    /// Watch the leader for ever.
    pub async fn run(mut self) {
        tokio::spawn(probe(self.http.clone(), self.reach.clone()));
        loop {
            let begun = Instant::now();
            let told = match self.look().await {
                Ok(told) => told,
                Err(error) => {
                    self.reading.prompt = None;
                    format!("etcd: {error:#}")
                }
            };
            self.board.lock().early_failover = told;
            let pause = if lock(&self.reach).measure() > 0 { HURRY } else { PAUSE };
            tokio::time::sleep(pause.saturating_sub(begun.elapsed())).await;
        }
    }

    async fn look(&mut self) -> Result<String> {
        let began = Instant::now();
        let pulse = lock(&self.reach).term.as_ref().map(|term| self.name_pulse(&term.name));
        let (keys, pulse, replica) = tokio::try_join!(
            self.hasty.list(&self.service),
            async {
                match &pulse {
                    Some(key) => self.hasty.get(key).await,
                    None => Ok(None),
                }
            },
            async { Ok(self.is_replica().await) }
        )?;
        let keys = read_keys(&self.service, &keys.entries);
        let Some(leader) = keys.leader.clone() else {
            self.registry.set_leads(false);
            *lock(&self.reach) = Reach::default();
            return Ok("there is no leader key".to_string());
        };
        let mine = leader.name == self.seed.node;
        self.registry.set_leads(mine);
        if lock(&self.reach).term.as_ref() != Some(&leader) {
            self.begin_term(&leader, mine);
            return Ok(format!("{} leads", leader.name));
        }
        let pulse = pulse.map(|entry| entry.mod_revision);
        let beat = self.reading.take(pulse, began);
        let gone = lock(&self.reach).measure();
        self.publish(&leader, gone, replica && !mine).await?;
        if gone == 0 {
            return Ok(format!("{} answers", leader.name));
        }
        self.act(&keys, &leader, pulse, beat).await
    }

    /// Another leader, or a new term of the same: what was seen of the last counts no more.
    fn begin_term(&mut self, leader: &LeaderKey, mine: bool) {
        let entry = self.seed.cluster.find_node(&leader.name);
        let url = entry.filter(|_| !mine).map(etcd_url);
        self.hasty = self.etcd.make_hasty(PROMPT, url.as_deref());
        self.reading = Reading::default();
        let address = entry.filter(|_| !mine).map(|entry| entry.address);
        *lock(&self.reach) = Reach { term: Some(leader.clone()), address, failed: None };
    }

    /// Whether this node's PostgreSQL is a running replica.
    async fn is_replica(&self) -> bool {
        let Some(own) = self.seed.entry() else { return false };
        let asked = patroni::read_own(&self.http, own.address);
        let answer = tokio::time::timeout(PROMPT, asked).await;
        answer.is_ok_and(|answer| answer.is_ok_and(|own| own.is_running_replica()))
    }

    fn name_pulse(&self, node: &str) -> String {
        self.registry.key("pulse", node)
    }

    /// Others count a sighting only while it is new: while the leader is out of reach it is
    /// published at every look, else when it changes.
    async fn publish(
        &mut self,
        leader: &LeaderKey,
        unreachable_ms: u64,
        replica: bool,
    ) -> Result<()> {
        let last = &mut self.last;
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
        self.hasty.put(&key, &serde_json::to_string(&next)?, Some(lease)).await?;
        *last = next;
        Ok(())
    }

    async fn act(
        &self,
        keys: &Keys,
        leader: &LeaderKey,
        pulse_revision: Option<i64>,
        beat: Option<Beat>,
    ) -> Result<String> {
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
            beat,
            sightings: self.registry.list_sightings(),
        };
        let (mod_revision, standby) = match decide(&observed) {
            Decision::Wait(reason) => return Ok(reason),
            Decision::Delete { mod_revision, standby, .. } => (mod_revision, standby),
        };
        // What was decided on must still be so at the moment of the deletion.
        let (leader_key, sync_key) = (self.key("leader"), self.key("sync"));
        let (config_key, failover_key) = (self.key("config"), self.key("failover"));
        let pulse = self.name_pulse(&leader.name);
        let sync_revision = keys.sync.as_ref().map_or(0, |(_, revision)| *revision);
        // A key that does not exist has revision 0.
        let unchanged = [
            (sync_key.as_str(), sync_revision),
            (config_key.as_str(), keys.config_revision),
            (failover_key.as_str(), keys.failover_revision),
            (pulse.as_str(), pulse_revision.unwrap_or(0)),
        ];
        let outcome = self.hasty.delete_if(&leader_key, mod_revision, &unchanged).await?;
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
}

/// Ask the leader of the present term for a sign of life, for ever.
async fn probe(http: Client, reach: Arc<Mutex<Reach>>) {
    loop {
        let began = Instant::now();
        let target = {
            let reach = lock(&reach);
            reach.address.map(|address| (reach.term.clone(), address))
        };
        if let Some((term, address)) = target {
            let reached = patroni::is_reachable(&http, address).await;
            let mut reach = lock(&reach);
            if reach.term == term {
                reach.note(began, reached);
            }
        }
        tokio::time::sleep(PAUSE.saturating_sub(began.elapsed())).await;
    }
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
    fn one_probe_that_fails_is_no_silence() {
        let mut reach = Reach::default();
        let began = Instant::now() - Duration::from_secs(1);
        reach.note(began, false);
        assert_eq!(reach.measure(), 0);
        reach.note(Instant::now(), false);
        assert!(reach.measure() >= 1000);
        reach.note(Instant::now(), true);
        assert_eq!(reach.measure(), 0);
    }

    #[test]
    fn a_late_answer_of_etcd_is_a_break_and_a_new_revision_a_beat() {
        let mut reading = Reading::default();
        let long = Duration::from_millis(30);
        reading.take(Some(1), Instant::now());
        std::thread::sleep(long);
        let beat = reading.take(Some(1), Instant::now()).unwrap();
        assert!(beat.unchanged >= long && beat.witnessed >= long);
        let late = reading.take(Some(1), Instant::now() - 2 * PROMPT).unwrap();
        assert!(late.unchanged >= long && late.witnessed < long);
        assert!(reading.take(Some(2), Instant::now()).unwrap().unchanged < long);
        assert_eq!(reading.take(None, Instant::now()), None);
    }

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
