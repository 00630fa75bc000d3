//! Looking at this node's services every two seconds: for readiness, for the registry, and
//! for what others' files hang on.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;

use super::board::{Board, Phase};
use super::checks;
use super::etcd::Etcd;
use super::node::{Node, lock};
use super::patroni::{self, View};
use super::pause::Pause;
use super::places::Places;
use super::ready::{self, EtcdView, Observed, PatroniView, SentinelCount};
use super::redis::{RedisView, SentinelView, ask_redis, ask_sentinel};
use super::registry::{Lease, NODE_LEASE, Registration, Registry};
use super::roles::web;
use super::systemd::run_program;
use super::tls::Tls;
use super::web::health::Health;
use crate::config::cluster::{Node as Entry, Role};
use crate::seed::Seed;

const PAUSE: Duration = Duration::from_secs(2);

/// What the looking task finds out for others.
#[derive(Clone, Default)]
pub struct Shared {
    /// Under which this node's keys in the registry are.
    pub lease: Arc<Mutex<Option<i64>>>,
    pub registration: Arc<Mutex<Option<Registration>>>,
    /// The Redis master, as this node's own Sentinel has it.
    pub redis_master: Arc<Mutex<Option<Ipv4Addr>>>,
}

/// What the looking task needs of the node.
pub struct Observer {
    places: Places,
    board: Board,
    seed: Arc<Seed>,
    entry: Entry,
    tls: Tls,
    http: reqwest::Client,
    etcd: Etcd,
    own_etcd: Etcd,
    registry: Registry,
    shared: Shared,
    units: Vec<&'static str>,
    health: Health,
}

impl Observer {
    /// `units`: those that this node has started.
    pub fn new(node: &Node, shared: Shared, units: Vec<&'static str>) -> Self {
        Observer {
            places: node.places.clone(),
            board: node.board.clone(),
            seed: node.seed.clone(),
            entry: node.entry.clone(),
            tls: node.tls.clone(),
            http: node.http.clone(),
            etcd: node.etcd.clone(),
            own_etcd: node.ask_etcd_of(&node.entry),
            registry: node.registry.clone(),
            shared,
            units,
            health: node.health.clone(),
        }
    }

