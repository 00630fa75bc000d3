//! Jobs that run on this agent, and what they have said so far.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::Notify;

use super::super::board::log;
use super::super::node::lock;
use crate::error::UserError;
use crate::secrets::Secret;

/// Jobs that are remembered; of those that have ended the oldest is forgotten first.
const KEPT: usize = 16;
/// Lines of one job that are kept, each cut to so many bytes.
const LINES: usize = 4096;
const LINE: usize = 2048;
/// A bundle is megabytes: once told it is kept for so long, in case the answer got lost.
const TOLD: Duration = Duration::from_secs(60);

/// What came of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Done(Value),
    /// Nothing was done, or it was stopped where it is safe; what helps is said.
    Refused(UserError),
    Failed(String),
}

/// What is told of a job: its lines from the one asked for, and its outcome at the end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub lines: Vec<String>,
    pub outcome: Option<Outcome>,
}

#[derive(Default)]
struct Content {
    lines: Vec<String>,
    outcome: Option<Outcome>,
    /// When a bundle's outcome was told first.
    told: Option<Instant>,
}

struct Job {
    id: String,
    content: Mutex<Content>,
    changed: Notify,
}

/// By which work says how far it is.
#[derive(Clone)]
pub struct Say {
    /// `None`: nobody asked for it, and the journal is told.
    job: Option<Arc<Job>>,
}

impl Say {
    /// For work that the agent does by itself.
    pub fn to_journal() -> Self {
        Say { job: None }
    }

    /// One line for a person.
    pub fn say(&self, line: impl Into<String>) {
        let mut line = line.into().replace('\n', " ");
        let end = (0..=LINE.min(line.len())).rev().find(|i| line.is_char_boundary(*i));
        line.truncate(end.unwrap_or(0));
        let Some(job) = &self.job else { return log(&line) };
        let mut content = lock(&job.content);
        if content.lines.len() < LINES {
            content.lines.push(line);
        }
        drop(content);
        job.changed.notify_waiters();
    }
}

/// All jobs of this agent.
#[derive(Clone, Default)]
pub struct Jobs {
    jobs: Arc<Mutex<VecDeque<Arc<Job>>>>,
}

impl Jobs {
    /// Start a job; its id. It goes on whoever listens.
    ///
    /// # Errors
    /// A [`UserError`] when too many run already.
    pub fn start<F>(&self, verb: &str, work: impl FnOnce(Say) -> F) -> Result<String>
    where
        F: Future<Output = Result<Value>> + Send + 'static,
    {
        let job = Arc::new(Job {
            id: Secret::make()?.reveal().to_string(),
            content: Mutex::default(),
            changed: Notify::new(),
        });
        self.forget_told(Duration::ZERO);
        {
            let mut jobs = lock(&self.jobs);
            if jobs.len() >= KEPT {
                let ended = jobs.iter().position(|job| lock(&job.content).outcome.is_some());
                let Some(ended) = ended else {
                    return Err(UserError::new("this node has too much to do already").into());
                };
                jobs.remove(ended);
            }
            jobs.push_back(job.clone());
        }
        let (id, verb) = (job.id.clone(), verb.to_string());
        let work = work(Say { job: Some(job.clone()) });
        tokio::spawn(async move {
            let begun = Instant::now();
            // A task of its own: one that panics must not leave its listener waiting.
            let outcome = match tokio::spawn(work).await {
                Ok(Ok(value)) => Outcome::Done(value),
                Ok(Err(error)) => describe_failure(&error),
                Err(_) => Outcome::Failed("the job ended without an answer".to_string()),
            };
            let word = match &outcome {
                Outcome::Done(_) => "done".to_string(),
                Outcome::Refused(refusal) => format!("refused: {}", refusal.summary()),
                Outcome::Failed(why) => format!("failed: {why}"),
            };
            log(&format!("operator: {verb}: {word} ({:.1} s)", begun.elapsed().as_secs_f64()));
            lock(&job.content).outcome = Some(outcome);
            job.changed.notify_waiters();
        });
        Ok(id)
    }

    /// Forget bundles that were told at least so long ago.
    fn forget_told(&self, age: Duration) {
        // The jobs are locked before the content of one, here and everywhere.
        lock(&self.jobs)
            .retain(|job| lock(&job.content).told.is_none_or(|told| told.elapsed() < age));
    }

