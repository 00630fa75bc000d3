use proptest::prelude::any;
use proptest::{prop_assert_eq, proptest};

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

proptest! {
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
