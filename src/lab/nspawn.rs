//! Runs a node by systemd-nspawn.
//!
//! ```text
//! lab command ──► launch ──► keep ──► systemd-nspawn ──► the node's init
//!   waits for     ends when  mounts the root, reads
//!   the answer    keep says  the console, writes down
//!                 it runs    what runs, starts again
//!                            after a reboot
//! ```
//!
//! `launch` and `keep` are new starts of this executable ([`serve_if_asked`]). The keeper
//! outlives the command. When it dies, so do nspawn and the node, and with the last process
//! of its mount namespace the mounts.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, PipeReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::cgroup::{self, Hierarchies};
use super::console::{self, Console};
use super::network;
use super::process::{Process, TICK};
use super::root::Root;
use crate::command::{Command, take_tail};
use crate::error::UserError;
use crate::store;
use crate::tools::Tools;

/// The hidden first argument of both stages.
const ENTRY: &str = "__lab";
/// The group of the keepers, beside those of the nodes.
const KEEPERS: &str = "keepers";
/// The oldest nspawn that does what is asked of it.
const OLDEST: u32 = 252;
/// nspawn's exit code for a node that wants to be started again.
const REBOOTED: i32 = 133;
/// Until the node's init runs; it takes less than a second.
const LIMIT: Duration = Duration::from_secs(60);
/// Bytes of an order or an answer, and of a credential.
const LONGEST: u64 = 1 << 20;

/// Where systemd-nspawn comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Nspawn {
    /// The machine's own.
    Host,
    /// That of a tools root.
    Tools(PathBuf),
}

impl Nspawn {
    /// This machine's own, when it is there and not too old.
    pub fn find_on_host() -> Option<Self> {
        let said = Command::new("systemd-nspawn").arg("--version").run().ok()?;
        let version = parse_version(&String::from_utf8_lossy(&said.stdout))?;
        (version >= OLDEST).then_some(Nspawn::Host)
    }

    fn command(&self) -> Result<Command> {
        match self {
            Nspawn::Host => Ok(Command::new("systemd-nspawn").env("LC_ALL", "C.UTF-8")),
            Nspawn::Tools(root) => Tools::new(root).command("systemd-nspawn"),
        }
    }
}

/// `systemd 257 (257.9-1)`
fn parse_version(text: &str) -> Option<u32> {
    let word = text.strip_prefix("systemd ")?.split([' ', '.', '~', '\n']).next()?;
    word.parse().ok()
}

/// What a keeper is to keep.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Order {
    pub nspawn: Nspawn,
    /// The raw disk.
    pub image: PathBuf,
    pub var: PathBuf,
    pub console: PathBuf,
    /// Where the keeper writes [`Running`], and removes it at the end.
    pub running: PathBuf,
    /// The lab's network namespace.
    pub pin: PathBuf,
    /// The name of the lab's group, and that of the node's group in it.
    pub group: (String, String),
    /// At most 12 letters; the interface outside is named after it.
    pub machine: String,
    pub hostname: String,
    /// Folders of this machine, and where the node has them.
    pub shares: Vec<(PathBuf, String)>,
    /// By name, the files that hold them.
    pub credentials: Vec<(String, PathBuf)>,
}

/// The processes of a node that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    pub keeper: Process,
    pub supervisor: Process,
    /// The first process of the node.
    pub init: Process,
    /// Starts since the lab started it: more than 1 after reboots.
    pub boots: u32,
}

impl Running {
    /// What the keeper wrote down, if it is true still.
    pub fn load(path: &Path) -> Option<Self> {
        let running: Running = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        running.keeper.is_alive().then_some(running)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Runs(Running),
    Mistake(UserError),
    Failed(String),
}

/// The interface of a node's machine outside of the node.
pub fn name_interface(machine: &str) -> String {
    format!("vb-{machine}")
}

/// Start a node by `program`, an executable that calls [`serve_if_asked`], and wait until
/// its first process runs.
pub fn launch(program: &Path, order: &Order) -> Result<Running> {
    let order = serde_json::to_vec(order).context("describing the node")?;
    let output = Command::new(program)
        .args([ENTRY, "launch"])
        .input(order)
        .run()
        .context("starting a node")?;
    match serde_json::from_slice(&output.stdout).context("reading the keeper's answer")? {
        Answer::Runs(running) => Ok(running),
        Answer::Mistake(mistake) => Err(mistake.into()),
        Answer::Failed(why) => bail!("starting a node: {why}"),
    }
}

/// If this process was started as a stage of the lab, do that stage's work and give back its
/// exit code. Call it first in `main`, before anything starts a thread.
pub fn serve_if_asked() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    if args.next().as_deref() != Some(OsStr::new(ENTRY)) {
        return None;
    }
    let done = match args.next().unwrap_or_default().to_str() {
        Some("launch") => start_keeper(),
        Some("keep") => read_order().and_then(|(_, order)| keep(&order)),
        _ => Err(anyhow::anyhow!("only the lab starts this")),
    };
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    })
}

