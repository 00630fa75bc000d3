//! Backups, the loss of all disks, and the way back to a time.

#[allow(dead_code, reason = "other tests do more with a cluster")]
#[path = "support/ha.rs"]
mod ha;
#[allow(dead_code, reason = "other tests look into the image")]
#[path = "support/image.rs"]
mod image;

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ha::{Ha, LEADER_PORT, WHOLE};
use stanchion::agent::backup::format_utc;
use stanchion::lab::ledger::{Record, read_ledger};
use stanchion::lab::plan_backup;

#[test]
fn what_was_there_at_a_time_comes_back_after_all_disks_are_lost() {
    let Some(ha) = Ha::create("backup", |cluster| cluster.backup = Some(plan_backup())) else {
        return;
    };
    ha.start_all();
    ha.wait_until_whole();
    ha.operate(&["restore", "--to", "2026-11-21T18:30:05"]).expect_refusal("it has no zone");
    ha.wait_for("the first backup", WHOLE, || (count_backups(&ha) > 0).then_some(()));
    let taken = ha.operate(&["backup", "--full"]).expect("backup");
    assert_eq!(taken["backup"]["kind"], "full");
    assert!(taken["snapshot"].as_u64().unwrap() > 0);
    assert_eq!(ha.operate(&["backup"]).expect("backup")["backup"]["kind"], "diff");

    let early = write_for(&ha, Duration::from_secs(3));
    std::thread::sleep(Duration::from_secs(2));
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    std::thread::sleep(Duration::from_secs(2));
    let late = write_for(&ha, Duration::from_secs(3));
    archive_all(&ha);
    let drilled = ha.operate(&["backup", "verify"]).expect("backup_verify");
    assert!(drilled["found"]["last_commit"].as_str().unwrap() > format_utc(time).as_str());

    let last_full = find_last_full(&ha);
    for node in ha.nodes() {
        ha.lab.kill(node).unwrap();
        ha.lab.destroy(node).unwrap();
    }
    let lost = Instant::now();
    ha.start_all();
    ha.wait_for("a new cluster", WHOLE, || ha.find_leader().and(ha.find_standby()));
    // It must not add to the backups of what is lost, nor take their place.
    ha.operate(&["backup"]).expect_refusal("backups of another database");
    ha.operate(&["restore", "--to", "2001-01-01T00:00:00Z"]).expect_refusal("nothing to restore");
    ha.operate(&["restore", "--to", &format_utc(time)]).expect_refusal("another one than that");
    give_one_up(&ha);

    let begun = Instant::now();
    let restored = ha.operate(&["restore", "--to", &format_utc(time), "--yes"]).expect("restore");
    assert!(restored["kept"].as_str().unwrap().contains("main.before-"));
    eprintln!(
        "restored in {:.1} s, {:.1} s after the loss",
        begun.elapsed().as_secs_f64(),
        lost.elapsed().as_secs_f64()
    );
    ha.wait_for("whole after the restore", WHOLE, || ha.is_whole().then_some(()));
    let there = read_rows(&ha);
    assert_eq!(early.find_lost(&there), [0_i64; 0], "rows from before that time are lost");
    let late: Vec<i64> = late.acknowledged.iter().map(|write| write.id).collect();
    assert!(late.iter().all(|id| !there.contains(id)), "rows from after that time are there");

    let given_up = format_utc(time + 3);
    ha.operate(&["restore", "--to", &given_up]).expect_refusal("given up by an earlier restore");

    // Life goes on: writes, backups on a timeline of their own, and a restore of all.
    let more = write_for(&ha, Duration::from_secs(2));
    let is_full = || (find_last_full(&ha) > last_full).then_some(());
    ha.wait_for("the full backup after the restore", WHOLE, is_full);
    // Until then the snapshot of etcd beside it may keep the cluster busy.
    let is_taken = || (ha.operate(&["backup"]).code == Some(0)).then_some(());
    ha.wait_for("a backup on the new timeline", WHOLE, is_taken);
    let last = write_for(&ha, Duration::from_secs(2));
    archive_all(&ha);
    ha.operate(&["restore", "--latest", "--yes"]).expect("restore");
    ha.wait_for("whole after the second restore", WHOLE, || ha.is_whole().then_some(()));
    let there = read_rows(&ha);
    assert_eq!(more.find_lost(&there), [0_i64; 0]);
    assert_eq!(last.find_lost(&there), [0_i64; 0]);
}

