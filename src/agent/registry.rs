//! The cluster's registry in etcd: who is there, what each sees, who has a pulse.
//!
//! ```text
//! /stanchion/<cluster>/nodes/<name>    registration, under a lease of 10 s
//! /stanchion/<cluster>/seen/<name>     what its agent sees of the leader, same lease
//! /stanchion/<cluster>/pulse/<name>    under a lease of 2 s: the agent lives; written anew
//!                                      at every beat while its node is PostgreSQL's leader
//! /stanchion/<cluster>/secrets/<name>  keyed fingerprint of a secret
//! /stanchion/<cluster>/restore/record  how far a restore is (backup/restore.rs)
//! /stanchion/<cluster>/locks/<name>    work that one node does at a time
//! /stanchion/<cluster>/redis/master    the last known Redis master (observe.rs)
//! /stanchion/<cluster>/site/<name>     what the edges show users, sealed
//! /stanchion/<cluster>/maintenance     users are asked to wait: since when, and why
//! /stanchion/<cluster>/pause/since     when `patronictl pause` was first seen
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::board::{Phase, log};
use super::etcd::{Etcd, Event, KeyValue};
use super::failover::{Dated, Sighting};
use super::node::lock;
use super::render::NodeView;

pub const NODE_LEASE: u32 = 10;
/// The shortest that etcd grants with its usual election timeout.
pub const PULSE_LEASE: u32 = 2;
/// What of the cluster's key holds [`Maintenance`].
pub const MAINTENANCE: &str = "maintenance";
/// Nodes that the cluster file does not name and that are listed all the same.
pub const MAX_STRANGERS: usize = 64;
/// Reasons of one node that are kept, and characters of each and of its other words.
const MAX_REASONS: usize = 64;
const MAX_WORDS: usize = 1000;
/// Between two beats of a pulse, and as long waits one for an endpoint of etcd.
const BEAT: Duration = Duration::from_millis(500);
/// A watch that has been silent for so long is made anew: its server may be gone.
const SILENCE: Duration = Duration::from_secs(15);

/// What a node tells about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Registration {
    #[serde(flatten)]
    pub node: NodeView,
    pub version: String,
    pub phase: Phase,
    pub ready: bool,
    pub reasons: Vec<String>,
    /// `leader`, `follower`, or what is wrong; empty without the role.
    #[serde(default)]
    pub etcd: String,
    /// Patroni's role and state; empty without the role.
    #[serde(default)]
    pub postgres: String,
    /// Bytes of the leader's log that this replica has not replayed.
    #[serde(default)]
    pub lag: Option<u64>,
    #[serde(default)]
    pub redis: String,
    /// `serving`, or what NetBox on it is at; empty without the role.
    #[serde(default)]
    pub web: String,
    /// It holds the VIP.
    #[serde(default)]
    pub vip: bool,
}

/// Users are asked to wait, and workers take no jobs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Maintenance {
    /// Seconds since 1970, UTC.
    pub since: u64,
    /// When it is thought to be over, likewise.
    #[serde(default)]
    pub until: Option<u64>,
    /// Who has asked for it.
    #[serde(default)]
    pub by: String,
    #[serde(default)]
    pub reason: String,
}

#[derive(Debug, Default)]
struct Content {
    maintenance: Option<Maintenance>,
    nodes: BTreeMap<String, Registration>,
    pulses: BTreeSet<String>,
    seen: BTreeMap<String, (Sighting, Instant)>,
}

/// A copy of the registry, kept up to date by [`Registry::follow`].
#[derive(Clone)]
pub struct Registry {
    prefix: Arc<str>,
    /// Names of the nodes of the cluster file.
    known: Arc<BTreeSet<String>>,
    content: Arc<Mutex<Content>>,
    changed: Arc<tokio::sync::Notify>,
    site_changed: Arc<tokio::sync::Notify>,
    leads: Arc<AtomicBool>,
}

impl Registry {
    /// Of a cluster, with the names of the nodes that its file has.
    pub fn new(cluster: &str, known: impl IntoIterator<Item = String>) -> Self {
        Registry {
            prefix: format!("/stanchion/{cluster}/").into(),
            known: Arc::new(known.into_iter().collect()),
            content: Arc::default(),
            changed: Arc::default(),
            site_changed: Arc::default(),
            leads: Arc::default(),
        }
    }

