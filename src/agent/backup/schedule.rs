//! When a backup is due, and the task that takes it where PostgreSQL's leader is.

use std::time::Duration;

use anyhow::Result;

use super::archive::{describe_gap, is_mended, judge_archive, look_at_archive, may_drop};
use super::branches::{list_abandoned, needs_full};
use super::clock::format_utc;
use super::info::Backup;
use super::pgbackrest::read_info;
use super::restore::{Record, read_record};
use super::take::{Kind, expect_place, prepare_repository, take};
use crate::agent::operate::{Desk, Say};
use crate::agent::patroni;
use crate::clock::read_clock;

const PAUSE: Duration = Duration::from_secs(20);
/// The repository is asked what it has every so many looks.
const ASK: u32 = 30;
const DAY: u64 = 24 * 3600;
/// A run that began a little later than the last must not be late by a day.
const SLACK: u64 = 1800;
/// A backup that is older than this is told.
const OLD: u64 = 2 * DAY;
/// A restore that has lasted for longer is told: backups wait for its end.
const FORGOTTEN: u64 = 3600;
/// What status calls it.
const THING: &str = "backup";
const ARCHIVE: &str = "archive";

/// What is due: a full backup each week, a differential one each day.
pub fn choose_due(now: u64, backups: &[Backup]) -> Option<Kind> {
    let is_due = |last: Option<&Backup>, age: u64| {
        last.is_none_or(|last| now.saturating_sub(last.start) + SLACK >= age)
    };
    if is_due(backups.iter().rev().find(|backup| backup.kind == "full"), 7 * DAY) {
        return Some(Kind::Full);
    }
    is_due(backups.last(), DAY).then_some(Kind::Differential)
}

/// Take backups while this node is PostgreSQL's leader, for ever; tell what is wrong.
pub async fn keep_backups(desk: Desk) {
    if desk.seed.cluster.backup.is_none() {
        desk.board.warn(THING, "no backups are made: the cluster file has no [backup]".into());
        return;
    }
    let (mut looks, mut is_prepared) = (0, false);
    loop {
        tokio::time::sleep(PAUSE).await;
        let leads = patroni::read_own(&desk.http, desk.entry.address)
            .await
            .is_ok_and(|own| own.role == "primary" && own.state == "running");
        // A repository is the leader's to write; and none is written while one is read.
        let record = match leads {
            true => read_record(&desk).await,
            false => Ok(None),
        };
        if !leads || !matches!(record, Ok(None)) {
            match record {
                Ok(Some(record)) => match describe_hindrance(&record, read_clock().unwrap_or(0)) {
                    Some(hindrance) => desk.board.raise(THING, hindrance),
                    None => desk.board.clear(THING),
                },
                Ok(None) => desk.board.clear(THING),
                // etcd's silence is told elsewhere, and hides nothing here.
                Err(_) => {}
            }
            desk.board.clear(ARCHIVE);
            (looks, is_prepared) = (0, false);
            continue;
        }
        match look(&desk, &mut is_prepared, looks % ASK == 0).await {
            Ok(()) => desk.board.clear(THING),
            Err(error) => {
                let text = describe(&error);
                desk.board.raise(THING, text);
                is_prepared = false;
            }
        }
        looks += 1;
        tell_archive(&desk, is_prepared).await;
    }
}

/// Why the leader takes no backups, when that has lasted for longer than a restore does.
fn describe_hindrance(record: &Record, now: u64) -> Option<String> {
    (now.saturating_sub(record.id) > FORGOTTEN).then(|| {
        format!(
            "no backups are taken: a restore to {} is under way since {}; end it with \
             `stanchion restore`, or give it up with `stanchion restore --abort`",
            record.target.describe(),
            format_utc(record.id)
        )
    })
}

