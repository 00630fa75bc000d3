//! A model of three db nodes, of Patroni's rules for its keys and of what PostgreSQL
//! acknowledges, on which agents decide by what they saw some time ago. Its events come in
//! any order; nothing that was acknowledged may be missing where the next leader begins.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::{Just, Strategy};
use proptest::{prop_oneof, proptest};

use super::*;

const NODES: usize = 3;
/// Milliseconds between two looks of an agent, and of the leases in etcd.
const BEAT: u64 = 500;
const PULSE_LEASE: u64 = 2000;
const NODE_LEASE: u64 = 10_000;

/// What happens next. What is impossible at that moment does not happen.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// Time passes, and every agent that lives looks, publishes, and decides.
    Beat,
    /// The node stops, or comes back with the data that it had.
    Toggle(usize),
    ToggleAgent(usize),
    /// Its network goes or comes back: to the others, and to etcd. Its clients reach it.
    ToggleCut(usize),
    /// The agent carries out what it had decided, however long ago.
    Execute(usize),
    /// The lease of a leader that leads no more runs out.
    Expire,
    /// Patroni, on a node: takes the free key; begins to lead; sees that another does.
    Take(usize),
    Promote(usize),
    StepDown(usize),
    /// Patroni, on the leader: reads `/sync`; drops its standby; asks PostgreSQL to wait for
    /// another; writes that one into `/sync`.
    ReadSync(usize),
    DropStandby(usize),
    NameStandby(usize, usize),
    ConfirmStandby(usize),
    /// PostgreSQL: takes a write; gets the leader's log; acknowledges what it may.
    Write(usize),
    Stream(usize),
    Acknowledge(usize),
}

fn any_act() -> impl Strategy<Value = Act> {
    let node = || 0..NODES;
    prop_oneof![
        12 => Just(Act::Beat),
        2 => node().prop_map(Act::Toggle),
        1 => node().prop_map(Act::ToggleAgent),
        2 => node().prop_map(Act::ToggleCut),
        4 => node().prop_map(Act::Execute),
        1 => Just(Act::Expire),
        5 => node().prop_map(Act::Take),
        5 => node().prop_map(Act::Promote),
        2 => node().prop_map(Act::StepDown),
        2 => node().prop_map(Act::ReadSync),
        2 => node().prop_map(Act::DropStandby),
        3 => (node(), node()).prop_map(|(leader, standby)| Act::NameStandby(leader, standby)),
        3 => node().prop_map(Act::ConfirmStandby),
        5 => node().prop_map(Act::Write),
        6 => node().prop_map(Act::Stream),
        5 => node().prop_map(Act::Acknowledge),
    ]
}

/// `/sync` and its revision.
#[derive(Debug, Clone, Copy)]
struct Sync {
    leader: usize,
    standby: Option<usize>,
    revision: i64,
}

/// A PostgreSQL and its Patroni.
#[derive(Debug, Clone, Default)]
struct Server {
    leads: bool,
    /// Every write that it has.
    log: BTreeSet<u32>,
    /// For whom it waits before it acknowledges, and what that one has told it that it has.
    waits_for: Option<usize>,
    told: BTreeSet<u32>,
    /// The revision of `/sync` that its Patroni read last.
    read: i64,
}

/// A decision, and what it was taken on.
#[derive(Debug, Clone)]
struct Plan {
    leader: String,
    leader_revision: i64,
    sync_revision: i64,
    pulse: Option<i64>,
}

/// An agent's memory.
#[derive(Debug, Clone, Default)]
struct Agent {
    term: Option<i64>,
    unreachable_since: Option<u64>,
    pulse: Option<(i64, u64)>,
    prompt_since: Option<u64>,
    plan: Option<Plan>,
    /// When it last really failed to reach the leader of its term.
    failed_at: Option<u64>,
}

#[derive(Debug, Clone)]
struct Model {
    /// Whether Patroni lets only those take the key whom `/sync` names: its rule, which a
    /// test takes away.
    only_named_take: bool,
    now: u64,
    revision: i64,
    next_write: u32,
    up: [bool; NODES],
    has_agent: [bool; NODES],
    cut: [bool; NODES],
    leader: Option<(usize, i64)>,
    sync: Sync,
    servers: [Server; NODES],
    agents: [Agent; NODES],
    /// In etcd, with the time of writing.
    seen: BTreeMap<usize, (Sighting, u64)>,
    pulses: BTreeMap<usize, (i64, u64)>,
    acknowledged: BTreeSet<u32>,
    /// How often a term was ended by an agent.
    ended: BTreeMap<i64, usize>,
}

fn name(node: usize) -> String {
    format!("n{}", node + 1)
}