    /// The key of a thing of a kind, such as `nodes` and `n1`.
    pub fn key(&self, kind: &str, name: &str) -> String {
        format!("{}{kind}/{name}", self.prefix)
    }

    pub fn list_nodes(&self) -> BTreeMap<String, Registration> {
        lock(&self.content).nodes.clone()
    }

    /// The key that is there while users are asked to wait.
    pub fn name_maintenance(&self) -> String {
        format!("{}{MAINTENANCE}", self.prefix)
    }

    pub fn find_maintenance(&self) -> Option<Maintenance> {
        lock(&self.content).maintenance.clone()
    }

    /// Have the node's files and services looked at again.
    pub fn tell_change(&self) {
        self.changed.notify_one();
    }

    pub fn list_pulses(&self) -> BTreeSet<String> {
        lock(&self.content).pulses.clone()
    }

    pub fn list_sightings(&self) -> BTreeMap<String, Dated> {
        let content = lock(&self.content);
        let date = |(sighting, at): &(Sighting, Instant)| Dated {
            sighting: sighting.clone(),
            age: at.elapsed(),
        };
        content.seen.iter().map(|(name, seen)| (name.clone(), date(seen))).collect()
    }

    /// Whether this node is PostgreSQL's leader: then others watch its pulse closely.
    pub fn set_leads(&self, leads: bool) {
        self.leads.store(leads, Ordering::Relaxed);
    }

    /// Wait until a node has come, gone or changed what others' files hang on.
    pub async fn wait_for_change(&self) {
        self.changed.notified().await;
    }

    /// Wait until what the edges show may have changed.
    pub async fn wait_for_site(&self) {
        self.site_changed.notified().await;
    }

    /// Follow the registry for ever.
    pub async fn follow(self, etcd: Etcd) {
        let mut told = false;
        loop {
            if let Err(error) = self.follow_once(&etcd).await {
                if !told {
                    log(&format!("registry: {error:#}; reading it anew"));
                }
                told = true;
                tokio::time::sleep(Duration::from_millis(500)).await;
            } else {
                told = false;
            }
        }
    }

    async fn follow_once(&self, etcd: &Etcd) -> Result<()> {
        let listing = etcd.list(&self.prefix).await?;
        self.replace(&listing.entries);
        let mut watch = etcd.watch(&self.prefix, listing.revision + 1).await?;
        loop {
            match tokio::time::timeout(SILENCE, watch.next()).await {
                Err(_) => return Ok(()),
                Ok(events) => {
                    for event in events? {
                        self.take(event);
                    }
                }
            }
        }
    }

    /// Take a whole listing; what it lacks is gone.
    fn replace(&self, entries: &[KeyValue]) {
        let (before, old_seen, maintained) = {
            let mut content = lock(&self.content);
            let old = std::mem::take(&mut *content);
            (old.nodes, old.seen, old.maintenance)
        };
        for entry in entries {
            self.put(entry);
        }
        // It may be gone, too.
        self.site_changed.notify_one();
        let mut content = lock(&self.content);
        // What has not changed is not newer for having been read again.
        for (name, (sighting, at)) in &mut content.seen {
            if let Some((old, since)) = old_seen.get(name)
                && old == sighting
            {
                *at = *since;
            }
        }
        let differs = !same_views(&before, &content.nodes) || maintained != content.maintenance;
        drop(content);
        if differs {
            self.changed.notify_one();
        }
    }

    fn take(&self, event: Event) {
        let (before, maintained) = {
            let content = lock(&self.content);
            (content.nodes.clone(), content.maintenance.clone())
        };
        match event {
            Event::Put(entry) => self.put(&entry),
            Event::Delete { key } => {
                let mut content = lock(&self.content);
                match self.split(&key) {
                    None if self.is_maintenance(&key) => content.maintenance = None,
                    Some(("nodes", name)) => drop(content.nodes.remove(name)),
                    Some(("pulse", name)) => drop(content.pulses.remove(name)),
                    Some(("seen", name)) => drop(content.seen.remove(name)),
                    Some(("site", _)) => self.site_changed.notify_one(),
                    _ => {}
                }
            }
        }
        let content = lock(&self.content);
        let differs = !same_views(&before, &content.nodes) || maintained != content.maintenance;
        drop(content);
        if differs {
            self.changed.notify_one();
        }
    }

