//! The cluster as it was at a time. The operator's program asks the nodes for one step after
//! the other; a record in etcd says how far it is, so that it can go on after anything.
//!
//! ```text
//! plan    what would be done                                        one node
//! begin   the record: from now on no PostgreSQL starts by itself    that node
//! stop    PostgreSQL stops                                          the others, then it
//! fetch   its data are put aside; restore, recover, look at all     it
//! lead    what Patroni knows of the old leader is deleted; start    it
//! follow  data are deleted; start as a replica                      each other one
//! end     the record goes                                           it
//! abort   before `lead`: the old data come back                     it
//! ```

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::branches::{
    Abandoned, archive_timelines, judge_time, keep_abandoned, list_abandoned, list_live,
};
use super::drill::{expect_room, remove_folder};
use super::info::Backup;
use super::pgbackrest::{read_info, run_unit};
use super::plan::{Target, choose_backup};
use super::scratch::{FILES, Found, Scratch, end_leftovers, make_folder};
use super::take::expect_place;
use crate::agent::board::log;
use crate::agent::etcd::Outcome;
use crate::agent::node::Node;
use crate::agent::operate::{ClusterLock, Desk, Say};
use crate::agent::patroni;
use crate::agent::systemd::{Active, forget_failure, query_unit, start_unit, stop_unit};
use crate::clock::read_clock;
use crate::config::cluster::Role;
use crate::error::UserError;

const PATRONI: &str = "patroni.service";
const DATA: &str = "/var/lib/postgresql/17/main";
const LEADS: Duration = Duration::from_secs(180);
/// A replica copies the whole database.
const FOLLOWS: Duration = Duration::from_secs(12 * 3600);

/// How far a restore is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Nothing is changed yet but that PostgreSQL stops.
    Stopping,
    /// The old data are put aside.
    Fetching,
    /// The restored data are whole and were looked at.
    Restored,
    /// They are the cluster's: there is no way back.
    Leading,
}

/// What etcd holds while a restore is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub id: u64,
    /// Where it is restored to; the others copy from there.
    pub node: String,
    pub target: Target,
    /// The backup that it begins with.
    pub backup: String,
    /// The old data are deleted, for want of room.
    pub in_place: bool,
    pub stage: Stage,
    /// The system identifier of what was restored.
    #[serde(default)]
    pub system: String,
    /// What is given up once the restored data lead, as the repository names it.
    #[serde(default)]
    pub abandoned: Option<String>,
    /// Nodes whose PostgreSQL may start.
    #[serde(default)]
    pub released: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case", tag = "step")]
enum Step {
    Plan { target: Option<Target> },
    Begin { target: Target, in_place: bool },
    Stop,
    Fetch,
    Lead,
    Follow,
    End,
    Abort,
}

/// What a restore would do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Planned {
    /// One that is under way, and would go on.
    pub record: Option<Record>,
    pub backup: Option<Backup>,
    /// Whether the data of this node can be kept until it is over.
    pub has_room: bool,
    /// The repository is another database's than the one that the cluster has now.
    pub other_database: bool,
}

fn key(desk: &Desk) -> String {
    desk.registry.key("restore", "record")
}

/// What is under way.
pub async fn read_record(desk: &Desk) -> Result<Option<Record>> {
    let Some(entry) = desk.etcd.get(&key(desk)).await? else { return Ok(None) };
    serde_json::from_str(&entry.value).map(Some).context("reading the record of a restore")
}

/// Why this node's PostgreSQL must not start now; `None` when it may.
pub async fn withhold(node: &Node) -> Result<Option<String>> {
    let key = node.registry.key("restore", "record");
    let Some(entry) = node.etcd.get(&key).await? else { return Ok(None) };
    let record: Record =
        serde_json::from_str(&entry.value).context("reading the record of a restore")?;
    Ok(judge_start(&record, &node.entry.name))
}

/// Old data that start first would be the cluster's again.
fn judge_start(record: &Record, name: &str) -> Option<String> {
    let may = record.stage == Stage::Leading && record.released.iter().any(|node| node == name);
    (!may).then(|| {
        format!(
            "a restore to {} is under way: end it with `stanchion restore`, or give it up with \
             `stanchion restore --abort`",
            record.target.describe()
        )
    })
}