impl Model {
    /// The first node leads, and the second is its synchronous standby.
    fn new() -> Self {
        let mut servers: [Server; NODES] = Default::default();
        servers[0] = Server { leads: true, waits_for: Some(1), read: 2, ..Server::default() };
        Model {
            only_named_take: true,
            now: 100_000,
            revision: 2,
            next_write: 0,
            up: [true; NODES],
            has_agent: [true; NODES],
            cut: [false; NODES],
            leader: Some((0, 1)),
            sync: Sync { leader: 0, standby: Some(1), revision: 2 },
            servers,
            agents: Default::default(),
            seen: BTreeMap::new(),
            pulses: BTreeMap::new(),
            acknowledged: BTreeSet::new(),
            ended: BTreeMap::new(),
        }
    }

    fn run(&mut self, acts: &[Act]) {
        for act in acts {
            self.step(*act);
            self.check();
        }
    }

    /// Nothing acknowledged is missing where somebody leads by right.
    fn check(&self) {
        let Some((holder, _)) = self.leader else { return };
        let server = &self.servers[holder];
        if server.leads && self.up[holder] {
            let lost: Vec<&u32> = self.acknowledged.difference(&server.log).collect();
            assert!(lost.is_empty(), "{} leads without {lost:?}: {self:#?}", name(holder));
        }
    }

    fn step(&mut self, act: Act) {
        match act {
            Act::Beat => {
                self.now += BEAT;
                (0..NODES).for_each(|node| self.look(node));
            }
            Act::Toggle(node) => {
                self.up[node] = !self.up[node];
                self.servers[node].leads = false;
            }
            Act::ToggleAgent(node) => self.has_agent[node] = !self.has_agent[node],
            Act::ToggleCut(node) => self.cut[node] = !self.cut[node],
            Act::Execute(node) => self.execute(node),
            // Patroni steps down before its lease ends.
            Act::Expire if self.leader.is_some_and(|(holder, _)| !self.servers[holder].leads) => {
                self.leader = None;
            }
            Act::Take(node) => self.take(node),
            Act::Promote(node) => self.promote(node),
            Act::StepDown(node) => {
                let holds = self.leader.is_some_and(|(holder, _)| holder == node);
                if self.is_connected(node) && !holds {
                    self.servers[node].leads = false;
                }
            }
            Act::ReadSync(node) if self.is_connected(node) => {
                self.servers[node].read = self.sync.revision;
            }
            Act::DropStandby(node) => self.drop_standby(node),
            Act::NameStandby(node, standby) => {
                let is_free = self.sync.leader == node && self.sync.standby.is_none();
                let server = &mut self.servers[node];
                if server.leads && is_free && standby != node && server.read == self.sync.revision {
                    (server.waits_for, server.told) = (Some(standby), BTreeSet::new());
                }
            }
            Act::ConfirmStandby(node) => {
                let server = &self.servers[node];
                // PostgreSQL calls a standby synchronous once it has everything.
                if let Some(standby) = server.waits_for
                    && server.leads
                    && server.told == server.log
                {
                    self.write_sync(node, Some(standby));
                }
            }
            Act::Write(node) if self.up[node] && self.servers[node].leads => {
                self.servers[node].log.insert(self.next_write);
                self.next_write += 1;
            }
            Act::Stream(node) => self.stream(node),
            Act::Acknowledge(node) if self.up[node] && self.servers[node].leads => {
                let server = &self.servers[node];
                let mine = if server.waits_for.is_some() { &server.told } else { &server.log };
                self.acknowledged.extend(mine);
            }
            _ => {}
        }
    }

    /// To the others and to etcd, whose members are elsewhere.
    fn is_connected(&self, node: usize) -> bool {
        self.up[node] && !self.cut[node]
    }

    /// Patroni's write of `/sync`: at the revision that it read, whoever holds the key by now.
    fn write_sync(&mut self, node: usize, standby: Option<usize>) -> bool {
        if !self.is_connected(node) || self.servers[node].read != self.sync.revision {
            return false;
        }
        self.revision += 1;
        self.sync = Sync { leader: node, standby, revision: self.revision };
        self.servers[node].read = self.revision;
        true
    }

    /// First in `/sync`, then here: else it would acknowledge alone what `/sync` denies.
    fn drop_standby(&mut self, node: usize) {
        if self.servers[node].leads && self.write_sync(node, None) {
            self.servers[node].waits_for = None;
        }
    }

    fn take(&mut self, node: usize) {
        let is_named = self.sync.leader == node || self.sync.standby == Some(node);
        let may = is_named || !self.only_named_take;
        if self.leader.is_none() && self.is_connected(node) && may {
            self.revision += 1;
            self.leader = Some((node, self.revision));
            self.servers[node].read = self.sync.revision;
        }
    }

