//! What the agent knows about itself: phase, steps with their times, failed checks. Kept in
//! memory, shown by `stanchion-agent status` and on the status page.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::cluster::Node;

/// The problem of a clock that is not right.
pub const CLOCK: &str = "clock";

/// How far a node is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    #[default]
    PreStart,
    Bootstrap,
    Main,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::PreStart => "pre-start",
            Phase::Bootstrap => "bootstrap",
            Phase::Main => "main",
        }
    }
}

/// One step of a phase, as it stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    pub phase: Phase,
    pub name: String,
    pub purpose: String,
    pub outcome: StepOutcome,
    /// Seconds since it began, or that it took.
    pub seconds: f64,
    pub tries: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "reason")]
pub enum StepOutcome {
    Running,
    Done,
    /// Went on, though this is not as it should be.
    Warned(String),
    /// Tried again until it works; this is why it has not.
    Waiting(String),
    Failed(String),
}

/// What `status` shows.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub node: String,
    pub cluster: String,
    /// The nodes of the cluster file, as the seed has it.
    #[serde(default)]
    pub members: Vec<Node>,
    pub phase: Phase,
    pub steps: Vec<StepRecord>,
    /// What is not as it should be, by the thing concerned; in words, with what helps. A
    /// node with one is not ready.
    pub problems: BTreeMap<String, String>,
    /// What was found to be poor, and does not keep the node from being ready.
    pub warnings: BTreeMap<String, String>,
    pub ready: bool,
    pub reasons: Vec<String>,
    /// What early failover decided last.
    pub early_failover: String,
}

/// The shared status. Locks are held for moments only, never across an await.
#[derive(Clone, Default)]
pub struct Board {
    inner: Arc<Mutex<Status>>,
}

impl Board {
    pub fn new(version: &str) -> Self {
        let board = Board::default();
        board.lock().version = version.to_string();
        board.lock().reasons = vec!["the node is starting".to_string()];
        board
    }

    pub fn lock(&self) -> MutexGuard<'_, Status> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn snapshot(&self) -> Status {
        self.lock().clone()
    }

    /// Something is wrong with `thing`; logged when it is new.
    pub fn raise(&self, thing: &str, problem: impl Into<String>) {
        let problem = problem.into();
        let old = self.lock().problems.insert(thing.to_string(), problem.clone());
        if old.as_ref() != Some(&problem) {
            log(&format!("{thing}: {problem}"));
        }
    }

    /// `thing` is well (again).
    pub fn clear(&self, thing: &str) {
        if self.lock().problems.remove(thing).is_some() {
            log(&format!("{thing}: well again"));
        }
    }

    /// Something about `thing` is poor; the runner has logged it.
    pub fn warn(&self, thing: &str, warning: String) {
        self.lock().warnings.insert(thing.to_string(), warning);
    }

    /// `thing` is not poor (any more).
    pub fn forget_warning(&self, thing: &str) {
        self.lock().warnings.remove(thing);
    }

    pub fn begin_step(&self, phase: Phase, name: &str, purpose: &str) -> usize {
        let mut status = self.lock();
        status.phase = phase;
        status.steps.push(StepRecord {
            phase,
            name: name.to_string(),
            purpose: purpose.to_string(),
            outcome: StepOutcome::Running,
            seconds: 0.0,
            tries: 0,
        });
        status.steps.len() - 1
    }

    pub fn record_step(&self, index: usize, outcome: StepOutcome, taken: Duration, tries: u32) {
        if let Some(step) = self.lock().steps.get_mut(index) {
            step.outcome = outcome;
            step.seconds = taken.as_secs_f64();
            step.tries = tries;
        }
    }
}

/// One plain line for the journal.
pub fn log(line: &str) {
    use std::io::Write;
    // A closed standard output must not end the agent.
    let _ = writeln!(std::io::stdout().lock(), "{}", line.replace('\n', " "));
}

/// The status as text for a person.
pub fn show(status: &Status) -> String {
    let mut text = format!(
        "{} of cluster {} (version {}): phase {}, {}\n",
        or_unknown(&status.node),
        or_unknown(&status.cluster),
        status.version,
        status.phase.name(),
        if status.ready { "ready" } else { "not ready" }
    );
    for reason in &status.reasons {
        text += &format!("  - {reason}\n");
    }
    if !status.problems.is_empty() {
        text += "\nproblems:\n";
        for (thing, problem) in &status.problems {
            text += &format!("  {thing}: {problem}\n");
        }
    }
    if !status.warnings.is_empty() {
        text += "\nwarnings:\n";
        for (thing, warning) in &status.warnings {
            text += &format!("  {thing}: {warning}\n");
        }
    }
    text += "\nsteps:\n";
    for step in &status.steps {
        let (word, reason) = match &step.outcome {
            StepOutcome::Running => ("running", ""),
            StepOutcome::Done => ("done", ""),
            StepOutcome::Warned(reason) => ("warned", reason.as_str()),
            StepOutcome::Waiting(reason) => ("waiting", reason.as_str()),
            StepOutcome::Failed(reason) => ("failed", reason.as_str()),
        };
        text += &format!(
            "  {:<9} {:<16} {:<8} {:>7.2} s",
            step.phase.name(),
            step.name,
            word,
            step.seconds
        );
        if step.tries > 1 {
            text += &format!("  ({} tries)", step.tries);
        }
        if !reason.is_empty() {
            text += &format!("\n            {}", reason.replace('\n', "\n            "));
        }
        text.push('\n');
    }
    text
}

fn or_unknown(name: &str) -> &str {
    if name.is_empty() { "(no seed yet)" } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_phase_steps_and_problems() {
        let board = Board::new("0.1.0");
        let index = board.begin_step(Phase::PreStart, "seed", "find the seed");
        let why = StepOutcome::Waiting("no seed".to_string());
        board.record_step(index, why, Duration::from_millis(1500), 3);
        board.raise("haproxy.service", "the new configuration was refused");
        let text = show(&board.snapshot());
        assert!(text.contains("(no seed yet)") && text.contains("phase pre-start"), "{text}");
        assert!(text.contains("waiting     1.50 s  (3 tries)\n            no seed"), "{text}");
        assert!(text.contains("haproxy.service: the new configuration was refused"), "{text}");
    }
}
