//! A throw-away cluster on this machine: nodes that boot built images side by side, each in
//! a container of systemd-nspawn, on a network that nothing leaves, with faults on demand.
//!
//! Needs root, cgroup v2 (beside v1, too), and erofs and overlay file systems.

mod cgroup;
mod cluster;
pub mod console;
mod exec;
pub mod ledger;
mod make;
mod network;
mod nspawn;
pub mod probe;
mod process;
mod root;
mod state;
pub mod timeline;

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::agent::server::Page;
use crate::cluster_dir::ClusterDir;
use crate::config::cluster::{Cluster, Ipv4Network};
use crate::error::{UserError, find_nearest};
use crate::store;

pub use cluster::{plan_backup, plan_cluster};
pub use exec::Ran;
pub use make::{NodeSpec, Spec};
pub use network::find_operator;
pub use nspawn::{Nspawn, serve_if_asked};
pub use process::Process;
pub use state::Places;

use make::give_seed;
use nspawn::{Order, Running};
use state::{Folder, NodeFolder, NodeState, State};

/// Until a node that was killed is gone, with its network.
const KILL_LIMIT: Duration = Duration::from_secs(20);
/// Until a node that was asked to power off is gone.
const STOP_LIMIT: Duration = Duration::from_secs(90);
/// Until an agent answers.
const ASK_LIMIT: Duration = Duration::from_secs(5);

/// systemd-network-generator(8) takes it as a file for networkd; the agent's come before it.
const ADDRESS: &str = "network.network.79-lab";

/// A lab that was made, by this process or by an earlier one.
#[derive(Debug, Clone)]
pub struct Lab {
    folder: Folder,
    program: PathBuf,
    state: State,
}

/// How a node is.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    pub node: String,
    pub address: Ipv4Addr,
    pub image: PathBuf,
    pub running: bool,
    /// The id of the node's first process, as this machine sees it.
    pub init: Option<i32>,
    /// Starts since the lab started it: more than 1 after reboots.
    pub boots: u32,
    pub frozen: bool,
    pub partitioned: bool,
}

/// Fail where no lab can be, before anything is built for one.
pub fn check_host() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(UserError::new("a lab needs root")
            .why("it makes network namespaces, control groups and mounts")
            .help("run it with sudo")
            .into());
    }
    cgroup::Hierarchies::find().map(drop)
}

impl Lab {
    /// A lab that was made before.
    pub fn open(places: &Places, name: &str) -> Result<Self> {
        let folder = places.find_folder(name)?;
        let state = folder.load()?;
        Ok(Lab { folder, program: places.program.clone(), state })
    }

    /// Take the lab of this name down, whatever is left of it: processes, control groups,
    /// network and folder. One that is not there is down.
    pub fn remove(places: &Places, name: &str) -> Result<()> {
        let folder = places.find_folder(name)?;
        let turn = match folder.exists() {
            true => {
                check_host()?;
                Some(folder.lock(true)?)
            }
            false => None,
        };
        if let Ok(group) = folder.find_group() {
            group.kill().context("ending the lab's processes")?;
            group.remove()?;
        }
        network::remove(&folder.pin())?;
        drop(turn);
        store::remove_tree(&folder.path)
    }

    pub fn name(&self) -> &str {
        &self.state.name
    }

    pub fn network(&self) -> Ipv4Network {
        self.state.network
    }

    /// The address from which [`Lab::enter_network`] speaks.
    pub fn operator(&self) -> Ipv4Addr {
        find_operator(self.state.network)
    }

    pub fn cluster(&self) -> Option<&Cluster> {
        self.state.cluster.as_ref()
    }

    /// The directory with the CA, the operator's certificate and the secrets of the cluster.
    pub fn secrets(&self) -> PathBuf {
        self.folder.secrets()
    }

    /// A new seed for a node of the cluster.
    pub fn make_seed(&self, node: &str) -> Result<Vec<u8>> {
        let node = self.find(node)?;
        let cluster = self.cluster().context("the lab has no cluster")?;
        let directory = ClusterDir::open(&self.folder.secrets(), cluster)?;
        cluster::make_seed(cluster, &directory, &node.name)
    }

    pub fn list_nodes(&self) -> Vec<&str> {
        self.state.nodes.iter().map(|node| node.name.as_str()).collect()
    }

    /// # Errors
    /// A [`UserError`] when there is no such node.
    pub fn address(&self, node: &str) -> Result<Ipv4Addr> {
        self.find(node).map(|node| node.address)
    }

