//! Runs Rust jobs and Debian maintainer scripts in namespaces of their own: user, mount,
//! pid, ipc, uts and network. No root is needed; root gets the same.
//!
//! ```text
//! builder ──► helper ──► worker ──► enter ──► init ──► program
//!             unshares   pid 1:     unshares  pid 1:   dpkg, a shell: its root is
//!             and waits  runs the   mounts    pivots,  the tree, and it can reach
//!             for ids    job        and pids  reaps    nothing else
//! ```
//!
//! Every arrow is a new start of this executable ([`serve_if_asked`]), since a process with
//! threads cannot enter a user namespace. Each process asks the kernel for SIGKILL when the
//! one before it dies, and the worker is the first process of a pid namespace: whenever the
//! builder dies, every process dies, and with the last of them the mounts.
//!
//! Ids inside are 0 to 65535. For root they are the same outside; for an ordinary user, 0 is
//! the user and the rest are subordinate ids (`subuid(5)`).
//!
//! The worker still sees the host's file system (with the rights of the mapped ids), so that
//! a job can read packages and write archives; a program run by [`Inside`] does not.

mod child;
mod idmap;
mod init;
mod inside;
mod mounts;
mod probe;
mod wire;

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, ExitStatus};
use std::thread::Scope;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::command::Command;
use crate::store;

pub use child::serve_if_asked;
pub use inside::{Inside, Program};
pub use probe::Check;

use wire::{Event, Job};

/// Code that runs in the namespaces: the job's name, its input, and what it may do there.
pub type Handler = fn(&str, Value, &mut Inside) -> Result<Value>;

/// The tree that a job works on and how its programs see the world.
///
/// Without `merged` a job has the ids but no tree, and can run no programs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Spec {
    /// Read-only trees, bottom first.
    pub lower: Vec<PathBuf>,
    /// Where changes land: an overlay's upper side over `lower`, with deletions as 0:0
    /// character devices and `user.overlay.*` attributes. With no `lower` it is the tree
    /// itself. Its own mode and owner are those of `/` inside. `None`: a read-only tree.
    pub upper: Option<PathBuf>,
    /// The overlay's work directory, on the file system of `upper`; emptied first. Changes
    /// are not synced to the disk (`volatile`): keep nothing of a job that was cut short.
    pub work: Option<PathBuf>,
    /// An existing directory to mount on, seen only by the job.
    pub merged: Option<PathBuf>,
    /// What programs see besides the tree.
    pub binds: Vec<Bind>,
    /// Added to the environment of programs.
    pub env: BTreeMap<String, String>,
    /// `None`: `localhost`.
    pub hostname: Option<String>,
    /// Share the host's network instead of having none.
    pub network: bool,
}

/// A file or directory of the host, shown to programs at the absolute path `to`: one that
/// exists in the tree, or one under `/run` or `/tmp`, which is made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Bind {
    pub from: PathBuf,
    pub to: PathBuf,
    pub read_only: bool,
}

/// Starts jobs. `program` is an executable that calls [`serve_if_asked`].
#[derive(Debug, Clone)]
pub struct Sandbox {
    program: PathBuf,
}

impl Default for Sandbox {
    fn default() -> Self {
        Sandbox::new("/proc/self/exe")
    }
}

