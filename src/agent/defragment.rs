//! Giving etcd's free pages back to the file system, before its quota is full of them. One
//! member at a time, and never the leader: it hands the lead over first.

use std::time::Duration;

use anyhow::{Context, Result};

use super::board::log;
use super::etcd::{Etcd, MemberStatus, Outcome};
use super::node::Node;
use super::registry::Registry;
use crate::config::cluster::Role;

/// Between two looks.
const PAUSE: Duration = Duration::from_secs(600);
/// Smaller databases are not worth a member's standstill.
const SMALL: u64 = 64 << 20;
/// Seconds; longer than one defragmentation may take.
const LOCK: u32 = 120;

/// One member, as it says itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub id: u64,
    pub is_leader: bool,
    pub learner: bool,
    /// Bytes on disk, and bytes in use.
    pub size: u64,
    pub in_use: u64,
}

/// What this node does about its own member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Defragment it.
    Own,
    /// It leads and is the last that needs it: this member takes the lead.
    HandOver(u64),
    Nothing,
}

impl Member {
    /// Half of a database that is not small is free.
    fn is_wasteful(&self) -> bool {
        self.size >= SMALL && self.in_use <= self.size / 2
    }
}

/// Decide what the node with the member `own` does. `members`: all that answer; while one of
/// the `expected` does not, none stands still, since two at once could cost the quorum.
pub fn choose_turn(own: u64, members: &[Member], expected: usize) -> Turn {
    if members.len() < expected || members.iter().any(|member| member.learner) {
        return Turn::Nothing;
    }
    let wasteful = || members.iter().filter(|member| member.is_wasteful());
    // The most wasteful first; of equal ones the one with the smallest id.
    let first = wasteful()
        .filter(|member| !member.is_leader || members.len() == 1)
        .max_by_key(|member| (member.size - member.in_use, std::cmp::Reverse(member.id)));
    match first {
        Some(first) if first.id == own => Turn::Own,
        Some(_) => Turn::Nothing,
        None => match wasteful().next() {
            Some(leader) if leader.id == own => {
                let next = members.iter().map(|member| member.id).find(|id| *id != own);
                next.map_or(Turn::Nothing, Turn::HandOver)
            }
            _ => Turn::Nothing,
        },
    }
}

/// Looks after this node's own member.
pub struct Defragmenter {
    etcd: Etcd,
    own: Etcd,
    /// One client for each member.
    each: Vec<Etcd>,
    registry: Registry,
    name: String,
}

impl Defragmenter {
    pub fn new(node: &Node) -> Self {
        let cluster = &node.seed.cluster;
        Defragmenter {
            etcd: node.etcd.clone(),
            own: node.ask_etcd_of(&node.entry),
            each: cluster.list_nodes(Role::Db).map(|entry| node.ask_etcd_of(entry)).collect(),
            registry: node.registry.clone(),
            name: node.entry.name.clone(),
        }
    }

    /// Look for ever.
    pub async fn run(self) {
        loop {
            tokio::time::sleep(PAUSE).await;
            if let Err(error) = self.look().await {
                log(&format!("etcd: not defragmented: {error:#}"));
            }
        }
    }

    async fn look(&self) -> Result<()> {
        match self.choose().await? {
            Turn::Nothing => return Ok(()),
            Turn::HandOver(next) => {
                log("etcd: handing the lead over, to be defragmented next");
                return self.own.transfer_leadership(next).await;
            }
            Turn::Own => {}
        }
        let lease = self.etcd.grant(LOCK).await?;
        let key = self.registry.key("locks", "defragment");
        if self.etcd.create(&key, &self.name, Some(lease)).await? == Outcome::Refused {
            return self.etcd.revoke(lease).await;
        }
        // Another may have been at work until the lock was free.
        if self.choose().await? != Turn::Own {
            return self.etcd.revoke(lease).await;
        }
        let before = self.own.read_status().await?.size;
        // When no answer comes in time it may go on: the lock then runs out by itself.
        self.own.defragment().await.context("defragmenting")?;
        let after = self.own.read_status().await?.size;
        log(&format!("etcd: defragmented, from {} to {} MiB", before >> 20, after >> 20));
        self.etcd.revoke(lease).await
    }

    async fn choose(&self) -> Result<Turn> {
        let own = self.own.read_status().await?.member;
        let mut members = Vec::new();
        for member in &self.each {
            // One that is silent is missed by the count.
            members.extend(member.read_status().await.ok().map(describe));
        }
        Ok(choose_turn(own, &members, self.each.len()))
    }
}

fn describe(status: MemberStatus) -> Member {
    Member {
        id: status.member,
        is_leader: status.leader == status.member,
        learner: status.learner,
        size: status.size,
        in_use: status.in_use,
    }
}

#[cfg(test)]
#[path = "defragment/tests.rs"]
mod tests;
