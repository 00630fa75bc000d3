//! Agents that join real etcd members: three nodes with a root folder each, in one network
//! namespace, with a stand-in for systemd that runs etcd and nothing else.

#[path = "support/etcd.rs"]
mod etcd;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use etcd::provide_etcd;
use serde_json::Value;
use stanchion::cluster_dir::{ClusterDir, make_directory};
use stanchion::config::cluster::{Cluster, Ipv4Network, Node, Role, Tuning};
use stanchion::seed::issue_seed;

struct World {
    folder: tempfile::TempDir,
    etcd: PathBuf,
    /// Processes that hold namespaces open: that of the bridge, then one a node.
    holders: Vec<Child>,
    agents: Vec<Option<Child>>,
    cluster: Cluster,
}

impl World {
    /// Three db nodes with their seeds, nothing started. `None`: it cannot be tried here.
    fn make() -> Option<World> {
        let folder = tempfile::tempdir().unwrap();
        let etcd = provide_etcd(&folder.path().join("etcd"))?;
        let holders = make_networks(folder.path());
        let node = |n: u8| Node {
            name: format!("n{n}"),
            address: Ipv4Addr::new(10, 77, 0, n),
            zone: format!("z{n}"),
            profile: "db".into(),
            roles: vec![Role::Db],
        };
        let cluster = Cluster {
            name: "trial".into(),
            domain: "trial.example".into(),
            vip: None,
            network: Ipv4Network::new(Ipv4Addr::new(10, 77, 0, 0), 24).unwrap(),
            gateway: None,
            dns: Vec::new(),
            ntp: Vec::new(),
            nodes: (1..=3).map(node).collect(),
            storage: None,
            external: Default::default(),
            backup: None,
            tuning: Tuning::default(),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let secrets = folder.path().join("secrets");
        make_directory(&secrets, &cluster, &Default::default(), now).unwrap();
        let directory = ClusterDir::open(&secrets, &cluster).unwrap();
        let bin = folder.path().join("bin");
        fs::create_dir(&bin).unwrap();
        symlink(env!("CARGO_BIN_EXE_stanchion"), bin.join("stanchion-agent")).unwrap();
        let project = Path::new(env!("CARGO_MANIFEST_DIR"));
        symlink(project.join("tests/agent/systemctl"), bin.join("systemctl")).unwrap();
        let world = World { folder, etcd, holders, agents: vec![None, None, None], cluster };
        for (n, node) in world.cluster.nodes.iter().enumerate() {
            let root = world.root(n);
            let credentials = root.join("run/credentials/@system");
            fs::create_dir_all(&credentials).unwrap();
            let seed = issue_seed(&world.cluster, node, &directory, None, now).unwrap();
            fs::write(credentials.join("stanchion.seed"), seed).unwrap();
            let template = root.join("usr/share/stanchion/boot/etcd/etc/etcd/etcd.yml.j2");
            fs::create_dir_all(template.parent().unwrap()).unwrap();
            fs::copy(project.join("layers/etcd/boot/etc/etcd/etcd.yml.j2"), template).unwrap();
            fs::create_dir_all(root.join("etc")).unwrap();
            fs::write(root.join("etc/passwd"), "etcd:x:0:0::/:/bin/false\n").unwrap();
            symlink("/proc", root.join("proc")).unwrap();
            world.make_disk(n);
        }
        Some(world)
    }

    fn root(&self, n: usize) -> PathBuf {
        self.folder.path().join(format!("n{}", n + 1))
    }

    fn make_disk(&self, n: usize) {
        fs::create_dir_all(self.root(n).join("var/lib/etcd")).unwrap();
    }

    /// A command inside a node's namespaces.
    fn enter(&self, n: usize, program: impl AsRef<std::ffi::OsStr>) -> Command {
        enter(&self.holders[n + 1], program)
    }

    fn start(&mut self, n: usize) {
        let root = self.root(n);
        let bin = self.folder.path().join("bin");
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join(format!("n{}.log", n + 1)))
            .unwrap();
        let child = self
            .enter(n, bin.join("stanchion-agent"))
            .args(["run", "--root"])
            .arg(&root)
            .env("PATH", path)
            .env("STANCHION_TEST_ROOT", &root)
            .env("STANCHION_TEST_ETCD", &self.etcd)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.agents[n] = Some(child);
    }