impl Sandbox {
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Sandbox { program: program.into() }
    }

    /// Run the job to its end and give back what its handler gave. `on_line` gets what the
    /// handler says meanwhile.
    ///
    /// # Errors
    /// The handler's error with its causes ([`UserError`](crate::error::UserError)s and
    /// I/O errors stay what they were), its panic, or what the namespaces lack.
    pub fn start(
        &self,
        spec: &Spec,
        job: &str,
        input: Value,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<Value> {
        let ids = idmap::IdMap::plan()?;
        let job = Job { name: job.to_string(), input, spec: spec.clone() };
        let job = serde_json::to_vec(&job).context("describing the job")?;
        let mut child = Command::new(&self.program)
            .args([wire::ENTRY, "helper"])
            .args(spec.network.then_some(wire::NETWORK))
            .input(Vec::new())
            .spawn()
            .context("starting the sandbox")?;
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let mut helper = Running { child };
        std::thread::scope(|scope| {
            let said = keep_last_lines(scope, stderr);
            let answer = converse(&helper, &ids, stdin, stdout, &job, on_line);
            if answer.is_err() {
                helper.kill();
            }
            let status = helper.wait()?;
            let said = said.join().unwrap_or_default();
            answer?.ok_or_else(|| describe_silence(status, &said))
        })
    }

    /// Run one program in the tree; `on_line` gets each line it writes.
    pub fn run(&self, spec: &Spec, program: &Program, on_line: &mut dyn FnMut(&str)) -> Result<()> {
        self.start(spec, child::WATCH, serde_json::to_value(program)?, on_line).map(drop)
    }

    /// Run one program in the tree and give back what it wrote to its standard output.
    pub fn read(&self, spec: &Spec, program: &Program) -> Result<String> {
        let answer = self.start(spec, child::READ, serde_json::to_value(program)?, &mut |_| ())?;
        serde_json::from_value(answer).context("reading the program's output")
    }

    /// Open a shell in the tree, on the terminal.
    pub fn open_shell(&self, spec: &Spec) -> Result<()> {
        self.start(spec, child::SHELL, Value::Null, &mut |_| ()).map(drop)
    }

    /// Remove a tree that may hold files of subordinate owners; nothing there is fine.
    pub fn remove_tree(&self, path: &Path) -> Result<()> {
        let Err(plain) = store::remove_tree(path) else { return Ok(()) };
        if rustix::process::geteuid().is_root() {
            return Err(plain);
        }
        let path = serde_json::to_value(std::path::absolute(path)?)?;
        self.start(&Spec::default(), child::REMOVE, path, &mut |_| ()).map(drop)
    }
}

/// The helper; killed when dropped before its end.
struct Running {
    child: Child,
}

impl Running {
    fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
    }

    fn wait(&mut self) -> Result<ExitStatus> {
        self.child.wait().context("waiting for the sandbox")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
        let _ = self.child.wait();
    }
}

/// The builder's side of the protocol: map ids when the helper has unshared, hand over the
/// job when the worker is ready, then listen. `None`: it ended without an answer.
///
/// The job is sent only to a worker that runs already: one whose builder died earlier than
/// it could ask for the death signal reads an end of file instead, and ends.
fn converse(
    helper: &Running,
    ids: &idmap::IdMap,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    job: &[u8],
    on_line: &mut dyn FnMut(&str),
) -> Result<Option<Value>> {
    let (Some(stdin), Some(stdout)) = (stdin, stdout) else { bail!("the sandbox has no pipes") };
    let (mut stdin, mut stdout) = (Some(stdin), BufReader::new(stdout));
    let mut answer = None;
    while let Some(event) = wire::read_event(&mut stdout)? {
        match event {
            Event::Unshared => {
                ids.write(helper.child.id())?;
                send(stdin.as_mut(), b"\n")?;
            }
            Event::Ready => send(stdin.take().as_mut(), job)?,
            Event::Say { text } => on_line(&text),
            Event::Done { value } => answer = Some(Ok(value)),
            Event::Failed { causes } => answer = Some(Err(wire::restore_error(causes))),
        }
    }
    answer.transpose()
}

fn send(stdin: Option<&mut ChildStdin>, bytes: &[u8]) -> Result<()> {
    match stdin {
        // When it has died already, the missing answer tells.
        Some(stdin) => match stdin.write_all(bytes) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                Err(error).context("writing to the sandbox")
            }
            _ => Ok(()),
        },
        None => bail!("the sandbox asked twice for its job"),
    }
}

fn describe_silence(status: ExitStatus, said: &str) -> anyhow::Error {
    let said = if said.is_empty() { String::new() } else { format!("\n{said}") };
    anyhow!("the sandbox ended without an answer ({status}){said}")
}

fn keep_last_lines<'scope>(
    scope: &'scope Scope<'scope, '_>,
    pipe: Option<impl Read + Send + 'scope>,
) -> std::thread::ScopedJoinHandle<'scope, String> {
    scope.spawn(move || {
        let mut tail = Tail::default();
        if let Some(pipe) = pipe {
            // A pipe that breaks has said all it could.
            let _ = read_lines(pipe, &mut |line| tail.push(line));
        }
        tail.into_text()
    })
}

/// The last 40 lines of something.
#[derive(Default)]
struct Tail(VecDeque<String>);

impl Tail {
    fn push(&mut self, line: &str) {
        if self.0.len() == 40 {
            self.0.pop_front();
        }
        self.0.push_back(line.to_string());
    }

    fn into_text(self) -> String {
        Vec::from(self.0).join("\n")
    }
}

/// Each line of `pipe` as text, without its end; a line beyond 64 KiB comes in parts.
fn read_lines(pipe: impl Read, on_line: &mut dyn FnMut(&str)) -> std::io::Result<()> {
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(64 << 10).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        on_line(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']));
    }
}
