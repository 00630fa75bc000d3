//! The `db` image boots under OVMF and is given a seed in each of the ways that machines
//! are. With one of them it is looked at what it becomes, since that is the same with all: a
//! development cluster of one node, which says that it is not HA.

#[allow(dead_code, reason = "other tests look into the image")]
#[path = "support/image.rs"]
mod image;
#[allow(dead_code, reason = "other tests wait for more")]
#[path = "support/machine.rs"]
mod machine;
#[allow(dead_code, reason = "other tests use it alone")]
#[path = "support/tools.rs"]
mod tools;

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::Image;
use machine::{Machine, Outcome, read_answer};
use stanchion::cluster_dir::{ClusterDir, make_directory};
use stanchion::config::cluster::{Cluster, Role};
use stanchion::disk::region::Region;
use stanchion::lab::plan_cluster;
use stanchion::seed::{issue_seed, volume};
use stanchion::tools::set;

/// Far more than a boot and the start of a database take under emulation on two idle
/// processors.
const LIMIT: Duration = Duration::from_secs(900);
const ENDS: [&str; 4] = ["Kernel panic", "Freezing execution", "emergency mode", "Emergency Mode"];

/// Waits until the agent has a seed, and asks whose.
const FIND: &str = r#"
say() { printf '%s=%s\n' "$1" "$(printf %s "$2" | tr '\n' '|')"; }
for i in $(seq 180); do
  journalctl -b -u stanchion-agent -o cat | grep -q 'seed: n1 of cluster' && break
  sleep 2
done
say found "$(journalctl -b -u stanchion-agent -o cat | grep -m 1 'seed: n1 of cluster')"
"#;

/// Waits until the database has a leader, and asks what it has become.
const LOOK: &str = r#"
for i in $(seq 180); do
  stanchion-agent status --cluster | grep -q 'leader running' && break
  sleep 2
done
say table "$(stanchion-agent status --cluster 2>&1)"
stanchion-agent status --cluster >/dev/null 2>&1
say code "$?"
say status "$(stanchion-agent status 2>&1)"
say members "$(patronictl -c /etc/patroni/config.yml list --format json 2>&1)"
say row "$(psql -h /run/postgresql -U postgres -Atc 'create table t as select 42 as x; select x from t' postgres 2>&1 | tail -n 1)"
say name "$(uname -n)"
say address "$(ip -brief address show scope global)"
say watchdog "$(cd /sys/class/watchdog/watchdog0 && cat identity state timeout 2>&1)"
say failed "$(systemctl list-units --failed --plain --no-legend)"
"#;

/// One machine at a time: two slow each other down.
fn wait_turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A cluster of one node, and the seed of that.
fn make_seed(folder: &Path) -> (Cluster, Vec<u8>) {
    let network = "10.0.2.0/24".parse().unwrap();
    let cluster = plan_cluster("alone", network, 1, "db", &[Role::Db]).unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let path = folder.join("alone");
    make_directory(&path, &cluster, &Default::default(), now).unwrap();
    let directory = ClusterDir::open(&path, &cluster).unwrap();
    let seed = issue_seed(&cluster, &cluster.nodes[0], &directory, None, now).unwrap();
    (cluster, seed)
}

/// Boot a fresh machine that has what `attach` makes of the seed, let it find the seed at its
/// place and run a script after that. The cluster, and the console.
fn boot(
    image: &Image,
    place: &str,
    script: &str,
    attach: impl FnOnce(&Path, &[u8]) -> Vec<String>,
) -> (Cluster, String) {
    let _turn = wait_turn();
    let folder = tempfile::tempdir_in(image::scratch()).unwrap();
    let (cluster, seed) = make_seed(folder.path());
    assert!(cluster.is_single());
    let disk = folder.path().join("disk.raw");
    let (from, to) = (File::open(&image.raw).unwrap(), File::create(&disk).unwrap());
    let length = from.metadata().unwrap().len();
    to.set_len(length).unwrap();
    Region::whole(&to).unwrap().write_file_at(0, &from, length).unwrap();

    let mut attached = attach(folder.path(), &seed);
    // One that does nothing when it fires: this machine may be slow.
    attached.extend(["-device", "i6300esb", "-action", "watchdog=none"].map(str::to_string));
    let began = Instant::now();
    let mut machine =
        Machine::start_with(&image.tools[0], &disk, &format!("{FIND}{script}"), "", &attached);
    let outcome = machine.wait_for(&ENDS, LIMIT);
    let console = machine.console();
    assert_eq!(outcome, Outcome::PoweredOff, "the console:\n{console}");
    println!("from power-on to power-off with the seed from {place}: {:.0?}", began.elapsed());

    let found = read_answer(&console, "found");
    assert_eq!(found, format!("seed: n1 of cluster alone, from {place}"));
    assert!(!console.contains("PRIVATE KEY"), "a secret is on the console");
    (cluster, console)
}