    /// Start a node and return when its first process runs.
    pub fn start(&self, node: &str) -> Result<()> {
        let node = self.find(node)?;
        let folder = self.folder(node);
        let _lab = self.folder.lock(false)?;
        let _turn = folder.lock(&node.name)?;
        if let Some(running) = Running::load(&folder.running()) {
            if running.init.is_alive() {
                return Err(UserError::new(format!("node `{}` runs already", node.name)).into());
            }
            // Its end is being noticed just now.
            self.wait_for_end(node, &running, KILL_LIMIT)?;
        }
        let _ = fs::remove_file(folder.partitioned());
        folder.create()?;
        let group = (self.folder.name_group()?, node.machine.clone());
        // One whose keeper was killed while it was frozen.
        self.thaw_group(node)?;
        let credentials = [("stanchion.seed", folder.seed()), (ADDRESS, folder.address())];
        let order = Order {
            nspawn: self.state.nspawn.clone(),
            image: node.image.clone(),
            var: folder.var(),
            console: folder.console(),
            running: folder.running(),
            pin: self.folder.pin(),
            group,
            machine: node.machine.clone(),
            hostname: node.name.clone(),
            shares: self.share_backups()?,
            credentials: credentials
                .into_iter()
                .filter(|(_, path)| path.exists())
                .map(|(name, path)| (name.to_string(), path))
                .collect(),
        };
        nspawn::launch(&self.program, &order)
            .with_context(|| format!("starting node `{}`", node.name))
            .map(drop)
    }

    /// The folder that stands for what is mounted on all nodes to hold their backups.
    fn share_backups(&self) -> Result<Vec<(PathBuf, String)>> {
        let backup = self.state.cluster.as_ref().and_then(|cluster| cluster.backup.as_ref());
        let Some(at) = backup.and_then(|backup| backup.directory.clone()) else {
            return Ok(Vec::new());
        };
        let folder = self.folder.backups();
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(vec![(folder, at)])
    }

    /// Ask a node to power off, and wait until it has; one that is down stays so.
    pub fn stop(&self, node: &str) -> Result<()> {
        let node = self.find(node)?;
        let _turn = self.folder(node).lock(&node.name)?;
        let Some(running) = self.load_running(node) else { return Ok(()) };
        if self.find_group(node)?.is_frozen() {
            return Err(UserError::new(format!("node `{}` is frozen", node.name))
                .help(format!("stanchion lab thaw {0}, or kill {0}", node.name))
                .into());
        }
        // It may not live to answer.
        let _ = self.exec(&node.name, &["systemctl", "--no-block", "poweroff"], STOP_LIMIT);
        self.wait_for_end(node, &running, STOP_LIMIT)
    }

    /// End a node at once, as if its power had gone (its memory is; what the machine has not
    /// written to the disk yet is not). One that is down stays so.
    pub fn kill(&self, node: &str) -> Result<()> {
        let node = self.find(node)?;
        let _turn = self.folder(node).lock(&node.name)?;
        let Some(running) = self.load_running(node) else { return Ok(()) };
        running.init.kill()?;
        // What supervises it is frozen with it, and has to see it end.
        self.thaw_group(node)?;
        self.wait_for_end(node, &running, KILL_LIMIT)
    }

    /// Stop all of a node's processes where they are, until [`Lab::thaw`].
    pub fn freeze(&self, node: &str) -> Result<()> {
        let node = self.find(node)?;
        self.need_running(node)?;
        self.find_group(node)?.set_frozen(true)
    }

    pub fn thaw(&self, node: &str) -> Result<()> {
        let node = self.find(node)?;
        self.need_running(node)?;
        self.find_group(node)?.set_frozen(false)
    }

    /// Pull the node's cable out of the lab's bridge, until [`Lab::heal`].
    pub fn partition(&self, node: &str) -> Result<()> {
        self.plug(node, false)
    }

    /// Put it back in.
    pub fn heal(&self, node: &str) -> Result<()> {
        self.plug(node, true)
    }

    fn plug(&self, node: &str, plugged: bool) -> Result<()> {
        let node = self.find(node)?;
        self.need_running(node)?;
        let marker = self.folder(node).partitioned();
        if !plugged {
            File::create(&marker).with_context(|| format!("making {}", marker.display()))?;
        }
        network::plug(&self.folder.pin(), &nspawn::name_interface(&node.machine), plugged)?;
        if plugged {
            let _ = fs::remove_file(&marker);
        }
        Ok(())
    }

