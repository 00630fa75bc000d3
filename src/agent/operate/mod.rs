//! What the operator asks of a running cluster: verbs on 7443, for one certificate alone.
//!
//! ```text
//! POST /operate/<verb>            starts a job; {"job": id}
//! GET  /operate/job/<id>/<n>      its lines after the n-th, and what came of it
//! ```
//!
//! A job goes on when whoever asked for it is gone. What it says are lines for a person;
//! what comes of it is a value, a refusal that the operator can mend, or a failure.

mod bundle;
mod cluster_lock;
mod force_quorum;
mod jobs;
mod judge_replace;
mod judge_switchover;
mod maintenance;
mod redact;
mod reinit;
mod switchover;
mod write_probe;

use std::sync::Arc;

use anyhow::Result;
use serde_json::Value;

pub use bundle::Page as BundlePage;
pub use cluster_lock::{ClusterLock, begin_alone};
pub use jobs::{Jobs, Outcome, Progress, Say};
pub use judge_replace::judge_replace;
pub use judge_switchover::judge_switchover;
pub use maintenance::end_in_time;
pub use redact::Redactor;
pub use switchover::Switched;

use super::backup;
use super::board::Board;
use super::etcd::Etcd;
use super::node::Node;
use super::places::Places;
use super::registry::Registry;
use super::site::{Renewal, Site};
use super::tls::Tls;
use crate::config::cluster::Node as Entry;
use crate::error::UserError;
use crate::seed::Seed;

/// What the verbs work with.
#[derive(Clone)]
pub struct Desk {
    pub places: Places,
    pub board: Board,
    pub seed: Arc<Seed>,
    pub entry: Entry,
    pub tls: Tls,
    pub http: reqwest::Client,
    pub etcd: Etcd,
    pub registry: Registry,
    pub site: Option<Site>,
}

impl Desk {
    pub fn of(node: &Node) -> Self {
        Desk {
            places: node.places.clone(),
            board: node.board.clone(),
            seed: node.seed.clone(),
            entry: node.entry.clone(),
            tls: node.tls.clone(),
            http: node.http.clone(),
            etcd: node.etcd.clone(),
            registry: node.registry.clone(),
            site: node.site.clone(),
        }
    }
}

/// The verbs by their names in the URL.
pub const SWITCHOVER: &str = "switchover";
pub const RENEW_CERTIFICATE: &str = "renew-certificate";
pub const BACKUP: &str = "backup";
pub const BACKUP_LIST: &str = "backup-list";
pub const BACKUP_DRILL: &str = "backup-drill";
pub const RESTORE: &str = "restore";
pub const START_DATABASE: &str = "start-database";
pub const MAINTENANCE: &str = "maintenance";
pub const REINIT: &str = "reinit";
pub const SUPPORT_BUNDLE: &str = "support-bundle";
pub const FORCE_QUORUM: &str = "force-quorum";

const VERBS: [&str; 11] = [
    SWITCHOVER,
    RENEW_CERTIFICATE,
    BACKUP,
    BACKUP_LIST,
    BACKUP_DRILL,
    RESTORE,
    START_DATABASE,
    MAINTENANCE,
    REINIT,
    SUPPORT_BUNDLE,
    FORCE_QUORUM,
];

/// Do what a verb says.
///
/// # Errors
/// A [`UserError`] for what is refused, and why.
pub async fn run_verb(desk: Desk, verb: &str, body: Value, say: Say) -> Result<Value> {
    match verb {
        SWITCHOVER => switchover::switch_over(&desk, body, &say).await,
        RENEW_CERTIFICATE => {
            Ok(serde_json::to_value(renew_certificate(desk.site.as_ref()).await?)?)
        }
        BACKUP => backup::take_by_verb(&desk, body, &say).await,
        BACKUP_LIST => backup::list(&desk).await,
        BACKUP_DRILL => backup::drill(&desk, &say).await,
        RESTORE => backup::restore(&desk, body, &say).await,
        START_DATABASE => backup::start_again(&desk).await,
        MAINTENANCE => maintenance::maintain(&desk, body, &say).await,
        REINIT => reinit::reinit(&desk, &say).await,
        SUPPORT_BUNDLE => bundle::bundle(&desk, &say).await,
        FORCE_QUORUM => force_quorum::force_quorum(&desk, &say).await,
        _ => Err(UserError::new("this agent does not know the verb")
            .why(format!("it is of version {}", env!("CARGO_PKG_VERSION")))
            .help("ask with a `stanchion` of the same version")
            .into()),
    }
}

/// Whether there is such a verb: what is none starts no job.
pub fn is_verb(verb: &str) -> bool {
    VERBS.contains(&verb)
}

/// Renew the certificate that users see; `site` is the node's part in it.
///
/// # Errors
/// A [`UserError`] when the node is no edge.
pub async fn renew_certificate(site: Option<&Site>) -> Result<Renewal> {
    match site {
        Some(site) => site.renew().await,
        None => Err(UserError::new("this node is no edge")
            .help("ask on a node with the role edge")
            .into()),
    }
}
