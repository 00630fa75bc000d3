//! etcd goes on from one member when the majority is lost for ever: that member forgets all
//! others, and fresh machines join it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{Desk, Say, begin_alone};
use crate::agent::etcd::Etcd;
use crate::agent::files::{Access, find_account, read_bounded, write_file};
use crate::agent::join::{Peer, PeerState, Record};
use crate::agent::join_act::{ask_agent, has_data, read_record};
use crate::agent::node::etcd_url;
use crate::agent::systemd::{
    Active, forget_failure, query_unit, run_program, run_to_end, start_unit, stop_unit,
};
use crate::clock::read_clock;
use crate::config::cluster::Role;
use crate::error::UserError;

const UNIT: &str = "etcd.service";
const ONCE: &str = "stanchion-etcd-alone";
const CONFIG: &str = "/etc/etcd/etcd.yml";
const LIMIT: Duration = Duration::from_secs(60);

/// What was seen before anything is done.
#[derive(Debug)]
struct Seen {
    has_majority: bool,
    /// This node was a member, and has its data.
    is_member: bool,
    /// Other db nodes whose agents answer, with what they have of etcd.
    others: Vec<(String, PeerState)>,
}

/// Two clusters of one name would be the end of both.
fn judge(name: &str, seen: &Seen) -> Result<(), UserError> {
    let refuse = |why: String| UserError::new("etcd must not go on alone").why(why);
    if seen.has_majority {
        return Err(refuse("it has a majority: nothing is to be mended".into())
            .help("see `stanchion status` for what is wrong"));
    }
    if !seen.is_member {
        return Err(refuse(format!("{name} was no member, or its data are gone"))
            .help("take a db node that has its disk still"));
    }
    if let Some((other, _)) = seen.others.iter().find(|(_, state)| *state != PeerState::Empty) {
        return Err(refuse(format!("{other} lives, and has etcd's data, too")).help(
            "with it there may be a majority: see on its console why its etcd does not run",
        ));
    }
    Ok(())
}

pub async fn force_quorum(desk: &Desk, say: &Say) -> Result<Value> {
    let name = desk.entry.name.as_str();
    let _alone = begin_alone()?;
    judge(name, &look(desk).await?)?;
    let own = Etcd::new(desk.http.clone(), vec![etcd_url(&desk.entry)]);
    let now = read_clock()?;
    let kept = desk.places.etcd_data().join(name_kept(now));
    let to = kept.display().to_string();
    let forgotten = forget_others(desk, &own, &to, say).await;
    // Whatever came of it, a stopped etcd helps nobody.
    if query_unit(UNIT).await? == Active::Failed {
        forget_failure(UNIT).await?;
    }
    let started = start_unit(UNIT).await;
    forgotten?;
    started?;
    wait_for_one(&own).await?;
    say.say("etcd runs with one member; boot fresh machines for the others");
    Ok(json!({ "node": name, "kept": to }))
}

/// Where a copy of the data stays: of each try another, for the first may be the only good one.
fn name_kept(now: u64) -> String {
    format!("before-alone-{now}")
}

async fn forget_others(desk: &Desk, own: &Etcd, to: &str, say: &Say) -> Result<()> {
    stop_unit(UNIT).await?;
    let from = desk.places.etcd_data().join("default").display().to_string();
    run_to_end(&["cp", "--archive", "--no-target-directory", &from, to])
        .await
        .context("keeping a copy of the data")?;
    say.say(format!("etcd has stopped; a copy of its data is at {to}"));
    let alone = run_alone(desk, own).await;
    stop_unit(&format!("{ONCE}.service")).await.ok();
    alone?;
    say.say("etcd has forgotten all other members");
    Ok(())
}

async fn look(desk: &Desk) -> Result<Seen> {
    let mut others = Vec::new();
    for peer in desk.seed.cluster.list_nodes(Role::Db).filter(|peer| peer.name != desk.entry.name) {
        if let Peer::Answered { state, .. } = ask_agent(&desk.http, peer).await {
            others.push((peer.name.clone(), state));
        }
    }
    let record = read_record(&desk.places)?;
    Ok(Seen {
        has_majority: desk.etcd.list_members().await.is_ok(),
        is_member: matches!(record, Record::Member { .. }) && has_data(&desk.places.etcd_data()),
        others,
    })
}

/// Run it once with the setting that makes a cluster of one of what is there.
async fn run_alone(desk: &Desk, own: &Etcd) -> Result<()> {
    let config = read_bounded(&desk.places.join(CONFIG), 64 << 10)?;
    let mut text = String::from_utf8(config.context("etcd has no configuration")?)
        .context("reading etcd's configuration")?;
    text += "\nforce-new-cluster: true\n";
    let passwd = std::fs::read_to_string(desk.places.join("/etc/passwd"))?;
    let owner = find_account(&passwd, "etcd").context("there is no account etcd")?;
    let path = desk.places.run().join("etcd-alone.yml");
    write_file(&path, text.as_bytes(), Access { mode: 0o400, owner: Some(owner) }, false)?;
    let (unit, shown) = (format!("--unit={ONCE}"), path.display().to_string());
    run_program(&[
        "systemd-run",
        "--quiet",
        "--collect",
        &unit,
        "--uid=etcd",
        "--gid=etcd",
        "--",
        "/usr/bin/etcd",
        "--config-file",
        &shown,
    ])
    .await?;
    let waited = wait_for_one(own).await;
    crate::agent::files::remove_file(&path)?;
    waited
}

async fn wait_for_one(own: &Etcd) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < LIMIT {
        if let Ok(live) = own.list_members().await
            && live.members.len() == 1
        {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    bail!("etcd does not answer as a cluster of one within {} s", LIMIT.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_member_goes_on_alone() {
        let seen = |has_majority, is_member, others: &[(&str, PeerState)]| Seen {
            has_majority,
            is_member,
            others: others.iter().map(|(name, state)| (name.to_string(), *state)).collect(),
        };
        let refused = |seen: Seen| judge("n1", &seen).unwrap_err().to_string();
        assert_eq!(judge("n1", &seen(false, true, &[])), Ok(()));
        assert_eq!(judge("n1", &seen(false, true, &[("n2", PeerState::Empty)])), Ok(()));
        assert!(refused(seen(true, true, &[])).contains("has a majority"));
        assert!(refused(seen(false, false, &[])).contains("no member"));
        assert!(refused(seen(false, true, &[("n2", PeerState::Data)])).contains("n2 lives"));
        assert!(refused(seen(false, true, &[("n2", PeerState::Forming)])).contains("n2 lives"));
    }
}
