use super::*;
use crate::agent::board::Phase;
use crate::agent::render::NodeView;
use crate::config::cluster::{Ipv4Network, Node, Tuning};

fn cluster(zones: [&str; 3]) -> Cluster {
    let node = |n: u8, zone: &str| Node {
        name: format!("n{n}"),
        address: [10, 0, 0, n].into(),
        zone: zone.into(),
        profile: "node".into(),
        roles: vec![Role::Db, Role::Cache, Role::Edge],
    };
    Cluster {
        name: "c".into(),
        domain: "c.example".into(),
        vip: Some([10, 0, 0, 100].into()),
        network: Ipv4Network::new([10, 0, 0, 0].into(), 24).unwrap(),
        gateway: None,
        dns: Vec::new(),
        ntp: Vec::new(),
        nodes: (1u8..).zip(zones).map(|(n, zone)| node(n, zone)).collect(),
        storage: None,
        backup: None,
        external: Default::default(),
        tuning: Tuning::default(),
    }
}

fn well(cluster: &Cluster) -> Observed {
    let registration = |node: &Node| Registration {
        node: NodeView {
            name: node.name.clone(),
            address: node.address,
            zone: node.zone.clone(),
            profile: node.profile.clone(),
            roles: node.roles.clone(),
            ordinal: 1,
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
        vip: node.name == "n2",
    };
    Observed {
        name: "n1".into(),
        in_main: true,
        etcd: Some(EtcdView { voters: 3, ..EtcdView::default() }),
        patroni: Some(PatroniView {
            leader: Some("n1".into()),
            synchronous: vec!["n2".into()],
            running: vec!["n2".into(), "n3".into()],
            paused: None,
        }),
        sentinel: Some(SentinelCount { known: 3, master_down: false }),
        redis_linked: Some(true),
        vip_here: false,
        registered: cluster.nodes.iter().map(|n| (n.name.clone(), registration(n))).collect(),
        ..Observed::default()
    }
}

const ZONES: [&str; 3] = ["a", "b", "c"];

#[test]
fn three_nodes_in_three_zones_that_all_answer_are_ready() {
    let cluster = cluster(ZONES);
    assert_eq!(judge(&cluster, &well(&cluster)), Vec::<String>::new());
}

#[test]
fn whatever_makes_it_less_than_highly_available_is_said() {
    type Change = fn(&mut Observed);
    let faults: [(&str, Change); 19] = [
        ("main phase", |seen| seen.in_main = false),
        ("no quorum", |seen| seen.etcd = None),
        ("2 voting members of 3", |seen| seen.etcd.as_mut().unwrap().voters = 2),
        ("learning", |seen| seen.etcd.as_mut().unwrap().learners = 1),
        ("NOSPACE", |seen| seen.etcd.as_mut().unwrap().alarms = vec!["NOSPACE".into()]),
        ("no sign of life from n3", |seen| seen.etcd.as_mut().unwrap().silent = vec!["n3".into()]),
        ("Patroni does not answer", |seen| seen.patroni = None),
        ("no leader", |seen| seen.patroni.as_mut().unwrap().leader = None),
        ("paused for 1 min", |seen| {
            seen.patroni.as_mut().unwrap().paused = Some(Duration::from_secs(60));
        }),
        ("no synchronous standby", |seen| seen.patroni.as_mut().unwrap().synchronous.clear()),
        ("does not run on n3", |seen| drop(seen.patroni.as_mut().unwrap().running.pop())),
        ("2 of 3 Sentinels", |seen| seen.sentinel.as_mut().unwrap().known = 2),
        ("4 Sentinels", |seen| seen.sentinel.as_mut().unwrap().known = 4),
        ("lost its link", |seen| seen.redis_linked = Some(false)),
        ("takes over the master's data", |seen| {
            seen.redis_linked = Some(false);
            seen.redis_syncing = true;
        }),
        ("2 nodes are Redis masters (n1, n3)", |seen| {
            for name in ["n1", "n3"] {
                seen.registered.get_mut(name).unwrap().redis = "master".into();
            }
        }),
        ("by 2 nodes at once (n1, n2)", |seen| seen.vip_here = true),
        ("no edge holds", |seen| seen.registered.get_mut("n2").unwrap().vip = false),
        ("1 of 3 nodes are not there: n3", |seen| drop(seen.registered.remove("n3"))),
    ];
    let cluster = cluster(ZONES);
    for (expected, change) in faults {
        let mut seen = well(&cluster);
        change(&mut seen);
        let reasons = judge(&cluster, &seen);
        assert!(reasons.iter().any(|reason| reason.contains(expected)), "{expected}: {reasons:?}");
    }
}

#[test]
fn one_zone_and_refused_files_and_stopped_units_are_said() {
    let cluster = cluster(["a"; 3]);
    let mut seen = well(&cluster);
    seen.stopped = vec!["haproxy.service".into()];
    seen.problems.insert("/etc/haproxy/haproxy.cfg".into(), "refused".into());
    let reasons = judge(&cluster, &seen).join("\n");
    assert!(reasons.contains("one zone"), "{reasons}");
    assert!(reasons.contains("haproxy.service does not run"), "{reasons}");
    assert!(reasons.contains("/etc/haproxy/haproxy.cfg: refused"), "{reasons}");
}

#[test]
fn a_zone_that_takes_the_majority_with_it_is_said() {
    let cluster = cluster(["a", "a", "b"]);
    let reasons = judge(&cluster, &well(&cluster));
    assert_eq!(reasons, ["not HA: 2 of 3 db nodes are in the zone a: its loss stops the database"]);
}

#[test]
fn one_edge_or_one_web_node_among_several_is_said() {
    let mut cluster = cluster(ZONES);
    for node in &mut cluster.nodes[1..] {
        node.roles.retain(|role| *role != Role::Edge);
    }
    let reasons = judge(&cluster, &well(&cluster));
    assert_eq!(
        reasons,
        ["not HA: n1 alone has the role edge: the way to the services is gone with it"]
    );
    cluster.nodes[0].roles = vec![Role::Db, Role::Cache];
    assert_eq!(judge(&cluster, &well(&cluster)), Vec::<String>::new());
    cluster.nodes[2].roles.push(Role::Web);
    let reasons = judge(&cluster, &well(&cluster)).join("\n");
    assert!(reasons.contains("n3 alone has the role web"), "{reasons}");
}

#[test]
fn a_single_node_says_loudly_that_it_is_none() {
    let mut cluster = cluster(ZONES);
    cluster.nodes.truncate(1);
    cluster.vip = None;
    let mut seen = well(&cluster);
    seen.etcd.as_mut().unwrap().voters = 1;
    seen.sentinel.as_mut().unwrap().known = 1;
    seen.patroni.as_mut().unwrap().synchronous.clear();
    assert_eq!(judge(&cluster, &seen), ["not HA: this is a development cluster of one node"]);
}