    fn is_maintenance(&self, key: &str) -> bool {
        key.strip_prefix(&*self.prefix) == Some(MAINTENANCE)
    }

    fn put(&self, entry: &KeyValue) {
        let mut content = lock(&self.content);
        match self.split(&entry.key) {
            // Whatever it says, it is there.
            None if self.is_maintenance(&entry.key) => {
                content.maintenance = Some(serde_json::from_str(&entry.value).unwrap_or_default());
            }
            Some(("nodes", name)) => {
                // Configuration is made of it: what does not fit is not taken, and what was
                // there before it does not count any more.
                content.nodes.remove(name);
                let known = &self.known;
                let strangers = content.nodes.keys().filter(|name| !known.contains(*name)).count();
                if let Some(node) = read_registration(name, &entry.value)
                    && (known.contains(name) || strangers < MAX_STRANGERS)
                {
                    content.nodes.insert(name.to_string(), node);
                }
            }
            Some(("pulse", name)) => drop(content.pulses.insert(name.to_string())),
            Some(("site", _)) => self.site_changed.notify_one(),
            Some(("seen", name)) => {
                if let Ok(sighting) = serde_json::from_str(&entry.value) {
                    content.seen.insert(name.to_string(), (sighting, Instant::now()));
                }
            }
            _ => {}
        }
    }

    fn split<'k>(&self, key: &'k str) -> Option<(&'k str, &'k str)> {
        key.strip_prefix(&*self.prefix)?.split_once('/')
    }
}

/// A registration that fits its key, with bounds on what is only shown.
fn read_registration(name: &str, text: &str) -> Option<Registration> {
    let mut node: Registration = serde_json::from_str(text).ok()?;
    let plain = [name, &node.node.zone, &node.node.profile].into_iter().all(is_plain);
    if !plain || node.node.name != name {
        return None;
    }
    node.reasons.truncate(MAX_REASONS);
    let states = [&mut node.version, &mut node.etcd, &mut node.postgres, &mut node.redis];
    for text in states.into_iter().chain([&mut node.web]).chain(&mut node.reasons) {
        let end = text.char_indices().nth(MAX_WORDS).map_or(text.len(), |(end, _)| end);
        text.truncate(end);
    }
    Some(node)
}

/// A name that may stand in any configuration.
fn is_plain(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    matches!(name.len(), 1..=63) && name.bytes().all(plain)
}

fn same_views(a: &BTreeMap<String, Registration>, b: &BTreeMap<String, Registration>) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|((_, a), (_, b))| a.node == b.node)
}

/// A lease that is kept, and granted anew when it was lost.
pub struct Lease {
    etcd: Etcd,
    seconds: u32,
    id: Option<i64>,
}

impl Lease {
    pub fn new(etcd: Etcd, seconds: u32) -> Self {
        Lease { etcd, seconds, id: None }
    }

    /// Keep it. The id, and whether it is a new one, under which nothing is written yet.
    pub async fn keep(&mut self) -> Result<(i64, bool)> {
        if let Some(id) = self.id {
            match self.etcd.keep_alive(id).await {
                Ok(true) => return Ok((id, false)),
                Ok(false) => self.id = None,
                Err(error) => {
                    if error.downcast_ref::<super::etcd::Rejected>().is_some() {
                        self.id = None;
                    }
                    return Err(error);
                }
            }
        }
        let id = self.etcd.grant(self.seconds).await?;
        self.id = Some(id);
        Ok((id, true))
    }

    pub async fn give_up(&mut self) {
        if let Some(id) = self.id.take() {
            // It runs out anyway.
            let _ = self.etcd.revoke(id).await;
        }
    }
}

