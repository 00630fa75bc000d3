//! What whoever helps wants to see of a node: states, configuration, versions and the
//! journal, each bounded, with every secret left out before it leaves the node.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::redact::Redactor;
use super::switchover::read_view;
use super::{Desk, Say};
use crate::agent::files::read_bounded;
use crate::agent::psql::{SOCKET, run_psql};
use crate::agent::render::list_targets;
use crate::agent::server::make_page;
use crate::agent::systemd::{run_program, run_to_end};
use crate::config::cluster::Role;
use crate::seed::Seed;

/// Bytes of one file, and of the journal.
const FILE: u64 = 256 << 10;
const JOURNAL: usize = 4 << 20;
const LINES: &str = "--lines=20000";

/// One file of the bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page {
    /// Such as `etc/patroni/config.yml`; relative, without `..`.
    pub name: String,
    pub text: String,
}

/// Programs whose answers go in, each under its name.
const PROGRAMS: [(&str, &[&str]); 9] = [
    ("units.txt", &["systemctl", "list-units", "--all", "--plain", "--no-pager"]),
    ("failed.txt", &["systemctl", "--failed", "--plain", "--no-pager"]),
    ("timers.txt", &["systemctl", "list-timers", "--all", "--no-pager"]),
    ("kernel.txt", &["uname", "-a"]),
    ("disks.txt", &["df", "-h"]),
    ("addresses.txt", &["networkctl", "--no-pager", "status", "--all"]),
    ("processes.txt", &["ps", "-eo", "pid,ppid,user,rss,etime,comm"]),
    ("packages.txt", &["dpkg-query", "-W"]),
    ("clock.txt", &["chronyc", "-n", "tracking"]),
];

const DATABASE: [(&str, &str); 3] = [
    (
        "replication",
        "select application_name, state, sync_state, replay_lag from pg_stat_replication",
    ),
    ("slots", "select slot_name, active, wal_status from pg_replication_slots"),
    (
        "archiver",
        "select archived_count, last_archived_time, failed_count, last_failed_time from pg_stat_archiver",
    ),
];

/// What this node has to show.
pub async fn bundle(desk: &Desk, say: &Say) -> Result<Value> {
    let redactor = Redactor::new(list_secrets(&desk.seed));
    let mut pages = Vec::new();
    let mut add = |name: &str, text: &str| {
        pages.push(Page { name: name.to_string(), text: redactor.redact(text) });
    };
    let page = make_page(&desk.board, Some(&desk.registry));
    add("status.json", &serde_json::to_string_pretty(&page)?);
    let cluster = serde_json::to_string_pretty(&desk.seed.cluster)?;
    add("cluster.json", &cluster);
    for (name, program) in PROGRAMS {
        match run_program(program).await {
            Ok(text) => add(name, &text),
            Err(error) => add(name, &format!("{error:#}\n")),
        }
    }
    for target in list_targets(&desk.places)? {
        let name = target.strip_prefix("/").unwrap_or(&target).to_string_lossy().into_owned();
        match read_bounded(&desk.places.join(&target), FILE) {
            Ok(Some(bytes)) => add(&name, &String::from_utf8_lossy(&bytes)),
            Ok(None) => {}
            Err(error) => add(&name, &format!("{error:#}\n")),
        }
    }
    for file in ["/etc/os-release", "/var/lib/stanchion/etcd.json", "/proc/meminfo"] {
        if let Ok(Some(bytes)) = read_bounded(&desk.places.join(file), FILE) {
            add(file.trim_start_matches('/'), &String::from_utf8_lossy(&bytes));
        }
    }
    if desk.entry.has(Role::Db) {
        add("patroni.txt", &format!("{:#?}\n", read_view(desk).await));
        add("etcd-members.txt", &format!("{:#?}\n", desk.etcd.list_members().await));
        for (name, question) in DATABASE {
            let text = run_psql(SOCKET, question).await.unwrap_or_else(|e| format!("{e:#}"));
            add(&format!("postgres-{name}.txt"), &text);
        }
    }
    say.say("reading the journal");
    let words = ["journalctl", "--boot", "--no-pager", "--output=short-iso-precise", LINES];
    let journal = run_to_end(&words).await.context("reading the journal")?;
    add("journal.txt", take_end(&journal, JOURNAL));
    Ok(serde_json::to_value(pages)?)
}

/// Everything that nobody but the node may know.
fn list_secrets(seed: &Seed) -> impl Iterator<Item = &str> {
    let brought = seed.site.as_ref().and_then(|site| site.brought.as_ref());
    seed.secrets
        .values()
        .map(|secret| secret.reveal())
        .chain(std::iter::once(seed.key.as_str()))
        .chain(brought.map(|brought| brought.key.as_str()))
}

/// The last bytes of a text, from the beginning of a line.
fn take_end(text: &str, most: usize) -> &str {
    if text.len() <= most {
        return text;
    }
    let from = text.len() - most;
    let line = text.as_bytes()[from..].iter().position(|byte| *byte == b'\n');
    line.map_or("", |line| &text[from + line + 1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_begins_with_a_line() {
        assert_eq!(take_end("one\ntwo\nthree\n", 100), "one\ntwo\nthree\n");
        assert_eq!(take_end("one\ntwo\nthree\n", 8), "three\n");
        assert_eq!(take_end("öööö\nö\n", 6), "ö\n");
        assert_eq!(take_end("ööööö", 3), "");
    }
}
