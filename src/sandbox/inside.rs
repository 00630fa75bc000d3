//! What a job can do in the namespaces.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::MemfdFlags;
use rustix::io::FdFlags;
use serde::{Deserialize, Serialize};

use super::init::{Report, Request};
use super::wire::{self, Event};
use super::{Spec, Tail, mounts, read_lines};
use crate::command::{Command, Failed, Output, take_tail};
use crate::error::UserError;

/// More output than this of one program that is not watched is an error.
const MOST_OUTPUT: usize = 16 << 20;

/// The environment of every program. Debconf asks nothing.
const ENVIRONMENT: [(&str, &str); 6] = [
    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("HOME", "/root"),
    ("LC_ALL", "C.UTF-8"),
    ("TZ", "UTC"),
    ("DEBIAN_FRONTEND", "noninteractive"),
    ("DEBCONF_NONINTERACTIVE_SEEN", "true"),
];

/// A program of the tree, with its arguments.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Program {
    argv: Vec<String>,
    env: BTreeMap<String, String>,
    input: Vec<u8>,
}

impl Program {
    /// `program` is a path or a name to be found on `PATH`.
    pub fn new(program: impl Into<String>) -> Self {
        Program { argv: vec![program.into()], env: BTreeMap::new(), input: Vec::new() }
    }

    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.argv.push(arg.into());
        self
    }

    pub fn args<A: Into<String>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.argv.extend(args.into_iter().map(Into::into));
        self
    }

    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    /// Bytes for its standard input (which is empty otherwise).
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = bytes.into();
        self
    }
}

/// The inside of the sandbox, as a job has it.
pub struct Inside {
    spec: Spec,
    events: Mutex<File>,
}

/// A program under way, and where its end will be told.
struct Running {
    child: Child,
    report: File,
}

#[derive(Clone, Copy, PartialEq)]
enum Streams {
    Apart,
    /// Standard error goes where standard output goes, so that lines keep their order.
    Joined,
    Terminal,
}

impl Inside {
    pub(super) fn new(spec: Spec, events: File) -> Self {
        Inside { spec, events: Mutex::new(events) }
    }

    /// The tree, where the job can read and write it; its `/dev`, `/proc`, `/run`, `/sys`
    /// and `/tmp` are what the tree has of them, not what programs see.
    pub fn root(&self) -> Result<PathBuf> {
        self.base().map(|base| base.join(mounts::ROOT))
    }

    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Tell the builder a line.
    pub fn say(&self, text: &str) -> Result<()> {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        wire::write_event(&mut *events, &Event::Say { text: text.to_string() })
    }

    /// Run a program with the tree as its root to its end, and all that it started with it.
    /// It has no network, few capabilities (see `init.rs`) and a clean environment.
    ///
    /// # Errors
    /// [`Failed`] when it ends with another status than 0; more than 16 MiB of output.
    pub fn run(&self, program: &Program) -> Result<Output> {
        let mut running = self.spawn(program, Streams::Apart)?;
        let (stdin, stdout, stderr) = running.take_pipes();
        let (stdout, stderr) = std::thread::scope(|scope| {
            // A program may end without reading all of its input: not our error.
            scope.spawn(move || stdin.map(|mut to| to.write_all(&program.input)));
            let stderr = scope.spawn(move || keep_output(stderr));
            (keep_output(stdout), stderr.join().unwrap_or_default())
        });
        let status = running.wait()?;
        if !status.success() {
            let both = [&stdout.bytes[..], &stderr.bytes].concat();
            return Err(fail(program, status, take_tail(&both, 40)));
        }
        if stdout.cut || stderr.cut {
            bail!("`{}` wrote more than {MOST_OUTPUT} bytes", program.argv.join(" "));
        }
        Ok(Output { stdout: stdout.bytes, stderr: stderr.bytes })
    }

    /// As [`Inside::run`], but `on_line` gets each line of both outputs as it comes, and
    /// there may be any number of them.
    pub fn watch(&self, program: &Program, on_line: &mut dyn FnMut(&str)) -> Result<()> {
        let mut running = self.spawn(program, Streams::Joined)?;
        let (stdin, stdout, _) = running.take_pipes();
        let mut tail = Tail::default();
        std::thread::scope(|scope| {
            scope.spawn(move || stdin.map(|mut to| to.write_all(&program.input)));
            stdout.map_or(Ok(()), |pipe| {
                read_lines(pipe, &mut |line| {
                    tail.push(line);
                    on_line(line);
                })
            })
        })
        .context("reading a program's output")?;
        match running.wait()? {
            status if status.success() => Ok(()),
            status => Err(fail(program, status, tail.into_text())),
        }
    }

    /// As [`Inside::watch`], with each line told to the builder.
    pub fn watch_and_say(&self, program: &Program) -> Result<()> {
        // A builder that is gone takes this process with it.
        self.watch(program, &mut |line| drop(self.say(line)))
    }

    /// An interactive shell on the terminal, until the user leaves it.
    pub fn open_shell(&self) -> Result<()> {
        let shells = ["bin/bash", "bin/sh"];
        let root = self.root()?;
        let shell = shells.iter().find(|shell| root.join(shell).symlink_metadata().is_ok());
        let shell = shell.context("the tree has no shell")?;
        let term = std::env::var("TERM").unwrap_or_else(|_| "dumb".to_string());
        let program = Program::new(format!("/{shell}")).env("TERM", term);
        self.spawn(&program, Streams::Terminal)?.wait()?;
        Ok(())
    }