async fn write_record(desk: &Desk, lock: &ClusterLock, record: &Record) -> Result<()> {
    lock.expect_held()?;
    desk.etcd.put(&key(desk), &serde_json::to_string(record)?, None).await
}

/// One step on this node.
pub async fn restore(desk: &Desk, body: Value, say: &Say) -> Result<Value> {
    let step: Step = serde_json::from_value(body).context("reading what is wanted")?;
    if let Step::Plan { target } = step {
        return plan(desk, target).await;
    }
    let doing = format!("a step of a restore on {}", desk.entry.name);
    let lock = ClusterLock::take(&desk.etcd, &desk.registry, "operate", &doing).await?;
    let done = do_step(desk, &lock, step, say).await;
    lock.give_back().await;
    done
}

async fn do_step(desk: &Desk, lock: &ClusterLock, step: Step, say: &Say) -> Result<Value> {
    if let Step::Begin { target, in_place } = step {
        return begin(desk, target, in_place).await;
    }
    let Some(record) = read_record(desk).await? else {
        return Err(UserError::new("no restore is under way").into());
    };
    match step {
        Step::Plan { .. } | Step::Begin { .. } => {}
        Step::Stop => stop_database(desk, &record, say).await?,
        Step::Fetch => return fetch(desk, lock, record, say).await,
        Step::Lead => lead(desk, lock, record, say).await?,
        Step::Follow => follow(desk, lock, record, say).await?,
        Step::End => return end(desk, &record).await,
        Step::Abort => abort(desk, lock, record, say).await?,
    }
    Ok(json!({}))
}

async fn plan(desk: &Desk, target: Option<Target>) -> Result<Value> {
    expect_place(desk)?;
    let record = read_record(desk).await?;
    let info = read_info(&desk.seed.cluster.name).await?;
    let abandoned = list_abandoned().await?;
    let backups = list_live(&info.list_backups(), &abandoned);
    let target = record.as_ref().map(|record| record.target.clone()).or(target);
    let backup = match &target {
        Some(target) => {
            if record.is_none() {
                judge_time(target, &abandoned)?;
            }
            Some(choose_backup(target, &backups, read_clock()?)?.clone())
        }
        None => None,
    };
    let has_room = match &backup {
        Some(backup) => expect_room(Path::new("/var/lib/postgresql"), backup.size).is_ok(),
        None => true,
    };
    let initialize = format!("/service/{}/initialize", desk.seed.cluster.name);
    let own = desk.etcd.get(&initialize).await?.map(|entry| entry.value);
    let theirs = info.find_system().map(|system| system.to_string());
    let other_database = own.is_some() && own != theirs;
    Ok(serde_json::to_value(Planned { record, backup, has_room, other_database })?)
}

async fn begin(desk: &Desk, target: Target, in_place: bool) -> Result<Value> {
    if let Some(record) = read_record(desk).await? {
        if record.target == target && record.node == desk.entry.name {
            return Ok(serde_json::to_value(record)?);
        }
        return Err(UserError::new("another restore is under way")
            .why(format!("to {}, on {}", record.target.describe(), record.node))
            .help("go on with that one, or give it up with `stanchion restore --abort`")
            .into());
    }
    expect_place(desk)?;
    let now = read_clock()?;
    let abandoned = list_abandoned().await?;
    judge_time(&target, &abandoned)?;
    let backups = list_live(&read_info(&desk.seed.cluster.name).await?.list_backups(), &abandoned);
    let backup = choose_backup(&target, &backups, now)?;
    if !in_place {
        expect_room(Path::new("/var/lib/postgresql"), backup.size)
            .context("say --in-place to delete this node's present data first")?;
    }
    if let Ok(view) = patroni::read_view(&desk.http, desk.entry.address).await
        && view.pause
    {
        return Err(UserError::new("Patroni is paused").help("`patronictl resume` first").into());
    }
    let record = Record {
        id: now,
        node: desk.entry.name.clone(),
        target,
        backup: backup.label.clone(),
        in_place,
        stage: Stage::Stopping,
        system: String::new(),
        abandoned: None,
        released: Vec::new(),
    };
    let text = serde_json::to_string(&record)?;
    if desk.etcd.create(&key(desk), &text, None).await? == Outcome::Refused {
        bail!("another restore has begun this moment");
    }
    log(&format!("restore: to {} begins on this node", record.target.describe()));
    Ok(serde_json::to_value(record)?)
}

