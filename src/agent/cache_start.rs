//! Starting Redis: who is master is asked of the others first.

use std::net::Ipv4Addr;
use std::time::Instant;

use anyhow::{Context, Result};

use super::board::log;
use super::etcd::Outcome;
use super::node::Node;
use super::redis::{Observed, Start, ask_redis, ask_sentinel, decide_start};
use super::runner::Verdict;
use super::systemd::{Active, query_unit};
use crate::config::cluster::{Node as Entry, Role};

const UNIT: &str = "stanchion-redis.service";
/// Made by Redis at its first start.
const DATA: &str = "/var/lib/redis/appendonlydir";

/// One round: ask, decide, set the facts that Redis' files hang on. `Done` when Redis may
/// be started with them.
pub async fn choose_master(node: &mut Node) -> Result<Verdict> {
    let own = node.entry.address;
    let secret = node.seed.secrets.get("redis").context("the seed has no secret for Redis")?;
    if query_unit(UNIT).await? == Active::Running
        && let Ok(view) = ask_redis(&node.tls, own, secret).await
    {
        // It runs since before this agent did: it goes on as what it is.
        set_master(node, view.master.filter(|_| !view.is_master).unwrap_or(own));
        node.lay_files().await?;
        return Ok(Verdict::Done);
    }
    let since = *node.cache_since.get_or_insert_with(Instant::now);
    let observed = observe(node, since).await?;
    let master = match decide_start(&observed) {
        Start::Wait(reason) => return Ok(Verdict::Wait(reason)),
        Start::Claim => {
            // Of several that claim it, one is written down; all look again.
            let written = node.etcd.create(&record_key(node), &node.entry.name, None).await?;
            node.cache_claimed = written == Outcome::Done;
            return Ok(Verdict::Wait("the first master is being written down".to_string()));
        }
        Start::ReplicaOf(master) => master,
        Start::Master => own,
    };
    let role = if master == own { "master".to_string() } else { format!("replica of {master}") };
    log(&format!("redis: starts as {role}"));
    set_master(node, master);
    node.lay_files().await?;
    Ok(Verdict::Done)
}

/// Set the facts; whether they have changed.
pub fn set_master(node: &mut Node, master: Ipv4Addr) -> bool {
    let facts = &mut node.facts.redis;
    let changed = facts.master != Some(master);
    facts.master = Some(master);
    facts.is_master = master == node.entry.address;
    changed
}

/// Where the last known master is written down, by its name.
pub fn record_key(node: &Node) -> String {
    node.registry.key("redis", "master")
}

async fn observe(node: &Node, since: Instant) -> Result<Observed> {
    let cluster = &node.seed.cluster;
    let secrets = &node.seed.secrets;
    let redis = secrets.get("redis").context("the seed has no secret for Redis")?;
    let sentinel = secrets.get("sentinel").context("the seed has no secret for Sentinel")?;
    let caches: Vec<&Entry> = cluster.list_nodes(Role::Cache).collect();
    let recorded = node.etcd.get(&record_key(node)).await?;
    let recorded = recorded.and_then(|entry| Some(cluster.find_node(&entry.value)?.address));
    let mut observed = Observed {
        address: Some(node.entry.address),
        recorded,
        first: caches.first().is_some_and(|first| first.name == node.entry.name),
        has_data: node.places.join(DATA).exists(),
        claimed: node.cache_claimed,
        ..Observed::default()
    };
    let mut looks = tokio::task::JoinSet::new();
    for other in caches.into_iter().filter(|other| other.name != node.entry.name) {
        let (tls, address) = (node.tls.clone(), other.address);
        let (redis, sentinel) = (redis.clone(), sentinel.clone());
        looks.spawn(async move {
            let (view, named) = tokio::join!(
                ask_redis(&tls, address, &redis),
                ask_sentinel(&tls, address, &sentinel)
            );
            (address, view.ok(), named.ok())
        });
    }
    while let Some(look) = looks.join_next().await {
        let (address, view, named) = look.context("asking another cache node")?;
        observed.named.extend(named.map(|named| named.master));
        match view {
            Some(view) if view.is_master => observed.masters.push(address),
            Some(_) => observed.followers += 1,
            None => {}
        }
    }
    observed.looked = since.elapsed();
    Ok(observed)
}
