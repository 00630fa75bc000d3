//! Whether PostgreSQL's log reaches the repository.

use anyhow::{Context, Result};

use super::clock::format_utc;
use super::info::Backup;
use crate::agent::psql::{SOCKET, run_psql};

/// Files that may wait: archiving goes by batches.
const WAITING: u64 = 16;
/// From about so many on, 2 GiB of 16 MiB each, pgBackRest drops them (`archive-push-queue-max`)
/// and tells PostgreSQL that they are archived.
const DROPPED: u64 = 120;

/// What PostgreSQL knows of its archiver. Ages are in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Archive {
    /// Since a file was archived last; `None` when none was.
    pub archived: Option<u64>,
    /// Since a file failed last.
    pub failed: Option<u64>,
    /// Files of the log that wait.
    pub waiting: u64,
}

const QUESTION: &str = "\
select extract(epoch from now() - last_archived_time)::bigint,
       extract(epoch from now() - last_failed_time)::bigint,
       (select count(*) from pg_ls_archive_statusdir() where name like '%.ready')
from pg_stat_archiver";

pub async fn look_at_archive() -> Result<Archive> {
    let text = run_psql(SOCKET, QUESTION).await?;
    read_archive(&text).context("reading what PostgreSQL says of its archiver")
}

fn read_archive(text: &str) -> Option<Archive> {
    let fields: Vec<&str> = text.trim().split('|').collect();
    let [archived, failed, waiting] = fields.as_slice() else { return None };
    Some(Archive {
        archived: archived.parse().ok(),
        failed: failed.parse().ok(),
        waiting: waiting.parse().ok()?,
    })
}

/// What is wrong with the archive; `None` when nothing is.
pub fn judge_archive(archive: &Archive) -> Option<String> {
    let is_failing = match (archive.archived, archive.failed) {
        (_, None) => false,
        (None, Some(_)) => true,
        (Some(archived), Some(failed)) => failed < archived,
    };
    if is_failing && archive.waiting > 0 {
        let since = match archive.archived {
            Some(seconds) => format!("for {} min", seconds / 60),
            None => "since this database was made".to_string(),
        };
        return Some(format!(
            "PostgreSQL's log has not reached the repository {since} ({} files wait): what is \
             written since then is in no backup",
            archive.waiting
        ));
    }
    (archive.waiting > WAITING)
        .then(|| format!("{} files of PostgreSQL's log wait for the repository", archive.waiting))
}

/// Whether so much waits that some of it is or will be dropped.
pub fn may_drop(archive: &Archive) -> bool {
    archive.waiting >= DROPPED
}

/// Whether a full backup began after log was dropped, and has ended.
pub fn is_mended(dropped: u64, backups: &[Backup]) -> bool {
    backups.iter().any(|backup| backup.kind == "full" && backup.start > dropped)
}

pub fn describe_gap(dropped: u64) -> String {
    format!(
        "PostgreSQL's log has waited for the repository until {} and grew so long that it may \
         have been dropped: times around it cannot be restored until a full backup has ended, \
         which begins by itself",
        format_utc(dropped)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_that_fails_or_lags_is_told() {
        let judge = |text: &str| judge_archive(&read_archive(text).unwrap());
        assert_eq!(judge("5||0"), None);
        assert_eq!(judge("||0"), None);
        assert_eq!(judge("5|60|3"), None);
        assert_eq!(judge("60|5|0"), None);
        assert!(judge("660|5|3").unwrap().contains("for 11 min (3 files"));
        assert!(judge("|5|3").unwrap().contains("since this database was made"));
        assert!(judge("1||17").unwrap().contains("17 files"));
        assert!(!may_drop(&read_archive("1|2|119").unwrap()));
        assert!(may_drop(&read_archive("1|2|120").unwrap()));
        assert_eq!(read_archive("x"), None);
        assert_eq!(read_archive("1|2"), None);
    }

    #[test]
    fn a_full_backup_mends_a_log_that_was_dropped() {
        let backup = |kind: &str, start| Backup {
            label: String::new(),
            kind: kind.into(),
            start,
            stop: start + 5,
            size: 0,
            stored: 0,
            damaged: false,
        };
        assert!(!is_mended(100, &[backup("full", 100), backup("diff", 200)]));
        assert!(is_mended(100, &[backup("full", 101)]));
        assert!(describe_gap(100).contains("1970-01-01 00:01:40+00"));
    }
}