/// Stop Patroni, and PostgreSQL with it.
async fn stop_database(desk: &Desk, record: &Record, say: &Say) -> Result<()> {
    if judge_start(record, &desk.entry.name).is_none() {
        return Ok(());
    }
    stop_unit(PATRONI).await?;
    let pid = desk.places.join(DATA).join("postmaster.pid");
    if let Ok(text) = std::fs::read_to_string(&pid)
        && is_postgres(text.lines().next().unwrap_or_default())
    {
        return Err(UserError::new(format!("PostgreSQL still runs on {}", desk.entry.name))
            .why("Patroni has stopped without it, as it does while it is paused")
            .help("`patronictl resume`, then ask again")
            .into());
    }
    say.say("PostgreSQL has stopped");
    Ok(())
}

fn is_postgres(pid: &str) -> bool {
    let Ok(pid) = pid.trim().parse::<u32>() else { return false };
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim() == "postgres"
}

/// Where the old data are until the restore is over.
fn name_kept(desk: &Desk, record: &Record) -> PathBuf {
    desk.places.join(format!("{DATA}.before-{}", record.id))
}

async fn expect_stopped(desk: &Desk, record: &Record) -> Result<()> {
    if record.node != desk.entry.name {
        return Err(UserError::new(format!("the restore is on {}", record.node)).into());
    }
    for node in desk.seed.cluster.list_nodes(Role::Db) {
        if patroni::read_own(&desk.http, node.address).await.is_ok() {
            return Err(UserError::new(format!("Patroni still runs on {}", node.name))
                .help("ask again: all are stopped first")
                .into());
        }
    }
    Ok(())
}

async fn fetch(desk: &Desk, lock: &ClusterLock, mut record: Record, say: &Say) -> Result<Value> {
    if record.stage >= Stage::Restored {
        return Ok(json!({}));
    }
    expect_stopped(desk, &record).await?;
    end_leftovers().await?;
    let (data, kept) = (desk.places.join(DATA), name_kept(desk, &record));
    if record.stage == Stage::Stopping && !record.in_place && data.exists() && !kept.exists() {
        lock.expect_held()?;
        drop_earlier(desk).await?;
        lock.expect_held()?;
        std::fs::rename(&data, &kept).context("putting the old data aside")?;
        say.say(format!("the old data are at {} until the next restore", kept.display()));
    }
    record.stage = Stage::Fetching;
    write_record(desk, lock, &record).await?;
    // In place of what an earlier try left.
    lock.expect_held()?;
    remove_folder(&data).await?;
    make_folder(desk, &data)?;
    let found = restore_and_look(desk, &record, &data, say).await?;
    record.stage = Stage::Restored;
    record.system = found.system.clone();
    write_record(desk, lock, &record).await?;
    Ok(serde_json::to_value(found)?)
}

/// Data that earlier restores have kept.
async fn drop_earlier(desk: &Desk) -> Result<()> {
    let folder = desk.places.join("/var/lib/postgresql/17");
    for entry in std::fs::read_dir(&folder).context("looking for earlier data")? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("main.before-") {
            remove_folder(&entry.path()).await?;
        }
    }
    Ok(())
}

async fn restore_and_look(desk: &Desk, record: &Record, data: &Path, say: &Say) -> Result<Found> {
    let stanza = format!("--stanza={}", desk.seed.cluster.name);
    let set = format!("--set={}", record.backup);
    let time = format!("--target={}", record.target.describe());
    let mut program = vec!["pgbackrest", stanza.as_str(), set.as_str()];
    match record.target {
        Target::Latest => program.push("--type=default"),
        Target::Time(..) => {
            program.extend(["--type=time", time.as_str(), "--target-action=promote"]);
        }
    }
    program.push("restore");
    say.say(format!("restoring the backup {}", record.backup));
    run_unit(FILES, &program, say).await?;
    say.say(format!("replaying the log to {}", record.target.describe()));
    let scratch = Scratch::start(desk, data, say).await?;
    let prepared = async {
        let found = scratch.look().await?;
        scratch.ask(&write_settings(desk)?).await?;
        Ok::<_, anyhow::Error>(found)
    };
    let prepared = prepared.await;
    scratch.stop(say).await?;
    let found = prepared?;
    say.say(format!(
        "recovered on timeline {}; the last transaction is of {}; all checksums are right",
        found.timeline,
        match found.last_commit.as_str() {
            "" => "before the backup ended",
            last => last,
        }
    ));
    Ok(found)
}

