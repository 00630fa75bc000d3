//! What a restore goes back to: a pure function of the repository's backups.

use serde::{Deserialize, Serialize};

use super::clock::format_utc;
use super::info::Backup;
use crate::error::UserError;

/// As of when the cluster is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// All that the repository has.
    Latest,
    /// Seconds since 1970, UTC, and microseconds beyond.
    Time(u64, u32),
}

impl Target {
    /// The time as PostgreSQL reads it.
    pub fn describe(&self) -> String {
        match self {
            Target::Latest => "the last that was archived".to_string(),
            Target::Time(seconds, 0) => format_utc(*seconds),
            Target::Time(seconds, micros) => {
                format_utc(*seconds).replace("+00", &format!(".{micros:06}+00"))
            }
        }
    }
}

/// The backup that a restore begins with: the last that had ended by then.
///
/// # Errors
/// A [`UserError`] when nothing leads to that time.
pub fn choose_backup<'b>(
    target: &Target,
    backups: &'b [Backup],
    now: u64,
) -> Result<&'b Backup, UserError> {
    let refuse = |why: String| UserError::new("there is nothing to restore from").why(why);
    let Some(oldest) = backups.first() else {
        return Err(refuse("the repository has no backup".to_string())
            .help("see `stanchion backup list`; `stanchion backup` takes one"));
    };
    let Target::Time(time, _) = *target else {
        return Ok(backups.last().unwrap_or(oldest));
    };
    if time > now {
        return Err(UserError::new(format!("{} is not yet", target.describe()))
            .help("times are in the zone that you write: is it the right one?"));
    }
    backups.iter().rev().find(|backup| backup.stop <= time).ok_or_else(|| {
        refuse(format!("the oldest backup ended at {}", format_utc(oldest.stop)))
            .help("take a later time")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backup(label: &str, stop: u64) -> Backup {
        Backup {
            label: label.into(),
            kind: "full".into(),
            start: stop - 5,
            stop,
            size: 1,
            stored: 1,
            damaged: false,
        }
    }

    #[test]
    fn the_last_backup_that_had_ended_is_taken() {
        let backups = [backup("a", 100), backup("b", 200)];
        let choose = |target| choose_backup(&target, &backups, 1000).map(|b| b.label.as_str());
        assert_eq!(choose(Target::Time(100, 0)), Ok("a"));
        assert_eq!(choose(Target::Time(199, 999_999)), Ok("a"));
        assert_eq!(choose(Target::Time(200, 1)), Ok("b"));
        assert_eq!(choose(Target::Latest), Ok("b"));
        assert!(choose(Target::Time(99, 0)).unwrap_err().to_string().contains("00:01:40"));
        assert!(choose(Target::Time(1001, 0)).unwrap_err().to_string().contains("not yet"));
        assert!(choose_backup(&Target::Latest, &[], 1000).is_err());
    }

    #[test]
    fn a_time_is_told_as_postgresql_reads_it() {
        assert_eq!(Target::Time(5, 0).describe(), "1970-01-01 00:00:05+00");
        assert_eq!(Target::Time(5, 40).describe(), "1970-01-01 00:00:05.000040+00");
    }
}
