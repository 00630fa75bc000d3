//! Taking a backup, and listing those that there are.

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::branches::{list_abandoned, needs_full};
use super::clock::format_utc;
use super::info::Backup;
use super::pgbackrest::{ask_unit, feed_unit, name_question, read_info, run_unit};
use super::schedule::choose_due;
use crate::agent::files::{find_account, make_private_file, remove_file};
use crate::agent::operate::{ClusterLock, Desk, Say};
use crate::agent::patroni;
use crate::clock::read_clock;
use crate::error::UserError;

/// Snapshots of etcd that are kept.
const SNAPSHOTS: usize = 14;
const UNIT: &str = "stanchion-backup";

/// How much a backup holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Full,
    /// What has changed since the last full one.
    Differential,
}

impl Kind {
    fn option(self) -> &'static str {
        match self {
            Kind::Full => "--type=full",
            Kind::Differential => "--type=diff",
        }
    }
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Taken {
    pub backup: Backup,
    /// Bytes of etcd's snapshot.
    pub snapshot: u64,
    pub seconds: f64,
}

/// Refuse where there is no place for backups, or where what is there is nobody's.
///
/// # Errors
/// A [`UserError`] that says what is missing.
pub fn expect_place(desk: &Desk) -> Result<()> {
    let Some(backup) = &desk.seed.cluster.backup else {
        return Err(UserError::new("this cluster makes no backups")
            .why("its cluster file has no section [backup]")
            .help("add one, make new seeds with `stanchion seed --all`, and restart the nodes one by one")
            .into());
    };
    let Some(directory) = &backup.directory else { return Ok(()) };
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
    if !desk.seed.cluster.is_single() && !is_mounted(&mounts, directory) {
        return Err(UserError::new(format!("nothing is mounted at {directory}"))
            .why("backups on a node's own disk are gone with the node")
            .help("mount the shared directory on every db node")
            .into());
    }
    give_to_postgres(&desk.places.join("/etc/passwd"), Path::new(directory))
}

fn is_mounted(mounts: &str, at: &str) -> bool {
    mounts.lines().any(|line| line.split(' ').nth(4) == Some(at))
}

/// A directory that is root's still and holds nothing becomes `postgres`' own.
fn give_to_postgres(passwd: &Path, directory: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let giving = || format!("giving {} to postgres", directory.display());
    let meta = std::fs::metadata(directory).with_context(giving)?;
    let passwd = std::fs::read_to_string(passwd).context("reading accounts")?;
    let (user, group) = find_account(&passwd, "postgres").context("there is no postgres")?;
    if meta.uid() == user {
        return Ok(());
    }
    if meta.uid() != 0 || std::fs::read_dir(directory).with_context(giving)?.next().is_some() {
        return Err(UserError::new(format!("{} is not postgres' own", directory.display()))
            .help(format!("chown {user}:{group} {}", directory.display()))
            .into());
    }
    std::os::unix::fs::chown(directory, Some(user), Some(group)).with_context(giving)
}