/// What the restore set is taken back, and the password is this cluster's.
fn write_settings(desk: &Desk) -> Result<String> {
    let mut text = String::new();
    for name in [
        "restore_command",
        "recovery_target",
        "recovery_target_time",
        "recovery_target_action",
        "recovery_target_timeline",
        "archive_mode",
    ] {
        text += &format!("alter system reset {name};\n");
    }
    if let Some(secret) = desk.seed.secrets.get("postgres_netbox") {
        // No statement with a password belongs into a log.
        text += "set log_statement = 'none';\nset log_min_error_statement = 'panic';\n";
        text += "set password_encryption = 'scram-sha-256';\n";
        text += &format!("alter role netbox password '{}';\n", secret.reveal());
    }
    Ok(text)
}

/// Make the restored data the cluster's.
async fn lead(desk: &Desk, lock: &ClusterLock, mut record: Record, say: &Say) -> Result<()> {
    if record.stage < Stage::Restored {
        return Err(UserError::new("nothing is restored yet").into());
    }
    if record.stage == Stage::Restored {
        expect_stopped(desk, &record).await?;
        let prefix = format!("/service/{}/", desk.seed.cluster.name);
        lock.expect_held()?;
        for entry in desk.etcd.list(&prefix).await?.entries {
            let name = entry.key.strip_prefix(&prefix).unwrap_or_default();
            // The settings stay; everything else is of what is gone.
            if name != "config" && name != "initialize" {
                desk.etcd.delete(&entry.key).await?;
            }
        }
        desk.etcd.put(&format!("{prefix}initialize"), &record.system, None).await?;
        record.stage = Stage::Leading;
        record.released = vec![desk.entry.name.clone()];
        let given_up = Abandoned::by(&record.target, record.id, read_clock()?);
        record.abandoned = Some(given_up.name());
        write_record(desk, lock, &record).await?;
        say.say("what Patroni knew of the old leader is deleted");
    }
    keep_abandoned(&record).await?;
    archive_timelines(&desk.places.join(DATA)).await?;
    start_database().await?;
    wait_for(desk, LEADS, "did not become the leader", |member, _| {
        member.role == "leader" && member.state == "running"
    })
    .await?;
    say.say(format!("{} leads", desk.entry.name));
    Ok(())
}

async fn start_database() -> Result<()> {
    match query_unit(PATRONI).await? {
        Active::Running | Active::Starting => return Ok(()),
        Active::Failed => forget_failure(PATRONI).await?,
        Active::Stopped => {}
        Active::Missing => bail!("this image has no {PATRONI}"),
    }
    start_unit(PATRONI).await
}

