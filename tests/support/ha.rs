//! A lab of three nodes of all roles, formed into one cluster, with clients that write to it.

#[path = "report.rs"]
pub mod report;
#[path = "steer.rs"]
mod steer;

use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use stanchion::agent::tls::Tls;
use stanchion::command::Command;
use stanchion::config::Project;
use stanchion::config::cluster::Cluster;
use stanchion::error::UserError;
use stanchion::lab::ledger::{Ledger, Record, Target, read_ledger};
use stanchion::lab::probe::{Probe, RedisTarget};
use stanchion::lab::{Lab, NodeSpec, Nspawn, Places, Spec, check_host, plan_cluster};
use stanchion::secrets::Secret;
use stanchion::tools::set;
use tempfile::TempDir;

use crate::image;

pub const LEADER_PORT: u16 = 5433;
pub const REPLICA_PORT: u16 = 5434;
pub const ALL_PORT: u16 = 5435;
const LIMIT: Duration = Duration::from_secs(60);
/// How long a cluster that was hurt may take to be whole again; not measured against a goal.
pub const WHOLE: Duration = Duration::from_secs(120);

/// Whose turn it is to form a cluster.
pub fn wait_turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a cluster's nodes boot.
pub struct Images<'a> {
    /// The name of the project's copy, as [`image::project`] has it.
    pub project: &'a str,
    /// For all profiles but the others.
    pub node: &'static image::Image,
    /// By profile.
    pub others: Vec<(&'a str, &'static image::Image)>,
}

pub struct Ha {
    pub lab: Lab,
    pub cluster: Cluster,
    /// What the nodes' images were built from.
    project: PathBuf,
    places: Places,
    pub tls: Tls,
    pems: [Vec<u8>; 3],
    secrets: std::collections::BTreeMap<String, Secret>,
    pub runtime: tokio::runtime::Runtime,
    _folder: TempDir,
}

/// What came of a verb.
pub struct Operated {
    pub code: Option<i32>,
    pub text: String,
}

impl Operated {
    /// The event of this name, of a verb that has worked.
    #[track_caller]
    pub fn expect(&self, event: &str) -> Value {
        assert_eq!(self.code, Some(0), "{}", self.text);
        let events = self.text.lines().filter_map(|line| serde_json::from_str(line).ok());
        let mut found = events.filter(|found: &Value| found["event"] == event);
        found.next().unwrap_or_else(|| panic!("no {event} in {}", self.text))
    }

    /// It was refused, and said this.
    #[track_caller]
    pub fn expect_refusal(&self, why: &str) {
        assert_eq!(self.code, Some(2), "{}", self.text);
        assert!(self.text.contains(why), "no {why:?} in {}", self.text);
    }
}

impl Drop for Ha {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show_nodes();
        }
        if let Err(error) = Lab::remove(&self.places, self.lab.name()) {
            eprintln!("taking the test's lab down: {error:?}");
        }
    }
}

impl Ha {
    /// A lab whose nodes are not started yet. `None`, with a line that says why, where there
    /// can be none.
    pub fn create(name: &str, edit: impl FnOnce(&mut Cluster)) -> Option<Self> {
        Self::create_by(name, edit, |_, _| {})
    }

    /// The same, with secrets and seeds of the test's own.
    pub fn create_by(
        name: &str,
        edit: impl FnOnce(&mut Cluster),
        arm: impl FnOnce(&Lab, &Cluster),
    ) -> Option<Self> {
        Self::create_with(name, edit, arm, |_| Some(Vec::new()))
    }

    /// The same, with machines of which the cluster file knows nothing; they are no part of
    /// [`Ha::nodes`].
    pub fn create_with(
        name: &str,
        edit: impl FnOnce(&mut Cluster),
        arm: impl FnOnce(&Lab, &Cluster),
        find_strangers: impl FnOnce(&Cluster) -> Option<Vec<NodeSpec>>,
    ) -> Option<Self> {
        let node = image::provide_node(&[set::LAB])?;
        let images = Images { project: "node", node, others: Vec::new() };
        Self::create_of(name, &images, edit, arm, find_strangers)
    }

