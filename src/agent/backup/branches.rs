//! What restores have given up: between the time that one went back to and the moment at which
//! it led, the database's log has a branch that no recovery may follow.
//!
//! The repository keeps one small file for each, which tells all by its name: it outlives the
//! cluster.

use std::path::Path;

use anyhow::{Context, Result};

use super::clock::format_utc;
use super::info::Backup;
use super::pgbackrest::ask_unit;
use super::plan::Target;
use super::restore::Record;
use crate::error::UserError;

const FOLDER: &str = "restores";

/// A stretch of time whose writes are not the cluster's any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Abandoned {
    /// Seconds since 1970, and microseconds: what was written until then is kept.
    pub from: (u64, u32),
    /// Seconds since 1970: when what was restored began to lead.
    pub until: u64,
}

impl Abandoned {
    /// What a restore gives up that began at `begun` and leads from `until` on.
    pub fn by(target: &Target, begun: u64, until: u64) -> Self {
        let from = match *target {
            Target::Time(seconds, micros) => (seconds, micros),
            // All that there was by then.
            Target::Latest => (begun, 0),
        };
        Abandoned { from, until }
    }

    /// As the repository has it: `100.000025-300`.
    pub fn name(&self) -> String {
        format!("{}.{:06}-{}", self.from.0, self.from.1, self.until)
    }

    fn read(name: &str) -> Option<Self> {
        let (from, until) = name.trim().split_once('-')?;
        let (seconds, micros) = from.split_once('.')?;
        let from = (seconds.parse().ok()?, micros.parse().ok()?);
        Some(Abandoned { from, until: until.parse().ok()? })
    }

    /// Whether a backup saw what was given up.
    fn has(&self, backup: &Backup) -> bool {
        backup.stop > self.from.0 && backup.start < self.until
    }

    /// Whether a time is within.
    fn covers(&self, time: (u64, u32)) -> bool {
        time > self.from && time < (self.until, 0)
    }
}

/// The backups that lead to what the cluster has now.
pub fn list_live(backups: &[Backup], abandoned: &[Abandoned]) -> Vec<Backup> {
    let is_live = |backup: &&Backup| !abandoned.iter().any(|stretch| stretch.has(backup));
    backups.iter().filter(is_live).cloned().collect()
}

/// Refuse a time that only a branch which was given up has.
///
/// # Errors
/// A [`UserError`] that names the times around it.
pub fn judge_time(target: &Target, abandoned: &[Abandoned]) -> Result<(), UserError> {
    let Target::Time(seconds, micros) = *target else { return Ok(()) };
    let Some(within) = abandoned.iter().find(|stretch| stretch.covers((seconds, micros))) else {
        return Ok(());
    };
    let from = Target::Time(within.from.0, within.from.1).describe();
    let until = format_utc(within.until);
    Err(UserError::new(format!("{} was given up by an earlier restore", target.describe()))
        .why(format!(
            "that one went back to {from} and led from {until} on; the log follows it, and not \
             what was written between"
        ))
        .help(format!("take a time until {from}, or after {until}")))
}

/// Whether no full backup has begun since the last restore.
pub fn needs_full(backups: &[Backup], abandoned: &[Abandoned]) -> bool {
    let last = backups.iter().filter(|backup| backup.kind == "full").map(|backup| backup.start);
    abandoned.iter().map(|stretch| stretch.until).max() > last.max()
}

/// What the repository says of earlier restores.
pub async fn list_abandoned() -> Result<Vec<Abandoned>> {
    let program = ["pgbackrest", "--log-level-console=off", "repo-ls", FOLDER];
    let text = ask_unit(&program).await.context("asking for earlier restores")?;
    Ok(text.lines().filter_map(Abandoned::read).collect())
}

/// Write down what a restore that leads has given up; again is harmless.
pub async fn keep_abandoned(record: &Record) -> Result<()> {
    let Some(name) = &record.abandoned else { return Ok(()) };
    let script = "echo \"$1\" | pgbackrest --log-level-console=off repo-put \"$2\"";
    let path = format!("{FOLDER}/{name}");
    let kept = ask_unit(&["sh", "-c", script, "sh", &record.target.describe(), &path]).await;
    kept.map(drop).context("writing down what the restore gives up")
}

