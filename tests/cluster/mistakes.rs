use crate::project::Project;
use crate::{HEAD, make_project, node, three};

/// What is said about a cluster file; it is the user's to mend.
#[track_caller]
fn check_in(project: &Project, text: &str, expected: &str) {
    project.write("cluster.toml", text);
    let ran = project.run(&["cluster", "check"]);
    ran.expect(2, &[]);
    assert_eq!(ran.stderr.trim_end(), format!("error: {expected}"), "{text}");
    assert_eq!(ran.stdout, "");
}

#[test]
fn keys_and_types_are_told_with_their_lines() {
    let project = make_project();
    let check = |text: &str, expected: &str| check_in(&project, text, expected);
    check(
        &format!("{HEAD}getaway = \"10.0.0.1\"\n"),
        "unknown key `getaway`\n  at: cluster.toml:5\n  why: a cluster file has no such key\n  help: did you mean `gateway`?",
    );
    check(
        &three().replacen("zone", "zoen", 1),
        "unknown key `zoen`\n  at: cluster.toml:8\n  why: `node` has no such key\n  help: did you mean `zone`?",
    );
    check(
        &three().replacen("zone = \"z1\"\n", "", 1),
        "missing key `zone`\n  at: cluster.toml:5\n  why: `node` needs it",
    );
    check(
        "name = \"lab\"\n",
        "missing key `domain`\n  at: cluster.toml:1\n  why: a cluster file needs it",
    );
    check(
        &format!("{HEAD}nodes = 1\n"),
        "unknown key `nodes`\n  at: cluster.toml:5\n  why: a cluster file has no such key\n  help: did you mean `node`?",
    );
    check(
        &format!("{HEAD}[node]\nname = \"n1\"\n"),
        "`node` must be an array, not a table\n  at: cluster.toml:5\n  help: write `[[node]]`",
    );
    check(
        &format!("{}[tuning]\npatroni_ttl = \"20\"\n", three()),
        "`tuning.patroni_ttl` must be a whole number, not the string `20`\n  at: cluster.toml:21",
    );
}

#[test]
fn names_are_dns_labels_and_once() {
    let project = make_project();
    let check = |from: &str, to: &str, expected: &str| {
        check_in(&project, &three().replacen(from, to, 1), expected);
    };
    let label =
        "write lower-case letters, digits and `-`, beginning and ending with none, at most 63";
    for bad in ["", "-n1", "n1-", "N1", "n.1", "n_1", "42", "n\\u0001", &"n".repeat(64)] {
        let shown = match bad {
            "n\\u0001" => "n\\u{1}".to_string(),
            long if long.len() > 60 => format!("{}…", &long[..60]),
            bad => bad.to_string(),
        };
        check(
            "name = \"n1\"",
            &format!("name = \"{bad}\""),
            &format!("bad node name `{shown}`\n  at: cluster.toml:6\n  help: {label}"),
        );
    }
    check(
        "name = \"lab\"",
        "name = \"../lab\"",
        &format!("bad cluster name `../lab`\n  at: cluster.toml:1\n  help: {label}"),
    );
    check(
        "zone = \"z2\"",
        "zone = \"Rack 2\"",
        &format!("bad zone `Rack 2`\n  at: cluster.toml:13\n  help: {label}"),
    );
    check(
        "domain = \"lab.test\"",
        "domain = \"lab..test\"",
        "bad domain `lab..test`\n  at: cluster.toml:2\n  help: write labels with dots between, at most 180 characters, such as netbox.example.org",
    );
    check(
        "name = \"n2\"",
        "name = \"n1\"",
        "the node `n1` is there twice\n  at: cluster.toml:11\n  why: line 6 has it already",
    );
    check(
        "name = \"n2\"",
        "name = \"db\"",
        "no node can be called `db`\n  at: cluster.toml:11\n  why: in a cluster these names mean something else: db, cache, netbox, localhost, operator, ca, seeds",
    );
}

