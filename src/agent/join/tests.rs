use proptest::prelude::{Just, Strategy, any};
use proptest::{prop_assert, prop_assert_eq, prop_oneof, proptest};

use super::*;

const PLAN: &str = "n1=https://10.0.0.1:2380,n2=https://10.0.0.2:2380,n3=https://10.0.0.3:2380";

fn listed(n: u64, id: u64, started: bool) -> Listed {
    Listed {
        id,
        name: if started { format!("n{n}") } else { String::new() },
        peer_urls: vec![format!("https://10.0.0.{n}:2380")],
        learner: false,
    }
}

fn answered(state: PeerState) -> Peer {
    Peer::Answered { state, plan: PLAN.to_string() }
}

fn observe(record: Record, data: bool, live: Option<Live>, peers: [Peer; 2]) -> Observed {
    let [second, third] = peers;
    Observed {
        name: "n1".into(),
        peer_url: "https://10.0.0.1:2380".into(),
        plan: PLAN.into(),
        record,
        data,
        live: live.into_iter().collect(),
        peers: BTreeMap::from([("n2".into(), second), ("n3".into(), third)]),
    }
}

fn live(members: &[Listed]) -> Option<Live> {
    Some(Live { cluster: 7, members: members.to_vec() })
}

fn empty() -> [Peer; 2] {
    [answered(PeerState::Empty), answered(PeerState::Empty)]
}

#[test]
fn all_fresh_nodes_form_a_cluster_and_one_silent_node_stops_that() {
    assert_eq!(decide(&observe(Record::Nothing, false, None, empty())), Decision::Form);
    let forming = [answered(PeerState::Forming), answered(PeerState::Empty)];
    assert_eq!(decide(&observe(Record::Nothing, false, None, forming)), Decision::Form);
    for other in [
        Peer::Unreachable("timed out".into()),
        answered(PeerState::Data),
        Peer::Answered { state: PeerState::Empty, plan: "n1=https://10.0.0.9:2380".into() },
    ] {
        let seen = observe(Record::Nothing, false, None, [answered(PeerState::Empty), other]);
        assert!(matches!(decide(&seen), Decision::Wait(_)));
    }
}

#[test]
fn a_late_node_takes_its_place_in_the_cluster_that_the_others_formed() {
    let members = [listed(1, 11, false), listed(2, 12, true), listed(3, 13, true)];
    let record = Record::Forming { plan: PLAN.into() };
    assert_eq!(decide(&observe(record, false, live(&members), empty())), Decision::Form);
}

#[test]
fn a_fresh_disk_replaces_the_dead_member_of_its_name() {
    let members = [listed(1, 11, true), listed(2, 12, true), listed(3, 13, true)];
    assert_eq!(
        decide(&observe(Record::Nothing, false, live(&members), empty())),
        Decision::JoinAsLearner { remove: Some(11), wipe: false }
    );
    assert_eq!(
        decide(&observe(Record::Nothing, false, live(&members[1..]), empty())),
        Decision::JoinAsLearner { remove: None, wipe: false }
    );
}

#[test]
fn a_node_that_was_added_and_crashed_goes_on_where_it_was() {
    let members = [listed(1, 21, false), listed(2, 12, true), listed(3, 13, true)];
    let record = Record::Joining { cluster: 7, member: 21 };
    assert_eq!(decide(&observe(record, false, live(&members), empty())), Decision::StartExisting);
    // It crashed before it could write the id down.
    assert_eq!(
        decide(&observe(Record::Nothing, false, live(&members), empty())),
        Decision::JoinAsLearner { remove: Some(21), wipe: false }
    );
}

#[test]
fn stale_data_go_only_when_the_member_was_removed() {
    let record = Record::Member { cluster: 7, member: 11 };
    let members = [listed(1, 11, true), listed(2, 12, true), listed(3, 13, true)];
    assert_eq!(
        decide(&observe(record.clone(), true, live(&members), empty())),
        Decision::StartExisting
    );
    assert_eq!(
        decide(&observe(record.clone(), true, live(&members[1..]), empty())),
        Decision::JoinAsLearner { remove: None, wipe: true }
    );
    let replaced = [listed(1, 99, true), listed(2, 12, true)];
    let taken = decide(&observe(record.clone(), true, live(&replaced), empty()));
    assert!(matches!(taken, Decision::Wait(_)), "{taken:?}");
    let foreign = Record::Member { cluster: 8, member: 11 };
    let refused = decide(&observe(foreign, true, live(&members), empty()));
    assert!(matches!(refused, Decision::Wait(_)), "{refused:?}");
}

