//! Wrong seeds, and a machine outside the cluster: refused, told, nothing lost and nothing
//! shown.

#[allow(dead_code, reason = "other tests ask more of a cluster")]
#[path = "support/ha.rs"]
mod ha;
#[allow(dead_code, reason = "other tests look into the image")]
#[path = "support/image.rs"]
mod image;
#[path = "support/stranger.rs"]
mod stranger;

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ha::Ha;
use serde_json::json;
use stanchion::cluster_dir::{ClusterDir, make_directory};
use stanchion::config::cluster::Cluster;
use stanchion::lab::{Lab, console};
use stanchion::seed::{Seed, Verdict, issue_seed, verify_seed, volume};

const YEAR: u64 = 365 * 86_400;
const SOON: Duration = Duration::from_secs(20);
const WHOLE: Duration = Duration::from_secs(180);
/// Where a node finds the volume.
const VOLUME: &str = "/dev/disk/by-label/STANCHION";

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// A CA of three years ago, which has issued seeds that are no longer valid; and seeds of
/// today for n1 and n2, none for n3.
fn arm(lab: &Lab, cluster: &Cluster) {
    fs::remove_dir_all(lab.secrets()).unwrap();
    make_directory(&lab.secrets(), cluster, &Default::default(), now() - 3 * YEAR).unwrap();
    for node in ["n1", "n2"] {
        lab.set_seed(node, Some(&lab.make_seed(node).unwrap())).unwrap();
    }
    lab.set_seed("n3", None).unwrap();
}

/// Seeds of a cluster's own directory.
struct Forge<'a> {
    cluster: &'a Cluster,
    directory: ClusterDir,
}

impl<'a> Forge<'a> {
    fn open(path: &Path, cluster: &'a Cluster) -> Self {
        Forge { cluster, directory: ClusterDir::open(path, cluster).unwrap() }
    }

    fn issue(&self, node: &str, at: u64) -> Vec<u8> {
        let entry = self.cluster.find_node(node).unwrap();
        issue_seed(self.cluster, entry, &self.directory, None, at).unwrap()
    }

    /// Rightly signed, with the certificate of a machine that has another address.
    fn issue_for_another_address(&self, node: &str) -> Vec<u8> {
        let Verdict::Accepted(mut seed) = verify_seed(Some(&self.issue(node, now())), now(), None)
        else {
            panic!("a right seed is refused");
        };
        let mut moved = self.cluster.clone();
        let entry = moved.nodes.iter_mut().find(|entry| entry.name == node).unwrap();
        entry.address = std::net::Ipv4Addr::new(10, 89, 0, 77);
        let entry = moved.find_node(node).unwrap();
        let issued = self.directory.authority.certify_node(&moved, entry, now()).unwrap();
        (seed.certificate, seed.key) = (issued.certificate, issued.key);
        self.sign(&seed)
    }

    fn sign(&self, seed: &Seed) -> Vec<u8> {
        let text = serde_json::to_string(seed).unwrap();
        let signature = STANDARD.encode(self.directory.authority.sign(text.as_bytes()).unwrap());
        json!({ "seed": text, "signature": signature }).to_string().into_bytes()
    }
}

/// Attach a disk with a seed to a running node, in the place of the one before.
fn attach(ha: &Ha, node: &str, seed: &[u8]) {
    let folder = tempfile::tempdir_in(image::scratch()).unwrap();
    let path = folder.path().join("seed.img");
    let file = fs::File::options().create_new(true).read(true).write(true).open(&path).unwrap();
    volume::write_seed(&file, seed, now()).unwrap();
    // Small enough for a command line: the volume is nearly all zeroes.
    let bytes = fs::read(&path).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let text = STANDARD.encode(&bytes[..end]);
    ha.run(node, &["mkdir", "-p", "/dev/disk/by-label"]);
    ha.run(node, &["rm", "-f", "/run/seed.new", "/run/seed.text"]);
    for piece in text.as_bytes().chunks(60_000) {
        let piece = std::str::from_utf8(piece).unwrap();
        ha.run(node, &["sh", "-c", "printf %s \"$1\" >> /run/seed.text", "sh", piece]);
    }
    let make = format!(
        "base64 -d /run/seed.text > /run/seed.new && truncate -s {} /run/seed.new && \
         cp /run/seed.new {VOLUME}.new && mv {VOLUME}.new {VOLUME}",
        bytes.len()
    );
    ha.run(node, &["sh", "-c", &make]);
}

/// The node says this in its status and on its console, and never the seed's content.
#[track_caller]
fn expect_refusal(ha: &Ha, node: &str, words: &str) {
    let says = || {
        let status = ha.lab.exec(node, &["stanchion-agent", "status"], SOON).ok()?.text();
        status.contains(words).then_some(status)
    };
    let status = ha.wait_for(words, SOON, says);
    assert!(status.contains("waiting"), "{status}");
    let path = ha.lab.console_path(node).unwrap();
    let shows = || {
        let text = String::from_utf8_lossy(&console::read(&path).unwrap()).into_owned();
        text.contains(words).then_some(text)
    };
    let shown = ha.wait_for("the reason is on the console", SOON, shows);
    for secret in ["PRIVATE KEY", "postgres_superuser"] {
        assert!(!shown.contains(secret) && !status.contains(secret), "{secret} was shown");
    }
}

#[track_caller]
fn expect_join(ha: &Ha, node: &str) {
    let knows = || {
        let status = ha.lab.exec(node, &["stanchion-agent", "status"], SOON).ok()?.text();
        status.starts_with(&format!("{node} of cluster")).then_some(())
    };
    ha.wait_for("the right seed is taken", SOON, knows);
    ha.wait_for("the cluster is whole", WHOLE, || ha.is_whole().then_some(()));
}