#[test]
fn addresses_are_on_the_network_and_once() {
    let project = make_project();
    let check = |from: &str, to: &str, expected: &str| {
        check_in(&project, &three().replacen(from, to, 1), expected);
    };
    check(
        "10.0.0.2\"",
        "10.0.0.1\"",
        "two nodes have the address 10.0.0.1\n  at: cluster.toml:12\n  why: line 7 has it already",
    );
    for bad in ["10.0.1.2", "10.0.0.0", "10.0.0.255"] {
        check(
            "10.0.0.2\"",
            &format!("{bad}\""),
            &format!(
                "no machine on the network 10.0.0.0/24 can have {bad}\n  at: cluster.toml:12\n  help: take one from 10.0.0.1 to 10.0.0.254"
            ),
        );
    }
    check(
        "10.0.0.2\"",
        "10.0.0.2/24\"",
        "bad address `10.0.0.2/24` in `node.address`\n  at: cluster.toml:12\n  help: write it like 10.0.0.11",
    );
    check(
        "10.0.0.100",
        "10.0.0.3",
        "`vip` is 10.0.0.3, the address of the node `n3`\n  at: cluster.toml:4\n  help: take one that is free",
    );
    check(
        "10.0.0.100",
        "10.9.0.100",
        "no machine on the network 10.0.0.0/24 can have 10.9.0.100\n  at: cluster.toml:4\n  help: take one from 10.0.0.1 to 10.0.0.254",
    );
    check(
        "vip = \"10.0.0.100\"",
        "vip = \"10.0.0.100\"\ngateway = \"10.0.0.1\"",
        "`gateway` is 10.0.0.1, the address of the node `n1`\n  at: cluster.toml:5\n  help: take one that is free",
    );
    check(
        "vip = \"10.0.0.100\"",
        "vip = \"10.0.0.100\"\ngateway = \"10.0.0.100\"",
        "`vip` is 10.0.0.100, the address of the gateway\n  at: cluster.toml:4\n  help: take one that is free",
    );
    check(
        "10.0.0.0/24",
        "10.0.0.7/24",
        "bad network `10.0.0.7/24`\n  at: cluster.toml:3\n  help: this is an address inside a network: write 10.0.0.0/24",
    );
    check(
        "10.0.0.0/24",
        "127.0.0.0/24",
        "machines cannot have addresses of the network 127.0.0.0/24\n  at: cluster.toml:3",
    );
    check(
        "10.0.0.0/24",
        "10.0.0.0/31",
        "the network 10.0.0.0/31 has a prefix of 31 bits\n  at: cluster.toml:3\n  help: take one from 8 to 30",
    );
    check(
        "vip = \"10.0.0.100\"",
        "vip = \"10.0.0.100\"\nntp = [\"a b\"]",
        "bad time server `a b`\n  at: cluster.toml:5\n  help: write a name or an address",
    );
    check(
        "vip = \"10.0.0.100\"",
        "vip = \"10.0.0.100\"\ndns = [\"10.0.0.53\",\n\"127.0.0.53\"]",
        "`127.0.0.53` in `dns` is no server's address\n  at: cluster.toml:6",
    );
}

#[test]
fn profiles_are_the_projects_and_have_roles() {
    let project = make_project();
    check_in(
        &project,
        &three().replacen("profile = \"node\"", "profile = \"noed\"", 1),
        "there is no profile `noed`\n  at: cluster.toml:9\n  why: the project has: cache, db, edge, node, none, web\n  help: did you mean `node`?",
    );
    check_in(
        &project,
        &three().replacen("profile = \"node\"", "profile = \"none\"", 1),
        "the profile `none` has no role\n  at: cluster.toml:9\n  help: add a layer with a `role` to the profile, or take another",
    );
    project.write("layers/db/layer.toml", "description = \"db\"\nrole = \"bd\"\n");
    project.write("cluster.toml", &three());
    project.run(&["cluster", "check"]).expect(
        2,
        &[
            "cluster.toml:9",
            "there is no role `bd`",
            "layers/db/layer.toml:2",
            "did you mean `db`?",
        ],
    );
}

#[test]
fn the_members_of_etcd_are_three_or_more_and_odd() {
    let project = make_project();
    let why = "etcd decides by majority, so there must be three or more, and an odd number";
    let help = "make it three or five; one node alone is a development cluster";
    for (profiles, what) in [
        (&["node", "node"][..], "2 nodes have the role db"),
        (&["node", "node", "node", "db"], "4 nodes have the role db"),
        (&["node", "cache", "cache"], "1 of several nodes has the role db"),
        (&["edge"], "no node has the role db"),
    ] {
        let nodes: String =
            (1..).zip(profiles).map(|(number, profile)| node(number, profile)).collect();
        let line = 4 + 5 * profiles.len();
        check_in(
            &project,
            &format!("{HEAD}{nodes}"),
            &format!("{what}\n  at: cluster.toml:{line}\n  why: {why}\n  help: {help}"),
        );
    }
    check_in(
        &project,
        HEAD,
        "the cluster has 0 nodes\n  at: cluster.toml\n  help: write a `[[node]]` for each machine: three or more, or one for development",
    );
}

#[test]
fn a_vip_has_edges_and_edges_have_a_vip() {
    let project = make_project();
    check_in(
        &project,
        &three().replace("profile = \"node\"", "profile = \"db\""),
        "there is a `vip`, and no node that can hold it\n  at: cluster.toml:4\n  help: give a node a profile with the role edge",
    );
    check_in(
        &project,
        &three().replace("vip = \"10.0.0.100\"\n", ""),
        "3 nodes have the role edge, and there is no `vip`\n  at: cluster.toml:1\n  help: add `vip`: a free address on the network that clients talk to",
    );
}

