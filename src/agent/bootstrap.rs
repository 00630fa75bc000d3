//! bootstrap: membership of etcd, the same secrets as the others, the registry.

use std::time::Duration;

use anyhow::{Context, Result};
use ring::hmac;

use super::board::log;
use super::etcd::Etcd;
use super::join_act::join_etcd;
use super::node::Node;
use super::registry::keep_pulse;
use super::runner::{Retry, Step, Verdict};
use crate::config::cluster::Role;

const QUICK: Retry =
    Retry::Until { first: Duration::from_millis(200), longest: Duration::from_secs(1) };

pub const STEPS: [Step<Node>; 3] = [
    Step {
        name: "secrets",
        purpose: "comparing the node's secrets with the cluster's",
        retry: QUICK,
        run: |node| Box::pin(compare_secrets(node)),
    },
    Step { name: "etcd", purpose: "joining etcd", retry: QUICK, run: |node| Box::pin(join(node)) },
    Step {
        name: "registry",
        purpose: "entering the registry",
        retry: QUICK,
        run: |node| Box::pin(enter_registry(node)),
    },
];

async fn join(node: &mut Node) -> Result<Verdict> {
    if node.has(Role::Db) {
        return join_etcd(node).await;
    }
    Ok(match node.etcd.list_members().await {
        Ok(_) => Verdict::Done,
        Err(error) => Verdict::Wait(format!("the db nodes' etcd does not answer: {error:#}")),
    })
}

/// Before it takes part: are its secrets those that the cluster has noted?
async fn compare_secrets(node: &mut Node) -> Result<Verdict> {
    // Without an answer there is no cluster yet, and nothing to compare with.
    let Ok(_) = node.etcd.list_members().await else { return Ok(Verdict::Done) };
    let differing = find_differing(node, &node.etcd).await?;
    if differing.is_empty() {
        return Ok(Verdict::Done);
    }
    Ok(Verdict::Wait(format!(
        "this node's secrets differ from the cluster's ({}): make its seed anew from the \
         cluster's own directory",
        differing.join(", ")
    )))
}

async fn find_differing(node: &Node, etcd: &Etcd) -> Result<Vec<String>> {
    let prefix = node.registry.key("secrets", "");
    let noted = etcd.list(&prefix).await?;
    let own = make_fingerprints(node)?;
    let mut differing = Vec::new();
    for entry in noted.entries {
        let name = entry.key.strip_prefix(&prefix).unwrap_or("");
        if own.iter().any(|(known, print)| known == name && *print != entry.value) {
            differing.push(name.to_string());
        }
    }
    Ok(differing)
}

/// Fingerprints under a key that only the cluster's nodes have: etcd learns nothing of the
/// secrets from them.
fn make_fingerprints(node: &Node) -> Result<Vec<(String, String)>> {
    let key = node.seed.secrets.get("fingerprint").context("the seed has no fingerprint key")?;
    let key = hmac::Key::new(hmac::HMAC_SHA256, key.reveal().as_bytes());
    let print = |name: &str, text: &str| {
        let tag = hmac::sign(&key, format!("{name}\0{text}").as_bytes());
        tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let secrets = node.seed.secrets.iter();
    Ok(secrets.map(|(name, secret)| (name.clone(), print(name, secret.reveal()))).collect())
}

async fn enter_registry(node: &mut Node) -> Result<Verdict> {
    for (name, print) in make_fingerprints(node)? {
        // Whoever comes first notes it.
        node.etcd.create(&node.registry.key("secrets", &name), &print, None).await?;
    }
    let differing = find_differing(node, &node.etcd).await?;
    if !differing.is_empty() {
        return Ok(Verdict::Wait(format!(
            "secrets differ from the cluster's: {}",
            differing.join(", ")
        )));
    }
    tokio::spawn(node.registry.clone().follow(node.etcd.clone()));
    let (etcd, registry) = (node.etcd.clone(), node.registry.clone());
    tokio::spawn(keep_pulse(etcd, registry, node.entry.name.clone()));
    log("registry: entered");
    Ok(Verdict::Done)
}