/// Wait until this node is so in Patroni's view.
async fn wait_for(
    desk: &Desk,
    limit: Duration,
    failure: &str,
    is_so: impl Fn(&patroni::Member, &patroni::View) -> bool,
) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < limit {
        if let Ok(view) = patroni::read_view(&desk.http, desk.entry.address).await
            && let Some(own) = view.members.iter().find(|member| member.name == desk.entry.name)
            && is_so(own, &view)
        {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    bail!("{} {failure} within {} s", desk.entry.name, limit.as_secs())
}

async fn follow(desk: &Desk, lock: &ClusterLock, mut record: Record, say: &Say) -> Result<()> {
    if record.stage < Stage::Leading {
        return Err(UserError::new("the restored data do not lead yet").into());
    }
    if record.node == desk.entry.name {
        return Err(UserError::new("this node has what was restored").into());
    }
    if !record.released.contains(&desk.entry.name) {
        stop_database(desk, &record, say).await?;
        lock.expect_held()?;
        remove_folder(&desk.places.join(DATA)).await?;
        record.released.push(desk.entry.name.clone());
        write_record(desk, lock, &record).await?;
        say.say("the old data are deleted; copying from the new leader");
    }
    start_database().await?;
    wait_for(desk, FOLLOWS, "did not follow", |own, _| own.state == "streaming").await?;
    say.say(format!("{} follows", desk.entry.name));
    Ok(())
}

async fn end(desk: &Desk, record: &Record) -> Result<Value> {
    if record.stage < Stage::Leading {
        return Err(UserError::new("the restore is not over").into());
    }
    for node in desk.seed.cluster.list_nodes(Role::Db) {
        if !record.released.contains(&node.name) {
            return Err(UserError::new(format!("{} does not follow yet", node.name)).into());
        }
    }
    desk.etcd.delete(&key(desk)).await?;
    let kept = name_kept(desk, record);
    log("restore: over");
    Ok(json!({ "kept": kept.exists().then(|| kept.display().to_string()) }))
}

/// What brings a node's data to what they were before a restore.
#[derive(Debug, PartialEq, Eq)]
enum WayBack {
    /// What is there was there before.
    Untouched,
    /// What was restored goes, and what was kept comes back.
    Kept,
    /// What was restored goes, and nothing was kept.
    Nothing,
}

/// The old data are renamed before the record says so: what is on the disk counts.
fn choose_way_back(stage: Stage, has_kept: bool) -> WayBack {
    match (has_kept, stage) {
        (true, _) => WayBack::Kept,
        (false, Stage::Stopping) => WayBack::Untouched,
        (false, _) => WayBack::Nothing,
    }
}

/// Before the restored data lead, all can be as it was.
async fn abort(desk: &Desk, lock: &ClusterLock, mut record: Record, say: &Say) -> Result<()> {
    if record.stage >= Stage::Leading {
        return Err(UserError::new("there is no way back any more")
            .why("the restored data are the cluster's already")
            .help("go on with `stanchion restore`")
            .into());
    }
    if record.node != desk.entry.name {
        return Err(UserError::new(format!("the restore is on {}", record.node)).into());
    }
    end_leftovers().await?;
    let (data, kept) = (desk.places.join(DATA), name_kept(desk, &record));
    lock.expect_held()?;
    match choose_way_back(record.stage, kept.exists()) {
        WayBack::Untouched => {}
        WayBack::Kept => {
            remove_folder(&data).await?;
            // Else giving up twice would take the old data for half of a restore.
            record.stage = Stage::Stopping;
            write_record(desk, lock, &record).await?;
            std::fs::rename(&kept, &data).context("bringing the old data back")?;
            say.say("the old data are back");
        }
        WayBack::Nothing => {
            // Half of a restore must not lead; the others have theirs.
            remove_folder(&data).await?;
            say.say("the data of this node are gone, as --in-place had it; it copies the others'");
        }
    }
    lock.expect_held()?;
    desk.etcd.delete(&key(desk)).await?;
    log("restore: given up");
    Ok(())
}

/// Start PostgreSQL again after a restore was given up.
pub async fn start_again(desk: &Desk) -> Result<Value> {
    if let Some(record) = read_record(desk).await?
        && let Some(reason) = judge_start(&record, &desk.entry.name)
    {
        return Err(UserError::new("PostgreSQL must not start now").why(reason).into());
    }
    start_database().await?;
    Ok(json!({}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn giving_up_deletes_nothing_that_was_there_before() {
        assert_eq!(choose_way_back(Stage::Stopping, false), WayBack::Untouched);
        // The agent ended between the renaming and the record.
        assert_eq!(choose_way_back(Stage::Stopping, true), WayBack::Kept);
        assert_eq!(choose_way_back(Stage::Fetching, true), WayBack::Kept);
        assert_eq!(choose_way_back(Stage::Restored, true), WayBack::Kept);
        assert_eq!(choose_way_back(Stage::Fetching, false), WayBack::Nothing);
    }

    #[test]
    fn during_a_restore_only_released_nodes_start() {
        let mut record = Record {
            id: 1,
            node: "n1".into(),
            target: Target::Latest,
            backup: "b".into(),
            in_place: false,
            stage: Stage::Restored,
            system: String::new(),
            abandoned: None,
            released: vec!["n1".into()],
        };
        assert!(judge_start(&record, "n1").unwrap().contains("under way"));
        record.stage = Stage::Leading;
        assert_eq!(judge_start(&record, "n1"), None);
        assert!(judge_start(&record, "n2").is_some());
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
        assert!(Stage::Stopping < Stage::Fetching && Stage::Restored < Stage::Leading);
    }
}