    fn kill_agent(&mut self, n: usize) {
        if let Some(mut child) = self.agents[n].take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The machine loses power: agent and etcd are gone at once.
    fn kill(&mut self, n: usize) {
        self.kill_agent(n);
        let file = self.root(n).join("etcd.pid");
        if let Ok(pid) = fs::read_to_string(&file) {
            let _ = Command::new("kill").args(["-KILL", pid.trim()]).stderr(Stdio::null()).status();
            fs::remove_file(file).unwrap();
        }
    }

    fn lose_disk(&self, n: usize) {
        fs::remove_dir_all(self.root(n).join("var")).unwrap();
        self.make_disk(n);
    }

    fn ask_status(&self, n: usize) -> Option<Value> {
        let output = Command::new(self.folder.path().join("bin/stanchion-agent"))
            .args(["status", "--json", "--root"])
            .arg(self.root(n))
            .output()
            .unwrap();
        serde_json::from_slice(&output.stdout).ok()
    }

    fn is_main(&self, n: usize) -> bool {
        self.ask_status(n).is_some_and(|status| status["phase"] == "main")
    }

    /// What the node has written down: cluster and member.
    fn read_record(&self, n: usize) -> (u64, u64) {
        let text = fs::read(self.root(n).join("var/lib/stanchion/etcd.json")).unwrap();
        let record: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(record["state"], "member", "{record}");
        (record["cluster"].as_u64().unwrap(), record["member"].as_u64().unwrap())
    }

    fn wait_for_main(&self, nodes: &[usize]) {
        for n in nodes {
            let begun = Instant::now();
            while !self.is_main(*n) {
                if begun.elapsed() > Duration::from_secs(60) {
                    panic!("n{} is not in its main phase:\n{}", n + 1, self.show_logs());
                }
                sleep(Duration::from_millis(200));
            }
        }
    }

    fn show_logs(&self) -> String {
        let logs = (1..=3).map(|n| {
            let agent = fs::read_to_string(self.folder.path().join(format!("n{n}.log")));
            let etcd = fs::read_to_string(self.root(n - 1).join("etcd.log")).unwrap_or_default();
            let etcd: Vec<&str> = etcd.lines().rev().take(8).collect();
            format!("--- n{n}\n{}\n{}\n", agent.unwrap_or_default(), etcd.join("\n"))
        });
        logs.collect()
    }

    /// Run etcdctl against one node.
    fn control(&self, n: usize, arguments: &[&str]) -> String {
        let tls = self.root(n).join("run/stanchion/tls");
        let run = || {
            self.enter(n, self.etcd.with_file_name("etcdctl"))
                .arg(format!("--endpoints=https://{}:2379", self.cluster.nodes[n].address))
                .arg(format!("--cacert={}", tls.join("ca.pem").display()))
                .arg(format!("--cert={}", tls.join("node.pem").display()))
                .arg(format!("--key={}", tls.join("node.key").display()))
                .args(arguments)
                .output()
                .unwrap()
        };
        // A majority that has just lost its leader needs a moment.
        let mut output = run();
        for _ in 0..10 {
            if output.status.success() {
                break;
            }
            sleep(Duration::from_secs(1));
            output = run();
        }
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Everybody is a voting member of the one cluster; its id.
    fn check_one_cluster(&self) -> u64 {
        let records: Vec<_> = (0..3).map(|n| self.read_record(n)).collect();
        let clusters: BTreeSet<u64> = records.iter().map(|(cluster, _)| *cluster).collect();
        assert_eq!(clusters.len(), 1, "{records:x?}");
        let list = self.control(0, &["member", "list"]);
        let listed: BTreeSet<String> =
            list.lines().map(|line| line.split(',').next().unwrap().to_string()).collect();
        let own = records.iter().map(|(_, member)| format!("{member:x}")).collect();
        assert_eq!(listed, own, "{list}");
        assert!(list.lines().all(|line| line.ends_with("false")), "a learner is left: {list}");
        records[0].0
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for n in 0..3 {
            self.kill(n);
        }
        for holder in &mut self.holders {
            let _ = holder.kill();
            let _ = holder.wait();
        }
    }
}

/// A command in the namespaces that a process holds.
fn enter(holder: &Child, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("nsenter");
    command
        .args(["--user", "--preserve-credentials", "--net", "--uts", "--target"])
        .arg(holder.id().to_string())
        .arg("--")
        .arg(program);
    command
}

/// A bridge in one namespace, and three others with an address each.
fn make_networks(folder: &Path) -> Vec<Child> {
    let hold = |mut command: Command, name: &str, script: &str| {
        let ready = folder.join(name);
        let script = format!("{script} && touch {} && exec sleep 600", ready.display());
        let holder = command.args(["sh", "-c", &script]).spawn().unwrap();
        wait("a network", 10, || ready.exists());
        holder
    };
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net", "--uts"]);
    let bridge = "ip link add br0 type bridge && ip link set br0 up";
    let mut holders = vec![hold(command, "bridge", bridge)];
    for n in 1..=3 {
        let mut command = enter(&holders[0], "unshare");
        command.args(["--net", "--uts"]);
        let holder = hold(command, &format!("net{n}"), "ip link set lo up");
        // nsenter and unshare become what they start: this is the process itself.
        let wire = format!(
            "ip link add v{n} type veth peer name host0 netns {} && ip link set v{n} master br0 up",
            holder.id()
        );
        assert!(enter(&holders[0], "sh").args(["-c", &wire]).status().unwrap().success());
        let address = format!("ip address add 10.77.0.{n}/24 dev host0 && ip link set host0 up");
        assert!(enter(&holder, "sh").args(["-c", &address]).status().unwrap().success());
        holders.push(holder);
    }
    holders
}

fn wait(what: &str, seconds: u64, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(seconds), "{what} has not come");
        sleep(Duration::from_millis(100));
    }
}

