//! Units of systemd, started and asked by `systemctl`.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::command::Command;

/// So long may what the agent asks take: whatever hangs must not hold up the agent for ever.
const LIMIT: Duration = Duration::from_secs(30);

/// Whether a unit runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Active {
    Running,
    Starting,
    /// Or stopping: a start waits until it is down.
    Stopped,
    Failed,
    /// There is no such unit in this image.
    Missing,
}

/// Ask for the state of a unit.
pub async fn query_unit(unit: &str) -> Result<Active> {
    let arguments = ["show", "--property=LoadState,ActiveState", unit];
    let text = run_systemctl(&arguments).await?;
    Ok(read_state(&text))
}

fn read_state(text: &str) -> Active {
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("");
    match (value("LoadState="), value("ActiveState=")) {
        ("not-found" | "masked" | "bad-setting" | "error", _) => Active::Missing,
        (_, "active" | "reloading" | "refreshing") => Active::Running,
        (_, "activating") => Active::Starting,
        (_, "failed") => Active::Failed,
        _ => Active::Stopped,
    }
}

/// Ask systemd to start a unit, without waiting until it is up.
pub async fn start_unit(unit: &str) -> Result<()> {
    run_systemctl(&["start", "--no-block", unit]).await.map(drop)
}

/// Stop a unit, and wait until it is down, however long it takes.
pub async fn stop_unit(unit: &str) -> Result<()> {
    run_to_end(&["systemctl", "stop", unit]).await.map(drop)
}

/// Ask systemd to stop a unit, without waiting until it is down.
pub async fn stop_unit_later(unit: &str) -> Result<()> {
    run_systemctl(&["stop", "--no-block", unit]).await.map(drop)
}

/// Restart a unit, and wait until it is up.
pub async fn restart_unit(unit: &str) -> Result<()> {
    run_systemctl(&["restart", unit]).await.map(drop)
}

/// Let a unit read its files again, or restart it if it cannot, and wait until it has.
pub async fn reload_unit(unit: &str) -> Result<()> {
    run_systemctl(&["reload-or-restart", unit]).await.map(drop)
}

/// Forget that a unit failed, so that it can be started again at once.
pub async fn forget_failure(unit: &str) -> Result<()> {
    run_systemctl(&["reset-failed", unit]).await.map(drop)
}

/// Let systemd see unit files that were rendered.
pub async fn reload_daemon() -> Result<()> {
    run_systemctl(&["daemon-reload"]).await.map(drop)
}

async fn run_systemctl(arguments: &[&str]) -> Result<String> {
    let mut words = vec!["systemctl"];
    words.extend(arguments);
    run_program(&words).await
}

/// Run a program that is soon done, without holding up the agent; its standard output. One
/// that is not is killed.
pub async fn run_program(words: &[&str]) -> Result<String> {
    run(words, Some(LIMIT)).await
}

/// The same, of a program that takes as long as it takes.
pub async fn run_to_end(words: &[&str]) -> Result<String> {
    run(words, None).await
}

async fn run(words: &[&str], limit: Option<Duration>) -> Result<String> {
    let (program, arguments) = words.split_first().context("no program was named")?;
    let command = Command::new(program).args(arguments);
    let command = match limit {
        Some(limit) => command.limit(limit),
        None => command,
    };
    let output = tokio::task::spawn_blocking(move || command.run())
        .await
        .context("waiting for a program")??;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_of_units_are_read() {
        assert_eq!(read_state("LoadState=loaded\nActiveState=active\n"), Active::Running);
        assert_eq!(read_state("LoadState=loaded\nActiveState=activating\n"), Active::Starting);
        assert_eq!(read_state("LoadState=loaded\nActiveState=deactivating\n"), Active::Stopped);
        assert_eq!(read_state("LoadState=not-found\nActiveState=inactive\n"), Active::Missing);
        assert_eq!(read_state("LoadState=loaded\nActiveState=failed\n"), Active::Failed);
        assert_eq!(read_state(""), Active::Stopped);
    }
}