    /// Look for ever.
    pub async fn run(self) {
        let mut pause = Pause::default();
        loop {
            self.look(&mut pause).await;
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn look(&self, pause: &mut Pause) {
        let has = |role| self.entry.has(role);
        let maintenance = self.registry.find_maintenance();
        let web = if has(Role::Web) { self.health.list_reasons() } else { Vec::new() };
        let units = self.list_expected(maintenance.is_some());
        let (etcd, own, view, redis, sentinel, stopped) = tokio::join!(
            self.look_at_etcd(),
            maybe(has(Role::Db), self.own_etcd.read_status()),
            maybe(has(Role::Db), patroni::read_view(&self.http, self.entry.address)),
            self.look_at_redis(),
            self.look_at_sentinel(),
            list_stopped(&units),
        );
        *lock(&self.shared.redis_master) = sentinel.as_ref().map(|view| view.master);
        self.record_master(redis.as_ref(), sentinel.as_ref()).await;
        let paused = match &view {
            Some(view) => {
                pause.track(&self.etcd, &self.registry.key("pause", "since"), view.pause).await
            }
            None => None,
        };
        let (observed, phase) = {
            let status = self.board.lock();
            let mut observed = Observed {
                name: self.entry.name.clone(),
                in_main: status.phase == Phase::Main,
                etcd: etcd.ok(),
                patroni: view.as_ref().map(|view| summarize(view, paused)),
                sentinel: sentinel.as_ref().map(|view| SentinelCount {
                    known: view.others + 1,
                    master_down: view.flags.contains("o_down"),
                }),
                redis_linked: redis.as_ref().map(|view| view.is_master || view.link_up),
                redis_syncing: redis.as_ref().is_some_and(|view| view.syncing),
                web: web.clone(),
                maintenance: maintenance.clone(),
                vip_here: self.holds_vip(),
                registered: self.registry.list_nodes(),
                problems: status.problems.clone(),
                stopped: Vec::new(),
            };
            match stopped {
                Ok(units) => observed.stopped = units,
                Err(error) => {
                    drop(observed.problems.insert("systemd".to_string(), format!("{error:#}")));
                }
            }
            (observed, status.phase)
        };
        let reasons = ready::judge(&self.seed.cluster, &observed);
        {
            let mut status = self.board.lock();
            status.ready = reasons.is_empty();
            status.reasons = reasons.clone();
        }
        let member = view
            .as_ref()
            .and_then(|view| view.members.iter().find(|member| member.name == self.entry.name));
        *lock(&self.shared.registration) = Some(Registration {
            node: super::render::NodeView {
                name: self.entry.name.clone(),
                address: self.entry.address,
                zone: self.entry.zone.clone(),
                profile: self.entry.profile.clone(),
                roles: self.entry.roles.clone(),
                ordinal: self.find_ordinal(),
            },
            version: env!("CARGO_PKG_VERSION").to_string(),
            phase,
            ready: reasons.is_empty(),
            reasons,
            etcd: match &own {
                Some(own) if own.learner => "learner".into(),
                Some(own) if own.leader == own.member => "leader".into(),
                Some(own) if own.leader == 0 => "no leader".into(),
                Some(_) => "follower".into(),
                None if has(Role::Db) => "silent".into(),
                None => String::new(),
            },
            postgres: match member {
                Some(member) => format!("{} {}", member.role, member.state),
                None if has(Role::Db) => "silent".into(),
                None => String::new(),
            },
            lag: member.and_then(patroni::Member::lag),
            redis: match &redis {
                Some(view) if view.is_master => "master".into(),
                Some(view) if view.link_up => "replica".into(),
                Some(_) => "replica without a link".into(),
                None if has(Role::Cache) => "silent".into(),
                None => String::new(),
            },
            web: match (has(Role::Web), web.is_empty(), maintenance.is_some()) {
                (false, ..) => String::new(),
                (true, true, false) => "serving".into(),
                (true, true, true) => "maintenance".into(),
                (true, false, _) if !self.health.is_prepared() => "starting".into(),
                (true, false, _) => "out".into(),
            },
            vip: observed.vip_here,
        });
    }

    /// Units that should run now.
    fn list_expected(&self, maintained: bool) -> Vec<&'static str> {
        let is_web = |unit: &str| web::SERVICES.iter().any(|service| service.unit == unit);
        let prepared = self.health.is_prepared();
        let expects = |unit: &&'static str| match *unit {
            web::PROXY => true,
            web::WORKER => prepared && !maintained,
            unit => prepared || !is_web(unit),
        };
        self.units.iter().copied().filter(expects).collect()
    }

    fn find_ordinal(&self) -> usize {
        let place = self.seed.cluster.nodes.iter().position(|node| node.name == self.entry.name);
        place.map_or(0, |place| place + 1)
    }

    fn holds_vip(&self) -> bool {
        let trie = checks::read_kernel_file(&self.places.join("/proc/net/fib_trie"));
        match (self.seed.cluster.vip, trie) {
            (Some(vip), Ok(trie)) => checks::has_address(&trie, vip),
            _ => false,
        }
    }

    async fn look_at_etcd(&self) -> Result<EtcdView> {
        let live = self.etcd.list_members().await?;
        let names = live.members.iter().map(|member| (member.id, member.name.as_str()));
        let names: std::collections::BTreeMap<u64, &str> = names.collect();
        let alarms = self.etcd.list_alarms().await?;
        let pulses = self.registry.list_pulses();
        Ok(EtcdView {
            voters: live.members.iter().filter(|member| !member.learner).count(),
            learners: live.members.iter().filter(|member| member.learner).count(),
            silent: names
                .values()
                .filter(|name| !pulses.contains(**name))
                .map(|name| name.to_string())
                .collect(),
            alarms: alarms.into_iter().map(|(_, kind)| kind).collect(),
        })
    }

