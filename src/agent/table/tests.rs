use super::*;
use crate::agent::board::Status;
use crate::agent::render::NodeView;

fn member(number: u8) -> Node {
    Node {
        name: format!("n{number}"),
        address: [10, 0, 0, number].into(),
        zone: format!("z{number}"),
        profile: "node".into(),
        roles: vec![Role::Db, Role::Cache],
    }
}

fn register(number: u8, postgres: &str) -> Registration {
    let node = member(number);
    Registration {
        node: NodeView {
            name: node.name,
            address: node.address,
            zone: node.zone,
            profile: node.profile,
            roles: node.roles,
            ordinal: number.into(),
        },
        version: "0.1.0".into(),
        phase: Phase::Main,
        ready: true,
        reasons: Vec::new(),
        etcd: "follower".into(),
        postgres: postgres.into(),
        lag: Some(2048),
        redis: "replica".into(),
        web: "serving".into(),
        vip: number == 1,
    }
}

fn answer(number: u8, nodes: Vec<Registration>, reasons: &[&str]) -> (String, Answer) {
    let status = Status {
        version: "0.1.0".into(),
        node: format!("n{number}"),
        phase: Phase::Main,
        ready: reasons.is_empty(),
        reasons: reasons.iter().map(|reason| reason.to_string()).collect(),
        ..Status::default()
    };
    (format!("n{number}"), Answer::Page(Box::new(Page { status, nodes })))
}

fn members() -> Vec<Node> {
    (1..=3).map(member).collect()
}

#[test]
fn a_cluster_whose_nodes_are_all_ready_is_ready() {
    let all =
        || vec![register(1, "leader running"), register(2, "sync_standby"), register(3, "replica")];
    let answers = (1..=3).map(|number| answer(number, all(), &[])).collect();
    let table = make_table("c", &members(), &answers);
    assert!(table.ready && !table.single);
    let text = show_table(&table);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "c: 3 of 3 nodes are ready");
    assert_eq!(
        lines[3],
        "n1    z1    db,cache  main   yes    follower  leader running  2 KiB  replica  serving  here  0.1.0"
    );
    assert_eq!(lines.len(), 6, "{text}");
}

#[test]
fn a_silent_node_is_shown_with_what_it_registered_and_is_not_ready() {
    let known = vec![register(1, "leader running"), register(2, "replica streaming")];
    let mut answers: BTreeMap<_, _> = [answer(1, known, &["not HA: one is missing"])].into();
    answers.insert("n2".into(), Answer::Silent("timed out".into()));
    answers.insert("n3".into(), Answer::Silent("connection refused".into()));
    let table = make_table("c", &members(), &answers);
    assert!(!table.ready);
    let [_, second, third] = &table.nodes[..] else { panic!("{table:?}") };
    assert_eq!((second.postgres.as_str(), second.registered), ("replica streaming", true));
    assert!(!second.ready, "it was ready when it registered");
    assert_eq!((third.postgres.as_str(), third.registered, third.phase), ("", false, None));
    let text = show_table(&table);
    assert!(text.starts_with("c: 0 of 3 nodes are ready"), "{text}");
    assert_eq!(text.matches("no answer").count(), 2, "{text}");
    assert!(text.contains("n3: its agent does not answer: connection refused\n"), "{text}");
}

#[test]
fn a_nodes_own_page_counts_more_than_what_others_have_of_it() {
    let stale = vec![register(1, "leader running"), register(2, "leader running")];
    let fresh = vec![register(1, "leader running"), register(2, "replica streaming")];
    let answers = [answer(1, stale, &[]), answer(2, fresh, &["etcd's alarm NOSPACE"])].into();
    let table = make_table("c", &members()[..2], &answers);
    assert_eq!(table.nodes[1].postgres, "replica streaming");
    assert_eq!((table.nodes[0].ready, table.nodes[1].ready), (true, false));
    assert!(show_table(&table).contains("n2: etcd's alarm NOSPACE"));
}

#[test]
fn a_node_that_sees_itself_alone_shows_the_others_by_the_registry() {
    let known = vec![register(2, "sync_standby"), register(9, "")];
    let answers = [answer(2, known, &[])].into();
    let table = make_table("c", &members(), &answers);
    let names: Vec<&str> = table.nodes.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["n1", "n2", "n3", "n9"]);
    let ready: Vec<bool> = table.nodes.iter().map(|row| row.ready).collect();
    assert_eq!(ready, [false, true, false, true]);
    let text = show_table(&table);
    assert!(text.contains("n1, n3: it is not there"), "{text}");
}

#[test]
fn one_node_is_loudly_not_highly_available_and_no_terminal_is_moved() {
    let answers = [answer(1, vec![register(1, "\u{1b}[2Jleader")], &["a\u{7}b"])].into();
    let table = make_table("c", &members()[..1], &answers);
    let text = show_table(&table);
    assert!(text.contains("NOT HIGHLY AVAILABLE"), "{text}");
    assert!(!text.contains(['\u{1b}', '\u{7}']), "{text:?}");
    assert!(!make_table("c", &[], &BTreeMap::new()).ready);
}