    /// The same, of these images.
    pub fn create_of(
        name: &str,
        images: &Images,
        edit: impl FnOnce(&mut Cluster),
        arm: impl FnOnce(&Lab, &Cluster),
        find_strangers: impl FnOnce(&Cluster) -> Option<Vec<NodeSpec>>,
    ) -> Option<Self> {
        if let Err(error) = check_host() {
            eprintln!("skipped: {error:#}");
            return None;
        }
        let nspawn = Nspawn::find_on_host()
            .unwrap_or_else(|| Nspawn::Tools(images.node.tools[0].root().to_path_buf()));
        let project = image::project(images.project);
        let found = Project::find(&project).unwrap();
        let roles = found.load_profile("node").unwrap().roles();
        let network = "10.89.0.0/24".parse().unwrap();
        let mut cluster = plan_cluster(name, network, 3, "node", &roles).unwrap();
        edit(&mut cluster);
        let folder = tempfile::tempdir_in(image::scratch()).unwrap();
        let places =
            Places { labs: folder.path().join("stanchion/labs"), program: image::PROGRAM.into() };
        let mut spec = Spec::of_cluster(name, nspawn, cluster.clone(), |profile| {
            let other = images.others.iter().find(|(name, _)| *name == profile);
            other.map_or(&images.node.raw, |(_, other)| &other.raw).clone()
        });
        spec.nodes.extend(find_strangers(&cluster)?);
        let lab = match Lab::create(&places, &spec) {
            Ok(lab) => lab,
            Err(error) => match error.downcast_ref::<UserError>() {
                Some(missing) if missing.summary().starts_with("this machine cannot") => {
                    eprintln!("skipped: {}", missing.summary());
                    return None;
                }
                _ => panic!("{error:?}"),
            },
        };
        arm(&lab, &cluster);
        let read = |name: &str| fs::read(lab.secrets().join(name)).unwrap();
        let pems = ["ca.pem", "operator.pem", "operator.key"].map(read);
        let [ca, certificate, key] = pems.each_ref().map(|pem| std::str::from_utf8(pem).unwrap());
        let tls = Tls::from_pem(ca, certificate, key).unwrap();
        let secrets = toml::from_str(std::str::from_utf8(&read("secrets.toml")).unwrap()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Some(Ha { lab, cluster, project, places, tls, pems, secrets, runtime, _folder: folder })
    }

    /// Form the cluster, one lab of this program at a time: a start keeps every processor busy.
    pub fn form(&self) {
        let _turn = wait_turn();
        self.start_all();
        self.wait_until_whole();
    }

    /// Run one of the operator's verbs in the lab's network, to its end.
    pub fn operate(&self, args: &[&str]) -> Operated {
        let command = self.describe_verb(args);
        let (status, output) = self.lab.enter_network(|| command.run_any()).unwrap().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        eprintln!("{args:?}: {status}\n{text}{}", String::from_utf8_lossy(&output.stderr));
        Operated { code: status.code(), text }
    }

    /// Start one of them, and do not wait for it.
    pub fn spawn(&self, args: &[&str]) -> std::process::Child {
        let nowhere = std::process::Stdio::null;
        let command = self.describe_verb(args).output_to(nowhere(), nowhere());
        self.lab.spawn_inside(command).unwrap()
    }

    fn describe_verb(&self, args: &[&str]) -> Command {
        Command::new(image::PROGRAM)
            .args(args)
            .arg("--project")
            .arg(&self.project)
            .args(["--json", "--cluster"])
            .arg(self.lab.secrets().with_file_name("cluster.toml"))
            .arg("--dir")
            .arg(self.lab.secrets())
    }

    pub fn start_all(&self) {
        for node in self.nodes() {
            self.lab.start(node).unwrap();
        }
    }

    pub fn nodes(&self) -> Vec<&str> {
        self.cluster.nodes.iter().map(|node| node.name.as_str()).collect()
    }

    pub fn others(&self, node: &str) -> Vec<&str> {
        self.nodes().into_iter().filter(|other| *other != node).collect()
    }

    pub fn vip(&self) -> Ipv4Addr {
        self.cluster.vip.unwrap()
    }

    pub fn secret(&self, name: &str) -> String {
        self.secrets[name].reveal().to_string()
    }

    /// The database as users reach it: through the VIP.
    pub fn database(&self, port: u16) -> Target {
        Target {
            address: self.vip(),
            port,
            user: "netbox".into(),
            password: self.secret("postgres_netbox"),
            database: "netbox".into(),
            tls: self.tls.client.clone(),
        }
    }

    pub fn write(&self) -> Ledger {
        let target = self.database(LEADER_PORT);
        self.lab.enter_network(|| Ledger::start(target)).unwrap().unwrap()
    }

    pub fn write_redis(&self) -> Probe {
        let [ca, certificate, key] = self.pems.clone();
        let target = RedisTarget {
            address: self.vip(),
            port: 6379,
            password: self.secret("redis"),
            ca,
            certificate,
            key,
        };
        self.lab.enter_network(|| Probe::write_redis(target)).unwrap().unwrap()
    }

    /// Whether the edge answers on the VIP.
    pub fn watch_vip(&self) -> Probe {
        let vip = self.vip();
        self.lab.enter_network(|| Probe::watch_port(vip, 80)).unwrap().unwrap()
    }

    /// Rows that were acknowledged and are gone.
    #[track_caller]
    pub fn find_lost(&self, record: &Record) -> Vec<i64> {
        let target = self.database(LEADER_PORT);
        let read = || -> Option<BTreeSet<i64>> {
            self.lab.enter_network(|| read_ledger(&target)).unwrap().ok()
        };
        let there = self.wait_for("the ledger can be read", LIMIT, read);
        record.find_lost(&there)
    }

    /// The answer of a node's HTTPS server to the operator: its status, and the text.
    pub fn get(&self, node: &str, port: u16, path: &str) -> Option<(u16, String)> {
        let url = format!("https://{}:{port}/{path}", self.lab.address(node).unwrap());
        let ask = async {
            let http = self.tls.make_http_client().ok()?;
            let answer = http.get(url).timeout(Duration::from_secs(3)).send().await.ok()?;
            Some((answer.status().as_u16(), answer.text().await.ok()?))
        };
        self.lab.enter_network(|| self.runtime.block_on(ask)).unwrap()
    }

    /// What a node's agent tells the operator.
    pub fn get_status(&self, node: &str) -> Option<Value> {
        serde_json::from_str(&self.get(node, 7443, "status")?.1).ok()
    }

    /// The nodes as they registered, from the first that answers.
    pub fn list_registered(&self) -> Vec<Value> {
        let mut pages = self.nodes().into_iter().filter_map(|node| self.get_status(node));
        pages.find_map(|page| page["nodes"].as_array().cloned()).unwrap_or_default()
    }

    /// The one node of which something is so.
    fn find_node(&self, is_so: impl Fn(&Value) -> bool) -> Option<String> {
        let nodes = self.list_registered();
        let mut found = nodes.iter().filter(|node| is_so(node));
        let first = found.next()?["name"].as_str()?.to_string();
        found.next().is_none().then_some(first)
    }

    pub fn find_leader(&self) -> Option<String> {
        self.find_node(|node| node["postgres"] == "leader running")
    }

    pub fn find_standby(&self) -> Option<String> {
        self.find_node(|node| node["postgres"] == "sync_standby streaming")
    }

    pub fn find_redis_master(&self) -> Option<String> {
        self.find_node(|node| node["redis"] == "master")
    }

    pub fn find_vip_holder(&self) -> Option<String> {
        self.find_node(|node| node["vip"] == true)
    }

    /// All three serve and are ready, whoever else there is: one leader, and two replicas of
    /// it, one of them synchronous; one Redis master; one holder of the VIP.
    pub fn is_whole(&self) -> bool {
        let pages: Vec<Value> =
            self.nodes().into_iter().filter_map(|node| self.get_status(node)).collect();
        let are_ready = pages.iter().all(|page| page["ready"] == true);
        let Some(nodes) = pages.first().and_then(|page| page["nodes"].as_array()) else {
            return false;
        };
        let count =
            |field: &str, value: Value| nodes.iter().filter(|node| node[field] == value).count();
        pages.len() == 3
            && are_ready
            && self.nodes().iter().all(|name| nodes.iter().any(|node| node["name"] == *name))
            && count("postgres", "leader running".into()) == 1
            && count("postgres", "sync_standby streaming".into()) == 1
            && count("postgres", "replica streaming".into()) == 1
            && count("redis", "master".into()) == 1
            && count("redis", "replica".into()) == 2
            && count("vip", true.into()) == 1
    }

    pub fn wait_until_whole(&self) -> Duration {
        let began = Instant::now();
        self.wait_for("the cluster is whole", 2 * LIMIT, || self.is_whole().then_some(()));
        began.elapsed()
    }

    /// Ask until there is something.
    #[track_caller]
    pub fn wait_for<T>(&self, what: &str, limit: Duration, ask: impl Fn() -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(found) = ask() {
                return found;
            }
            if began.elapsed() > limit {
                self.show_nodes();
                panic!("not within {} s: {what}", limit.as_secs());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// What a command in a node, which must succeed, writes.
    #[track_caller]
    pub fn run(&self, node: &str, argv: &[&str]) -> String {
        let ran = self.lab.exec(node, argv, LIMIT).unwrap();
        assert_eq!(ran.code, Some(0), "{argv:?}: {}", String::from_utf8_lossy(&ran.stderr));
        ran.text()
    }

    /// The same, for what takes minutes.
    #[track_caller]
    pub fn run_long(&self, node: &str, argv: &[&str]) -> String {
        let ran = self.lab.exec(node, argv, 5 * LIMIT).unwrap();
        assert_eq!(ran.code, Some(0), "{argv:?}: {}", String::from_utf8_lossy(&ran.stderr));
        ran.text()
    }

    /// What each node says of itself, for whoever reads a failed test.
    pub fn show_nodes(&self) {
        for node in self.nodes() {
            let ran = self.lab.exec(node, &["stanchion-agent", "status"], Duration::from_secs(5));
            match ran {
                Ok(ran) => eprintln!("{node}:\n{}", ran.text()),
                Err(error) => eprintln!("{node}: {error:#}"),
            }
        }
        for node in self.list_registered() {
            eprintln!("{node}");
        }
    }
}
