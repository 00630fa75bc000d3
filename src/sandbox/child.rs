//! The stages between the builder and a job: the helper, and the worker that runs the job
//! as the first process of its pid namespace.

use std::any::Any;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;
use rustix::thread::UnshareFlags;
use serde_json::Value;

use super::inside::{Inside, Program};
use super::wire::{self, Event, Job};
use super::{Handler, init, mounts, probe};
use crate::command::Command;
use crate::store;

pub const WATCH: &str = "sandbox/watch";
pub const READ: &str = "sandbox/read";
pub const SHELL: &str = "sandbox/shell";
pub const REMOVE: &str = "sandbox/remove";
pub const PROBE: &str = "sandbox/probe";

/// If this process was started as a stage of the sandbox, do that stage's work and give back
/// its exit code. Call it first in `main`, before anything starts a thread.
pub fn serve_if_asked(handler: Handler) -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    if args.next().as_deref() != Some(OsStr::new(wire::ENTRY)) {
        return None;
    }
    let stage = args.next().unwrap_or_default();
    let rest: Vec<_> = args.collect();
    // By hand, these two would change the host's mounts.
    let is_first = rustix::process::getpid() == rustix::process::Pid::INIT;
    let done = match stage.to_str() {
        Some("worker" | "init") if !is_first => Err(anyhow!("only the sandbox starts this")),
        Some("helper") => help(rest.first().is_some_and(|word| word == wire::NETWORK)),
        Some("worker") => work(handler),
        Some("enter") => init::enter(&rest),
        Some("init") => init::run(&rest),
        _ => Err(anyhow!("only the sandbox starts this")),
    };
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    })
}

/// Enter the namespaces, have the builder map ids, then start the worker and wait for it.
/// With `network` it keeps the host's.
fn help(network: bool) -> Result<()> {
    let terminal = find_own_terminal();
    let mut stdout = std::io::stdout();
    let flags = UnshareFlags::NEWUSER
        | UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS;
    let flags = if network { flags } else { flags | UnshareFlags::NEWNET };
    // SAFETY: no memory or descriptor table is unshared.
    if let Err(errno) = unsafe { rustix::thread::unshare_unsafe(flags) } {
        let causes = wire::list_causes(&probe::explain_unshare(errno).into());
        return wire::write_event(&mut stdout, &Event::Failed { causes });
    }
    // A change of credentials may clear it (`PR_SET_PDEATHSIG(2const)`).
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    wire::write_event(&mut stdout, &Event::Unshared)?;
    // One byte and no more: the rest is the worker's. At an end of file the builder is gone
    // or has said what is wrong.
    if rustix::io::read(std::io::stdin(), &mut [0_u8; 1])? == 0 {
        return Ok(());
    }
    let mut worker =
        Command::new("/proc/self/exe").args([wire::ENTRY, "worker"]).inherit().spawn()?;
    let status = worker.wait().context("waiting for the worker")?;
    if let Some(terminal) = terminal {
        take_back(&terminal);
    }
    if !status.success() {
        bail!("the worker ended with {status}");
    }
    Ok(())
}

/// The terminal, when our process group is the one it listens to.
fn find_own_terminal() -> Option<File> {
    let terminal = File::open("/dev/tty").ok()?;
    let group = rustix::termios::tcgetpgrp(&terminal).ok()?;
    (group == rustix::process::getpgrp()).then_some(terminal)
}

/// A shell inside makes itself the terminal's process group and cannot name ours, which
/// lies outside of its pid namespace, to give it back.
fn take_back(terminal: &File) {
    // SAFETY: ignoring a signal installs no code.
    unsafe { libc::signal(libc::SIGTTOU, libc::SIG_IGN) };
    // Without it the next read of the terminal fails, and says so.
    let _ = rustix::termios::tcsetpgrp(terminal, rustix::process::getpgrp());
}

/// Read the job, run it, answer.
fn work(handler: Handler) -> Result<()> {
    // The caller's must not show in what a job writes.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    // Whatever prints from now on must not get into the answer.
    let mut events = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    rustix::stdio::dup2_stdout(std::io::stderr())?;
    wire::write_event(&mut events, &Event::Ready)?;
    let mut job = Vec::new();
    std::io::stdin().read_to_end(&mut job).context("reading the job")?;
    if job.is_empty() {
        bail!("the builder is gone");
    }
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    let said = events.try_clone()?;
    let event = match perform(handler, &job, said) {
        Ok(value) => Event::Done { value },
        Err(error) => Event::Failed { causes: wire::list_causes(&error) },
    };
    wire::write_event(&mut events, &event)?;
    events.flush().context("writing to the builder")
}

fn perform(handler: Handler, job: &[u8], events: File) -> Result<Value> {
    let Job { name, input, spec } = serde_json::from_slice(job).context("reading the job")?;
    mounts::detach_from_host().map_err(probe::explain_first_mount)?;
    let hostname = spec.hostname.as_deref().unwrap_or("localhost");
    rustix::system::sethostname(hostname.as_bytes()).context("setting the host name")?;
    if !spec.network {
        raise_loopback().context("raising the loopback interface")?;
    }
    if spec.merged.is_some() {
        mounts::prepare(&spec).context("preparing the sandbox's tree")?;
    }
    let mut inside = Inside::new(spec, events);
    catch_panic(|| match name.as_str() {
        WATCH => {
            let program: Program = serde_json::from_value(input)?;
            inside.watch_and_say(&program)?;
            Ok(Value::Null)
        }
        READ => {
            let output = inside.run(&serde_json::from_value(input)?)?;
            Ok(String::from_utf8_lossy(&output.stdout).into())
        }
        SHELL => inside.open_shell().map(|()| Value::Null),
        REMOVE => {
            let path: std::path::PathBuf = serde_json::from_value(input)?;
            store::remove_tree(&path).map(|()| Value::Null)
        }
        PROBE => {
            let directory: std::path::PathBuf = serde_json::from_value(input)?;
            Ok(serde_json::to_value(probe::try_inside(&directory))?)
        }
        job => handler(job, input, &mut inside),
    })
}

/// A panic becomes an error with its message; the place it names is on standard error.
fn catch_panic(job: impl FnOnce() -> Result<Value>) -> Result<Value> {
    catch_unwind(AssertUnwindSafe(job))
        .unwrap_or_else(|panic| Err(anyhow!("the job panicked: {}", describe_panic(&*panic))))
}

fn describe_panic(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}

/// `netdevice(7)`. Programs that talk to themselves expect 127.0.0.1 to exist.
fn raise_loopback() -> std::io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: a C struct of numbers, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is a valid `ifreq` that the kernel only reads.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_that_carries_its_message() {
        let error = catch_panic(|| panic!("entry {} is odd", 7)).unwrap_err();
        assert_eq!(error.to_string(), "the job panicked: entry 7 is odd");
        assert_eq!(catch_panic(|| Ok(Value::from(1))).unwrap(), 1);
    }
}
