//! The proof that backups can be restored: into a scratch folder of this node, with a
//! PostgreSQL that nobody reaches, and away again.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::branches::{list_abandoned, list_live};
use super::info::Backup;
use super::pgbackrest::{read_info, run_unit};
use super::plan::{Target, choose_backup};
use super::scratch::{FILES, Found, Scratch, end_leftovers, make_folder};
use super::take::expect_place;
use crate::agent::operate::{ClusterLock, Desk, Say};
use crate::clock::read_clock;
use crate::error::UserError;

const FOLDER: &str = "/var/lib/postgresql/drill";

/// What came of a drill.
#[derive(Debug, Serialize, Deserialize)]
pub struct Drilled {
    pub node: String,
    pub backup: Backup,
    pub found: Found,
    pub seconds: f64,
}

pub async fn drill(desk: &Desk, say: &Say) -> Result<Value> {
    expect_place(desk)?;
    let stanza = desk.seed.cluster.name.as_str();
    let backups = read_info(stanza).await?.list_backups();
    let backups = list_live(&backups, &list_abandoned().await?);
    let backup = choose_backup(&Target::Latest, &backups, read_clock()?)?.clone();
    let folder = desk.places.join(FOLDER);
    expect_room(Path::new("/var/lib/postgresql"), backup.size)?;
    let doing = format!("a restore drill on {}", desk.entry.name);
    let lock = ClusterLock::take(&desk.etcd, &desk.registry, "operate", &doing).await?;
    let begun = Instant::now();
    let drilled = restore_and_look(desk, &lock, &backup.label, &folder, say).await;
    let removed = remove_folder(&folder).await;
    lock.give_back().await;
    removed?;
    let seconds = begun.elapsed().as_secs_f64();
    let node = desk.entry.name.clone();
    Ok(serde_json::to_value(Drilled { node, backup, found: drilled?, seconds })?)
}

async fn restore_and_look(
    desk: &Desk,
    lock: &ClusterLock,
    label: &str,
    folder: &Path,
    say: &Say,
) -> Result<Found> {
    end_leftovers().await?;
    lock.expect_held()?;
    remove_folder(folder).await?;
    make_folder(desk, folder)?;
    let (stanza, set) = (format!("--stanza={}", desk.seed.cluster.name), format!("--set={label}"));
    let path = format!("--pg1-path={}", folder.display());
    say.say("restoring the last backup into a scratch folder");
    // It must not add to the archive of the database that lives.
    let program = ["pgbackrest", &stanza, &path, &set, "--archive-mode=off", "restore"];
    run_unit(FILES, &program, say).await?;
    say.say("replaying the log that was archived since");
    let scratch = Scratch::start(desk, folder, say).await?;
    let found = scratch.look().await;
    scratch.stop(say).await?;
    found
}

/// Refuse when what is restored would fill the disk.
pub fn expect_room(place: &Path, size: u64) -> Result<()> {
    let stat = rustix::fs::statvfs(place).context("looking at the disk")?;
    let free = stat.f_bavail * stat.f_frsize;
    judge_room(free, size).map_err(Into::into)
}

/// Twice the log that PostgreSQL keeps comes on top.
fn judge_room(free: u64, size: u64) -> Result<(), UserError> {
    const LOG: u64 = 512 << 20;
    if free >= size + size / 10 + LOG {
        return Ok(());
    }
    let megabytes = |bytes: u64| bytes >> 20;
    Err(UserError::new("there is no room for a second copy of the database")
        .why(format!(
            "it has {} MiB, and {} MiB of /var are free",
            megabytes(size),
            megabytes(free)
        ))
        .help("make the disk larger, or take another node"))
}

/// Delete a folder and all that is in it.
pub async fn remove_folder(folder: &Path) -> Result<()> {
    let path = folder.to_path_buf();
    let remove = move || match std::fs::remove_dir_all(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    let removed = tokio::task::spawn_blocking(remove).await.context("deleting a folder")?;
    removed.with_context(|| format!("deleting {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_copy_needs_its_room() {
        assert!(judge_room(2 << 30, 1 << 30).is_ok());
        assert!(judge_room(1 << 30, 1 << 30).is_err());
        let why = judge_room(100 << 20, 50 << 20).unwrap_err().to_string();
        assert!(why.contains("50 MiB") && why.contains("100 MiB"), "{why}");
    }
}
