//! What the agent renders on a node, from the shipped layers: every template with every kind
//! of node, and each configuration through the program that will read it.

#[path = "boot_templates/checkers.rs"]
mod checkers;
#[path = "boot_templates/contexts.rs"]
mod contexts;
#[path = "boot_templates/firewall.rs"]
mod firewall;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use contexts::{Kind, describe, list_kinds};
use stanchion::config::tree::TreeKind;
use stanchion::config::{Profile, Project};
use stanchion::template;

/// Where this project's own profiles and layers are.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn load(profile: &str) -> Profile {
    Project::find(root()).unwrap().load_profile(profile).unwrap()
}

/// All files that the agent makes on a node, by their path there.
fn render(kind: &Kind) -> BTreeMap<PathBuf, String> {
    let context = describe(kind);
    let mut rendered = BTreeMap::new();
    for layer in load(kind.profile).layers {
        for file in &layer.boot {
            let TreeKind::File { source, .. } = &file.kind else { continue };
            let text = fs::read_to_string(root().join(source)).unwrap();
            let shipped = format!("/usr/share/stanchion/boot/{}", layer.name);
            let target = Path::new("/").join(file.target.strip_prefix(shipped).unwrap());
            let (target, text) = match target.extension().is_some_and(|end| end == "j2") {
                true => {
                    let text = template::render(&text, source, &context);
                    (target.with_extension(""), text.unwrap_or_else(|error| panic!("{error}")))
                }
                false => (target, text),
            };
            rendered.insert(target, text);
        }
    }
    rendered
}

fn find<'a>(rendered: &'a BTreeMap<PathBuf, String>, path: &str) -> &'a str {
    rendered.get(Path::new(path)).unwrap_or_else(|| panic!("no {path}"))
}

