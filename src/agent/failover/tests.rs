use proptest::prelude::{Strategy, any};
use proptest::{prop_assert, prop_assert_eq, proptest};

use super::*;

fn sighting(unreachable_ms: u64, replica: bool) -> Sighting {
    Sighting { leader: "n1".into(), revision: 5, unreachable_ms, replica, tick: 1 }
}

/// The leader n1 is gone, n2 is its synchronous standby, n3 another replica.
fn gone() -> Observed {
    let dated = |sighting| Dated { sighting, age: Duration::from_millis(300) };
    Observed {
        enabled: true,
        synchronous: true,
        leader: Some(LeaderKey { name: "n1".into(), mod_revision: 5 }),
        sync: Some(SyncKey { leader: "n1".into(), standbys: vec!["n2".into()] }),
        db_nodes: ["n1", "n2", "n3"].map(String::from).into(),
        pulses: ["n2", "n3"].map(String::from).into(),
        beat: Some(quiet()),
        sightings: BTreeMap::from([
            ("n2".into(), dated(sighting(2000, true))),
            ("n3".into(), dated(sighting(2000, true))),
        ]),
        ..Observed::default()
    }
}

fn quiet() -> Beat {
    Beat { unchanged: QUIET, witnessed: WITNESSED }
}

fn reason(seen: &Observed) -> String {
    match decide(seen) {
        Decision::Wait(reason) => reason,
        Decision::Delete { .. } => panic!("deleted the key in spite of {seen:?}"),
    }
}

#[test]
fn a_leader_that_is_gone_loses_its_key_at_its_revision() {
    assert_eq!(
        decide(&gone()),
        Decision::Delete { leader: "n1".into(), mod_revision: 5, standby: "n2".into() }
    );
}

#[test]
fn every_guard_alone_keeps_the_key() {
    type Change = fn(&mut Observed);
    let guards: [(&str, Change); 15] = [
        ("turned off", |seen| seen.enabled = false),
        ("paused", |seen| seen.paused = true),
        ("switchover", |seen| seen.pending = true),
        ("synchronous mode is off", |seen| seen.synchronous = false),
        ("no leader key", |seen| seen.leader = None),
        ("agent lives", |seen| seen.beat = Some(Beat { unchanged: QUIET / 2, ..quiet() })),
        // Etcd has only just come back: a pulse may be on its way.
        ("agent lives", |seen| seen.beat = Some(Beat { witnessed: WITNESSED / 2, ..quiet() })),
        ("1 of 2", |seen| seen.sightings.get_mut("n3").unwrap().sighting.unreachable_ms = 0),
        ("1 of 2", |seen| seen.sightings.get_mut("n3").unwrap().age = STALE * 2),
        ("1 of 2", |seen| seen.sightings.get_mut("n3").unwrap().sighting.revision = 4),
        ("1 of 2", |seen| seen.sightings.get_mut("n3").unwrap().sighting.leader = "n2".into()),
        ("1 of 2", |seen| {
            seen.pulses.remove("n3");
        }),
        ("no synchronous standby", |seen| seen.sync = None),
        ("another leader", |seen| seen.sync.as_mut().unwrap().leader = "n3".into()),
        ("no synchronous standby lives", |seen| {
            seen.sightings.get_mut("n2").unwrap().sighting.replica = false;
        }),
    ];
    for (expected, change) in guards {
        let mut seen = gone();
        change(&mut seen);
        let reason = reason(&seen);
        assert!(reason.contains(expected), "{expected}: {reason}");
    }
}

#[test]
fn a_single_node_never_deletes_its_own_key() {
    let mut seen = gone();
    seen.db_nodes = ["n1".to_string()].into();
    reason(&seen);
}

/// etcd's part of the model: one leader key and its revision.
#[derive(Debug, Clone)]
struct Store {
    leader: Option<(usize, i64)>,
    revision: i64,
}

impl Store {
    fn delete_at(&mut self, revision: i64) -> bool {
        let hit = self.leader.is_some_and(|(_, at)| at == revision);
        if hit {
            self.revision += 1;
            self.leader = None;
        }
        hit
    }

    fn acquire(&mut self, node: usize) {
        if self.leader.is_none() {
            self.revision += 1;
            self.leader = Some((node, self.revision));
        }
    }
}

#[derive(Debug, Clone)]
enum Act {
    /// Node stops or comes back; a stopped one has neither pulse nor ports.
    Toggle(usize),
    /// Its agent alone stops or comes back.
    ToggleAgent(usize),
    /// The agent of this node looks, and decides.
    Look(usize),
    /// It executes what it had decided, however long ago.
    Execute(usize),
    /// This node's Patroni takes the free key.
    Acquire(usize),
}