    /// The holder of the key begins to lead, if `/sync` is as it was when it took the key.
    fn promote(&mut self, node: usize) {
        let holds = self.leader.is_some_and(|(holder, _)| holder == node);
        if holds && !self.servers[node].leads && self.write_sync(node, None) {
            let server = &mut self.servers[node];
            (server.leads, server.waits_for) = (true, None);
            server.told.clear();
        }
    }

    /// A replica gets the log of whoever leads where it can reach: the holder of the key, or
    /// else one who still leads. What it has beyond that it gives up, as by pg_rewind.
    fn stream(&mut self, node: usize) {
        if !self.is_connected(node) || self.servers[node].leads {
            return;
        }
        let holder = self.leader.map(|(holder, _)| holder);
        let leads = |other: &usize| {
            *other != node && self.is_connected(*other) && self.servers[*other].leads
        };
        let Some(source) = holder.filter(leads).or_else(|| (0..NODES).find(leads)) else { return };
        self.servers[node].log = self.servers[source].log.clone();
        if self.servers[source].waits_for == Some(node) {
            self.servers[source].told = self.servers[source].log.clone();
        }
    }

    fn look(&mut self, node: usize) {
        let lives = self.has_agent[node] && self.up[node];
        if !lives || self.cut[node] {
            // Etcd does not answer it.
            self.agents[node].prompt_since = None;
            return;
        }
        let now = self.now;
        let Some((leader, revision)) = self.leader else { return };
        let beat = if leader == node { self.revision + now as i64 } else { 1 };
        self.pulses.insert(node, (beat, now));
        let reached = self.is_connected(leader);
        let agent = &mut self.agents[node];
        agent.prompt_since.get_or_insert(now);
        if agent.term != Some(revision) {
            let (prompt_since, plan) = (agent.prompt_since, agent.plan.take());
            *agent = Agent { term: Some(revision), prompt_since, plan, ..Agent::default() };
        }
        if reached {
            agent.unreachable_since = None;
        } else {
            agent.unreachable_since.get_or_insert(now);
            agent.failed_at = Some(now);
        }
        let pulse = self.pulses.get(&leader).filter(|(_, at)| now - at < PULSE_LEASE);
        let pulse = pulse.map(|(revision, _)| *revision);
        match (pulse, agent.pulse) {
            (Some(new), Some((old, _))) if new == old => {}
            (Some(new), _) => agent.pulse = Some((new, now)),
            (None, _) => agent.pulse = None,
        }
        let gone = agent.unreachable_since.map_or(0, |since| now - since);
        let sighting = Sighting {
            leader: name(leader),
            revision,
            unreachable_ms: gone,
            replica: node != leader && !self.servers[node].leads,
            tick: now,
        };
        self.seen.insert(node, (sighting, now));
        if gone > 0 {
            let observed = self.observe(node);
            if let Decision::Delete { leader, mod_revision, standby } = decide(&observed) {
                self.expect_reasons(node, mod_revision, &standby);
                let sync_revision = self.sync.revision;
                let plan = Plan { leader, leader_revision: mod_revision, sync_revision, pulse };
                self.agents[node].plan = Some(plan);
            }
        }
    }

    fn observe(&self, node: usize) -> Observed {
        let agent = &self.agents[node];
        let since = |at: u64| Duration::from_millis(self.now - at);
        let lives = |at: u64, lease: u64| self.now - at < lease;
        let pulses = self.pulses.iter().filter(|(_, (_, at))| lives(*at, PULSE_LEASE));
        let seen = self.seen.iter().filter(|(_, (_, at))| lives(*at, NODE_LEASE));
        let date = |sighting: &Sighting, at| Dated { sighting: sighting.clone(), age: since(at) };
        Observed {
            enabled: true,
            synchronous: true,
            leader: self
                .leader
                .map(|(leader, mod_revision)| LeaderKey { name: name(leader), mod_revision }),
            sync: Some(SyncKey {
                leader: name(self.sync.leader),
                standbys: self.sync.standby.into_iter().map(name).collect(),
            }),
            db_nodes: (0..NODES).map(name).collect(),
            pulses: pulses.map(|(node, _)| name(*node)).collect(),
            beat: agent.pulse.map(|(_, at)| Beat {
                unchanged: since(at),
                witnessed: agent.prompt_since.map_or(Duration::ZERO, since),
            }),
            sightings: seen.map(|(n, (sighting, at))| (name(*n), date(sighting, *at))).collect(),
            ..Observed::default()
        }
    }

    /// However old what was seen is: both others have failed to reach the leader a moment ago.
    fn expect_reasons(&self, node: usize, revision: i64, standby: &str) {
        let (leader, _) = self.leader.expect("a decision about nobody");
        let recent = |at: u64| u128::from(self.now - at) <= STALE.as_millis();
        for other in (0..NODES).filter(|other| *other != leader) {
            let agent = &self.agents[other];
            assert_eq!(agent.term, Some(revision), "{} looks at another term", name(other));
            assert!(agent.failed_at.is_some_and(recent), "{} reached it", name(other));
        }
        assert_eq!(self.sync.standby.map(name).as_deref(), Some(standby));
        assert_ne!(node, leader, "a leader ends its own term");
    }

