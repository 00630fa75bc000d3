//! `--debug-shell`, on a terminal of the test's own (`pty(7)`).

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::CommandExt;

use crate::project::{Project, can_build, take_turn};

/// A new terminal: the side that a user sits at, and the program's.
fn open_terminal() -> (File, File) {
    let (mut user, mut program) = (-1, -1);
    let null = std::ptr::null_mut();
    // SAFETY: both numbers are written before they are used, and then owned here alone.
    unsafe {
        assert_eq!(libc::openpty(&mut user, &mut program, null, null.cast(), null.cast()), 0);
        (File::from_raw_fd(user), File::from_raw_fd(program))
    }
}

#[test]
fn a_shell_opens_where_a_command_failed() {
    let _turn = take_turn();
    if !can_build() {
        return;
    }
    let project = Project::tiny("commands = [\"echo mark > /etc/mark; exit 3\"]");
    project.copy_store();
    let (mut user, program) = open_terminal();
    let mut command = project.command(&["build", "tiny", "--offline", "--debug-shell"]);
    let side = || program.try_clone().unwrap();
    command.stdin(side()).stdout(side()).stderr(side());
    // SAFETY: both calls are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let mut child = command.spawn().unwrap();
    drop((command, program));
    assert!(user.as_raw_fd() >= 0);
    // Typed ahead: the shell reads it when it opens.
    user.write_all(b"echo in-$((40 + 2))-shell; cat /etc/mark; head -c 9 /etc/os-release; exit\n")
        .unwrap();
    let mut shown = Vec::new();
    // At the end of the last process on it a terminal gives an error.
    let _ = user.read_to_end(&mut shown);
    let shown = String::from_utf8_lossy(&shown);
    assert_eq!(child.wait().unwrap().code(), Some(2), "{shown}");
    for part in ["in-42-shell", "mark\r\n", "PRETTY_NA", "a command failed in layer `extra`"] {
        assert!(shown.contains(part), "no `{part}` in:\n{shown}");
    }
    assert!(!shown.contains("`stanchion build --debug-shell PROFILE`"), "{shown}");
}
