//! Joining etcd: looking, and doing what [`join::decide`] says. What cannot be undone is
//! written down first, so that the same steps run after a crash at any point.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::board::log;
use super::etcd::Etcd;
use super::files::{Access, find_account, make_private_folder, read_bounded, write_file};
use super::join::{self, Decision, Listed, Live, Observed, Peer, PeerState, Record};
use super::node::Node;
use super::places::Places;
use super::render::{EtcdFacts, make_plan};
use super::runner::Verdict;
use super::systemd::{Active, forget_failure, query_unit, start_unit, stop_unit};
use crate::config::cluster::{Node as Entry, Role};

const UNIT: &str = "etcd.service";

/// What an agent answers on `/bootstrap`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootstrapAnswer {
    pub node: String,
    pub etcd: PeerState,
    /// The members that this node would form a cluster of.
    pub plan: String,
}

/// This node's own answer, from what is on its disk now.
pub fn answer_bootstrap(places: &Places, node: &str, plan: &str) -> Result<BootstrapAnswer> {
    let etcd = match read_record(places)? {
        Record::Forming { .. } => PeerState::Forming,
        Record::Nothing if !has_data(&places.etcd_data()) => PeerState::Empty,
        _ => PeerState::Data,
    };
    Ok(BootstrapAnswer { node: node.to_string(), etcd, plan: plan.to_string() })
}

/// One round: look, decide, do. `Done` when this node is a voting member of a cluster with
/// a majority.
pub async fn join_etcd(node: &mut Node) -> Result<Verdict> {
    if query_unit(UNIT).await? == Active::Running
        && let Some(verdict) = take_part(node).await?
    {
        return Ok(verdict);
    }
    let observed = observe(node).await?;
    let decision = join::decide(&observed);
    match decision {
        Decision::Wait(reason) => Ok(Verdict::Wait(reason)),
        Decision::Form => {
            let plan = observed.plan.clone();
            let record = Record::Forming { plan: plan.clone() };
            if observed.record != record {
                log(&format!("etcd: forming a new cluster of {plan}"));
                write_record(&node.places, &record)?;
            }
            start(node, EtcdFacts { state: "new", initial_cluster: plan }).await
        }
        Decision::StartExisting => {
            let initial_cluster = match observed.live.first() {
                Some(live) => list_initial(node, &live.members),
                None => observed.plan.clone(),
            };
            start(node, EtcdFacts { state: "existing", initial_cluster }).await
        }
        Decision::JoinAsLearner { remove, wipe } => {
            join_as_learner(node, &observed, remove, wipe).await
        }
    }
}

/// Our own member runs: note that it takes part in a cluster with a majority, or get it its
/// vote. `None` when neither can be said.
async fn take_part(node: &Node) -> Result<Option<Verdict>> {
    let own = node.ask_etcd_of(&node.entry);
    let Ok(status) = own.read_status().await else { return Ok(None) };
    if status.learner {
        // A learner answers for itself only; its vote is the others' to give.
        return Ok(Some(match ask_others(node).promote(status.member).await {
            Ok(()) => Verdict::Wait("the learner has its vote now".to_string()),
            Err(error) => Verdict::Wait(format!("the learner catches up: {error:#}")),
        }));
    }
    let Ok(live) = own.list_members().await else { return Ok(None) };
    if !live.members.iter().any(|member| member.id == status.member && !member.learner) {
        return Ok(None);
    }
    let record = Record::Member { cluster: live.cluster, member: status.member };
    if read_record(&node.places)? != record {
        write_record(&node.places, &record)?;
    }
    Ok(Some(Verdict::Done))
}

async fn join_as_learner(
    node: &mut Node,
    observed: &Observed,
    remove: Option<u64>,
    wipe: bool,
) -> Result<Verdict> {
    if wipe {
        log("etcd: this node was removed from the cluster; deleting its stale data");
        write_record(&node.places, &Record::Wiping)?;
        stop_unit(UNIT).await?;
        wipe_folder(&node.places.etcd_data())?;
        write_record(&node.places, &Record::Nothing)?;
    }
    let cluster = ask_others(node);
    let pulse = node.registry.key("pulse", &node.entry.name);
    if remove.is_some() && cluster.get(&pulse).await?.is_some() {
        // The pulse of a dead node is gone within seconds.
        return Ok(Verdict::Wait(format!(
            "a machine that bears the name {} is alive: two must not have the same seed",
            node.entry.name
        )));
    }
    if let Some(id) = remove {
        log(&format!("etcd: removing the dead member {id:x} that bore this node's name"));
        cluster.remove_member(id).await?;
    }
    let (member, live) = cluster.add_learner(&observed.peer_url).await?;
    log(&format!("etcd: added as the learner {member:x}"));
    write_record(&node.places, &Record::Joining { cluster: live.cluster, member })?;
    let initial_cluster = list_initial(node, &live.members);
    start(node, EtcdFacts { state: "existing", initial_cluster }).await
}

/// A client of all db nodes but this one.
fn ask_others(node: &Node) -> Etcd {
    let endpoints = list_peers(node).map(|peer| format!("https://{}:2379", peer.address)).collect();
    Etcd::new(node.http.clone(), endpoints)
}

fn list_peers(node: &Node) -> impl Iterator<Item = &Entry> {
    node.seed.cluster.list_nodes(Role::Db).filter(|peer| peer.name != node.entry.name)
}

