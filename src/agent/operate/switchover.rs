//! The leader hands over to its synchronous standby.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::judge_switchover::Switch;
use super::write_probe::WriteProbe;
use super::{ClusterLock, Desk, Say, judge_switchover};
use crate::agent::patroni::{self, View};
use crate::config::cluster::Role;
use crate::error::UserError;

/// A write must be had before, to measure from.
const FIRST_WRITE: Duration = Duration::from_secs(10);
const HAND_OVER: Duration = Duration::from_secs(60);
/// For the old leader to follow the new one.
const FOLLOW: Duration = Duration::from_secs(120);

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Wish {
    to: Option<String>,
    /// Only say what would be done.
    dry: bool,
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Switched {
    pub from: String,
    pub to: String,
    /// It was only looked at.
    #[serde(default)]
    pub dry: bool,
    /// Seconds between two acknowledged writes, at most; a probe on this node measured it.
    pub writes_stood_still: Option<f64>,
    /// Seconds until the new leader had a synchronous standby.
    pub seconds: f64,
}

pub async fn switch_over(desk: &Desk, body: Value, say: &Say) -> Result<Value> {
    let wish: Wish = serde_json::from_value(body).context("reading what is wanted")?;
    let view = read_view(desk).await?;
    let switch = judge_switchover(&view, wish.to.as_deref())?;
    let done = Switched {
        from: switch.from.clone(),
        to: switch.to.clone(),
        dry: wish.dry,
        writes_stood_still: None,
        seconds: 0.0,
    };
    if wish.dry {
        return Ok(serde_json::to_value(done)?);
    }
    let doing = format!("a switchover from {} to {}", switch.from, switch.to);
    let lock = ClusterLock::take(&desk.etcd, &desk.registry, "operate", &doing).await?;
    let handed = hand_over(desk, &switch, done, say).await;
    lock.give_back().await;
    Ok(serde_json::to_value(handed?)?)
}

async fn hand_over(
    desk: &Desk,
    switch: &Switch,
    mut done: Switched,
    say: &Say,
) -> Result<Switched> {
    let probe = start_probe(desk);
    if let Some(probe) = &probe
        && !probe.wait_for_write(FIRST_WRITE).await
    {
        return Err(UserError::new("there can be no switchover now")
            .why(format!("the leader {} has taken no write for {FIRST_WRITE:?}", switch.from))
            .help("see `stanchion status` first: a switchover does not mend it")
            .into());
    }
    let begun = Instant::now();
    say.say(format!("{} hands over to {}", switch.from, switch.to));
    let leader = find_address(desk, &switch.from)?;
    let secret = desk.seed.secrets.get("patroni_rest").context("this node has no such secret")?;
    let asked =
        patroni::switch_over(&desk.http, leader, secret, &switch.from, &switch.to, HAND_OVER);
    let answer = asked.await;
    wait_for_leader(desk, &switch.to, &answer).await?;
    say.say(format!("{} leads after {:.1} s", switch.to, begun.elapsed().as_secs_f64()));
    if let Some(probe) = &probe
        && probe.wait_for_write(HAND_OVER).await
    {
        let still = probe.read().find_longest(Instant::now()).unwrap_or_default().as_secs_f64();
        say.say(format!("writes go on; they stood still for {still:.1} s"));
        done.writes_stood_still = Some(still);
    }
    wait_for_follower(desk, &switch.from).await?;
    done.seconds = begun.elapsed().as_secs_f64();
    say.say(format!(
        "{} follows, and {} has a synchronous standby, after {:.1} s",
        switch.from, switch.to, done.seconds
    ));
    Ok(done)
}

fn start_probe(desk: &Desk) -> Option<WriteProbe> {
    let password = desk.seed.secrets.get("postgres_netbox")?.clone();
    let servers = desk.seed.cluster.list_nodes(Role::Db).map(|node| node.address).collect();
    Some(WriteProbe::start(servers, password, desk.tls.client.clone()))
}

/// Patroni's view, from the first db node whose Patroni answers.
pub async fn read_view(desk: &Desk) -> Result<View> {
    let mut failure = anyhow::anyhow!("the cluster has no db nodes");
    let mut nodes: Vec<_> = desk.seed.cluster.list_nodes(Role::Db).collect();
    nodes.sort_by_key(|node| node.name != desk.entry.name);
    for node in nodes {
        match patroni::read_view(&desk.http, node.address).await {
            Ok(view) => return Ok(view),
            Err(error) => failure = error,
        }
    }
    Err(UserError::new("no Patroni answers").why(format!("{failure:#}")).into())
}

fn find_address(desk: &Desk, name: &str) -> Result<std::net::Ipv4Addr> {
    if let Some(node) = desk.seed.cluster.find_node(name) {
        return Ok(node.address);
    }
    let known = desk.registry.list_nodes().remove(name).map(|found| found.node.address);
    known.with_context(|| format!("nobody knows the address of {name}"))
}

async fn wait_for_leader(desk: &Desk, name: &str, answer: &Result<()>) -> Result<()> {
    let begun = Instant::now();
    loop {
        if let Ok(view) = read_view(desk).await {
            let leads = |m: &&patroni::Member| m.role == "leader" && m.state == "running";
            match view.members.iter().find(leads) {
                Some(leader) if leader.name == name => return Ok(()),
                // Patroni has said no, and nothing has changed.
                Some(_) if answer.is_err() && begun.elapsed() > Duration::from_secs(5) => break,
                _ => {}
            }
        }
        if begun.elapsed() > HAND_OVER {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    match answer {
        Err(error) => bail!("{name} did not become the leader: {error:#}"),
        Ok(()) => bail!("{name} did not become the leader within {} s", HAND_OVER.as_secs()),
    }
}

async fn wait_for_follower(desk: &Desk, name: &str) -> Result<()> {
    let begun = Instant::now();
    // A view is as old as Patroni's last round: one alone may be from before.
    let mut in_a_row = 0;
    while begun.elapsed() < FOLLOW {
        if let Ok(view) = read_view(desk).await {
            let has_standby =
                view.members.iter().any(|m| m.role == "sync_standby" && m.state == "streaming");
            let follows = |m: &patroni::Member| m.name == name && m.state == "streaming";
            in_a_row = match has_standby && view.members.iter().any(follows) {
                true => in_a_row + 1,
                false => 0,
            };
            if in_a_row == 6 {
                return Ok(());
            }
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    bail!(
        "the switchover is done, but {name} does not follow after {} s: see `stanchion status`",
        FOLLOW.as_secs()
    )
}