fn any_act() -> impl Strategy<Value = Act> {
    (0u8..5, 0usize..3).prop_map(|(kind, node)| match kind {
        0 => Act::Toggle(node),
        1 => Act::ToggleAgent(node),
        2 => Act::Look(node),
        3 => Act::Execute(node),
        _ => Act::Acquire(node),
    })
}

fn name(node: usize) -> String {
    format!("n{}", node + 1)
}

/// What an agent sees of the model: everything at once, since the leases and sightings in
/// etcd are older than the look, never newer.
fn look(store: &Store, up: [bool; 3], agents: [bool; 3], standby: usize) -> Observed {
    let Some((leader, revision)) = store.leader else { return Observed::default() };
    let sees = |node: usize| Dated {
        sighting: Sighting {
            leader: name(leader),
            revision,
            unreachable_ms: if up[leader] { 0 } else { 3000 },
            replica: node != leader,
            tick: 1,
        },
        age: Duration::ZERO,
    };
    let alive = |node: &usize| up[*node] && agents[*node];
    Observed {
        enabled: true,
        synchronous: true,
        leader: Some(LeaderKey { name: name(leader), mod_revision: revision }),
        sync: Some(SyncKey { leader: name(leader), standbys: vec![name(standby)] }),
        db_nodes: (0..3).map(name).collect(),
        pulses: (0..3).filter(alive).map(name).collect(),
        beat: alive(&leader).then_some(Beat { unchanged: Duration::ZERO, ..quiet() }),
        sightings: (0..3).filter(alive).map(|n| (name(n), sees(n))).collect(),
        ..Observed::default()
    }
}

proptest! {
    /// However looks, executions, deaths and returns interleave: each term of a leader is
    /// ended at most once, only one whose leader was gone when the decision was taken, and
    /// never the term of a leader that came after the decision.
    #[test]
    fn at_most_one_deletion_takes_effect_and_never_without_its_guards(
        acts in proptest::collection::vec(any_act(), 0..60),
        standby in 0usize..3,
    ) {
        let mut store = Store { leader: Some((0, 1)), revision: 1 };
        let (mut up, mut agents) = ([true; 3], [true; 3]);
        let mut decided: [Option<(Decision, bool)>; 3] = [None, None, None];
        let mut ended = BTreeMap::new();
        for act in acts {
            match act {
                Act::Toggle(node) => up[node] = !up[node],
                Act::ToggleAgent(node) => agents[node] = !agents[node],
                Act::Look(node) if up[node] && agents[node] => {
                    let guards = store.leader.is_some_and(|(leader, _)| {
                        let others: Vec<usize> = (0..3).filter(|n| *n != leader).collect();
                        !up[leader]
                            && others.iter().all(|n| up[*n] && agents[*n])
                            && standby != leader
                    });
                    decided[node] = Some((decide(&look(&store, up, agents, standby)), guards));
                }
                Act::Execute(node) if up[node] && agents[node] => {
                    if let Some((Decision::Delete { leader, mod_revision, .. }, guards)) = decided[node].take() {
                        prop_assert!(guards, "decided without its guards");
                        let holder = store.leader.map(|(holder, _)| name(holder));
                        if store.delete_at(mod_revision) {
                            prop_assert_eq!(holder, Some(leader));
                            *ended.entry(mod_revision).or_insert(0) += 1;
                        }
                    }
                }
                Act::Acquire(node) if up[node] => store.acquire(node),
                _ => {}
            }
        }
        prop_assert!(ended.values().all(|times| *times == 1));
    }

    #[test]
    fn a_delete_names_what_was_observed(
        enabled in any::<bool>(), paused in any::<bool>(), pending in any::<bool>(),
        pulse in proptest::option::of(proptest::array::uniform2(0u64..4000)),
        unreachable in proptest::array::uniform2(0u64..4000),
        age in proptest::array::uniform2(0u64..5000),
        replica in any::<bool>(),
    ) {
        let mut seen = gone();
        (seen.enabled, seen.paused, seen.pending) = (enabled, paused, pending);
        let beat = pulse.map(|times| times.map(Duration::from_millis));
        seen.beat = beat.map(|[unchanged, witnessed]| Beat { unchanged, witnessed });
        for (i, name) in ["n2", "n3"].iter().enumerate() {
            let dated = seen.sightings.get_mut(*name).unwrap();
            dated.sighting.unreachable_ms = unreachable[i];
            dated.age = Duration::from_millis(age[i]);
            dated.sighting.replica = replica;
        }
        let allowed = enabled && !paused && !pending && replica
            && pulse.is_none_or(|[unchanged, witnessed]| unchanged >= 2000 && witnessed >= 1000)
            && unreachable.iter().all(|ms| *ms >= 1500)
            && age.iter().all(|ms| *ms <= 2500);
        prop_assert_eq!(matches!(decide(&seen), Decision::Delete { .. }), allowed);
    }
}