fn count_backups(ha: &Ha) -> usize {
    let list = ha.operate(&["backup", "list"]).expect("backup_list");
    list["backups"].as_array().unwrap().len()
}

/// Its label, which begins with its time.
fn find_last_full(ha: &Ha) -> Option<String> {
    let list = ha.operate(&["backup", "list"]).expect("backup_list");
    let fulls = list["backups"].as_array()?.iter().filter(|backup| backup["kind"] == "full");
    fulls.filter_map(|backup| backup["label"].as_str().map(str::to_string)).max()
}

fn write_for(ha: &Ha, time: Duration) -> Record {
    let ledger = ha.write();
    ledger.wait_for_write(Duration::from_secs(60)).unwrap();
    std::thread::sleep(time);
    let record = ledger.stop();
    assert!(record.acknowledged.len() > 10);
    record
}

fn read_rows(ha: &Ha) -> BTreeSet<i64> {
    let target = ha.database(LEADER_PORT);
    let read = || ha.lab.enter_network(|| read_ledger(&target)).unwrap().ok();
    ha.wait_for("the ledger can be read", WHOLE, read)
}

/// End the present file of the log, and wait until it is in the repository.
fn archive_all(ha: &Ha) {
    let leader = ha.wait_for("a leader", WHOLE, || ha.find_leader());
    let ask = |statement: &str| {
        let psql = ["psql", "-h", "/run/postgresql", "-U", "postgres", "-AtXqc", statement];
        ha.run(&leader, &psql).trim().to_string()
    };
    let file = ask("select pg_walfile_name(pg_switch_wal())");
    let done = format!("select last_archived_wal >= '{file}' from pg_stat_archiver");
    ha.wait_for("the log is archived", WHOLE, || (ask(&done) == "t").then_some(()));
}

/// The operator's program dies in the middle; nothing starts by itself, and all can be as
/// it was.
fn give_one_up(ha: &Ha) {
    let before = ha.wait_for("a leader", WHOLE, || ha.find_leader());
    let mut asked = ha.spawn(&["restore", "--latest", "--yes"]);
    let stopped = || {
        let state = ha.lab.exec(&before, &["systemctl", "is-active", "patroni"], WHOLE).unwrap();
        (state.code != Some(0)).then_some(())
    };
    ha.wait_for("PostgreSQL stops for the restore", WHOLE, stopped);
    asked.kill().unwrap();
    asked.wait().unwrap();
    ha.operate(&["restore", "--to", "2026-01-01T00:00:00Z", "--yes"])
        .expect_refusal("another restore is under way");
    // A node that comes back meanwhile must not start what is to be gone.
    let other = ha.others(&before)[0];
    ha.lab.kill(other).unwrap();
    ha.lab.start(other).unwrap();
    let waits = || {
        let page = ha.get_status(other)?;
        page.to_string().contains("a restore to the last that was archived").then_some(())
    };
    ha.wait_for("the node that came back waits", WHOLE, waits);
    // What the agent was at goes on to its end first.
    let gave_up = || {
        let given = ha.operate(&["restore", "--abort", "--yes"]);
        (given.code == Some(0)).then_some(())
    };
    ha.wait_for("the restore is given up", WHOLE, gave_up);
    ha.wait_for("the old database runs", WHOLE, || ha.find_leader().and(ha.find_standby()));
}
