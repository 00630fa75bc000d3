//! The stages between a job and its program: `enter`, which makes a mount and a pid
//! namespace, and `init`, the first process in it, which makes the tree its root, gives up
//! what the program does not need, starts it and reaps what others leave.
//!
//! A pid namespace for each program: when the program ends, so does all that it left behind,
//! and the worker, whose root is the host's, is not to be seen.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::fs::Mode;
use rustix::io::FdFlags;
use rustix::process::WaitOptions;
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use serde::{Deserialize, Serialize};

use super::wire::{self, Cause};
use super::{Bind, mounts};
use crate::command::Command;

/// What the worker asks of these stages.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// The directory that the job mounts on.
    pub base: PathBuf,
    pub binds: Vec<Bind>,
    pub env: BTreeMap<String, String>,
    /// Empty: enter the tree and end.
    pub argv: Vec<String>,
}

/// What became of it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The program ran: its status as `wait(2)` gives it.
    Ended(i32),
    /// There was no program to run; whether `/proc` is a fresh one.
    Entered {
        fresh_proc: bool,
    },
    Failed(Vec<Cause>),
}

/// What a program may do as root, besides what its ids allow: what Docker leaves to the
/// containers in which Debian's packages are installed every day, but for raw sockets. It
/// can neither mount nor trace the processes that have more.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::AUDIT_WRITE);

/// `args`: the descriptors of the request and of the pipe for the report, which are `init`'s.
pub fn enter(args: &[OsString]) -> Result<()> {
    // SAFETY: no memory or descriptor table is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWPID) }
        .context("entering namespaces for a program")?;
    let mut init =
        Command::new("/proc/self/exe").args([wire::ENTRY, "init"]).args(args).inherit().spawn()?;
    init.wait().context("waiting for a program's init")?;
    Ok(())
}

pub fn run(args: &[OsString]) -> Result<()> {
    let [request, report] = args else { anyhow::bail!("init takes two descriptors") };
    let (mut request, mut report) = (take_file(request)?, take_file(report)?);
    let outcome = read_request(&mut request).and_then(|request| perform(&request));
    let outcome = outcome.unwrap_or_else(|error| Report::Failed(wire::list_causes(&error)));
    report.write_all(&serde_json::to_vec(&outcome)?).context("writing the report")
}

/// The file behind a descriptor that was inherited for us, and for no program.
fn take_file(number: &OsString) -> Result<File> {
    let number = number.to_str().and_then(|text| text.parse().ok());
    let number = number.context("a descriptor is a number")?;
    // SAFETY: the stage before this one opened it for us; nothing else here owns it.
    let file = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&file, FdFlags::CLOEXEC).context("taking an inherited descriptor")?;
    Ok(file.into())
}

fn read_request(file: &mut File) -> Result<Request> {
    let mut text = Vec::new();
    file.read_to_end(&mut text).context("reading the request")?;
    serde_json::from_slice(&text).context("reading the request")
}

fn perform(request: &Request) -> Result<Report> {
    let fresh_proc = mounts::enter(&request.base, &request.binds)?;
    let [program, args @ ..] = &request.argv[..] else { return Ok(Report::Entered { fresh_proc }) };
    give_up_rights().context("giving up rights")?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let command = request
        .env
        .iter()
        .fold(Command::new(program).clear_env(), |command, (name, value)| command.env(name, value));
    let child = command.args(args).inherit().spawn()?;
    reap_until(child.id()).map(Report::Ended)
}

/// Wait for whoever ends until it is the program; its status.
fn reap_until(program: u32) -> Result<i32> {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid.as_raw_nonzero().get() as u32 == program => {
                let code = status.exit_status().map(|code| code << 8);
                return Ok(code.or(status.terminating_signal()).unwrap_or(1 << 8));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).context("waiting for the program"),
        }
    }
}

fn give_up_rights() -> Result<()> {
    for capability in (CapabilitySet::all() - KEPT).iter() {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // One that this kernel does not know.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    rustix::thread::set_thread_groups(&[])?;
    let now = rustix::thread::capabilities(None)?;
    let kept = now.permitted & KEPT;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )?;
    Ok(rustix::thread::set_no_new_privs(true)?)
}
