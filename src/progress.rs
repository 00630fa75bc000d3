//! What the user sees while something runs.
//!
//! On a terminal: a spinner for each running step and a bar for each running download.
//! Elsewhere: one plain line when a step ends. `--quiet`: nothing. `--json`: one JSON
//! object a line. Everything goes to standard error but JSON, which a script reads from
//! standard output.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Terminal,
    Lines,
    Quiet,
    Json,
}

impl Mode {
    /// The mode that fits the flags and what standard error is.
    pub fn choose(quiet: bool, json: bool) -> Self {
        match (json, quiet, std::io::stderr().is_terminal()) {
            (true, _, _) => Mode::Json,
            (false, true, _) => Mode::Quiet,
            (false, false, true) => Mode::Terminal,
            (false, false, false) => Mode::Lines,
        }
    }
}

/// How a step ended, and how long it took.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StepTime {
    pub step: String,
    /// Seconds from the start of the command to that of the step.
    pub began: f64,
    pub seconds: f64,
    pub cached: bool,
    /// One line about the result; may be empty.
    pub note: String,
}

/// Shared by all threads of one command; clones show in the same place.
#[derive(Clone)]
pub struct Progress {
    mode: Mode,
    multi: MultiProgress,
    finished: Arc<Mutex<Vec<StepTime>>>,
    began: Instant,
}

impl Progress {
    pub fn new(mode: Mode) -> Self {
        let multi = MultiProgress::new();
        if mode != Mode::Terminal {
            multi.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        }
        Progress { mode, multi, finished: Arc::default(), began: Instant::now() }
    }

    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Begin a step; it ends by [`Step::finish`] or [`Step::finish_cached`]. A step that
    /// is dropped has failed, and leaves no line.
    pub fn begin(&self, name: impl Into<String>) -> Step {
        let name = name.into();
        let bar = self.multi.add(ProgressBar::new_spinner());
        bar.set_style(
            ProgressStyle::with_template("  {spinner} {msg} {elapsed:.dim}").expect("a template"),
        );
        bar.set_message(name.clone());
        bar.enable_steady_tick(Duration::from_millis(120));
        Step { progress: self.clone(), name, bar, began: Instant::now() }
    }

    /// A bar over `total` bytes.
    pub fn begin_bytes(&self, name: &str, total: u64) -> Bar {
        let bar = self.multi.add(ProgressBar::new(total));
        bar.set_style(
            ProgressStyle::with_template(
                "  {prefix:36!} {bar:24} {bytes:>10}/{total_bytes:10} {bytes_per_sec:>12} {eta}",
            )
            .expect("a template"),
        );
        bar.set_prefix(name.to_string());
        Bar { bar }
    }

    /// A line that stays. Not shown under `--quiet`.
    pub fn note(&self, text: &str) {
        self.say("note", text);
    }

    /// Shown under `--quiet` too.
    pub fn warn(&self, text: &str) {
        self.say("warning", text);
    }

    /// The steps that have ended, in the order of their ends.
    pub fn step_times(&self) -> Vec<StepTime> {
        self.finished.lock().expect("no panic while held").clone()
    }

    fn say(&self, kind: &str, text: &str) {
        match self.mode {
            Mode::Json => {
                print_line(&serde_json::json!({ "event": kind, "text": text }).to_string());
            }
            Mode::Quiet if kind == "note" => {}
            _ => {
                let line =
                    if kind == "note" { text.to_string() } else { format!("{kind}: {text}") };
                self.multi.suspend(|| eprintln!("{line}"));
            }
        }
    }

    fn record(&self, time: StepTime) {
        match self.mode {
            Mode::Terminal | Mode::Lines => {
                let took =
                    if time.cached { "cached".into() } else { format!("{:.1} s", time.seconds) };
                let line = format!("{:<44} {took:>8}  {}", time.step, time.note);
                self.multi.suspend(|| eprintln!("{}", line.trim_end()));
            }
            Mode::Json => {
                let mut event = serde_json::to_value(&time).expect("plain data");
                event["event"] = "step".into();
                print_line(&event.to_string());
            }
            Mode::Quiet => {}
        }
        self.finished.lock().expect("no panic while held").push(time);
    }
}

/// A running step.
pub struct Step {
    progress: Progress,
    name: String,
    bar: ProgressBar,
    began: Instant,
}

impl Step {
    /// What it does just now.
    pub fn update(&self, doing: &str) {
        self.bar.set_message(format!("{}: {doing}", self.name));
    }

    pub fn finish(self, note: impl Into<String>) {
        self.end(false, note.into());
    }

    pub fn finish_cached(self, note: impl Into<String>) {
        self.end(true, note.into());
    }

    fn end(self, cached: bool, note: String) {
        self.bar.finish_and_clear();
        let seconds = self.began.elapsed().as_secs_f64();
        let began = self.began.duration_since(self.progress.began).as_secs_f64();
        self.progress.record(StepTime { step: self.name.clone(), began, seconds, cached, note });
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A bar over bytes; cleared when dropped.
pub struct Bar {
    bar: ProgressBar,
}

impl Bar {
    pub fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    /// There turned out to be more to do.
    pub fn lengthen(&self, bytes: u64) {
        self.bar.inc_length(bytes);
    }

    /// Back to `bytes` done, for a transfer that starts over.
    pub fn set(&self, bytes: u64) {
        self.bar.set_position(bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Write a line to standard output, where scripts read. A reader that has gone away (`head`)
/// ends the program quietly, as it ends others.
pub fn print_line(text: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    if let Err(error) = writeln!(out, "{text}").and_then(|()| out.flush()) {
        let quiet = error.kind() == std::io::ErrorKind::BrokenPipe;
        std::process::exit(if quiet { 0 } else { 1 });
    }
}

/// `1.5 GB`, `20 MB`, `3 kB`, `12 B`.
pub fn format_bytes(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{} kB", bytes / 1_000),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
