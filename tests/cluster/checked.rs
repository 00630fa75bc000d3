use crate::certificate::write_certificate;
use crate::project::Project;
use crate::{HEAD, make_project, node, three};

fn check(project: &Project, text: &str) -> String {
    project.write("cluster.toml", text);
    let ran = project.run(&["cluster", "check"]);
    ran.expect(0, &[]);
    ran.stdout
}

#[test]
fn a_new_file_is_good_as_it_is() {
    let project = make_project();
    project.run(&["cluster", "new"]).expect(0, &["wrote cluster.toml"]);
    let written = std::fs::read_to_string(project.root().join("cluster.toml")).unwrap();
    for key in ["name", "domain", "vip", "network", "gateway", "dns", "ntp", "profile = \"node\""] {
        assert!(written.contains(&format!("\n{key}")), "{key}:\n{written}");
    }
    // What it shows as comments is good, too.
    let all: String = written
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(code) if code.starts_with('[') || code.contains(" = ") => format!("{code}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    assert_ne!(all, written);
    write_certificate(&project, "site", &["netbox.example.org"], (-1, 90));
    for name in ["postgres-ca.pem", "redis-ca.pem"] {
        std::fs::copy(project.root().join("site.pem"), project.root().join(name)).unwrap();
    }
    for text in [&written, &all] {
        let shown = check(&project, text);
        assert!(shown.contains("3 nodes"), "{shown}");
    }
    let ran = project.run(&["cluster", "new"]);
    ran.expect(2, &["cluster.toml exists already", "name another file"]);
    project.run(&["cluster", "new", "other.toml", "--json"]).expect(0, &[]).events();
    project.run(&["cluster", "new", "no/such.toml"]).expect(2, &["there is no directory no"]);

    // So it is for the profiles that are shipped, with all roles.
    let shipped = ["--project", env!("CARGO_MANIFEST_DIR"), "cluster"];
    project.run(&[&shipped[..], &["new", "shipped.toml"]].concat()).expect(0, &[]);
    let ran = project.run(&[&shipped[..], &["check", "shipped.toml"]].concat());
    assert!(ran.expect(0, &[]).stdout.contains("role web    3 nodes"), "{}", ran.stdout);

    let edgeless = Project::new(&[
        ("profiles/only.toml", "description = \"p\"\nlayers = [\"a\"]\n"),
        ("layers/a/layer.toml", "description = \"a\"\nrole = \"db\"\n"),
    ]);
    edgeless.run(&["cluster", "new"]).expect(0, &[]);
    edgeless.run(&["cluster", "check"]).expect(0, &[]);
    edgeless.write("layers/a/layer.toml", "description = \"a\"\n");
    edgeless.run(&["cluster", "new", "x.toml"]).expect(2, &["no profile with the role db"]);
}

#[test]
fn the_list_says_what_holds_what_is_weak_and_what_to_look_at() {
    let project = make_project();
    let shown = check(&project, &three());
    for line in [
        "ok    nodes       3 nodes, their names and profiles are good",
        "ok    role db     3 nodes (n1, n2, n3): the database survives the loss of 1",
        "ok    role cache  3 nodes (n1, n2, n3)",
        "ok    role edge   3 nodes (n1, n2, n3)",
        "ok    zones       the db nodes are in 3 zones; the database outlives each",
        "ok    addresses   each once, all on 10.0.0.0/24, and the VIP 10.0.0.100 is no node's",
        "WARN  storage     no [storage]: media lie on the nodes alone and are not highly available",
        "WARN  clocks      no `ntp`: the nodes' clocks agree with each other, but with nobody else's",
        "look  backup      no [backup]: what all nodes lose together is lost for ever",
        "look  VIP         nothing else uses 10.0.0.100, and nobody's VRRP the id 51",
        " 2380  tcp   db          db                     etcd, among its members",
        "    -  vrrp  edge        edge                   who holds the VIP (unicast)",
        " 7443  tcp   every node  every node, operator   the agents",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "no `{line}` in:\n{shown}");
    }
    assert!(!shown.contains("web"), "{shown}");
}

#[test]
fn zones_that_take_the_majority_are_warned_of() {
    let project = make_project();
    let one = three().replace("\"z2\"", "\"z1\"").replace("\"z3\"", "\"z1\"");
    assert!(check(&project, &one).contains(
        "WARN  zones       all db nodes are in the zone z1: readiness will say not highly available"
    ));
    let two = three().replace("\"z2\"", "\"z1\"");
    assert!(check(&project, &two).contains(
        "WARN  zones       2 of 3 db nodes are in the zone z1: its loss stops the database"
    ));
}

#[test]
fn roles_with_too_few_nodes_are_warned_of() {
    let project = make_project();
    let nodes: String = (1..=3).map(|number| node(number, "db")).collect();
    let shown = check(
        &project,
        &format!("{HEAD}{nodes}{}{}{}", node(4, "cache"), node(5, "cache"), node(6, "edge")),
    );
    for line in [
        "WARN  role cache  2 nodes (n4, n5): Sentinel decides by majority; make it three",
        "WARN  role edge   1 node (n6): the VIP is gone with it",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "no `{line}` in:\n{shown}");
    }
}

#[test]
fn one_node_is_a_development_cluster_and_says_so() {
    let project = make_project();
    let alone = format!("{}{}", HEAD.replace("vip = \"10.0.0.100\"\n", ""), node(1, "node"));
    project.write("cluster.toml", &alone);
    let loud = "a development cluster, NOT highly available";
    let ran = project.run(&["cluster", "check"]);
    ran.expect(0, &[loud]);
    assert!(ran.stdout.contains(loud), "{}", ran.stdout);
    project.run(&["cluster", "init"]).expect(0, &[loud]);
    project.run(&["seed", "--all"]).expect(0, &[loud]);
    project.run(&["seed", "n1", "--quiet"]).expect(0, &[loud]);
}

#[test]
fn json_holds_the_cluster_and_the_list() {
    let project = make_project();
    project.write("cluster.toml", &three());
    let ran = project.run(&["cluster", "check", "--json"]);
    ran.expect(0, &[]);
    assert_eq!(ran.stderr, "");
    let [event] = &ran.events()[..] else { panic!("{}", ran.stdout) };
    assert_eq!(event["event"], "cluster_check");
    assert_eq!(event["cluster"]["network"], "10.0.0.0/24");
    assert_eq!(event["cluster"]["nodes"][0]["roles"], serde_json::json!(["db", "cache", "edge"]));
    assert_eq!(event["cluster"]["tuning"]["early_failover"], true);
    assert_eq!(event["highly_available"], false);
    let states: Vec<&str> =
        event["checks"].as_array().unwrap().iter().map(|c| c["state"].as_str().unwrap()).collect();
    assert!(["verified", "warning", "open"].iter().all(|state| states.contains(state)));
    assert!(event["ports"].as_array().unwrap().iter().any(|port| port["port"] == 5433));

    project.write("cluster.toml", &three().replace("\"n2\"", "\"n1\""));
    let ran = project.run(&["cluster", "check", "--json"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.events()[0]["text"].as_str().unwrap().contains("there twice"));
}
