//! The only place that starts processes.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::process::{Signal, WaitId, WaitIdOptions};

/// A program to run. Its output is captured unless [`Command::inherit`] says otherwise,
/// and it is killed when the thread that started it dies.
pub struct Command {
    inner: std::process::Command,
    shown: Vec<OsString>,
    input: Option<Vec<u8>>,
    limit: Option<Duration>,
}

/// What a program that ended well wrote.
#[derive(Debug)]
pub struct Output {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

/// A program that could be started and did not end well, with the end of its output.
#[derive(Debug, thiserror::Error)]
#[error("`{command}` {}{}", describe_status(status), indent_tail(tail))]
pub struct Failed {
    pub command: String,
    pub status: ExitStatus,
    /// The last lines of what it wrote, standard output before standard error.
    pub tail: String,
}

impl Command {
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let mut inner = std::process::Command::new(&program);
        inner.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Command { inner, shown: vec![program.as_ref().to_owned()], input: None, limit: None }
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.shown.push(arg.as_ref().to_owned());
        self.inner.arg(arg);
        self
    }

    pub fn args<A: AsRef<OsStr>>(self, args: impl IntoIterator<Item = A>) -> Self {
        args.into_iter().fold(self, |command, arg| command.arg(arg))
    }

    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.inner.env(name, value);
        self
    }

    /// Start from an empty environment.
    pub fn clear_env(mut self) -> Self {
        self.inner.env_clear();
        self
    }

    pub fn directory(mut self, path: &Path) -> Self {
        self.inner.current_dir(path);
        self
    }

    /// Bytes for its standard input (which is empty otherwise).
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.inner.stdin(Stdio::piped());
        self.input = Some(bytes.into());
        self
    }

    /// Let [`Command::run`] kill it, and what it has started, after so long.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.inner.process_group(0);
        self.limit = Some(limit);
        self
    }

    /// An open file for its standard input.
    pub fn input_from(mut self, file: std::fs::File) -> Self {
        self.inner.stdin(file);
        self
    }

    /// Let it use our standard input, output and error.
    pub fn inherit(mut self) -> Self {
        self.inner.stdin(Stdio::inherit()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
        self
    }

    /// Write its output there, instead of to us.
    pub fn output_to(mut self, stdout: impl Into<Stdio>, stderr: impl Into<Stdio>) -> Self {
        self.inner.stdout(stdout).stderr(stderr);
        self
    }

    /// Change the process between fork and exec.
    ///
    /// # Safety
    /// `prepare` runs in a forked child: only async-signal-safe calls, no allocation.
    pub unsafe fn before_exec(
        mut self,
        prepare: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        unsafe { self.inner.pre_exec(prepare) };
        self
    }

    /// Run to the end. An exit status other than 0 is a [`Failed`].
    pub fn run(self) -> Result<Output> {
        let shown = self.to_string();
        let (status, output) = self.run_any()?;
        if status.success() {
            return Ok(output);
        }
        let tail = take_tail(&[&output.stdout[..], &output.stderr].concat(), 40);
        Err(Failed { command: shown, status, tail }.into())
    }

    /// Run to the end, whatever the exit status.
    pub fn run_any(mut self) -> Result<(ExitStatus, Output)> {
        let (input, limit) = (self.input.take(), self.limit);
        let shown = self.to_string();
        let mut child = self.spawn()?;
        let mut late = false;
        let wait = || -> std::io::Result<(ExitStatus, Output)> {
            let (stdin, stdout, stderr) =
                (child.stdin.take(), child.stdout.take(), child.stderr.take());
            let id = rustix::process::Pid::from_child(&child);
            let (stdout, stderr) = std::thread::scope(|scope| {
                let (ended, end) = mpsc::channel::<()>();
                let killer = limit.map(|limit| {
                    scope.spawn(move || {
                        let late = end.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
                        // It is not waited for yet, so that its id is nobody else's.
                        late && rustix::process::kill_process_group(id, Signal::KILL).is_ok()
                    })
                });
                // A program may end without reading all of its input: not our error.
                scope.spawn(move || stdin.map(|mut to| to.write_all(&input.unwrap_or_default())));
                let stderr = scope.spawn(move || read_all(stderr));
                let read = (read_all(stdout), stderr.join().expect("reading does not panic"));
                if let Some(killer) = killer {
                    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
                    let wait = || rustix::process::waitid(WaitId::Pid(id), options);
                    while matches!(wait(), Err(Errno::INTR)) {}
                    drop(ended);
                    late = killer.join().expect("killing does not panic");
                }
                read
            });
            let status = child.wait()?;
            Ok((status, Output { stdout: stdout?, stderr: stderr? }))
        };
        let done = wait().with_context(|| format!("waiting for `{shown}`"));
        match limit.filter(|_| late) {
            Some(limit) => bail!("`{shown}` did not end within {} s", limit.as_secs_f32()),
            None => done,
        }
    }

    /// Start it in a session of its own, to outlive us; the caller serves its pipes.
    pub fn spawn_detached(mut self) -> Result<Child> {
        let shown = self.to_string();
        // SAFETY: setsid is async-signal-safe.
        unsafe {
            self.inner.pre_exec(|| Ok(rustix::process::setsid().map(drop)?));
        }
        self.inner.spawn().with_context(|| format!("starting `{shown}`"))
    }

    /// Start it and return at once; the caller serves its pipes and waits.
    pub fn spawn(mut self) -> Result<Child> {
        let shown = self.to_string();
        let parent = std::process::id();
        // SAFETY: prctl and getppid are async-signal-safe.
        unsafe {
            self.inner.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(
                    rustix::process::Signal::KILL,
                ))?;
                // The parent may have died before the line above.
                match rustix::process::getppid() {
                    Some(now) if now.as_raw_nonzero().get() as u32 != parent => {
                        Err(std::io::Error::from(std::io::ErrorKind::BrokenPipe))
                    }
                    _ => Ok(()),
                }
            });
        }
        self.inner.spawn().with_context(|| format!("starting `{shown}`"))
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, word) in self.shown.iter().enumerate() {
            let separator = if i == 0 { "" } else { " " };
            write!(f, "{separator}{}", word.to_string_lossy())?;
        }
        Ok(())
    }
}