#[test]
fn three_nodes_form_one_cluster_and_it_stays_the_only_one() {
    let Some(mut world) = World::make() else { return };

    // One alone, then two, do not know that there is no cluster: they wait.
    world.start(0);
    wait("the first agent", 10, || world.ask_status(0).is_some());
    sleep(Duration::from_secs(3));
    let status = world.ask_status(0).unwrap();
    assert_eq!(status["phase"], "bootstrap", "{status}");
    assert!(!world.root(0).join("var/lib/etcd/default").exists());
    world.start(1);
    world.start(2);
    world.wait_for_main(&[0, 1, 2]);
    let cluster = world.check_one_cluster();
    world.control(0, &["put", "/kept", "yes"]);

    // A machine is lost with its disk; a fresh one with the same seed takes its place.
    let (_, before) = world.read_record(2);
    world.kill(2);
    world.lose_disk(2);
    world.start(2);
    world.wait_for_main(&[2]);
    assert_ne!(world.read_record(2).1, before);
    assert_eq!(world.check_one_cluster(), cluster);

    // The agent crashes again and again while it joins.
    world.kill(2);
    world.lose_disk(2);
    for pause in [150, 400, 700, 1100, 1600, 2200] {
        world.start(2);
        sleep(Duration::from_millis(pause));
        world.kill_agent(2);
    }
    world.kill(2);
    world.start(2);
    world.wait_for_main(&[2]);
    assert_eq!(world.check_one_cluster(), cluster);

    // A member that was removed while it was off has stale data, and joins anew.
    let (_, before) = world.read_record(1);
    world.kill(1);
    world.control(0, &["member", "remove", &format!("{before:x}")]);
    world.start(1);
    world.wait_for_main(&[1]);
    assert_ne!(world.read_record(1).1, before);
    assert_eq!(world.check_one_cluster(), cluster);

    // The power of all fails. One alone, with its data, does not go on; two do.
    for n in 0..3 {
        world.kill(n);
    }
    world.start(1);
    sleep(Duration::from_secs(3));
    assert!(!world.is_main(1));
    world.start(2);
    world.wait_for_main(&[1, 2]);
    world.start(0);
    world.wait_for_main(&[0]);
    assert_eq!(world.check_one_cluster(), cluster);
    assert_eq!(world.control(0, &["get", "--print-value-only", "/kept"]), "yes\n");

    // Two disks are lost at once: without a majority nobody forms a second cluster.
    world.kill(1);
    world.kill(2);
    world.lose_disk(1);
    world.lose_disk(2);
    world.start(1);
    world.start(2);
    sleep(Duration::from_secs(5));
    for n in [1, 2] {
        assert_eq!(world.ask_status(n).unwrap()["phase"], "bootstrap");
        assert!(!world.root(n).join("var/lib/etcd/default").exists());
    }
}