fn read_order() -> Result<(Vec<u8>, Order)> {
    let mut bytes = Vec::new();
    std::io::stdin().take(LONGEST).read_to_end(&mut bytes).context("reading the order")?;
    let order = serde_json::from_slice(&bytes).context("reading the order")?;
    Ok((bytes, order))
}

/// Enter the keepers' group, start the keeper, and hand on its answer.
fn start_keeper() -> Result<()> {
    let (bytes, order) = read_order()?;
    let group = Hierarchies::find()?.name_group(&order.group.0).name_child(KEEPERS);
    group.create()?;
    cgroup::enter(&group.open_doors()?).context("entering the keepers' group")?;
    let mut keeper = Command::new("/proc/self/exe")
        .args([ENTRY, "keep"])
        .input(bytes.as_slice())
        .output_to(std::process::Stdio::piped(), std::process::Stdio::inherit())
        .spawn_detached()?;
    if let Some(mut stdin) = keeper.stdin.take() {
        stdin.write_all(&bytes).context("writing to the keeper")?;
    }
    let mut answer = String::new();
    if let Some(stdout) = keeper.stdout.take() {
        BufReader::new(stdout.take(LONGEST)).read_line(&mut answer)?;
    }
    if answer.is_empty() {
        bail!("the keeper ended without an answer");
    }
    print!("{answer}");
    Ok(std::io::stdout().flush()?)
}

/// Run the node until it ends other than by a reboot.
fn keep(order: &Order) -> Result<()> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let mut console = Console::open(&order.console).context("opening the console's log")?;
    let mut boots = 0;
    loop {
        boots += 1;
        let started = start(order, &mut console, boots);
        if boots == 1 {
            answer(&started)?;
        }
        let (root, mut child, pipe) = match started {
            Ok(started) => (started.root, started.child, started.pipe),
            Err(error) => {
                let _ = console.write(format!("stanchion: {error:#}\n").as_bytes());
                let _ = fs::remove_file(&order.running);
                return Ok(());
            }
        };
        // It ends with nspawn.
        let copied = console.copy_from(pipe);
        let status = child.wait().context("waiting for systemd-nspawn")?;
        drop(root);
        let _ = fs::remove_file(&order.running);
        let said = format!("stanchion: the node has ended ({status})\n");
        let _ = console.write(said.as_bytes());
        copied.context("reading the console")?;
        if status.code() != Some(REBOOTED) {
            return Ok(());
        }
    }
}

/// Say how the start went, then let go of whoever waits for it.
fn answer(started: &Result<Started>) -> Result<()> {
    let answer = match started {
        Ok(started) => Answer::Runs(started.running),
        Err(error) => match error.downcast_ref::<UserError>() {
            Some(mistake) => Answer::Mistake(mistake.clone()),
            None => Answer::Failed(format!("{error:#}")),
        },
    };
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    // Nobody may be there any more; then the next command finds the node running.
    let _ = std::io::stdout().write_all(&line);
    let nowhere = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nowhere)?;
    rustix::stdio::dup2_stdout(&nowhere)?;
    Ok(rustix::stdio::dup2_stderr(&nowhere)?)
}

struct Started {
    running: Running,
    root: Root,
    child: Child,
    pipe: PipeReader,
}

