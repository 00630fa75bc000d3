//! The operator's verbs against a cluster that is at work: what they do, and what they
//! refuse.

#[allow(dead_code, reason = "other tests do more with a cluster")]
#[path = "support/ha.rs"]
mod ha;
#[allow(dead_code, reason = "other tests look into the image")]
#[path = "support/image.rs"]
mod image;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use flate2::read::GzDecoder;
use ha::report::find_longest_pause;
use ha::{Ha, WHOLE};
use stanchion::agent::operate::Redactor;

const TALK: &str = "\
import json, ssl, sys, urllib.error, urllib.request
tls = ssl.create_default_context(cafile='/run/stanchion/tls/ca.pem')
tls.load_cert_chain('/run/stanchion/tls/node.pem', '/run/stanchion/tls/node.key')
for path, body in (('switchover', b'{}'), ('job/x/0', None)):
    try:
        urllib.request.urlopen(urllib.request.Request(sys.argv[1] + path, body), context=tls)
    except urllib.error.HTTPError as error:
        print(error.code)
";

/// One cluster, whole before each.
#[test]
fn an_operator_does_what_is_safe_and_nothing_else() {
    let Some(ha) = Ha::create("operate", |_| {}) else { return };
    ha.start_all();
    ha.wait_until_whole();
    refuse_nodes(&ha);
    switch_over(&ha);
    maintain(&ha);
    gather_a_bundle(&ha);
    take_data_anew(&ha);
    replace_a_node(&ha);
    lose_two_for_ever(&ha);
}

/// A node's certificate is good for its own work, and for no verb.
fn refuse_nodes(ha: &Ha) {
    let url = format!("https://{}:7443/operate/", ha.lab.address("n2").unwrap());
    let said = ha.run("n1", &["python3", "-I", "-c", TALK, &url]);
    assert_eq!(said.split_whitespace().collect::<Vec<_>>(), ["403", "403"]);
    let journal = ha.run("n2", &["journalctl", "-b", "-u", "stanchion-agent", "-o", "cat"]);
    assert!(journal.contains("operator: refused switchover to n1 at 10.89.0.11"), "{journal}");
    ha.wait_for("whole after it", WHOLE, || ha.is_whole().then_some(()));
}

fn switch_over(ha: &Ha) {
    let leader = ha.wait_for("a leader", WHOLE, || ha.find_leader());
    let standby = ha.wait_for("a synchronous standby", WHOLE, || ha.find_standby());
    let third = ha.others(&leader).into_iter().find(|node| *node != standby).unwrap();
    ha.operate(&["switchover"]).expect_refusal("nobody has confirmed it");
    ha.operate(&["switchover", "--yes", "--to", third]).expect_refusal("may lack the last writes");
    ha.operate(&["switchover", "--yes", "--to", &leader]).expect_refusal("leader already");
    let tell = |verb| ha.run(&leader, &["patronictl", "-c", "/etc/patroni/config.yml", verb]);
    tell("pause");
    ha.operate(&["switchover", "--yes"]).expect_refusal("Patroni is paused");
    tell("resume");
    ha.wait_for("whole before it", WHOLE, || ha.is_whole().then_some(()));

    let ledger = ha.write();
    ledger.wait_for_write(Duration::from_secs(30)).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let event = Instant::now();
    let done = ha.operate(&["switchover", "--yes"]).expect("switchover");
    std::thread::sleep(Duration::from_secs(1));
    let (end, record) = (Instant::now(), ledger.stop());
    assert_eq!((&done["from"], &done["to"]), (&leader.as_str().into(), &standby.as_str().into()));
    let told = done["writes_stood_still"].as_f64().expect("it was measured");
    let seen = find_longest_pause(&record.acknowledged, event, end);
    eprintln!("writes stood still for {told:.1} s as told, {seen:.1} s as a client saw it");
    assert!(told > 0.0 && told < seen + 3.0, "told {told}, seen {seen}");
    assert_eq!(ha.find_lost(&record), [0_i64; 0]);
    assert_eq!(record.list_servers().len(), 2);
    ha.wait_for("whole after it", WHOLE, || ha.is_whole().then_some(()));
    assert_eq!(ha.find_leader(), Some(standby));
}

fn maintain(ha: &Ha) {
    let show = || ha.operate(&["maintenance"]).expect("maintenance")["maintenance"].clone();
    assert!(show().is_null());
    ha.operate(&["maintenance", "on"]).expect_refusal("nobody has confirmed it");
    ha.operate(&["maintenance", "on", "--yes", "--reason", "a\nb"]).expect_refusal("no reason");
    ha.operate(&["maintenance", "on", "--yes", "--reason", "moving racks"]).expect("maintenance");
    assert_eq!(show()["reason"], "moving racks");
    assert!(show()["until"].is_null());
    ha.operate(&["maintenance", "off"]).expect("maintenance");
    assert!(show().is_null());
    let on = ["maintenance", "on", "--yes", "--for", "5s"];
    assert!(ha.operate(&on).expect("maintenance")["maintenance"]["until"].is_u64());
    ha.wait_for("it ends by itself", Duration::from_secs(30), || show().is_null().then_some(()));
    ha.wait_for("whole after it", WHOLE, || ha.is_whole().then_some(()));
}

