//! A throw-away cluster on this machine: nodes that boot built images side by side, each in
//! a container of systemd-nspawn, on a network that nothing leaves, with faults on demand.
//!
//! Needs root, cgroup v2 (beside v1, too), and erofs and overlay file systems.

mod cgroup;
mod cluster;
pub mod console;
pub mod ledger;
mod network;
mod nspawn;
pub mod probe;
mod process;
mod root;
mod state;
pub mod timeline;

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::MemfdFlags;
use serde::Serialize;

use crate::agent::server::Page;
use crate::cluster_dir::ClusterDir;
use crate::command::Command;
use crate::config::cluster::{Cluster, Ipv4Network};
use crate::error::{UserError, find_nearest};
use crate::store;

pub use cluster::{plan_backup, plan_cluster};
pub use network::find_operator;
pub use nspawn::{Nspawn, serve_if_asked};
pub use process::Process;
pub use state::Places;

use nspawn::{Order, Running};
use process::wait_until;
use state::{Folder, NodeFolder, NodeState, State};

/// Until a node that was killed is gone, with its network.
const KILL_LIMIT: Duration = Duration::from_secs(20);
/// Until a node that was asked to power off is gone.
const STOP_LIMIT: Duration = Duration::from_secs(90);
/// Until an agent answers.
const ASK_LIMIT: Duration = Duration::from_secs(5);
/// Bytes kept of what a command writes.
const LONGEST_OUTPUT: u64 = 16 << 20;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin";

/// A lab to make.
#[derive(Debug, Clone)]
pub struct Spec {
    pub name: String,
    /// With a prefix of 8 to 29 bits.
    pub network: Ipv4Network,
    pub nspawn: Nspawn,
    pub nodes: Vec<NodeSpec>,
    /// What the nodes are to be seeded for. A node that it does not have, and every node of a
    /// lab without one, gets its address, and nothing else is set up in it.
    pub cluster: Option<Cluster>,
}

impl Spec {
    /// A lab of a whole cluster; `find_image` gives the raw disk of a profile.
    pub fn of_cluster(
        name: &str,
        nspawn: Nspawn,
        cluster: Cluster,
        find_image: impl Fn(&str) -> PathBuf,
    ) -> Self {
        let node = |node: &crate::config::cluster::Node| NodeSpec {
            name: node.name.clone(),
            address: node.address,
            image: find_image(&node.profile),
        };
        Spec {
            name: name.to_string(),
            network: cluster.network,
            nspawn,
            nodes: cluster.nodes.iter().map(node).collect(),
            cluster: Some(cluster),
        }
    }
}

#[derive(Debug, Clone)]
pub struct NodeSpec {
    /// Lower-case letters, digits and `-`, at most 40.
    pub name: String,
    /// In the lab's network, not the last usable one.
    pub address: Ipv4Addr,
    /// A raw disk as `stanchion build` writes it; only read.
    pub image: PathBuf,
}

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

/// How a command in a node ended.
#[derive(Debug, Clone)]
pub struct Ran {
    /// `None`: a signal ended it.
    pub code: Option<i32>,
    /// At most the first 16 MiB.
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Ran {
    /// Its standard output as text, without the last newline.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_string()
    }
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
    /// Make a lab; its nodes are not started.
    ///
    /// # Errors
    /// A [`UserError`] for a lab of this name that is there, for names and addresses that
    /// cannot be, and for what this machine lacks. What was made until then is removed.
    pub fn create(places: &Places, spec: &Spec) -> Result<Self> {
        check_host()?;
        check(spec)?;
        let folder = places.find_folder(&spec.name)?;
        if folder.exists() {
            return Err(UserError::new(format!("there is a lab `{}` already", spec.name))
                .in_file(&folder.path)
                .help(format!(
                    "stanchion lab down --name {0}, or name another with --name",
                    spec.name
                ))
                .into());
        }
        folder.create()?;
        let turn = folder.lock(true)?;
        let made = describe(spec).and_then(|state| {
            make(&folder, spec, &state)?;
            Ok(Lab { folder, program: places.program.clone(), state })
        });
        drop(turn);
        made.map_err(|error| match Lab::remove(places, &spec.name) {
            Ok(()) => error,
            Err(left) => error.context(format!("taking the lab down again: {left:#}")),
        })
    }

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

    /// Run a command in a node, as root there, for at most `limit`.
    ///
    /// # Errors
    /// A [`UserError`] when the node is down; the command's own failure is in [`Ran`].
    pub fn exec(&self, node: &str, argv: &[&str], limit: Duration) -> Result<Ran> {
        let shown = argv.join(" ");
        let capture = || -> Result<File> {
            Ok(rustix::fs::memfd_create("output", MemfdFlags::CLOEXEC)?.into())
        };
        let (mut stdout, mut stderr) = (capture()?, capture()?);
        let (out, err) = (stdout.try_clone()?, stderr.try_clone()?);
        let status = self.enter_node(node, || -> Result<ExitStatus> {
            let mut child = describe_command(argv)?.output_to(out, err).spawn()?;
            wait_for(&mut child, limit)
                .with_context(|| format!("running `{shown}` in node `{node}`"))
        })??;
        Ok(Ran { code: status.code(), stdout: take(&mut stdout)?, stderr: take(&mut stderr)? })
    }

    /// Run a command in a node on our own standard input, output and error.
    pub fn exec_attached(&self, node: &str, argv: &[&str]) -> Result<ExitStatus> {
        let terminal = std::env::var_os("TERM").unwrap_or_else(|| "dumb".into());
        self.enter_node(node, || -> Result<ExitStatus> {
            let mut child = describe_command(argv)?.env("TERM", terminal).inherit().spawn()?;
            child.wait().with_context(|| format!("running `{}`", argv.join(" ")))
        })?
    }

