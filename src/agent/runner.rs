//! Phases are data: lists of steps. One runner executes, logs and times them.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::board::{Board, Phase, StepOutcome, log};

/// What a step that did not fail says.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Done,
    /// Not as it should be, but the node can go on.
    Warn(String),
    /// Not yet; a look later may find it done.
    Wait(String),
}

/// What happens when a step fails or says to wait.
#[derive(Debug, Clone, Copy)]
pub enum Retry {
    /// Again after a pause that doubles from the first to the longest.
    Until { first: Duration, longest: Duration },
    /// A retry does not help: note it and go on.
    GoOn,
}

pub type Work<'a> = Pin<Box<dyn Future<Output = Result<Verdict>> + Send + 'a>>;

/// One step over a context `C`. Each is idempotent.
pub struct Step<C> {
    pub name: &'static str,
    pub purpose: &'static str,
    pub retry: Retry,
    pub run: for<'a> fn(&'a mut C) -> Work<'a>,
}

/// Seconds, for tables of steps.
pub const fn back_off(first: u64, longest: u64) -> Retry {
    Retry::Until { first: Duration::from_secs(first), longest: Duration::from_secs(longest) }
}

/// Run all steps of a phase in their order. Ends only when each is done or given up.
pub async fn run_phase<C>(board: &Board, phase: Phase, steps: &[Step<C>], context: &mut C) {
    let begun = Instant::now();
    log(&format!("phase {}: {} steps", phase.name(), steps.len()));
    notify_status(&format!("{}: starting", phase.name()));
    for step in steps {
        run_step(board, phase, step, context).await;
    }
    log(&format!("phase {}: done in {:.2} s", phase.name(), begun.elapsed().as_secs_f64()));
}

async fn run_step<C>(board: &Board, phase: Phase, step: &Step<C>, context: &mut C) {
    let begun = Instant::now();
    let index = board.begin_step(phase, step.name, step.purpose);
    let label = format!("{}: {}", phase.name(), step.name);
    notify_status(&label);
    let mut pause = match step.retry {
        Retry::Until { first, .. } => first,
        Retry::GoOn => Duration::ZERO,
    };
    let mut last = String::new();
    for tries in 1.. {
        let verdict = (step.run)(context).await.with_context(|| step.purpose.to_string());
        let taken = begun.elapsed();
        let seconds = taken.as_secs_f64();
        let reason = match verdict {
            Ok(Verdict::Done) => {
                board.record_step(index, StepOutcome::Done, taken, tries);
                log(&format!("{label}: done in {seconds:.2} s"));
                return;
            }
            Ok(Verdict::Warn(reason)) => {
                log(&format!("{label}: {reason} ({seconds:.2} s)"));
                board.warn(step.name, reason.clone());
                board.record_step(index, StepOutcome::Warned(reason), taken, tries);
                return;
            }
            Ok(Verdict::Wait(reason)) => reason,
            Err(error) => format!("{error:#}"),
        };
        let Retry::Until { longest, .. } = step.retry else {
            log(&format!("{label}: failed: {reason}"));
            board.raise(step.name, reason.clone());
            board.record_step(index, StepOutcome::Failed(reason), taken, tries);
            return;
        };
        if reason != last {
            log(&format!("{label}: {reason}; looking again"));
            notify_status(&format!("{label}: {reason}"));
        }
        board.record_step(index, StepOutcome::Waiting(reason.clone()), taken, tries);
        last = reason;
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(longest);
    }
}

fn notify_status(text: &str) {
    // Outside systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(&text.replace('\n', " "))]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Counter {
        calls: u32,
    }

    const STEPS: [Step<Counter>; 3] = [
        Step {
            name: "third-time",
            purpose: "work at the third try",
            retry: Retry::Until { first: Duration::ZERO, longest: Duration::ZERO },
            run: |counter| {
                Box::pin(async {
                    counter.calls += 1;
                    match counter.calls {
                        1 => anyhow::bail!("broken"),
                        2 => Ok(Verdict::Wait("not yet".into())),
                        _ => Ok(Verdict::Done),
                    }
                })
            },
        },
        Step {
            name: "check",
            purpose: "look at the disk",
            retry: Retry::GoOn,
            run: |_| Box::pin(async { Ok(Verdict::Warn("the disk is slow".into())) }),
        },
        Step {
            name: "broken",
            purpose: "never work",
            retry: Retry::GoOn,
            run: |_| Box::pin(async { anyhow::bail!("no") }),
        },
    ];

    #[tokio::test]
    async fn steps_are_retried_timed_and_given_up_as_their_data_say() {
        let (board, mut counter) = (Board::default(), Counter::default());
        run_phase(&board, Phase::Bootstrap, &STEPS, &mut counter).await;
        assert_eq!(counter.calls, 3);
        let status = board.snapshot();
        assert_eq!(status.phase, Phase::Bootstrap);
        let outcomes: Vec<_> = status.steps.iter().map(|s| (s.tries, s.outcome.clone())).collect();
        assert_eq!(
            outcomes,
            [
                (3, StepOutcome::Done),
                (1, StepOutcome::Warned("the disk is slow".into())),
                (1, StepOutcome::Failed("never work: no".into())),
            ]
        );
        assert_eq!(status.warnings["check"], "the disk is slow");
    }
}
