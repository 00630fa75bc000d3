//! web: NetBox's database is brought to the version of this node, and looked after.
//!
//! What is to be done to the database is a pure function (`decide`); one node at a time does
//! it (`prepare`). Whether this node serves is seen from here (`health`): the edges ask.

pub mod decide;
pub mod health;

mod database;
mod prepare;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

use self::database::Access;
use self::health::Health;
use super::board::Board;
use super::etcd::Etcd;
use super::node::Node;
use super::places::Places;
use super::registry::Registry;
use crate::seed::Seed;

/// A node's part in NetBox.
#[derive(Clone)]
pub struct Web {
    inner: Arc<Inner>,
}

struct Inner {
    places: Places,
    board: Board,
    etcd: Etcd,
    registry: Registry,
    seed: Arc<Seed>,
    database: Access,
    /// The database is of this node's version: NetBox may run.
    prepared: AtomicBool,
    health: Health,
}

impl Web {
    pub fn new(node: &Node) -> Result<Self> {
        let secret = |name: &str| {
            let secret = node.seed.secrets.get(name).cloned();
            secret.with_context(|| format!("the seed has no secret {name}"))
        };
        let inner = Inner {
            places: node.places.clone(),
            board: node.board.clone(),
            etcd: node.etcd.clone(),
            registry: node.registry.clone(),
            seed: node.seed.clone(),
            database: Access::new(&node.seed, &node.tls, secret("postgres_netbox")?)?,
            prepared: AtomicBool::new(false),
            health: node.health.clone(),
        };
        Ok(Web { inner: Arc::new(inner) })
    }

    /// Whether NetBox may be started.
    pub fn is_prepared(&self) -> bool {
        self.inner.prepared.load(Ordering::Relaxed)
    }

    /// Prepare the database, then look at NetBox for ever; both in the background.
    pub fn start(&self) {
        tokio::spawn(prepare::prepare(self.clone()));
        tokio::spawn(health::watch(self.clone()));
    }
}