/// Make the repository ready for this database; nothing happens when it is.
///
/// # Errors
/// A [`UserError`] when it holds the backups of another database.
pub async fn prepare_repository(stanza: &str) -> Result<()> {
    let option = format!("--stanza={stanza}");
    let program = ["pgbackrest", &option, "--log-level-console=warn", "stanza-create"];
    let made = run_unit(&name_question(), &program, &Say::to_journal()).await;
    made.map_err(|error| {
        let text = format!("{error:#}");
        if text.contains("do not match the database") {
            return UserError::new("the repository holds the backups of another database")
                .why("this cluster was formed anew on empty disks, or the repository is not its own")
                .help("`stanchion restore` brings that database back; for a fresh start give the cluster an empty place for its backups")
                .into();
        }
        error
    })
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Wish {
    kind: Option<Kind>,
}

/// The operator wants a backup now.
pub async fn take_by_verb(desk: &Desk, body: Value, say: &Say) -> Result<Value> {
    let wish: Wish = serde_json::from_value(body).context("reading what is wanted")?;
    expect_place(desk)?;
    let own = patroni::read_own(&desk.http, desk.entry.address).await?;
    if own.role != "primary" {
        return Err(UserError::new(format!("{} is not PostgreSQL's leader", desk.entry.name))
            .help("the leader takes backups; ask again")
            .into());
    }
    let stanza = desk.seed.cluster.name.as_str();
    prepare_repository(stanza).await?;
    let backups = read_info(stanza).await?.list_backups();
    // Without a full one of this branch there is nothing to differ from.
    let needs_full = backups.is_empty() || needs_full(&backups, &list_abandoned().await?);
    let kind = match (wish.kind, needs_full) {
        (_, true) => Kind::Full,
        (Some(kind), _) => kind,
        (None, _) => choose_due(read_clock()?, &backups).unwrap_or(Kind::Differential),
    };
    Ok(serde_json::to_value(take(desk, kind, say).await?)?)
}

/// Take a backup of the leader, which this node is.
pub async fn take(desk: &Desk, kind: Kind, say: &Say) -> Result<Taken> {
    let doing = format!("a backup on {}", desk.entry.name);
    let lock = ClusterLock::take(&desk.etcd, &desk.registry, "operate", &doing).await?;
    let taken = write_backup(desk, kind, say).await;
    lock.give_back().await;
    taken
}

async fn write_backup(desk: &Desk, kind: Kind, say: &Say) -> Result<Taken> {
    let begun = Instant::now();
    let stanza = desk.seed.cluster.name.as_str();
    let option = format!("--stanza={stanza}");
    run_unit(UNIT, &["pgbackrest", &option, kind.option(), "backup"], say).await?;
    let snapshot = save_etcd(desk).await.context("keeping a snapshot of etcd")?;
    say.say(format!("a snapshot of etcd of {snapshot} bytes lies beside it"));
    let backups = read_info(stanza).await?.list_backups();
    let backup = backups.last().cloned().context("the repository does not list the backup")?;
    Ok(Taken { backup, snapshot, seconds: begun.elapsed().as_secs_f64() })
}

/// Put a snapshot of this node's etcd into the repository, and drop old ones.
async fn save_etcd(desk: &Desk) -> Result<u64> {
    // Where only root makes files: whoever is postgres could put a link elsewhere.
    let path = desk.places.state().join("backup/etcd.snapshot");
    let save = async {
        let mut file = make_private_file(&path)?;
        let size = desk.etcd.write_snapshot(&mut file).await?;
        file.sync_all().context("writing a snapshot")?;
        let name = format!("etcd/{}.snapshot", name_time(read_clock()?));
        let program = ["pgbackrest", "--log-level-console=off", "repo-put", &name];
        feed_unit(&program, File::open(&path).context("reading a snapshot")?).await?;
        Ok::<_, anyhow::Error>(size)
    };
    let saved = save.await;
    let _ = remove_file(&path);
    let size = saved?;
    for old in list_old(&list_snapshots().await?) {
        let name = format!("etcd/{old}");
        let program = ["pgbackrest", "--log-level-console=off", "repo-rm", &name];
        ask_unit(&program).await?;
    }
    Ok(size)
}

async fn list_snapshots() -> Result<Vec<String>> {
    let program = ["pgbackrest", "--log-level-console=off", "repo-ls", "etcd"];
    let text = ask_unit(&program).await?;
    let mut names: Vec<String> =
        text.lines().filter(|name| name.ends_with(".snapshot")).map(str::to_string).collect();
    names.sort();
    Ok(names)
}

/// `names` are in the order of their times.
fn list_old(names: &[String]) -> &[String] {
    &names[..names.len().saturating_sub(SNAPSHOTS)]
}

/// `20261121T183005Z`
fn name_time(seconds: u64) -> String {
    let text = format_utc(seconds);
    let plain = text.trim_end_matches("+00").replace(['-', ':'], "").replace(' ', "T");
    format!("{plain}Z")
}

/// What the repository has.
pub async fn list(desk: &Desk) -> Result<Value> {
    expect_place(desk)?;
    let info = read_info(&desk.seed.cluster.name).await?;
    let snapshots = list_snapshots().await.unwrap_or_default();
    Ok(json!({
        "backups": info.list_backups(),
        "system": info.find_system().map(|system| system.to_string()),
        "etcd_snapshots": snapshots,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_told_from_a_folder() {
        let mounts = "36 35 98:0 /a /var rw - ext4 /dev/x rw\n\
                      37 36 0:5 / /var/backups/stanchion rw - nfs4 h:/x rw\n";
        assert!(is_mounted(mounts, "/var/backups/stanchion"));
        assert!(!is_mounted(mounts, "/var/backups"));
    }

    #[test]
    fn snapshots_are_named_by_their_time_and_the_oldest_go() {
        assert_eq!(name_time(1_795_285_805), "20261121T183005Z");
        let names: Vec<String> = (0..16).map(|n| format!("{n:02}.snapshot")).collect();
        assert_eq!(list_old(&names), ["00.snapshot", "01.snapshot"]);
        assert!(list_old(&names[..3]).is_empty());
    }
}