#[test]
fn media_of_two_web_nodes_need_a_bucket() {
    let project = make_project();
    let text = format!("{}{}{}", three(), node(4, "web"), node(5, "web"));
    check_in(
        &project,
        &text,
        "2 nodes have the role web, and there is no `[storage]`\n  at: cluster.toml:1\n  why: media that lie on one node are gone with it\n  help: add `[storage]` with `endpoint`, `bucket` and `region`",
    );
    let storage =
        "[storage]\nendpoint = \"https://s3.test\"\nbucket = \"media\"\nregion = \"eu\"\n";
    project.write("cluster.toml", &format!("{text}{storage}"));
    project.run(&["cluster", "check"]).expect(0, &[]);
    for bad in ["s3.test", "https://", "https://s3.test/x", "https://s3.test:0", "https://a b"] {
        check_in(
            &project,
            &format!("{text}{}", storage.replace("https://s3.test", bad)),
            &format!(
                "bad endpoint `{bad}`\n  at: cluster.toml:31\n  help: write https://HOST or https://HOST:PORT, without a path"
            ),
        );
    }
    check_in(
        &project,
        &format!("{text}{}", storage.replace("media", "My Bucket")),
        "bad bucket `My Bucket`\n  at: cluster.toml:32\n  help: write 3 to 63 lower-case letters, digits, `-` and `.`",
    );
}

#[test]
fn tuning_stays_within_what_patroni_takes() {
    let project = make_project();
    let check = |line: &str, expected: &str| {
        check_in(&project, &format!("{}[tuning]\n{line}\n", three()), expected);
    };
    check(
        "patroni_ttl = 19",
        "bad `tuning.patroni_ttl` `19`\n  at: cluster.toml:21\n  help: take one from 20 to 600 seconds",
    );
    check(
        "patroni_ttl = 20\npatroni_retry_timeout = 10",
        "`tuning.patroni_ttl` is 20, and too short\n  at: cluster.toml:21\n  why: a leader must be able to try twice within its lease: patroni_loop_wait + 2 x patroni_retry_timeout is 22",
    );
    check(
        "vrrp_router_id = 0",
        "bad `tuning.vrrp_router_id` `0`\n  at: cluster.toml:21\n  help: take one from 1 to 255",
    );
    check(
        "vrrp_router_id = 256",
        "bad `tuning.vrrp_router_id` `256`\n  at: cluster.toml:21\n  help: take one from 1 to 255",
    );
}

#[test]
fn a_file_that_is_none_is_told() {
    let project = make_project();
    let ran = project.run(&["cluster", "check"]);
    ran.expect(2, &["there is no cluster file `cluster.toml`", "stanchion cluster new"]);
    project.run(&["cluster", "check", "profiles"]).expect(2, &["`profiles` is no file"]);
    std::fs::write(project.root().join("cluster.toml"), b"name = \"\xff\"").unwrap();
    project.run(&["cluster", "check"]).expect(2, &["not UTF-8 text", "cluster.toml:1"]);
    std::fs::write(project.root().join("cluster.toml"), "[".repeat(100_000)).unwrap();
    project.run(&["cluster", "check"]).expect(2, &["TOML syntax"]);
    std::fs::write(project.root().join("cluster.toml"), "#".repeat(1 << 21)).unwrap();
    project.run(&["cluster", "check"]).expect(2, &["cluster.toml is too long"]);
    let many: String = (0..70).map(|i| node(i + 1, "node")).collect();
    project.write("cluster.toml", &format!("{HEAD}{many}"));
    project.run(&["cluster", "check"]).expect(2, &["70 nodes", "64 are the most"]);
}

#[test]
fn a_path_that_is_no_text_makes_nothing_panic() {
    use std::os::unix::ffi::OsStrExt;
    let project = make_project();
    project.write("cluster.toml", &three());
    let odd = std::ffi::OsStr::from_bytes(b"odd\xff");
    for args in
        [&["cluster", "new"][..], &["cluster", "init", "--dir"], &["seed", "--all", "--dir"]]
    {
        let mut command = project.command(args);
        let target = if args[1] == "new" { odd.into() } else { project.root().join(odd).join("d") };
        std::fs::create_dir_all(project.root().join(odd)).unwrap();
        if args[1] == "new" {
            std::fs::remove_dir(project.root().join(odd)).unwrap();
        }
        command.arg(target).arg("--json");
        crate::project::run(command).expect(0, &[]);
        let _ = std::fs::remove_file(project.root().join(odd));
    }
}