    /// Forget all that a node which is down has ever written.
    pub fn destroy(&self, node: &str) -> Result<()> {
        let node = self.find(node)?;
        let folder = self.folder(node);
        let _turn = folder.lock(&node.name)?;
        if self.load_running(node).is_some() {
            return Err(UserError::new(format!("node `{}` runs", node.name))
                .help(format!("stanchion lab kill {}", node.name))
                .into());
        }
        store::remove_tree(&folder.var())?;
        folder.create()
    }

    /// Give a node another seed, or none, from its next start on.
    pub fn set_seed(&self, node: &str, seed: Option<&[u8]>) -> Result<()> {
        let node = self.find(node)?;
        give_seed(&self.folder(node), self.state.network, node.address, seed)
    }

    /// What a node's agent says of itself; nothing while it does not answer.
    pub fn ask_agent(&self, node: &str) -> Result<Option<Page>> {
        let ran = self.exec(node, &["stanchion-agent", "status", "--json"], ASK_LIMIT)?;
        Ok(serde_json::from_slice(&ran.stdout).ok())
    }

    /// Wait until a node's systemd has started what it starts, and give back what it says:
    /// `running`, or `degraded` when units have failed.
    pub fn wait_for_boot(&self, node: &str, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let ran = self.exec(node, &["systemctl", "is-system-running"], left)?;
            match ran.text().as_str() {
                "" | "offline" | "unknown" | "initializing" | "starting" if !left.is_zero() => {
                    std::thread::sleep(Duration::from_millis(100));
                }
                "" | "offline" | "unknown" | "initializing" | "starting" => {
                    bail!("node `{node}` has not booted within {} s", limit.as_secs())
                }
                state => return Ok(state.to_string()),
            }
        }
    }

    pub fn status(&self, node: &str) -> Result<Status> {
        let node = self.find(node)?;
        let running = self.load_running(node);
        let up = running.is_some();
        Ok(Status {
            node: node.name.clone(),
            address: node.address,
            image: node.image.clone(),
            running: up,
            init: running.map(|running| running.init.pid),
            boots: running.map_or(0, |running| running.boots),
            frozen: up && self.find_group(node)?.is_frozen(),
            partitioned: up && self.folder(node).partitioned().exists(),
        })
    }

    /// Every process of the lab on this machine.
    pub fn list_processes(&self) -> Result<Vec<Process>> {
        Ok(self.folder.find_group()?.list_processes())
    }

    /// The log of a node's console; see [`console`].
    pub fn console_path(&self, node: &str) -> Result<PathBuf> {
        Ok(self.folder(self.find(node)?).console())
    }

    /// Whether a node runs.
    pub fn is_running(&self, node: &str) -> Result<bool> {
        Ok(self.load_running(self.find(node)?).is_some())
    }

    fn find(&self, name: &str) -> Result<&NodeState> {
        self.state.nodes.iter().find(|node| node.name == name).ok_or_else(|| {
            let nodes = self.list_nodes();
            let help = match find_nearest(name, nodes.iter().copied()) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("it has {}", nodes.join(", ")),
            };
            UserError::new(format!("the lab `{}` has no node `{name}`", self.name()))
                .help(help)
                .into()
        })
    }

    fn folder(&self, node: &NodeState) -> NodeFolder {
        self.folder.node(&node.name)
    }

    fn find_group(&self, node: &NodeState) -> Result<cgroup::Group> {
        Ok(self.folder.find_group()?.name_child(&node.machine))
    }

    fn thaw_group(&self, node: &NodeState) -> Result<()> {
        let group = self.find_group(node)?;
        // Not `is_frozen`: while processes in it die, it says no, and keeps the others.
        if group.exists() { group.set_frozen(false) } else { Ok(()) }
    }

    fn load_running(&self, node: &NodeState) -> Option<Running> {
        Running::load(&self.folder(node).running()).filter(|running| running.init.is_alive())
    }

    fn need_running(&self, node: &NodeState) -> Result<Running> {
        self.load_running(node).ok_or_else(|| explain_down(&node.name).into())
    }

    /// The keeper ends after the node, when its interface is gone.
    fn wait_for_end(&self, node: &NodeState, running: &Running, limit: Duration) -> Result<()> {
        match running.keeper.wait_for_end(limit) {
            true => Ok(()),
            false => bail!("node `{}` has not ended within {} s", node.name, limit.as_secs()),
        }
    }
}

fn explain_down(node: &str) -> UserError {
    UserError::new(format!("node `{node}` is down")).help(format!("stanchion lab start {node}"))
}
