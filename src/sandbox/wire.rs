//! What the builder and the worker tell each other: JSON, one event a line.

use std::io::{BufRead, Read, Write};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Spec;
use crate::error::UserError;

/// The hidden first argument of every stage.
pub const ENTRY: &str = "__sandbox";
/// The word that lets a helper keep the host's network.
pub const NETWORK: &str = "network";

const LONGEST_EVENT: u64 = 64 << 20;

#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
    pub name: String,
    pub input: Value,
    pub spec: Spec,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The namespaces exist; the ids are to be mapped now.
    Unshared,
    /// The worker runs and reads its job.
    Ready,
    Say {
        text: String,
    },
    Done {
        value: Value,
    },
    Failed {
        causes: Vec<Cause>,
    },
}

/// One link of an error's chain.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    User(UserError),
    /// The number of an operating system's error.
    System(i32),
    Text(String),
}

pub fn write_event(to: &mut impl Write, event: &Event) -> Result<()> {
    let mut line = serde_json::to_vec(event).context("describing an event")?;
    line.push(b'\n');
    to.write_all(&line).context("writing to the builder")
}

/// The next event; `None` at the end.
pub fn read_event(from: &mut impl BufRead) -> Result<Option<Event>> {
    let mut line = Vec::new();
    from.take(LONGEST_EVENT).read_until(b'\n', &mut line).context("reading from the sandbox")?;
    ensure!((line.len() as u64) < LONGEST_EVENT, "the sandbox's answer is too long");
    if !line.ends_with(b"\n") {
        // Cut short by its death, which the missing answer tells.
        return Ok(None);
    }
    serde_json::from_slice(&line).map(Some).context("reading the sandbox's answer")
}

/// Outermost first.
pub fn list_causes(error: &anyhow::Error) -> Vec<Cause> {
    error.chain().map(describe_cause).collect()
}

fn describe_cause(cause: &(dyn std::error::Error + 'static)) -> Cause {
    if let Some(user) = cause.downcast_ref::<UserError>()
        // Names that are not UTF-8 have no JSON.
        && serde_json::to_value(user).is_ok()
    {
        return Cause::User(user.clone());
    }
    let number = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
    let number = number
        .or_else(|| cause.downcast_ref::<rustix::io::Errno>().map(|errno| errno.raw_os_error()));
    number.map_or_else(|| Cause::Text(cause.to_string()), Cause::System)
}

/// The reverse of [`list_causes`]: an error that shows the same and has the same exit code.
/// Only the innermost cause can be of a type that matters: the others are contexts.
pub fn restore_error(mut causes: Vec<Cause>) -> anyhow::Error {
    let innermost = match causes.pop() {
        Some(Cause::User(user)) => user.into(),
        Some(Cause::System(number)) => std::io::Error::from_raw_os_error(number).into(),
        Some(Cause::Text(text)) => anyhow::Error::msg(text),
        None => anyhow::Error::msg("the sandbox failed without a reason"),
    };
    causes.into_iter().rev().fold(innermost, |error, cause| match cause {
        Cause::User(user) => error.context(user.to_string()),
        Cause::System(number) => {
            error.context(std::io::Error::from_raw_os_error(number).to_string())
        }
        Cause::Text(text) => error.context(text),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::exit_code;

    fn send(error: anyhow::Error) -> anyhow::Error {
        let mut bytes = Vec::new();
        write_event(&mut bytes, &Event::Failed { causes: list_causes(&error) }).unwrap();
        match read_event(&mut &bytes[..]).unwrap() {
            Some(Event::Failed { causes }) => restore_error(causes),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_error_comes_out_as_it_went_in() {
        let mistake = UserError::new("no such user").at("layers/db/layer.toml", 7).help("add it");
        let error = anyhow::Error::new(mistake.clone()).context("making users").context("layer db");
        let restored = send(error);
        assert_eq!(restored.downcast_ref::<UserError>(), Some(&mistake));
        assert_eq!(exit_code(&restored), 2);
        assert_eq!(format!("{restored:#}"), format!("layer db: making users: {mistake}"));

        let full = anyhow::Error::from(std::io::Error::from_raw_os_error(libc::ENOSPC));
        let shown = format!("{:#}", send(full.context("writing a layer")));
        assert_eq!(shown, "writing a layer: No space left on device (os error 28)");
        let full = anyhow::Error::from(rustix::io::Errno::NOSPC).context("writing");
        assert_eq!(exit_code(&send(full)), 2);
        assert_eq!(exit_code(&send(anyhow::anyhow!("a bug"))), 1);
    }

    #[test]
    fn an_answer_cut_short_is_no_answer() {
        assert!(read_event(&mut &b"{\"event\":\"do"[..]).unwrap().is_none());
        assert!(read_event(&mut &b""[..]).unwrap().is_none());
        assert!(read_event(&mut &b"rubbish\n"[..]).is_err());
    }
}