/// What must be as it was while the node has no right seed.
fn read_data(ha: &Ha, node: &str) -> String {
    let script = "cat /var/mark /var/lib/stanchion/identity.json /var/lib/stanchion/etcd.json \
                  && find /var/lib/postgresql /var/lib/etcd /var/lib/redis -type f | sort | sha256sum";
    ha.run(node, &["sh", "-c", script])
}

#[test]
fn wrong_seeds_are_refused_and_a_stranger_gets_nothing() {
    let Some(ha) = Ha::create_by("seeds", |_| {}, arm) else { return };
    let forge = Forge::open(&ha.lab.secrets(), &ha.cluster);
    let right = forge.issue("n3", now());
    ha.start_all();

    // A fresh machine: it trusts the first seed that is right in itself.
    expect_refusal(&ha, "n3", "there is no seed: attach a volume labelled STANCHION");
    attach(&ha, "n3", &spoil(&right));
    expect_refusal(&ha, "n3", "the seed is damaged or was changed");
    attach(&ha, "n3", &forge.issue("n3", now() - 5 * YEAR / 2));
    expect_refusal(
        &ha,
        "n3",
        "the seed is not valid at this time: the node's certificate has expired",
    );
    attach(&ha, "n3", &forge.issue_for_another_address("n3"));
    expect_refusal(&ha, "n3", "its certificate is for another address");
    attach(&ha, "n3", &right);
    expect_join(&ha, "n3");

    refuse_after_a_start(&ha, &forge, &right);
    show_the_table(&ha);
    stranger::knock_everywhere(&ha);
}

/// A machine that has been a node: it knows whose it is.
fn refuse_after_a_start(ha: &Ha, forge: &Forge, right: &[u8]) {
    let folder = tempfile::tempdir_in(image::scratch()).unwrap();
    let foreign = folder.path().join("foreign");
    make_directory(&foreign, &ha.cluster, &Default::default(), now()).unwrap();
    let foreign = Forge::open(&foreign, &ha.cluster);
    ha.run("n3", &["sh", "-c", "echo mine > /var/mark"]);
    ha.lab.kill("n3").unwrap();
    ha.lab.set_seed("n3", None).unwrap();
    ha.lab.start("n3").unwrap();
    expect_refusal(ha, "n3", "there is no seed: attach a volume labelled STANCHION");
    let before = read_data(ha, "n3");
    assert!(before.contains("mine") && before.contains("\"n3\""), "{before}");
    let wrong = [
        (foreign.issue("n3", now()), "the seed is that of another cluster"),
        (spoil(right), "the seed is damaged or was changed"),
        (
            forge.issue("n2", now()),
            "the seed is for another node: this node is `n3`, the seed is for `n2`",
        ),
        (forge.issue("n3", now() - 5 * YEAR / 2), "the node's certificate has expired"),
    ];
    for (seed, words) in wrong {
        attach(ha, "n3", &seed);
        expect_refusal(ha, "n3", words);
        assert_eq!(read_data(ha, "n3"), before, "{words}");
    }
    // Two more looks.
    std::thread::sleep(Duration::from_secs(11));
    assert_eq!(read_data(ha, "n3"), before);
    let active = ha.lab.exec("n3", &["systemctl", "is-active", "patroni", "etcd"], SOON);
    assert!(!active.unwrap().text().lines().any(|line| line == "active"));
    attach(ha, "n3", right);
    expect_join(ha, "n3");
    assert!(read_data(ha, "n3").starts_with("mine"));
}

/// With one bit changed.
fn spoil(seed: &[u8]) -> Vec<u8> {
    let mut spoilt = seed.to_vec();
    spoilt[seed.len() / 2] ^= 1;
    spoilt
}

/// The operator's verb and the node's own show the same three nodes.
fn show_the_table(ha: &Ha) {
    // A node's registration is some seconds behind the node.
    let on_node = ha.wait_for("a table in which all are ready", 6 * SOON, || {
        let ran = ha.lab.exec("n2", &["stanchion-agent", "status", "--cluster"], SOON).ok()?;
        (ran.code == Some(0)).then(|| ran.text())
    });
    let [code, table] = run_status(ha, &[]);
    assert_eq!(code, "0", "{table}");
    for text in [&on_node, &table] {
        assert!(text.starts_with("seeds: 3 of 3 nodes are ready"), "{text}");
        for words in ["leader running", "sync_standby", "replica streaming", "here", "master"] {
            assert_eq!(text.matches(words).count(), 1, "{words}: {text}");
        }
    }
    ha.lab.partition("n3").unwrap();
    let [code, table] = run_status(ha, &[]);
    assert_eq!(code, "3", "{table}");
    let line = table.lines().find(|line| line.starts_with("n3")).unwrap();
    assert!(line.contains("no answer") && line.contains("NO"), "{table}");
    let [code, table] = run_status(ha, &["--node", "n3"]);
    assert!(code == "2" && table.contains("no node of `seeds` answers"), "{table}");
    ha.lab.heal("n3").unwrap();
    ha.wait_for("whole after the cut", WHOLE, || ha.is_whole().then_some(()));
}

/// Exit code, and what it wrote.
fn run_status(ha: &Ha, args: &[&str]) -> [String; 2] {
    let folder = ha.lab.secrets();
    let command = stanchion::command::Command::new(image::PROGRAM)
        .arg("status")
        .arg("--project")
        .arg(image::project("node"))
        .arg("--cluster")
        .arg(folder.with_file_name("cluster.toml"))
        .arg("--dir")
        .arg(&folder)
        .args(args);
    let output = ha.lab.spawn_inside(command).unwrap().wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    [
        output.status.code().map_or(String::new(), |code| code.to_string()),
        String::from_utf8_lossy(&text).into_owned(),
    ]
}
