//! Judging a seed: a pure function of its bytes, the time, and what the node remembers.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::MAX_BYTES;
use super::document::{Envelope, FORMAT, Seed};
use crate::config::cluster::{Role, check_rules};
use crate::pki::{Certificate, SiteAuthority};
use crate::secrets::{SITE_KEY, Secret, list_needed};

/// Who a node became with the first seed that it accepted; kept on `/var`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The cluster's name.
    pub cluster: String,
    /// SHA-256 of the CA's certificate (DER), 64 hexadecimal digits.
    pub ca: String,
    /// The node's name.
    pub node: String,
}

/// What becomes of a seed. All but `Accepted` are refusals; the texts say why, in words for
/// the operator, and hold nothing secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// There is none.
    Missing,
    /// It is damaged, was changed, or does not fit together.
    Tampered(String),
    /// It is another cluster's.
    Foreign(String),
    /// It is this cluster's, for another node.
    ForAnotherNode(String),
    /// A certificate in it is not valid at this time.
    Expired(String),
    Accepted(Box<Seed>),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Missing => f.write_str("there is no seed"),
            Verdict::Tampered(why) => write!(f, "the seed is damaged or was changed: {why}"),
            Verdict::Foreign(why) => write!(f, "the seed is that of another cluster: {why}"),
            Verdict::ForAnotherNode(why) => write!(f, "the seed is for another node: {why}"),
            Verdict::Expired(why) => write!(f, "the seed is not valid at this time: {why}"),
            Verdict::Accepted(seed) => write!(f, "the seed of {} is accepted", seed.node),
        }
    }
}

/// Judge what was found: the bytes of a seed's file, or nothing. `now` is in seconds since
/// 1970, UTC; `remembered` is what the node became before, if it ever did.
///
/// Without a memory, the CA in the seed is trusted: whoever attaches a disk to a fresh
/// machine decides what it becomes.
pub fn verify_seed(bytes: Option<&[u8]>, now: u64, remembered: Option<&Identity>) -> Verdict {
    let Some(bytes) = bytes else { return Verdict::Missing };
    match judge(bytes, now, remembered) {
        Ok(seed) => Verdict::Accepted(Box::new(seed)),
        Err(refusal) => refusal,
    }
}

fn judge(bytes: &[u8], now: u64, remembered: Option<&Identity>) -> Result<Seed, Verdict> {
    let (seed, ca) = open_envelope(bytes)?;
    check_memory(&seed, &ca, remembered)?;
    check_content(&seed)?;
    check_certificates(&seed, &ca, now)?;
    Ok(seed)
}

fn refuse<T>(why: impl Into<String>) -> Result<T, Verdict> {
    Err(Verdict::Tampered(why.into()))
}

/// The seed whose text the CA in it has signed, and that CA.
fn open_envelope(bytes: &[u8]) -> Result<(Seed, Certificate), Verdict> {
    if bytes.len() > MAX_BYTES {
        return refuse(format!("it has more than {} KiB", MAX_BYTES >> 10));
    }
    // The reader's own messages may show what it read.
    let Ok(envelope) = serde_json::from_slice::<Envelope>(bytes) else {
        return refuse("it is not the JSON of a seed's file");
    };
    let plain = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    if serde_json::to_vec(&envelope).ok().as_deref() != Some(plain) {
        return refuse("its file is not as it was written");
    }
    let Ok(seed) = serde_json::from_str::<Seed>(&envelope.seed) else {
        return refuse("it cannot be read, or another version of Stanchion wrote it");
    };
    if seed.format != FORMAT {
        return refuse(format!("its format is {}, and this image knows {FORMAT}", seed.format));
    }
    let Ok(ca) = Certificate::read(&seed.ca) else {
        return refuse("its CA's certificate cannot be read");
    };
    let signature = STANDARD.decode(&envelope.signature).unwrap_or_default();
    if !ca.has_signed(envelope.seed.as_bytes(), &signature) {
        return refuse("its signature is wrong");
    }
    Ok((seed, ca))
}

