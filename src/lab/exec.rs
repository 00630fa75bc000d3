//! Running programs inside a lab: in a node, or in the network with the operator's address.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::MemfdFlags;

use super::process::wait_until;
use super::{Lab, explain_down, network};
use crate::command::Command;

/// Bytes kept of what a command writes.
const LONGEST_OUTPUT: u64 = 16 << 20;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin";

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

impl Lab {
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