fn start(order: &Order, console: &mut Console, boots: u32) -> Result<Started> {
    let groups = Hierarchies::find()?;
    let group = groups.name_group(&order.group.0).name_child(&order.group.1);
    group.create()?;
    let doors = group.open_doors()?;
    let namespace = network::open(&order.pin)?;
    let credentials = read_credentials(order)?;
    let root = Root::mount(&order.image, &order.var)?;
    let mut command = describe_node(order, &root)?;
    for (name, bytes) in &credentials {
        let path = root.add_credential(name, bytes)?;
        command = command.arg(format!("--load-credential={name}:{}", path.display()));
    }
    let (pipe, output) = std::io::pipe().context("making the console's pipe")?;
    // SAFETY: write and setns are async-signal-safe.
    let command = unsafe {
        command.before_exec(move || {
            cgroup::enter(&doors)?;
            network::join(&namespace)
        })
    };
    let mut child = command.output_to(output.try_clone()?, output).spawn()?;
    match wait_for_init(&mut child) {
        Ok((supervisor, init)) => {
            let keeper = Process::find(std::process::id() as i32).context("finding ourselves")?;
            let running = Running { keeper, supervisor, init, boots };
            store::write_atomically(&order.running, &serde_json::to_vec(&running)?)?;
            Ok(Started { running, root, child, pipe })
        }
        Err(error) => {
            // It may have ended by itself.
            let _ = child.kill();
            child.wait().context("waiting for systemd-nspawn")?;
            let _ = console.copy_from(pipe);
            let said = take_tail(&console::read(&order.console)?, 20);
            Err(error.context(format!("the console's end:\n{said}")))
        }
    }
}

/// Read before the mounts, which may hide them.
fn read_credentials(order: &Order) -> Result<Vec<(String, Vec<u8>)>> {
    let read = |path: &Path| -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path)?.take(LONGEST).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let mut credentials = Vec::new();
    for (name, path) in &order.credentials {
        let bytes = read(path).with_context(|| format!("reading {}", path.display()))?;
        credentials.push((name.clone(), bytes));
    }
    Ok(credentials)
}

fn describe_node(order: &Order, root: &Root) -> Result<Command> {
    let command = order.nspawn.command()?;
    Ok(command
        // Both are for machines where cgroup v1 is there, too, or a lock folder is not.
        .env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1")
        .env("SYSTEMD_NSPAWN_LOCK", "0")
        // The node's: its console is a log.
        .env("TERM", "dumb")
        .arg("--quiet")
        .arg("--boot")
        .arg("--directory")
        .arg(root.path())
        .arg(format!("--machine={}", order.machine))
        .arg(format!("--hostname={}", order.hostname))
        .arg(format!("--network-bridge={}", network::BRIDGE))
        .args(["--register=no", "--keep-unit", "--settings=no", "--console=read-only"])
        .args(["--resolv-conf=off", "--timezone=off", "--link-journal=no"])
        .arg("--kill-signal=SIGRTMIN+3")
        .args(order.shares.iter().map(|(from, to)| format!("--bind={}:{to}", from.display()))))
}

/// nspawn, and its child that is the first process of a pid namespace and has started the
/// node's own program.
fn wait_for_init(child: &mut Child) -> Result<(Process, Process)> {
    let pid = child.id() as i32;
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(status) = child.try_wait().context("waiting for systemd-nspawn")? {
            bail!("systemd-nspawn ended before the node's init ran ({status})");
        }
        if let (Some(supervisor), Some(init)) = (Process::find(pid), find_init(pid)) {
            return Ok((supervisor, init));
        }
        if Instant::now() > end {
            bail!("the node's init did not start within {} s", LIMIT.as_secs());
        }
        std::thread::sleep(TICK);
    }
}

fn find_init(supervisor: i32) -> Option<Process> {
    let own = fs::read_link(format!("/proc/{supervisor}/exe")).ok()?;
    list_children(supervisor).into_iter().find_map(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        (is_first(&status) && program != own).then(|| Process::find(pid))?
    })
}

/// Whether it is the first process of a pid namespace below ours (`NSpid` of
/// `proc_pid_status(5)`).
fn is_first(status: &str) -> bool {
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    let mut ids = ids.split_ascii_whitespace();
    ids.next().is_some() && ids.last() == Some("1")
}

fn list_children(parent: i32) -> Vec<i32> {
    let is_child = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        fields.split_ascii_whitespace().nth(1) == Some(&parent.to_string())
    };
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(is_child)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_systemd_are_read() {
        assert_eq!(parse_version("systemd 257 (257.9-1)\n+PAM"), Some(257));
        assert_eq!(parse_version("systemd 258.1 (258.1)"), Some(258));
        assert_eq!(parse_version("systemd 256~rc3"), Some(256));
        assert_eq!(parse_version("elogind 252"), None);
    }

    #[test]
    fn the_first_process_of_a_namespace_below_is_told_from_others() {
        assert!(is_first("Name:\tsystemd\nNSpid:\t4711\t1\n"));
        assert!(!is_first("NSpid:\t1\n"));
        assert!(!is_first("NSpid:\t4711\t12\n"));
        assert!(!is_first(""));
    }
}