#[test]
fn every_template_renders_for_every_kind_of_node() {
    for kind in list_kinds() {
        let rendered = render(&kind);
        assert!(rendered.contains_key(Path::new("/etc/nftables.conf")));
        for path in rendered.keys() {
            assert!(path.starts_with("/etc") || path.starts_with("/run"), "{path:?}");
        }
        // Whoever wants to look at them, or to try them out, finds them here.
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("rendered").join(kind.label);
        for (path, text) in rendered {
            let path = folder.join(path.strip_prefix("/").unwrap());
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }
}

#[test]
fn a_secret_is_in_files_that_only_its_service_reads() {
    for kind in list_kinds() {
        let rendered = render(&kind);
        for layer in load(kind.profile).layers {
            for file in layer.boot.iter().filter(|file| file.mode & 0o004 != 0) {
                let shipped = format!("/usr/share/stanchion/boot/{}", layer.name);
                let target = file.target.strip_prefix(shipped).unwrap();
                let Some(text) = rendered.get(&Path::new("/").join(target).with_extension(""))
                else {
                    continue;
                };
                assert!(!text.contains("secret-"), "{target:?} can be read by everyone");
            }
        }
    }
}

#[test]
fn only_nodes_reach_what_is_for_nodes() {
    let rendered = render(&list_kinds()[0]);
    let rules = find(&rendered, "/etc/nftables.conf");
    assert!(rules.contains("define nodes = { 10.9.0.1, 10.9.0.2, 10.9.0.3 }\n"), "{rules}");
    for line in rules.lines().filter(|line| line.starts_with("add rule")) {
        let is_for_all = line.contains("input tcp dport 7443 accept")
            || line.contains("input tcp dport { 80, 443, 5433-5435, 6379 } accept");
        assert!(is_for_all || line.contains(" ip saddr "), "{line}");
    }
    assert!(rules.contains("input ip saddr $edges ip protocol 112 accept\n"), "{rules}");
    for kind in list_kinds().iter().filter(|kind| !kind.roles.contains(&"edge")) {
        let rendered = render(kind);
        let rules = find(&rendered, "/etc/nftables.conf");
        assert!(
            !rules.contains("protocol 112") && !rules.contains("443,"),
            "{}: {rules}",
            kind.label
        );
    }
}

#[test]
fn patroni_starts_with_the_settings_that_the_agent_reconciles() {
    for kind in list_kinds().iter().filter(|kind| kind.roles.contains(&"db")) {
        let rendered = render(kind);
        let dynamic = find(&rendered, "/etc/patroni/dynamic.json");
        let config = find(&rendered, "/etc/patroni/config.yml");
        let indented: String = dynamic.lines().map(|line| format!("    {line}\n")).collect();
        assert!(config.contains(&format!("  dcs:\n{indented}  method: initdb\n")), "{config}");
        let dynamic: serde_json::Value = serde_json::from_str(dynamic).unwrap();
        let of = |name: &str| dynamic[name].as_u64().unwrap();
        assert!(of("loop_wait") + 2 * of("retry_timeout") <= of("ttl"), "{dynamic}");
        // One port behind all addresses.
        assert!(config.contains(&format!("  listen: \"{},127.0.0.1:5432\"\n", kind.address())));
        let hba = config.split("pg_hba:\n").nth(1).unwrap().split("\n\n").next().unwrap();
        let lines = || hba.lines().map(str::trim).filter(|line| line.starts_with("- "));
        assert!(lines().all(|line| !line.contains("trust") && !line.contains(" md5")), "{hba}");
        let open = |line: &&str| line.starts_with("- host ") && !line.ends_with(" reject");
        assert_eq!(lines().filter(open).count(), 0, "{hba}");
    }
}

#[test]
fn backups_go_where_the_cluster_file_says() {
    let kinds = list_kinds();
    let show = |label: &str| {
        let rendered = render(kinds.iter().find(|kind| kind.label == label).unwrap());
        let path = |path: &str| find(&rendered, path).to_string();
        let dynamic: serde_json::Value =
            serde_json::from_str(&path("/etc/patroni/dynamic.json")).unwrap();
        let archive = dynamic["postgresql"]["parameters"]["archive_command"].clone();
        let drop_in = path("/etc/systemd/system/patroni.service.d/20-backup.conf");
        (path("/etc/pgbackrest/pgbackrest.conf"), archive, drop_in)
    };
    let push = "pgbackrest --stanza=lab archive-push %p";
    let (config, archive, drop_in) = show("node");
    assert!(config.contains("\nrepo1-path=/var/backups/stanchion\n"), "{config}");
    assert!(!config.contains("s3") && !config.contains("cipher"), "{config}");
    assert_eq!(archive, push);
    assert!(drop_in.contains("\nReadWritePaths=-/var/backups/stanchion\n"), "{drop_in}");

    let (config, archive, drop_in) = show("db");
    for line in [
        "repo1-type=s3",
        "repo1-path=/lab",
        "repo1-s3-endpoint=s3.example.org:9000",
        "repo1-retention-full=8",
        "repo1-cipher-type=aes-256-cbc",
        "repo1-cipher-pass=secret-backup_cipher-_0123456789abcdef",
    ] {
        assert!(config.contains(&format!("\n{line}\n")), "{line}: {config}");
    }
    assert_eq!(archive, push);
    assert!(!drop_in.contains("/var/backups"), "{drop_in}");

    let (config, archive, _) = show("single-db");
    assert!(!config.contains("repo1"), "{config}");
    assert_eq!(archive, "/bin/true");
}

#[test]
fn a_redis_follows_only_whom_the_sentinels_named() {
    for kind in list_kinds().iter().filter(|kind| kind.roles.contains(&"cache")) {
        for (master, expected) in
            [(None, None), (Some(kind.address()), None), (Some("10.9.0.9"), Some("10.9.0.9"))]
        {
            let rendered = render(&Kind { redis_master: master, ..*kind });
            let config = find(&rendered, "/etc/stanchion-redis/redis.conf");
            let followed = config.lines().find_map(|line| line.strip_prefix("replicaof "));
            assert_eq!(followed, expected.map(|master| format!("{master} 6380")).as_deref());
            let least = if kind.single { "0" } else { "1" };
            assert!(config.contains(&format!("min-replicas-to-write {least}\n")), "{config}");
            let sentinel = find(&rendered, "/etc/stanchion-sentinel/sentinel.conf");
            let quorum = if kind.single { 1 } else { 2 };
            let monitored = sentinel.lines().find(|line| line.starts_with("sentinel monitor "));
            let wanted = master.map(|at| format!("sentinel monitor stanchion {at} 6380 {quorum}"));
            assert_eq!(monitored, wanted.as_deref());
        }
    }
}

#[test]
fn the_shared_address_is_kept_by_edges_in_a_fixed_order() {
    let mut priorities = Vec::new();
    for number in 1..=3 {
        let rendered = render(&Kind { number, ..list_kinds()[0] });
        let config = find(&rendered, "/etc/keepalived/keepalived.conf");
        assert!(config.contains("state BACKUP\n    nopreempt\n"), "{config}");
        let own = format!("        10.9.0.{number}\n");
        let mut peers = config.lines().filter(|line| line.starts_with("        10.9.0."));
        assert_eq!(peers.clone().count(), 3, "two peers and the shared address: {config}");
        assert!(peers.any(|line| line == "        10.9.0.100/32"), "{config}");
        assert!(!config.contains(&own), "{config}");
        let mut lines = config.lines();
        let priority = lines.find_map(|line| line.strip_prefix("    priority ")).unwrap();
        priorities.push(priority.to_string());
    }
    assert_eq!(priorities, ["99", "98", "97"]);
    for kind in list_kinds().iter().filter(|kind| kind.vip.is_none() && kind.profile == "node") {
        let rendered = render(kind);
        assert_eq!(rendered.get(Path::new("/etc/keepalived/keepalived.conf")).unwrap(), "");
    }
}