    /// Enter the tree as a program would, and leave it. Whether it has a fresh `/proc`.
    pub(super) fn try_to_enter(&self) -> Result<bool> {
        let nothing = Program { argv: Vec::new(), env: BTreeMap::new(), input: Vec::new() };
        match self.spawn(&nothing, Streams::Apart)?.read_report()? {
            Report::Entered { fresh_proc } => Ok(fresh_proc),
            other => bail!("entering the tree gave {other:?}"),
        }
    }

    fn base(&self) -> Result<&Path> {
        self.spec.merged.as_deref().context("this job has no tree")
    }

    fn spawn(&self, program: &Program, streams: Streams) -> Result<Running> {
        let env = ENVIRONMENT.iter().map(|(name, value)| (name.to_string(), value.to_string()));
        let env = env.chain(self.spec.env.clone()).chain(program.env.clone()).collect();
        let request = Request {
            base: self.base()?.to_path_buf(),
            binds: self.spec.binds.clone(),
            env,
            argv: program.argv.clone(),
        };
        let request = write_request(&request)?;
        let (report, report_end) = std::io::pipe().context("making a pipe")?;
        let report_end = OwnedFd::from(report_end);
        let mut command = Command::new("/proc/self/exe")
            .args([wire::ENTRY, "enter"])
            .arg(request.as_raw_fd().to_string())
            .arg(report_end.as_raw_fd().to_string());
        if !program.input.is_empty() {
            command = command.input(Vec::new());
        }
        let terminal = match streams {
            Streams::Terminal => Some(open_terminal()?),
            _ => None,
        };
        let inherited = [request.as_raw_fd(), report_end.as_raw_fd()];
        let terminal_end = terminal.as_ref().map(AsRawFd::as_raw_fd);
        // SAFETY: fcntl and dup2 are async-signal-safe; the descriptors stay open until the
        // program has started.
        let command = unsafe {
            command.before_exec(move || {
                for number in inherited {
                    rustix::io::fcntl_setfd(BorrowedFd::borrow_raw(number), FdFlags::empty())?;
                }
                if let Some(number) = terminal_end {
                    let terminal = BorrowedFd::borrow_raw(number);
                    rustix::stdio::dup2_stdin(terminal)?;
                    rustix::stdio::dup2_stdout(terminal)?;
                    rustix::stdio::dup2_stderr(terminal)?;
                }
                if streams == Streams::Joined {
                    rustix::stdio::dup2_stderr(rustix::stdio::stdout())?;
                }
                Ok(())
            })
        };
        let child = command.spawn()?;
        Ok(Running { child, report: OwnedFd::from(report).into() })
    }
}

impl Running {
    fn take_pipes(
        &mut self,
    ) -> (
        Option<std::process::ChildStdin>,
        Option<std::process::ChildStdout>,
        Option<std::process::ChildStderr>,
    ) {
        (self.child.stdin.take(), self.child.stdout.take(), self.child.stderr.take())
    }

    /// The program's own status.
    fn wait(self) -> Result<ExitStatus> {
        match self.read_report()? {
            Report::Ended(status) => Ok(ExitStatus::from_raw(status)),
            other => bail!("running a program gave {other:?}"),
        }
    }

    /// An error of the stages before the program comes back as one.
    fn read_report(mut self) -> Result<Report> {
        let mut text = Vec::new();
        self.report.read_to_end(&mut text).context("reading a program's report")?;
        let status = self.child.wait().context("waiting for a program")?;
        if text.is_empty() {
            let mut said = String::new();
            if let Some(mut stderr) = self.child.stderr.take() {
                let _ = stderr.read_to_string(&mut said);
            }
            return Err(anyhow!("a program's init ended without a report ({status}) {said}"));
        }
        match serde_json::from_slice(&text).context("reading a program's report")? {
            Report::Failed(causes) => Err(wire::restore_error(causes)),
            report => Ok(report),
        }
    }
}

fn write_request(request: &Request) -> Result<File> {
    let file = rustix::fs::memfd_create("request", MemfdFlags::CLOEXEC)
        .context("making a file in memory")?;
    let mut file = File::from(file);
    file.write_all(&serde_json::to_vec(request)?)
        .and_then(|()| file.rewind())
        .context("writing a request")?;
    Ok(file)
}

fn open_terminal() -> Result<File> {
    File::options().read(true).write(true).open("/dev/tty").map_err(|error| {
        UserError::new("a shell needs a terminal")
            .why(error.to_string())
            .help("run the command in a terminal")
            .into()
    })
}

fn fail(program: &Program, status: ExitStatus, tail: String) -> anyhow::Error {
    Failed { command: program.argv.join(" "), status, tail }.into()
}

#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    /// The beginning was let go.
    cut: bool,
}

/// Read a pipe to its end; of more than [`MOST_OUTPUT`] bytes, keep the last.
fn keep_output(pipe: Option<impl Read>) -> Kept {
    let mut kept = Kept::default();
    let Some(mut pipe) = pipe else { return kept };
    // A pipe that breaks has said all it could.
    while pipe.by_ref().take(1 << 16).read_to_end(&mut kept.bytes).is_ok_and(|read| read > 0) {
        if kept.bytes.len() > MOST_OUTPUT {
            kept.bytes.drain(..kept.bytes.len() / 2);
            kept.cut = true;
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endless_output_is_bounded_and_its_end_is_kept() {
        let endless = std::io::repeat(b'x').take(40 << 20).chain(&b"the end"[..]);
        let kept = keep_output(Some(endless));
        assert!(kept.cut && kept.bytes.len() <= MOST_OUTPUT + (1 << 16));
        assert!(kept.bytes.ends_with(b"the end"));
        let short = keep_output(Some(&b"short"[..]));
        assert!(!short.cut && short.bytes == b"short");
    }
}