async fn start(node: &mut Node, facts: EtcdFacts) -> Result<Verdict> {
    node.facts.etcd = facts;
    node.lay_files().await?;
    match query_unit(UNIT).await? {
        // It counts as changing until it has seen a majority, or while it is restarted.
        Active::Running | Active::Starting => {
            give_data_folder(&node.places)?;
            return Ok(Verdict::Wait("etcd starts; its cluster has no majority yet".to_string()));
        }
        Active::Missing => anyhow::bail!("this image has no {UNIT}"),
        Active::Failed => forget_failure(UNIT).await?,
        Active::Stopped => {}
    }
    give_data_folder(&node.places)?;
    start_unit(UNIT).await?;
    Ok(Verdict::Wait("etcd starts".to_string()))
}

/// The folder of etcd's data, for etcd alone.
fn give_data_folder(places: &Places) -> Result<()> {
    let folder = places.etcd_data();
    make_private_folder(&folder)?;
    let passwd = fs::read_to_string(places.join("/etc/passwd")).context("reading accounts")?;
    let (user, group) = find_account(&passwd, "etcd").context("there is no account etcd")?;
    std::os::unix::fs::chown(&folder, Some(user), Some(group))
        .with_context(|| format!("giving {} to etcd", folder.display()))
}

async fn observe(node: &Node) -> Result<Observed> {
    let plan = make_plan(&node.seed);
    let peers: Vec<Entry> = list_peers(node).cloned().collect();
    let mut looks = tokio::task::JoinSet::new();
    for peer in peers {
        let (http, etcd) = (node.http.clone(), node.ask_etcd_of(&peer));
        looks.spawn(async move {
            let (answer, live) = tokio::join!(ask_agent(&http, &peer), etcd.list_members());
            (peer.name, answer, live.ok())
        });
    }
    let (mut answers, mut live): (BTreeMap<String, Peer>, Vec<Live>) = Default::default();
    while let Some(looked) = looks.join_next().await {
        let (name, answer, found) = looked.context("asking a peer")?;
        answers.insert(name, answer);
        if let Some(found) = found
            && !live.iter().any(|known| known.cluster == found.cluster)
        {
            live.push(found);
        }
    }
    Ok(Observed {
        name: node.entry.name.clone(),
        peer_url: format!("https://{}:2380", node.entry.address),
        plan,
        record: read_record(&node.places)?,
        data: has_data(&node.places.etcd_data()),
        live,
        peers: answers,
    })
}

/// What a peer's agent answers on `/bootstrap`.
pub async fn ask_agent(http: &reqwest::Client, peer: &Entry) -> Peer {
    let ask = async {
        let url = format!("https://{}:7443/bootstrap", peer.address);
        let request = http.get(url).timeout(Duration::from_secs(2));
        let response = request.send().await?.error_for_status()?;
        response.json::<BootstrapAnswer>().await
    };
    match ask.await {
        Ok(answer) if answer.node == peer.name => {
            Peer::Answered { state: answer.etcd, plan: answer.plan }
        }
        Ok(answer) => Peer::Unreachable(format!(
            "at its address is a node that calls itself {}",
            answer.node.escape_debug().take(63).collect::<String>()
        )),
        Err(error) => Peer::Unreachable(super::etcd::describe_transport(&error)),
    }
}

/// Members with their names; those not yet started have the name of the node at their URL.
fn list_initial(node: &Node, members: &[Listed]) -> String {
    let mut parts = Vec::new();
    for member in members {
        for url in &member.peer_urls {
            let at = |entry: &&Entry| *url == format!("https://{}:2380", entry.address);
            let known = node.seed.cluster.nodes.iter().find(at).map(|entry| entry.name.as_str());
            let name = if member.name.is_empty() { known.unwrap_or("?") } else { &member.name };
            parts.push(format!("{name}={url}"));
        }
    }
    parts.join(",")
}

/// Whether there is a member's data in the folder or in one right below it.
pub fn has_data(folder: &Path) -> bool {
    let below = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    std::iter::once(folder.to_path_buf()).chain(below).any(|f| f.join("member").exists())
}

fn wipe_folder(folder: &Path) -> Result<()> {
    let wipe = || -> std::io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    };
    wipe().with_context(|| format!("deleting what is in {}", folder.display()))
}

pub fn read_record(places: &Places) -> Result<Record> {
    match read_bounded(&places.etcd_record(), 64 << 10)? {
        None => Ok(Record::Nothing),
        Some(bytes) => serde_json::from_slice(&bytes)
            .with_context(|| format!("reading {}", places.etcd_record().display())),
    }
}

fn write_record(places: &Places, record: &Record) -> Result<()> {
    let text = serde_json::to_vec(record).context("writing down the membership of etcd")?;
    write_file(&places.etcd_record(), &text, Access::PRIVATE, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_follows_from_what_is_on_the_disk() {
        let root = tempfile::tempdir().unwrap();
        let places = Places::under(root.path());
        let state = || answer_bootstrap(&places, "n1", "plan").unwrap().etcd;
        assert_eq!(state(), PeerState::Empty);
        write_record(&places, &Record::Forming { plan: "p".into() }).unwrap();
        assert_eq!(state(), PeerState::Forming);
        write_record(&places, &Record::Member { cluster: u64::MAX, member: 3 }).unwrap();
        assert_eq!(state(), PeerState::Data);
        assert_eq!(read_record(&places).unwrap(), Record::Member { cluster: u64::MAX, member: 3 });
        write_record(&places, &Record::Nothing).unwrap();
        fs::create_dir_all(places.etcd_data().join("n1.etcd/member")).unwrap();
        assert_eq!(state(), PeerState::Data);
        wipe_folder(&places.etcd_data()).unwrap();
        assert_eq!(state(), PeerState::Empty);
        fs::write(places.etcd_record(), "{").unwrap();
        assert!(answer_bootstrap(&places, "n1", "plan").is_err());
    }
}