    async fn look_at_redis(&self) -> Option<RedisView> {
        let secret = self.seed.secrets.get("redis").filter(|_| self.entry.has(Role::Cache))?;
        ask_redis(&self.tls, self.entry.address, secret).await.ok()
    }

    async fn look_at_sentinel(&self) -> Option<SentinelView> {
        let secret = self.seed.secrets.get("sentinel").filter(|_| self.entry.has(Role::Cache))?;
        ask_sentinel(&self.tls, self.entry.address, secret).await.ok()
    }

    /// The master writes itself down, once Redis and Sentinel agree that it is; after a
    /// loss of power of all nodes this says who has the newest data.
    async fn record_master(&self, redis: Option<&RedisView>, sentinel: Option<&SentinelView>) {
        let agreed = redis.is_some_and(|view| view.is_master)
            && sentinel.is_some_and(|view| view.master == self.entry.address);
        if !agreed {
            return;
        }
        let key = self.registry.key("redis", "master");
        let name = self.entry.name.as_str();
        // What fails is done at the next look.
        if let Ok(entry) = self.etcd.get(&key).await
            && entry.is_none_or(|entry| entry.value != name)
        {
            let _ = self.etcd.put(&key, name, None).await;
        }
    }
}

async fn maybe<T>(wanted: bool, work: impl Future<Output = Result<T>>) -> Option<T> {
    if wanted { work.await.ok() } else { None }
}

fn summarize(view: &View, paused: Option<Duration>) -> PatroniView {
    let running = |state: &str| matches!(state, "running" | "streaming" | "in archive recovery");
    let names = |keep: &dyn Fn(&patroni::Member) -> bool| -> Vec<String> {
        view.members.iter().filter(|member| keep(member)).map(|m| m.name.clone()).collect()
    };
    PatroniView {
        leader: names(&|m| m.role == "leader" && running(&m.state)).pop(),
        synchronous: names(&|m| m.role == "sync_standby" && running(&m.state)),
        running: names(&|m| m.role != "leader" && running(&m.state)),
        paused,
    }
}

/// Those of the units that do not run, by one question to systemd.
async fn list_stopped(units: &[&'static str]) -> Result<Vec<String>> {
    let mut words = vec!["systemctl", "show", "--property=Id,ActiveState"];
    words.extend(units);
    if units.is_empty() {
        return Ok(Vec::new());
    }
    Ok(read_stopped(&run_program(&words).await?))
}

fn read_stopped(text: &str) -> Vec<String> {
    let mut stopped = Vec::new();
    for block in text.split("\n\n") {
        let value = |name: &str| block.lines().find_map(|line| line.strip_prefix(name));
        let (id, state) = (value("Id=").unwrap_or(""), value("ActiveState=").unwrap_or(""));
        if !id.is_empty() && !matches!(state, "active" | "reloading" | "refreshing") {
            stopped.push(format!("{id} ({state})"));
        }
    }
    stopped
}

/// Keep this node's registration under its lease, for ever.
pub async fn keep_registration(etcd: Etcd, key: String, shared: Shared) {
    let mut lease = Lease::new(etcd.clone(), NODE_LEASE);
    let mut written: Option<Registration> = None;
    loop {
        let keep = async {
            let (id, new) = lease.keep().await?;
            *lock(&shared.lease) = Some(id);
            let next = lock(&shared.registration).clone();
            if let Some(next) = next
                && (new || written.as_ref() != Some(&next))
            {
                etcd.put(&key, &serde_json::to_string(&next)?, Some(id)).await?;
                written = Some(next);
            }
            Ok::<_, anyhow::Error>(())
        };
        // Without etcd nothing can be registered; readiness says so.
        if keep.await.is_err() {
            written = None;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_that_do_not_run_are_named() {
        let text = "Id=a.service\nActiveState=active\n\nId=b.service\nActiveState=failed\n\nId=c.service\nActiveState=activating\n";
        assert_eq!(read_stopped(text), ["b.service (failed)", "c.service (activating)"]);
        assert!(read_stopped("").is_empty());
    }
}
