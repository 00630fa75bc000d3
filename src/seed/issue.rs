//! Making a node's seed.

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::document::{Brought, Envelope, FORMAT, Seed, Site};
use super::{MAX_BYTES, Verdict, verify_seed};
use crate::cluster_dir::ClusterDir;
use crate::config::cluster::{Cluster, Node, Role};
use crate::error::UserError;
use crate::secrets::{SITE_KEY, list_needed};

/// The bytes of the file for one node: with a new key and certificate, and with the secrets
/// that its roles need; `brought` is what edges show users, if the operator has something.
/// `now` is in seconds since 1970, UTC.
pub fn issue_seed(
    cluster: &Cluster,
    node: &Node,
    directory: &ClusterDir,
    brought: Option<&Brought>,
    now: u64,
) -> Result<Vec<u8>> {
    let issued = directory.authority.certify_node(cluster, node, now)?;
    let secrets = list_needed(cluster, &node.roles).map(|name| {
        let secret = directory.secrets.get(name).with_context(|| format!("no secret {name}"))?;
        Ok((name.to_string(), secret.clone()))
    });
    let seed = Seed {
        format: FORMAT,
        issued: now,
        node: node.name.clone(),
        cluster: cluster.clone(),
        secrets: secrets.collect::<Result<_>>()?,
        ca: directory.ca.clone(),
        certificate: issued.certificate,
        key: issued.key,
        site: match node.has(Role::Edge) {
            true => Some(make_site(cluster, directory, brought, now)?),
            false => None,
        },
    };
    let text = serde_json::to_string(&seed).context("writing a seed as JSON")?;
    let signature = STANDARD.encode(directory.authority.sign(text.as_bytes())?);
    let mut file = serde_json::to_vec(&Envelope { seed: text, signature })
        .context("writing a seed as JSON")?;
    file.push(b'\n');
    ensure!(
        file.len() <= MAX_BYTES,
        "the seed of {} has {} bytes, and {MAX_BYTES} are the most",
        node.name,
        file.len()
    );
    // What a node would refuse must not leave here.
    match verify_seed(Some(&file), now, None) {
        Verdict::Accepted(_) => Ok(file),
        refused => anyhow::bail!("the seed of {} is not valid: {refused}", node.name),
    }
}

/// The site CA is certified anew for each seed, so that it is always that of the cluster
/// file as it stands.
fn make_site(
    cluster: &Cluster,
    directory: &ClusterDir,
    brought: Option<&Brought>,
    now: u64,
) -> Result<Site> {
    let key = directory.secrets.get(SITE_KEY).context("no secret site_key")?;
    let authority = match directory.authority.certify_site_authority(cluster, key.reveal(), now) {
        Err(error) if error.is::<UserError>() && brought.is_some() => None,
        authority => Some(authority?),
    };
    Ok(Site { authority, brought: brought.cloned() })
}