/// All secrets that there are stand in a journal in every form, and in no bundle.
fn gather_a_bundle(ha: &Ha) {
    let directory = ha.lab.secrets();
    let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap();
    let table: toml::Table = toml::from_str(&read("secrets.toml")).unwrap();
    let mut secrets: Vec<String> =
        table.values().map(|value| value.as_str().unwrap().to_string()).collect();
    for name in ["ca.key", "operator.key"] {
        let key = read(name);
        secrets.extend(key.lines().filter(|line| !line.starts_with("-----")).map(String::from));
    }
    assert!(secrets.len() > 12);
    let hex = |text: &str| text.bytes().map(|b| format!("{b:02x}")).collect::<String>();
    let url = |text: &str| text.replace('/', "%2F").replace('+', "%2B").replace('=', "%3D");
    for secret in &secrets {
        let basic = BASE64_STANDARD.encode(format!("user:{secret}"));
        for form in [secret.clone(), hex(secret), url(secret), basic] {
            ha.run("n1", &["logger", "-t", "planted", &format!("found <{form}>")]);
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("bundle.tar.gz");
    let done = ha.operate(&["support-bundle", "--out", out.to_str().unwrap()]);
    assert_eq!(done.expect("support_bundle")["nodes"].as_array().unwrap().len(), 3);
    ha.operate(&["support-bundle", "--out", out.to_str().unwrap()])
        .expect_refusal("exists already");

    let files = read_bundle(&out);
    let redactor = Redactor::new(secrets.iter().map(String::as_str));
    for (name, text) in &files {
        assert!(!redactor.finds_any(text), "a secret is in {name}");
        assert!(!text.contains("PRIVATE KEY-----"), "a key is in {name}");
    }
    let find = |end: &str| {
        let found = files.iter().find(|(name, _)| name.ends_with(end));
        &found.unwrap_or_else(|| panic!("no {end} in the bundle")).1
    };
    assert!(find("n1/journal.txt").contains("planted"));
    assert!(find("n1/journal.txt").contains("found <[LEFT-OUT]>"));
    assert!(find("n2/etc/patroni/config.yml").contains("password: \"[LEFT-OUT]\""));
    assert!(find("n3/status.json").contains("\"ready\": true"));
    assert!(find("status.txt").contains("operate: 3 of 3 nodes are ready"));
}

fn read_bundle(path: &Path) -> Vec<(String, String)> {
    let mut archive = tar::Archive::new(GzDecoder::new(fs::File::open(path).unwrap()));
    let mut files = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().to_str().unwrap().to_string();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        files.push((name, text));
    }
    files
}

fn take_data_anew(ha: &Ha) {
    let leader = ha.wait_for("a leader", WHOLE, || ha.find_leader());
    let other = ha.others(&leader)[0].to_string();
    ha.operate(&["node", "reinit", &leader, "--yes"]).expect_refusal("it is the leader");
    ha.operate(&["node", "reinit", &other, "--yes"]).expect("node_reinit");
    ha.wait_for("whole after it", WHOLE, || ha.is_whole().then_some(()));
}

/// A machine is gone with its disk; another gets its name by a new seed.
fn replace_a_node(ha: &Ha) {
    let leader = ha.wait_for("a leader", WHOLE, || ha.find_leader());
    let lost = ha.others(&leader)[0].to_string();
    ha.operate(&["node", "replace", &leader, "--yes"]).expect_refusal("switchover");
    ha.operate(&["node", "replace", &lost, "--yes"]).expect_refusal("it runs");
    ha.operate(&["node", "replace", "n7", "--yes"]).expect_refusal("no node `n7`");
    ha.lab.kill(&lost).unwrap();
    ha.lab.destroy(&lost).unwrap();
    let gone = || ha.list_registered().iter().all(|node| node["name"] != lost).then_some(());
    ha.wait_for("the registry misses it", WHOLE, gone);

    let folder = tempfile::tempdir().unwrap();
    let seed = folder.path().join(format!("{lost}.seed.json"));
    let out = folder.path().to_str().unwrap();
    let args = ["node", "replace", &lost, "--yes", "--wait", "--format", "file", "--out", out];
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| ha.operate(&args));
        let begun = Instant::now();
        while !seed.exists() {
            assert!(begun.elapsed() < Duration::from_secs(60), "no seed was made");
            std::thread::sleep(Duration::from_millis(100));
        }
        ha.lab.set_seed(&lost, Some(&fs::read(&seed).unwrap())).unwrap();
        ha.lab.start(&lost).unwrap();
        let done = asked.join().unwrap().expect("node_replace");
        eprintln!("{lost} was a whole member {:.1} s after", done["seconds"].as_f64().unwrap());
    });
    ha.wait_for("whole after it", WHOLE, || ha.is_whole().then_some(()));
}

/// Two of three are gone with their disks: etcd goes on from the third, and nothing that was
/// acknowledged is lost when that one has it.
fn lose_two_for_ever(ha: &Ha) {
    let leader = ha.wait_for("a leader", WHOLE, || ha.find_leader());
    let force = ["node", "force-quorum", &leader, "--yes"];
    ha.operate(&force).expect_refusal("it has a majority");
    let ledger = ha.write();
    ledger.wait_for_write(Duration::from_secs(30)).unwrap();
    let record = ledger.stop();
    for other in ha.others(&leader) {
        ha.lab.kill(other).unwrap();
    }
    let lives = ha.others(&leader)[0].to_string();
    ha.lab.start(&lives).unwrap();
    ha.wait_for("the other's agent answers", WHOLE, || ha.get_status(&lives).map(drop));
    let refused = ha.operate(&force);
    assert_eq!(refused.code, Some(2), "{}", refused.text);
    ha.lab.kill(&lives).unwrap();
    for other in ha.others(&leader) {
        ha.lab.destroy(other).unwrap();
    }
    let done = || (ha.operate(&force).code == Some(0)).then_some(());
    ha.wait_for("etcd goes on alone", WHOLE, done);
    for other in ha.others(&leader) {
        ha.lab.start(other).unwrap();
    }
    ha.wait_for("whole with fresh machines", WHOLE, || ha.is_whole().then_some(()));
    assert_eq!(ha.find_lost(&record), [0_i64; 0]);
}