fn check_memory(
    seed: &Seed,
    ca: &Certificate,
    remembered: Option<&Identity>,
) -> Result<(), Verdict> {
    let Some(known) = remembered else { return Ok(()) };
    if known.ca != ca.fingerprint.to_string() || known.cluster != seed.cluster.name {
        let why = match known.cluster == seed.cluster.name {
            true => format!("it is called `{}` too, but has another CA", known.cluster),
            false => format!(
                "this node belongs to `{}`, the seed to `{}`",
                known.cluster, seed.cluster.name
            ),
        };
        return Err(Verdict::Foreign(why));
    }
    if known.node != seed.node {
        let why = format!("this node is `{}`, the seed is for `{}`", known.node, seed.node);
        return Err(Verdict::ForAnotherNode(why));
    }
    Ok(())
}

/// The cluster in it is one, and holds the node; the secrets are those of its roles.
fn check_content(seed: &Seed) -> Result<(), Verdict> {
    if let Err(fault) = check_rules(&seed.cluster) {
        return refuse(format!("its cluster is not valid: {}", fault.what));
    }
    let Some(node) = seed.entry() else {
        return refuse(format!("its cluster has no node `{}`", seed.node));
    };
    match list_needed(&seed.cluster, &node.roles).find(|name| !seed.secrets.contains_key(*name)) {
        Some(missing) => refuse(format!("it lacks the secret `{missing}`")),
        None => Ok(()),
    }
}

fn check_certificates(seed: &Seed, ca: &Certificate, now: u64) -> Result<(), Verdict> {
    let Ok(own) = Certificate::read(&seed.certificate) else {
        return refuse("its node's certificate cannot be read");
    };
    if !ca.has_issued(ca) || !ca.has_issued(&own) || own.is_ca {
        return refuse("its node's certificate is not the CA's");
    }
    if !own.fits(&seed.key) {
        return refuse("its key is not that of its certificate");
    }
    let is_organized = [ca, &own].iter().all(|one| one.organization == seed.cluster.name);
    if own.name != seed.node || !is_organized {
        return refuse("its certificate names another node or cluster");
    }
    check_site(seed, ca)?;
    let address = seed.entry().map(|node| std::net::IpAddr::from(node.address));
    if !address.is_some_and(|address| own.addresses.contains(&address)) {
        return refuse("its certificate is for another address");
    }
    for (what, one) in [("CA's", ca), ("node's", &own)] {
        if now >= one.not_after {
            let days = (now - one.not_after) / 86_400;
            let why = format!("the {what} certificate has expired {days} days ago");
            return Err(Verdict::Expired(why));
        }
        if now < one.not_before {
            let why = format!("the {what} certificate is not valid yet: the clock is behind");
            return Err(Verdict::Expired(why));
        }
    }
    Ok(())
}

/// An edge has what it makes the certificate for users with. What the operator brought is
/// no reason to refuse a node: it is looked at where it is used.
fn check_site(seed: &Seed, ca: &Certificate) -> Result<(), Verdict> {
    if !seed.entry().is_some_and(|node| node.has(Role::Edge)) {
        return Ok(());
    }
    let Some(site) = &seed.site else { return refuse("it lacks the site CA's certificate") };
    let Some(authority) = &site.authority else { return Ok(()) };
    let key = seed.secrets.get(SITE_KEY).map(Secret::reveal).unwrap_or_default();
    match SiteAuthority::read(authority, key) {
        Ok(site) if ca.has_issued(site.certificate()) => Ok(()),
        _ => refuse("its site CA is not the CA's, or has another key"),
    }
}

impl Identity {
    /// What a node becomes with an accepted seed; `None` when its CA cannot be read, which
    /// an accepted one's can.
    pub fn of(seed: &Seed) -> Option<Self> {
        Some(Identity {
            cluster: seed.cluster.name.clone(),
            ca: Certificate::read(&seed.ca).ok()?.fingerprint.to_string(),
            node: seed.node.clone(),
        })
    }
}