async fn look(desk: &Desk, is_prepared: &mut bool, ask: bool) -> Result<()> {
    let stanza = desk.seed.cluster.name.as_str();
    if !*is_prepared {
        expect_place(desk)?;
        prepare_repository(stanza).await?;
        *is_prepared = true;
    } else if !ask {
        return Ok(());
    }
    let backups = read_info(stanza).await?.list_backups();
    let now = read_clock()?;
    let is_new_branch = needs_full(&backups, &list_abandoned().await?);
    let has_gap = read_dropped(desk).await?.is_some_and(|at| !is_mended(at, &backups));
    let must_be_full = is_new_branch || has_gap;
    let due = must_be_full.then_some(Kind::Full).or_else(|| choose_due(now, &backups));
    if let Some(kind) = due {
        Say::to_journal().say(format!("backup: a {kind:?} one is due"));
        let taken = take(desk, kind, &Say::to_journal()).await;
        let is_old = backups.last().is_none_or(|last| now.saturating_sub(last.stop) > OLD);
        match taken {
            // The cluster is busy with what the operator wants, perhaps.
            Err(_) if !is_old => {}
            taken => drop(taken?),
        }
    }
    if let Some(last) = backups.last().filter(|last| last.damaged) {
        anyhow::bail!("the backup {} found pages with wrong checksums", last.label);
    }
    Ok(())
}

fn describe(error: &anyhow::Error) -> String {
    match error.downcast_ref::<crate::error::UserError>() {
        Some(refusal) => match refusal.advice() {
            Some(advice) => format!("{}; {advice}", refusal.summary()),
            None => refusal.summary(),
        },
        None => format!("{error:#}"),
    }
}

async fn tell_archive(desk: &Desk, is_prepared: bool) {
    let archive = look_at_archive().await;
    if let Ok(archive) = &archive
        && may_drop(archive)
        && let Ok(now) = read_clock()
    {
        // What fails is done at the next look: the log waits for as long.
        let _ = desk.etcd.put(&name_dropped(desk), &now.to_string(), None).await;
    }
    // A repository that cannot be had is told already.
    match archive {
        Ok(archive) if is_prepared => match judge_archive(&archive) {
            Some(problem) => desk.board.raise(ARCHIVE, problem),
            None => tell_gap(desk).await,
        },
        _ => desk.board.clear(ARCHIVE),
    }
}

/// A log that was dropped counts as archived for PostgreSQL; only a full backup mends it.
async fn tell_gap(desk: &Desk) {
    let Ok(dropped) = read_dropped(desk).await else { return };
    let Some(at) = dropped else { return desk.board.clear(ARCHIVE) };
    let Ok(info) = read_info(&desk.seed.cluster.name).await else { return };
    if is_mended(at, &info.list_backups()) {
        if desk.etcd.delete(&name_dropped(desk)).await.is_ok() {
            desk.board.clear(ARCHIVE);
        }
        return;
    }
    desk.board.raise(ARCHIVE, describe_gap(at));
}

fn name_dropped(desk: &Desk) -> String {
    desk.registry.key("archive", "dropped")
}

/// When PostgreSQL's log was last so long that pgBackRest drops of it; seconds since 1970.
async fn read_dropped(desk: &Desk) -> Result<Option<u64>> {
    let entry = desk.etcd.get(&name_dropped(desk)).await?;
    Ok(entry.and_then(|entry| entry.value.parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backup(kind: &str, start: u64) -> Backup {
        Backup {
            label: String::new(),
            kind: kind.into(),
            start,
            stop: start + 60,
            size: 0,
            stored: 0,
            damaged: false,
        }
    }

    #[test]
    fn a_restore_that_was_forgotten_is_told() {
        let record = serde_json::from_str(
            r#"{"id": 100, "node": "n1", "target": "latest", "backup": "b", "in_place": false,
                "stage": "leading"}"#,
        );
        let record: Record = record.unwrap();
        assert_eq!(describe_hindrance(&record, 100 + FORGOTTEN), None);
        let told = describe_hindrance(&record, 101 + FORGOTTEN).unwrap();
        assert!(told.contains("since 1970-01-01 00:01:40+00; end it with"), "{told}");
    }

    #[test]
    fn a_full_backup_is_due_each_week_and_a_differential_one_each_day() {
        assert_eq!(choose_due(0, &[]), Some(Kind::Full));
        let full = backup("full", 1000);
        assert_eq!(choose_due(1000 + DAY / 2, std::slice::from_ref(&full)), None);
        assert_eq!(choose_due(1000 + DAY, std::slice::from_ref(&full)), Some(Kind::Differential));
        let both = [full, backup("diff", 1000 + 6 * DAY)];
        assert_eq!(choose_due(1000 + 6 * DAY + DAY / 2, &both), None);
        assert_eq!(choose_due(1000 + 7 * DAY - SLACK, &both), Some(Kind::Full));
        // A clock that went back makes nothing due.
        assert_eq!(choose_due(0, &both), None);
        assert_eq!(choose_due(9, &[backup("diff", 5)]), Some(Kind::Full));
    }
}