    /// Run in all namespaces of a node, in a thread of its own.
    fn enter_node<T: Send>(&self, node: &str, act: impl FnOnce() -> T + Send) -> Result<T> {
        let node = self.find(node)?;
        let running = self.need_running(node)?;
        running.init.enter(act)?.ok_or_else(|| explain_down(&node.name).into())
    }

    /// Run in the lab's network, in a thread of its own, with the operator's address.
    /// Threads and programs that are started there are inside, too.
    pub fn enter_network<T: Send>(&self, act: impl FnOnce() -> T + Send) -> Result<T> {
        network::enter(&self.folder.pin(), act)
    }

    /// Start a program of this machine in the lab's network.
    pub fn spawn_inside(&self, command: Command) -> Result<Child> {
        let namespace = network::open(&self.folder.pin())?;
        // SAFETY: setns is async-signal-safe.
        unsafe { command.before_exec(move || network::join(&namespace)) }.spawn()
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

/// systemd-network-generator(8) takes it as a file for networkd; the agent's come before it.
const ADDRESS: &str = "network.network.79-lab";

fn explain_down(node: &str) -> UserError {
    UserError::new(format!("node `{node}` is down")).help(format!("stanchion lab start {node}"))
}

fn check(spec: &Spec) -> Result<()> {
    let mistake = |text: String| Err(UserError::new(text).into());
    let network = spec.network;
    if !(8..=29).contains(&network.prefix()) {
        return mistake(format!("{network} is no lab's network"));
    }
    if spec.nodes.is_empty() || spec.nodes.len() > 99 {
        return mistake(format!("a lab has 1 to 99 nodes, not {}", spec.nodes.len()));
    }
    for (index, node) in spec.nodes.iter().enumerate() {
        let earlier = &spec.nodes[..index];
        if !state::is_name(&node.name) || earlier.iter().any(|other| other.name == node.name) {
            return mistake(format!("`{}` is no name for one node", node.name));
        }
        let taken = node.address == find_operator(network)
            || earlier.iter().any(|other| other.address == node.address);
        if taken || !network.has_host(node.address) {
            return mistake(format!("node `{}` cannot have {}", node.name, node.address));
        }
        if !node.image.is_file() {
            return Err(UserError::new(format!("node `{}` has no image", node.name))
                .in_file(&node.image)
                .help("stanchion build")
                .into());
        }
    }
    Ok(())
}

fn describe(spec: &Spec) -> Result<State> {
    let describe = |(index, node): (usize, &NodeSpec)| -> Result<NodeState> {
        Ok(NodeState {
            name: node.name.clone(),
            address: node.address,
            image: node.image.canonicalize().context("finding the image")?,
            machine: format!("node{}", index + 1),
        })
    };
    let nodes = spec.nodes.iter().enumerate().map(describe).collect::<Result<_>>()?;
    let (nspawn, cluster) = (spec.nspawn.clone(), spec.cluster.clone());
    Ok(State::new(&spec.name, spec.network, nspawn, nodes, cluster))
}

fn make(folder: &Folder, spec: &Spec, state: &State) -> Result<()> {
    folder.save(state)?;
    let secrets = match &spec.cluster {
        Some(cluster) => {
            fs::write(folder.cluster_file(), cluster::write_file(cluster)?)
                .context("writing the cluster file")?;
            Some((cluster, cluster::make_secrets(&folder.secrets(), cluster)?))
        }
        None => None,
    };
    for node in &spec.nodes {
        let place = folder.node(&node.name);
        place.create()?;
        let known = secrets.as_ref().filter(|(cluster, _)| cluster.find_node(&node.name).is_some());
        let seed = match known {
            Some((cluster, directory)) => Some(cluster::make_seed(cluster, directory, &node.name)?),
            None => None,
        };
        give_seed(&place, spec.network, node.address, seed.as_deref())?;
    }
    let group = folder.find_group()?;
    group.create()?;
    group.delegate();
    network::create(spec.network, &folder.pin())
}

fn give_seed(
    folder: &NodeFolder,
    network: Ipv4Network,
    address: Ipv4Addr,
    seed: Option<&[u8]>,
) -> Result<()> {
    let remove = |path: &Path| store::remove_tree(path);
    match seed {
        Some(bytes) => {
            remove(&folder.address())?;
            // Its folder is for root alone.
            store::write_atomically(&folder.seed(), bytes)
        }
        None => {
            remove(&folder.seed())?;
            let text = format!(
                "[Match]\nName=host0\n\n[Network]\nAddress={address}/{}\n",
                network.prefix()
            );
            store::write_atomically(&folder.address(), text.as_bytes())
        }
    }
}

fn describe_command(argv: &[&str]) -> Result<Command> {
    let (program, args) = argv.split_first().ok_or_else(|| anyhow!("there is no command"))?;
    Ok(Command::new(program)
        .args(args)
        .clear_env()
        .env("PATH", PATH)
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .directory(Path::new("/")))
}

fn wait_for(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let mut ended = Ok(None);
    wait_until(limit, || {
        ended = child.try_wait();
        !matches!(ended, Ok(None))
    });
    if let Some(status) = ended? {
        return Ok(status);
    }
    // It may have ended just now.
    let _ = child.kill();
    child.wait()?;
    bail!("it did not end within {} s", limit.as_secs())
}

fn take(file: &mut File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.take(LONGEST_OUTPUT).read_to_end(&mut bytes)?;
    Ok(bytes)
}
