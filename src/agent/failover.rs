//! Early failover: giving up the lease of a leader that is known to be gone.
//!
//! Patroni waits until the leader's lease (20 s) has run out. Here the decision to delete
//! the leader's key earlier is a pure function of what was observed; `docs/agent.md` has
//! the argument why it loses nothing that was acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// So long must a node have failed to reach the leader, without a break.
pub const UNREACHABLE: Duration = Duration::from_millis(1500);
/// So long must the pulse of the leader's agent have stood still: four beats.
pub const QUIET: Duration = Duration::from_secs(2);
/// Of which etcd must have answered so long without a break, or nobody's pulse could be new.
pub const WITNESSED: Duration = Duration::from_secs(1);
/// What another agent published longer ago than this counts for nothing.
pub const STALE: Duration = Duration::from_millis(2500);

/// Patroni's leader key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderKey {
    pub name: String,
    /// Unchanged during one term: Patroni writes the key once and then keeps its lease.
    pub mod_revision: i64,
}

/// What one db node's agent sees, as it publishes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sighting {
    /// The leader that it looks at, and the revision of that leader's key.
    pub leader: String,
    pub revision: i64,
    /// For how long neither Patroni nor PostgreSQL of the leader has answered it.
    pub unreachable_ms: u64,
    /// Its own PostgreSQL is a running replica.
    pub replica: bool,
    /// Grows with every observation, so that readers see which are new.
    pub tick: u64,
}

/// A sighting and how long ago, by this node's own clock, it last changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dated {
    pub sighting: Sighting,
    pub age: Duration,
}

/// Patroni's `/sync` key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SyncKey {
    pub leader: String,
    pub standbys: Vec<String>,
}

/// The pulse of the leader's agent, as this node has read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// For how long it has been read with the same revision.
    pub unchanged: Duration,
    /// For how long each of these readings has come without delay.
    pub witnessed: Duration,
}

impl Beat {
    fn is_quiet(self) -> bool {
        self.unchanged >= QUIET && self.witnessed >= WITNESSED
    }
}

/// Everything the decision hangs on.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    pub enabled: bool,
    /// `patronictl pause` is on.
    pub paused: bool,
    pub synchronous: bool,
    /// A switchover or failover was asked for and is under way.
    pub pending: bool,
    pub leader: Option<LeaderKey>,
    pub sync: Option<SyncKey>,
    /// The db nodes of the cluster file.
    pub db_nodes: BTreeSet<String>,
    /// Nodes whose agent has a live pulse (a lease of two seconds).
    pub pulses: BTreeSet<String>,
    /// Of the leader's agent; `None`: it has none.
    pub beat: Option<Beat>,
    /// By node, this one's own among them.
    pub sightings: BTreeMap<String, Dated>,
}

/// What to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Delete the leader's key if it still has this revision.
    Delete {
        leader: String,
        mod_revision: i64,
        standby: String,
    },
    Wait(String),
}

/// Decide whether the leader's key may be deleted.
pub fn decide(seen: &Observed) -> Decision {
    match check(seen) {
        Ok(decision) => decision,
        Err(reason) => Decision::Wait(reason),
    }
}

fn check(seen: &Observed) -> Result<Decision, String> {
    let require = |condition: bool, reason: &str| {
        if condition { Ok(()) } else { Err(reason.to_string()) }
    };
    require(seen.enabled, "early failover is turned off")?;
    let leader = seen.leader.as_ref().ok_or("there is no leader key")?;
    require(!seen.paused, "Patroni is paused")?;
    require(!seen.pending, "a switchover is under way")?;
    require(seen.synchronous, "synchronous mode is off")?;
    require(seen.db_nodes.contains(&leader.name), "the leader is no db node of the cluster file")?;
    require(seen.beat.is_none_or(Beat::is_quiet), "the leader's agent lives")?;

    let others: Vec<&String> = seen.db_nodes.iter().filter(|n| **n != leader.name).collect();
    let fresh = |name: &str| {
        seen.sightings
            .get(name)
            .filter(|dated| dated.age <= STALE && seen.pulses.contains(name))
            .map(|dated| &dated.sighting)
    };
    let blind = others
        .iter()
        .filter_map(|name| fresh(name))
        .filter(|sighting| {
            sighting.leader == leader.name
                && sighting.revision == leader.mod_revision
                && u128::from(sighting.unreachable_ms) >= UNREACHABLE.as_millis()
        })
        .count();
    let needed = others.len() / 2 + 1;
    if blind < needed {
        return Err(format!(
            "{blind} of {} other db nodes cannot reach {}; {needed} are needed",
            others.len(),
            leader.name
        ));
    }

    let sync = seen.sync.as_ref().ok_or("there is no synchronous standby")?;
    require(sync.leader == leader.name, "the list of synchronous standbys is of another leader")?;
    let standby = sync
        .standbys
        .iter()
        .filter(|name| seen.db_nodes.contains(*name) && **name != leader.name)
        .find(|name| fresh(name).is_some_and(|sighting| sighting.replica))
        .ok_or("no synchronous standby lives")?;
    Ok(Decision::Delete {
        leader: leader.name.clone(),
        mod_revision: leader.mod_revision,
        standby: standby.clone(),
    })
}

#[cfg(test)]
#[path = "failover/tests.rs"]
mod tests;

#[cfg(test)]
#[path = "failover/model.rs"]
mod model;
