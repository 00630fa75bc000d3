//! Joining etcd: what to do next, as a pure function of what was observed.
//!
//! A cluster is formed only when every db node of the cluster file answers that it has
//! none, and always with the same full list of members, so that nodes which decide at
//! different moments form the same cluster. Every other way in is as a learner.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// What this node has written down before each step that cannot be undone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Record {
    #[default]
    Nothing,
    /// About to start the first member of its own, with this list of members.
    Forming { plan: String },
    /// Added as a learner with this id; not yet seen as a healthy member.
    Joining { cluster: u64, member: u64 },
    /// Was a healthy member.
    Member { cluster: u64, member: u64 },
    /// Was removed; its data are being deleted before it joins anew.
    Wiping,
}

/// One line of a live cluster's list of members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub id: u64,
    /// Empty while the member has not started for the first time.
    pub name: String,
    pub peer_urls: Vec<String>,
    pub learner: bool,
}

/// A cluster that answered a linearizable read: a majority of its members lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Live {
    pub cluster: u64,
    pub members: Vec<Listed>,
}

/// What the agent of another db node says about its etcd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PeerState {
    /// No data and no intent.
    Empty,
    /// It has decided to form a cluster and has not yet seen it healthy.
    Forming,
    /// It is or was a member.
    Data,
}

/// The answer of one other db node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    Unreachable(String),
    Answered { state: PeerState, plan: String },
}

/// Everything the decision hangs on.
#[derive(Debug, Clone)]
pub struct Observed {
    pub name: String,
    pub peer_url: String,
    /// The members of a new cluster, as `n1=https://a:2380,n2=...` in the file's order.
    pub plan: String,
    pub record: Record,
    /// Is there a data directory with a member in it?
    pub data: bool,
    /// Clusters that answer, one entry for each that differs.
    pub live: Vec<Live>,
    /// The other db nodes of the cluster file.
    pub peers: BTreeMap<String, Peer>,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Start etcd with state `new` and the whole plan.
    Form,
    /// Remove this member (it bore our name and is dead), delete our own stale data if
    /// `wipe`, be added as a learner.
    JoinAsLearner { remove: Option<u64>, wipe: bool },
    /// Start etcd with what it has (or was added with).
    StartExisting,
    /// Nothing safe can be done; look again.
    Wait(String),
}

/// Decide what to do next.
pub fn decide(seen: &Observed) -> Decision {
    let clusters: BTreeSet<u64> = seen.live.iter().map(|live| live.cluster).collect();
    if clusters.len() > 1 {
        let ids: Vec<String> = clusters.iter().map(|id| format!("{id:x}")).collect();
        return wait(format!(
            "the nodes answer for {} different etcd clusters ({}): stop all but one",
            ids.len(),
            ids.join(", ")
        ));
    }
    match seen.live.first() {
        Some(live) => decide_with_cluster(seen, live),
        None => decide_without_cluster(seen),
    }
}

fn decide_with_cluster(seen: &Observed, live: &Live) -> Decision {
    let ours = live.members.iter().find(|member| is_ours(seen, member));
    let unstarted = |id: u64| live.members.iter().any(|m| m.id == id && m.name.is_empty());
    let listed = |id: u64| live.members.iter().any(|m| m.id == id);
    let has_data = seen.data && seen.record != Record::Wiping;
    match &seen.record {
        Record::Member { cluster, .. } | Record::Joining { cluster, .. }
            if has_data && *cluster != live.cluster =>
        {
            wait(format!(
                "this node's data are of etcd cluster {cluster:x}, the others are {:x}: it has \
                 been given another cluster's disk, and touches nothing",
                live.cluster
            ))
        }
        Record::Member { member, .. } | Record::Joining { member, .. } if has_data => {
            if listed(*member) {
                return Decision::StartExisting;
            }
            match ours {
                // A started one is not ours: we write down an id before we start with it.
                Some(other) if !other.name.is_empty() => wait(format!(
                    "another machine has joined as {} (member {:x}) since this one was removed",
                    seen.name, other.id
                )),
                other => Decision::JoinAsLearner { remove: other.map(|m| m.id), wipe: true },
            }
        }
        Record::Joining { cluster, member } if *cluster == live.cluster && unstarted(*member) => {
            Decision::StartExisting
        }
        Record::Forming { .. } if has_data => match ours {
            Some(_) => Decision::StartExisting,
            None => Decision::JoinAsLearner { remove: None, wipe: true },
        },
        // The cluster was formed while this node, which takes part, was not yet started.
        Record::Forming { plan }
            if *plan == seen.plan && ours.is_some_and(|member| member.name.is_empty()) =>
        {
            Decision::Form
        }
        Record::Nothing if has_data => match ours {
            Some(_) => Decision::StartExisting,
            None => wait(
                "there are etcd data here that this node knows nothing of, and the cluster does \
                 not list it: move /var/lib/etcd away to let it join"
                    .to_string(),
            ),
        },
        _ => Decision::JoinAsLearner { remove: ours.map(|m| m.id), wipe: seen.data },
    }
}

fn decide_without_cluster(seen: &Observed) -> Decision {
    match &seen.record {
        Record::Wiping => {
            return wait("this node was removed and joins anew when the cluster answers".into());
        }
        Record::Joining { .. } if !seen.data => {
            return wait("the cluster that this node is joining does not answer".into());
        }
        _ if seen.data => return Decision::StartExisting,
        Record::Member { .. } | Record::Joining { .. } => {
            return wait(
                "this node has lost its etcd data and no other member answers; it never forms a \
                 second cluster"
                    .into(),
            );
        }
        Record::Nothing | Record::Forming { .. } => {}
    }
    let mut reasons = Vec::new();
    for (name, peer) in &seen.peers {
        match peer {
            Peer::Unreachable(why) => reasons.push(format!("{name} does not answer ({why})")),
            Peer::Answered { plan, .. } if *plan != seen.plan => {
                reasons.push(format!("{name} has another list of db nodes ({plan})"));
            }
            Peer::Answered { state: PeerState::Data, .. } => {
                reasons.push(format!("{name} has etcd data, but its cluster has no majority"));
            }
            Peer::Answered { .. } => {}
        }
    }
    if reasons.is_empty() { Decision::Form } else { wait(reasons.join("; ")) }
}

fn is_ours(seen: &Observed, member: &Listed) -> bool {
    member.name == seen.name
        || (member.name.is_empty() && member.peer_urls.contains(&seen.peer_url))
}

fn wait(why: String) -> Decision {
    Decision::Wait(why)
}

#[cfg(test)]
#[path = "join/tests.rs"]
mod tests;