fn read_all(pipe: Option<impl Read>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        pipe.read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

/// The last `lines` lines of a program's output, as text.
pub fn take_tail(output: &[u8], lines: usize) -> String {
    let text = String::from_utf8_lossy(output);
    let all: Vec<&str> = text.trim_end().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn describe_status(status: &ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "did not end well".to_string(),
    }
}

fn indent_tail(tail: &str) -> String {
    if tail.is_empty() {
        return String::new();
    }
    format!("; the end of its output:\n    {}", tail.replace('\n', "\n    "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_program_shows_its_end_and_its_command() {
        let error = Command::new("sh")
            .args(["-c", "seq 1 60; echo gone >&2; exit 3"])
            .run()
            .unwrap_err()
            .to_string();
        assert!(error.contains("exit code 3"), "{error}");
        assert!(error.contains("gone") && error.contains("    60"), "{error}");
        assert!(!error.contains("    20\n"), "{error}");
    }

    #[test]
    fn input_reaches_the_program_and_output_comes_back() {
        let bytes = vec![b'x'; 1 << 20];
        let output = Command::new("cat").input(bytes.clone()).run().unwrap();
        assert_eq!(output.stdout, bytes);
    }

    #[test]
    fn a_program_that_hangs_is_killed_with_what_it_started() {
        let begun = std::time::Instant::now();
        let limit = Duration::from_millis(200);
        for script in ["sleep 60; true", "sleep 60 & exec >&- 2>&-; sleep 60"] {
            let error = Command::new("sh").args(["-c", script]).limit(limit).run().unwrap_err();
            assert!(error.to_string().contains("did not end within 0.2 s"), "{error}");
        }
        assert!(begun.elapsed() < Duration::from_secs(30));
        let quick = Command::new("echo").arg("x").limit(Duration::from_secs(60)).run().unwrap();
        assert_eq!(quick.stdout, b"x\n");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Command::new("no-such-program").run().unwrap_err();
        assert!(error.to_string().contains("no-such-program"));
    }
}
