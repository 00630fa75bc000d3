//! Processes by id and start time: an id alone may be somebody else's by now.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags};
use serde::{Deserialize, Serialize};

/// How often something is looked at that tells nobody when it changes.
pub const TICK: Duration = Duration::from_millis(10);

/// A process that ran when it was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: i32,
    /// Clock ticks after the machine's boot (`proc_pid_stat(5)`, field 22).
    started: u64,
}

impl Process {
    /// The process that has this id now. `None`: there is none, or it is dead and unreaped.
    pub fn find(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, started) = parse_stat(&stat)?;
        (!matches!(state, 'Z' | 'X')).then_some(Process { pid, started })
    }

    pub fn is_alive(&self) -> bool {
        Process::find(self.pid) == Some(*self)
    }

    /// A descriptor of this process and no other. `None`: it has ended.
    pub fn open(&self) -> Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        match pidfd_open(pid, PidfdFlags::empty()) {
            // The id is the process's still, so it was when it was opened.
            Ok(descriptor) => Ok(self.is_alive().then_some(descriptor)),
            Err(Errno::SRCH) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("opening process {}", self.pid)),
        }
    }

    /// Send it SIGKILL; one that has ended is as it should be.
    pub fn kill(&self) -> Result<()> {
        let Some(descriptor) = self.open()? else { return Ok(()) };
        match pidfd_send_signal(&descriptor, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("killing process {}", self.pid)),
        }
    }

    /// Whether it ends within `limit`.
    pub fn wait_for_end(&self, limit: Duration) -> bool {
        wait_until(limit, || !self.is_alive())
    }

    /// Run in all of its namespaces, in a thread of its own. Programs that are started there
    /// are inside, with the process's root as theirs.
    ///
    /// # Errors
    /// `Ok(None)`: it has ended.
    pub fn enter<T: Send>(&self, act: impl FnOnce() -> T + Send) -> Result<Option<T>> {
        let Some(descriptor) = self.open()? else { return Ok(None) };
        let spaces = ThreadNameSpaceType::MOUNT
            | ThreadNameSpaceType::CONTROL_GROUP
            | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
            | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
            | ThreadNameSpaceType::PROCESS_ID
            | ThreadNameSpaceType::NETWORK;
        let enter = || -> io::Result<()> {
            // SAFETY: no memory or descriptor table is unshared.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS)? };
            Ok(rustix::thread::move_into_thread_name_spaces(descriptor.as_fd(), spaces)?)
        };
        run_in_thread(|| match enter() {
            Ok(()) => Ok(Some(act())),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            Err(error) => Err(error)
                .with_context(|| format!("entering the namespaces of process {}", self.pid)),
        })
    }
}

/// Run in a thread that ends with it, and whatever it entered.
pub fn run_in_thread<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(act).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Whether it becomes true within `limit`.
pub fn wait_until(limit: Duration, mut is_true: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    while !is_true() {
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(TICK);
    }
    true
}

/// State and start time; the program's name before them may hold anything.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Command;

    #[test]
    fn the_start_time_stands_behind_a_name_with_spaces_and_brackets() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 2 3";
        assert_eq!(parse_stat(stat), Some(('S', 4711)));
        assert_eq!(parse_stat("7 (a"), None);
        assert_eq!(parse_stat("7 (a) S 1"), None);
    }

    #[test]
    fn an_id_that_is_somebody_elses_is_not_killed() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::find(child.id() as i32).unwrap();
        let earlier = Process { started: process.started - 1, ..process };
        assert!(process.is_alive() && !earlier.is_alive());
        earlier.kill().unwrap();
        assert!(!process.wait_for_end(Duration::from_millis(50)));
        process.kill().unwrap();
        // Unreaped, it has ended all the same.
        assert!(process.wait_for_end(Duration::from_secs(10)));
        assert!(process.open().unwrap().is_none());
        child.wait().unwrap();
        process.kill().unwrap();
    }
}