fn expect_cluster_of_one(cluster: &Cluster, console: &str) {
    let answer = |name: &str| read_answer(console, name);
    let loud = "THIS IS A CLUSTER OF ONE NODE, FOR DEVELOPMENT: NOT HIGHLY AVAILABLE";
    // The agent's own line, not what the script shows of its status.
    let is_told = |line: &str| line.contains("stanchion-agent[") && line.ends_with(loud);
    assert!(console.lines().any(is_told), "the console does not say it:\n{console}");
    let table = answer("table");
    assert!(table.starts_with("alone: 0 of 1 nodes are ready|"), "{table}");
    for words in ["leader running", loud, "n1: not HA: this is a development cluster of one node"] {
        assert!(table.contains(words), "{words}: {table}");
    }
    assert_eq!(answer("code"), "3");
    let status = answer("status");
    assert!(status.contains("phase main, not ready|  - not HA: this is a"), "{status}");
    let members: serde_json::Value = serde_json::from_str(&answer("members")).unwrap();
    assert_eq!(members.as_array().map(Vec::len), Some(1), "{members}");
    assert_eq!((&members[0]["Role"], &members[0]["State"]), (&"Leader".into(), &"running".into()));
    assert_eq!(answer("row"), "42");
    assert_eq!(answer("name"), "n1");
    let address: Ipv4Addr = cluster.nodes[0].address;
    assert!(answer("address").contains(&format!("{address}/24")), "{}", answer("address"));
    // Patroni holds it, and it fires before the lease of the leader has ended.
    assert_eq!(answer("watchdog"), "i6300ESB timer|active|15");
    assert!(!answer("status").contains("watchdog:"), "{}", answer("status"));
    assert_eq!(answer("failed"), "");
}

#[test]
fn a_seeds_volume_makes_a_machine_a_cluster_of_one_that_says_so() {
    let Some(image) = image::provide(&[set::BOOT]) else { return };
    let (cluster, console) = boot(image, "the volume STANCHION", LOOK, |folder, seed| {
        let path = folder.join("n1.seed.img");
        let options = File::options().read(true).write(true).create_new(true).open(&path);
        volume::write_seed(&options.unwrap(), seed, 0).unwrap();
        let drive = format!("file={},format=raw,if=virtio,readonly=on", path.display());
        vec!["-drive".to_string(), drive]
    });
    expect_cluster_of_one(&cluster, &console);
}

#[test]
fn a_credential_of_the_firmware_is_found() {
    let Some(image) = image::provide(&[set::BOOT]) else { return };
    boot(image, "the credential stanchion.seed", "", |folder, seed| {
        let path = folder.join("n1.smbios");
        let text = STANDARD.encode(seed);
        fs::write(&path, format!("io.systemd.credential.binary:stanchion.seed={text}")).unwrap();
        vec!["-smbios".to_string(), format!("type=11,path={}", path.display())]
    });
}

#[test]
fn a_cloud_drive_is_found() {
    let Some(image) = image::provide(&[set::BOOT]) else { return };
    let Some(tools) = tools::find_tools(&["xorriso"]) else { return };
    boot(image, "the volume CIDATA", "", |folder, seed| {
        let (data, path) = (folder.join("user-data"), folder.join("cidata.iso"));
        fs::write(&data, seed).unwrap();
        let made = tools
            .command("xorriso")
            .unwrap()
            .args(["-as", "genisoimage", "-quiet", "-volid", "cidata", "-joliet", "-rock"])
            .arg("-output")
            .arg(&path)
            .arg(&data)
            .run();
        made.unwrap();
        vec!["-cdrom".to_string(), path.display().to_string()]
    });
}