    /// What a job has said after its first `after` lines; waits for `patience` until there is
    /// something new. `None` when there is no such job.
    pub async fn follow(&self, id: &str, after: usize, patience: Duration) -> Option<Progress> {
        let job = lock(&self.jobs).iter().find(|job| job.id == id).cloned()?;
        let end = tokio::time::Instant::now() + patience;
        loop {
            // Made before looking, so that nothing is missed in between.
            let changed = job.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut content = lock(&job.content);
                if content.lines.len() > after || content.outcome.is_some() {
                    let lines = content.lines.iter().skip(after).cloned().collect();
                    let outcome = content.outcome.clone();
                    if matches!(outcome, Some(Outcome::Done(Value::Array(_))))
                        && content.told.is_none()
                    {
                        content.told = Some(Instant::now());
                        let jobs = self.clone();
                        tokio::spawn(async move {
                            tokio::time::sleep(TOLD).await;
                            jobs.forget_told(TOLD);
                        });
                    }
                    return Some(Progress { lines, outcome });
                }
            }
            if tokio::time::timeout_at(end, changed).await.is_err() {
                return Some(Progress { lines: Vec::new(), outcome: None });
            }
        }
    }
}

fn describe_failure(error: &anyhow::Error) -> Outcome {
    match error.chain().find_map(|cause| cause.downcast_ref::<UserError>()) {
        Some(refusal) => Outcome::Refused(refusal.clone()),
        None => Outcome::Failed(format!("{error:#}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const SOON: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn a_job_tells_its_lines_and_then_its_outcome() {
        let jobs = Jobs::default();
        let id = jobs
            .start("try", |say| async move {
                say.say("one\ntwo");
                Ok(json!({"n": 1}))
            })
            .unwrap();
        let mut lines = Vec::new();
        let outcome = loop {
            let progress = jobs.follow(&id, lines.len(), SOON).await.unwrap();
            lines.extend(progress.lines);
            if let Some(outcome) = progress.outcome {
                break outcome;
            }
        };
        assert_eq!(lines, ["one two"]);
        assert_eq!(outcome, Outcome::Done(json!({"n": 1})));
        assert!(jobs.follow("another", 0, SOON).await.is_none());
    }

    #[tokio::test]
    async fn refusals_failures_and_panics_are_told_apart() {
        let jobs = Jobs::default();
        let refused = jobs.start("r", |_| async { Err(UserError::new("no").into()) }).unwrap();
        let failed = jobs.start("f", |_| async { anyhow::bail!("broken") }).unwrap();
        let ended = jobs.start("p", |_| async { panic!("on purpose") }).unwrap();
        let outcome = async |id: &str| jobs.follow(id, 0, SOON).await.unwrap().outcome.unwrap();
        assert_eq!(outcome(&refused).await, Outcome::Refused(UserError::new("no")));
        assert_eq!(outcome(&failed).await, Outcome::Failed("broken".into()));
        assert!(matches!(outcome(&ended).await, Outcome::Failed(_)));
    }

    #[tokio::test]
    async fn a_bundle_is_told_again_until_the_next_job() {
        let jobs = Jobs::default();
        let bundle = jobs.start("b", |_| async { Ok(json!([1])) }).unwrap();
        for _ in 0..2 {
            let progress = jobs.follow(&bundle, 0, SOON).await.unwrap();
            assert_eq!(progress.outcome, Some(Outcome::Done(json!([1]))));
        }
        jobs.forget_told(TOLD);
        assert!(jobs.follow(&bundle, 0, SOON).await.is_some());
        jobs.start("n", |_| async { Ok(Value::Null) }).unwrap();
        assert!(jobs.follow(&bundle, 0, SOON).await.is_none());
    }

    #[tokio::test]
    async fn jobs_that_have_ended_make_room() {
        let jobs = Jobs::default();
        for _ in 0..2 * KEPT {
            let id = jobs.start("t", |_| async { Ok(Value::Null) }).unwrap();
            jobs.follow(&id, 0, SOON).await.unwrap();
        }
        let endless = || jobs.start("e", |_| std::future::pending::<Result<Value>>());
        for _ in 0..KEPT {
            endless().unwrap();
        }
        assert!(endless().is_err());
    }
}