/// Keep this node's pulse for ever. A lease that outlives an election of etcd says little
/// about the agent: a leader's key is written anew at every beat.
pub async fn keep_pulse(etcd: Etcd, registry: Registry, name: String) {
    let (etcd, key) = (etcd.make_hasty(BEAT, None), registry.key("pulse", &name));
    let mut lease = Lease::new(etcd.clone(), PULSE_LEASE);
    let mut written = false;
    loop {
        let beat = async {
            let (id, new) = lease.keep().await?;
            written &= !new;
            if !written || registry.leads.load(Ordering::Relaxed) {
                etcd.put(&key, "", Some(id)).await?;
                written = true;
            }
            Ok::<_, anyhow::Error>(())
        };
        // What fails is tried again at the next beat.
        let _ = beat.await;
        tokio::time::sleep(BEAT).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::cluster::Role;

    fn registration(name: &str) -> Registration {
        Registration {
            node: NodeView {
                name: name.into(),
                address: [10, 0, 0, 4].into(),
                zone: "z1".into(),
                profile: "web".into(),
                roles: vec![Role::Web],
                ordinal: 4,
            },
            version: "1".into(),
            phase: Phase::Main,
            ready: true,
            reasons: Vec::new(),
            etcd: String::new(),
            postgres: String::new(),
            lag: None,
            redis: String::new(),
            web: String::new(),
            vip: false,
        }
    }

    fn entry(key: &str, value: &str) -> KeyValue {
        KeyValue { key: key.into(), value: value.into(), mod_revision: 1, lease: 0 }
    }

    #[test]
    fn nodes_come_and_go_and_nonsense_is_left_out() {
        let registry = Registry::new("c", []);
        let good = serde_json::to_string(&registration("w1")).unwrap();
        let evil = serde_json::to_string(&registration("x\n  server evil")).unwrap();
        registry.take(Event::Put(entry("/stanchion/c/nodes/w1", &good)));
        registry.take(Event::Put(entry("/stanchion/c/nodes/x\n  server evil", &evil)));
        registry.take(Event::Put(entry("/stanchion/c/nodes/w2", &good)));
        registry.take(Event::Put(entry("/stanchion/c/nodes/w3", "{}")));
        // One that no longer fits takes the old one with it.
        registry.take(Event::Put(entry("/stanchion/c/nodes/w4", &good.replace("w1", "w4"))));
        assert_eq!(registry.list_nodes().len(), 2);
        registry.take(Event::Put(entry("/stanchion/c/nodes/w4", "{")));
        registry.take(Event::Put(entry("/stanchion/c/pulse/w1", "")));
        assert_eq!(registry.list_nodes().keys().collect::<Vec<_>>(), ["w1"]);
        assert!(registry.list_pulses().contains("w1"));
        registry.take(Event::Delete { key: "/stanchion/c/pulse/w1".into() });
        assert!(registry.list_pulses().is_empty());
        registry.replace(&[]);
        assert!(registry.list_nodes().is_empty());
    }

    #[test]
    fn strangers_and_their_words_are_bounded() {
        let registry = Registry::new("c", ["z1".to_string()]);
        let mut node = registration("w1");
        node.version = "ä".repeat(5000);
        node.reasons = vec!["x".repeat(5000); 5000];
        for name in (0..90).map(|n| format!("w{n}")).chain(["z1".into()]) {
            node.node.name = name.clone();
            let text = serde_json::to_string(&node).unwrap();
            registry.take(Event::Put(entry(&format!("/stanchion/c/nodes/{name}"), &text)));
        }
        let nodes = registry.list_nodes();
        assert_eq!(nodes.len(), MAX_STRANGERS + 1);
        let node = &nodes["z1"];
        assert_eq!(node.version.chars().count(), MAX_WORDS);
        assert_eq!((node.reasons.len(), node.reasons[0].len()), (MAX_REASONS, MAX_WORDS));
    }

    #[test]
    fn maintenance_begins_and_ends() {
        let registry = Registry::new("c", []);
        let key = "/stanchion/c/maintenance";
        assert_eq!(Registry::new("c", []).name_maintenance(), key);
        registry.take(Event::Put(entry(key, r#"{"since":7,"by":"operator","reason":"disks"}"#)));
        assert_eq!(registry.find_maintenance().unwrap().reason, "disks");
        registry.take(Event::Put(entry(key, "nonsense")));
        assert_eq!(registry.find_maintenance(), Some(Maintenance::default()));
        registry.take(Event::Delete { key: key.into() });
        assert_eq!(registry.find_maintenance(), None);
    }

    #[test]
    fn a_sighting_that_is_read_again_grows_older() {
        let registry = Registry::new("c", []);
        let seen =
            entry("/stanchion/c/seen/n2", &serde_json::to_string(&Sighting::default()).unwrap());
        registry.replace(std::slice::from_ref(&seen));
        std::thread::sleep(Duration::from_millis(20));
        registry.replace(&[seen]);
        assert!(registry.list_sightings()["n2"].age >= Duration::from_millis(20));
    }
}