    /// The transaction: all that was decided on is still so.
    fn execute(&mut self, node: usize) {
        if !self.is_connected(node) || !self.has_agent[node] {
            return;
        }
        let Some(plan) = self.agents[node].plan.take() else { return };
        let Some((holder, revision)) = self.leader else { return };
        let pulse = self.pulses.get(&holder).filter(|(_, at)| self.now - at < PULSE_LEASE);
        let is_unchanged = revision == plan.leader_revision
            && self.sync.revision == plan.sync_revision
            && pulse.map(|(revision, _)| *revision) == plan.pulse;
        if is_unchanged {
            assert_eq!(name(holder), plan.leader);
            self.revision += 1;
            self.leader = None;
            *self.ended.entry(revision).or_insert(0) += 1;
        }
    }
}

/// The leader dies with a write that the standby has, and one that nobody else has.
const DEATH: [Act; 6] =
    [Act::Write(0), Act::Stream(1), Act::Acknowledge(0), Act::Write(0), Act::Beat, Act::Toggle(0)];

fn wait(beats: usize) -> Vec<Act> {
    vec![Act::Beat; beats]
}

#[test]
fn a_dead_leader_is_followed_by_its_standby_with_all_that_was_acknowledged() {
    let mut model = Model::new();
    model.run(&DEATH);
    model.run(&wait(3));
    model.run(&[Act::Execute(1), Act::Execute(2)]);
    assert!(model.ended.is_empty(), "after 1.5 s");
    model.run(&wait(3));
    model.run(&[Act::Execute(1), Act::Execute(2)]);
    assert_eq!(model.ended, BTreeMap::from([(1, 1)]));
    model.run(&[Act::Take(2), Act::Take(1), Act::Promote(1)]);
    assert!(model.servers[1].leads && model.acknowledged.len() == 1);
}

/// It is cut off and goes on for the clients that reach it: they are not acknowledged to.
#[test]
fn a_leader_whose_term_was_ended_acknowledges_nothing_more() {
    let mut model = Model::new();
    model.run(&[Act::Write(0), Act::Stream(1), Act::Acknowledge(0), Act::ToggleCut(0)]);
    model.run(&wait(8));
    model.run(&[Act::Execute(2), Act::Take(1), Act::Promote(1)]);
    assert!(model.servers[0].leads && model.servers[1].leads);
    let before = model.acknowledged.clone();
    let tries = [Act::Write(0), Act::Stream(1), Act::Stream(2), Act::DropStandby(0)];
    model.run(&tries);
    model.run(&[Act::Acknowledge(0), Act::ToggleCut(0), Act::DropStandby(0), Act::Acknowledge(0)]);
    assert_eq!(model.acknowledged, before);
}

/// A decision that was taken before `/sync` changed comes too late.
#[test]
fn a_standby_that_was_dropped_meanwhile_is_not_waited_for() {
    let mut model = Model::new();
    model.run(&[Act::Write(0), Act::Stream(1), Act::ToggleCut(0)]);
    model.run(&wait(8));
    assert!(model.agents[2].plan.is_some());
    model.run(&[Act::ToggleCut(0), Act::DropStandby(0), Act::Write(0), Act::Acknowledge(0)]);
    model.run(&[Act::Execute(1), Act::Execute(2), Act::Take(1), Act::Promote(1)]);
    assert!(model.ended.is_empty() && model.servers[0].leads);
}

#[test]
#[should_panic(expected = "n3 leads without")]
fn the_model_notices_a_write_that_is_lost() {
    let mut model = Model { only_named_take: false, ..Model::new() };
    model.run(&DEATH);
    model.run(&wait(8));
    model.run(&[Act::Execute(1), Act::Take(2), Act::Promote(2)]);
}

proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(1000))]
    /// However deaths, cuts, late looks, late deletions, elections, changes of `/sync` and
    /// writes interleave: nothing acknowledged is lost, and a term is ended only when both others
    /// have just failed to reach its leader.
    #[test]
    fn nothing_acknowledged_is_lost_whatever_interleaves(
        acts in proptest::collection::vec(any_act(), 0..150),
        // Most runs begin with the fault that it is about.
        begin in prop_oneof![Just(None), Just(Some(Act::Toggle(0))), Just(Some(Act::ToggleCut(0)))],
    ) {
        let mut model = Model::new();
        model.run(&[Act::Write(0), Act::Stream(1), Act::Acknowledge(0), Act::Beat]);
        model.run(begin.as_slice());
        model.run(&acts);
    }
}