/// Marks what PostgreSQL's archiver has not had, so that the leader hands it over.
const MARK: &str = "cd \"$1\" || exit 1; for name in *.history; do \
    test ! -e \"$name\" || test -e archive_status/\"$name\".done || \
    : >archive_status/\"$name\".ready || exit 1; done";

/// Let the leader archive how the timeline of its recovery began, which archived nothing.
/// PostgreSQL looks for timelines one after the other, and the leader's own is the next.
pub async fn archive_timelines(data: &Path) -> Result<()> {
    let folder = data.join("pg_wal").display().to_string();
    // As postgres, whose folder it is.
    let marked = ask_unit(&["sh", "-c", MARK, "sh", &folder]).await;
    marked.map(drop).context("marking the timeline's history for the archive")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backup(label: &str, kind: &str, start: u64, stop: u64) -> Backup {
        let label = label.to_string();
        Backup { label, kind: kind.into(), start, stop, size: 1, stored: 1, damaged: false }
    }

    #[test]
    fn a_stretch_is_its_name() {
        let stretch = Abandoned { from: (100, 25), until: 300 };
        assert_eq!(stretch.name(), "100.000025-300");
        assert_eq!(Abandoned::read(&stretch.name()), Some(stretch));
        for text in ["", "100-300", "100.5", "a.b-c", "20261121T183005Z.snapshot"] {
            assert_eq!(Abandoned::read(text), None, "{text}");
        }
    }

    #[test]
    fn all_there_was_is_kept_by_the_latest() {
        assert_eq!(Abandoned::by(&Target::Time(100, 5), 250, 300).from, (100, 5));
        let latest = Abandoned::by(&Target::Latest, 250, 300);
        assert_eq!(latest.from, (250, 0));
        assert!(!latest.has(&backup("last", "diff", 240, 250)));
    }

    #[test]
    fn times_and_backups_that_were_given_up_are_told_apart() {
        let abandoned = [Abandoned { from: (100, 5), until: 300 }];
        let judge = |seconds, micros| judge_time(&Target::Time(seconds, micros), &abandoned);
        assert!(judge(100, 5).is_ok() && judge(300, 0).is_ok() && judge(50, 0).is_ok());
        let refused = judge(100, 6).unwrap_err().to_string();
        assert!(refused.contains("00:01:40.000005") && refused.contains("00:05:00"), "{refused}");
        assert!(judge(299, 999_999).is_err());
        assert!(judge_time(&Target::Latest, &abandoned).is_ok());
        let all = [
            backup("before", "full", 10, 20),
            backup("across", "diff", 95, 110),
            backup("within", "full", 200, 210),
            backup("after", "diff", 300, 310),
        ];
        let live = list_live(&all, &abandoned);
        let labels: Vec<&str> = live.iter().map(|backup| backup.label.as_str()).collect();
        assert_eq!(labels, ["before", "after"]);
    }

    #[test]
    fn a_restore_makes_a_full_backup_due() {
        let abandoned = [Abandoned { from: (100, 0), until: 300 }];
        let full = |start| [backup("f", "full", start, start + 5)];
        assert!(!needs_full(&[], &[]));
        assert!(!needs_full(&full(10), &[]));
        assert!(needs_full(&full(10), &abandoned));
        assert!(needs_full(&full(200), &abandoned));
        assert!(!needs_full(&full(300), &abandoned));
    }

    #[test]
    fn a_history_that_was_not_archived_is_marked() {
        let folder = tempfile::tempdir().unwrap();
        let status = folder.path().join("archive_status");
        std::fs::create_dir(&status).unwrap();
        let mark = || {
            let folder = folder.path().display().to_string();
            let arguments = ["-c", MARK, "sh", folder.as_str()];
            crate::command::Command::new("sh").args(arguments).run().unwrap();
            let entries = std::fs::read_dir(&status).unwrap();
            let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
            let mut names: Vec<_> = entries.map(name).collect();
            names.sort();
            names
        };
        assert!(mark().is_empty());
        for name in ["00000002.history", "00000003.history", "archive_status/00000002.history.done"]
        {
            std::fs::write(folder.path().join(name), "x").unwrap();
        }
        assert_eq!(mark(), ["00000002.history.done", "00000003.history.ready"]);
    }
}