#[test]
fn after_a_power_loss_of_all_each_starts_with_what_it_has() {
    let record = Record::Member { cluster: 7, member: 11 };
    let silent = || [Peer::Unreachable("no route".into()), Peer::Unreachable("no route".into())];
    assert_eq!(decide(&observe(record.clone(), true, None, silent())), Decision::StartExisting);
    // A node that has lost its data never starts a second cluster.
    assert!(matches!(decide(&observe(record, false, None, empty())), Decision::Wait(_)));
}

#[test]
fn two_clusters_at_once_are_told_and_joined_by_nobody() {
    let mut seen = observe(Record::Nothing, false, live(&[listed(2, 12, true)]), empty());
    seen.live.push(Live { cluster: 8, members: vec![listed(3, 13, true)] });
    assert!(matches!(decide(&seen), Decision::Wait(_)));
}

fn any_record() -> impl Strategy<Value = Record> {
    prop_oneof![
        Just(Record::Nothing),
        Just(Record::Wiping),
        prop_oneof![Just(PLAN), Just("other")]
            .prop_map(|plan| Record::Forming { plan: plan.into() }),
        (6u64..9, 10u64..14).prop_map(|(cluster, member)| Record::Joining { cluster, member }),
        (6u64..9, 10u64..14).prop_map(|(cluster, member)| Record::Member { cluster, member }),
    ]
}

fn any_peer() -> impl Strategy<Value = Peer> {
    let state =
        prop_oneof![Just(PeerState::Empty), Just(PeerState::Forming), Just(PeerState::Data)];
    prop_oneof![
        Just(Peer::Unreachable("silent".into())),
        (state, prop_oneof![Just(PLAN), Just("other")])
            .prop_map(|(state, plan)| Peer::Answered { state, plan: plan.into() }),
    ]
}

fn any_live() -> impl Strategy<Value = Option<Live>> {
    let member = (1u64..4, 10u64..14, any::<bool>()).prop_map(|(n, id, on)| listed(n, id, on));
    let members = proptest::collection::vec(member, 0..4);
    proptest::option::of(
        (6u64..9, members).prop_map(|(cluster, members)| Live { cluster, members }),
    )
}

proptest! {
    /// Whatever is observed: what cannot be undone happens only under its guard.
    #[test]
    fn no_second_cluster_and_no_data_lost_whatever_is_observed(
        record in any_record(),
        data in any::<bool>(),
        live in any_live(),
        peers in [any_peer(), any_peer()],
    ) {
        let seen = observe(record.clone(), data, live.clone(), peers.clone());
        match decide(&seen) {
            Decision::Form => {
                prop_assert!(!data);
                match live {
                    None => {
                        let may = matches!(record, Record::Nothing | Record::Forming { .. });
                        let agreed = peers.iter().all(|peer| {
                            *peer == answered(PeerState::Empty)
                                || *peer == answered(PeerState::Forming)
                        });
                        prop_assert!(may && agreed);
                    }
                    // It is the same cluster that lives: the plan is the one it was formed by.
                    Some(live) => {
                        prop_assert_eq!(record, Record::Forming { plan: PLAN.into() });
                        let mut members = live.members.iter();
                        prop_assert!(members.any(|m| is_ours(&seen, m) && m.name.is_empty()));
                    }
                }
            }
            Decision::JoinAsLearner { remove, wipe } => {
                let live = live.expect("only a live cluster can be joined");
                let ours = |id| live.members.iter().any(|m| m.id == id && is_ours(&seen, m));
                prop_assert!(remove.is_none_or(ours));
                if wipe {
                    let gone = match record {
                        Record::Wiping => true,
                        Record::Member { cluster, member } | Record::Joining { cluster, member } =>
                            cluster == live.cluster && live.members.iter().all(|m| m.id != member),
                        Record::Forming { .. } => live.members.iter().all(|m| !is_ours(&seen, m)),
                        Record::Nothing => false,
                    };
                    prop_assert!(gone);
                }
            }
            Decision::StartExisting => {
                let added = matches!(record, Record::Joining { .. });
                prop_assert!((data || added) && record != Record::Wiping);
            }
            Decision::Wait(why) => prop_assert!(!why.is_empty()),
        }
    }
}
