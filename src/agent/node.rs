//! A node that knows who it is: what all phases work on.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};
use reqwest::Client;

use super::apply::{Applied, apply, tell_service};
use super::board::Board;
use super::etcd::Etcd;
use super::find_seed::read_memory;
use super::join::Record;
use super::join_act::read_record;
use super::observe::Shared;
use super::places::Places;
use super::registry::Registry;
use super::render::{Facts, render_all};
use super::roles::{Service, list_role_services, list_services, web};
use super::site::Site;
use super::tls::Tls;
use super::web::Web;
use super::web::health::Health;
use crate::config::cluster::{Node as Entry, Role};
use crate::seed::Seed;

/// Everything the phases share.
pub struct Node {
    pub places: Places,
    pub board: Board,
    pub seed: Arc<Seed>,
    pub entry: Entry,
    pub facts: Facts,
    pub services: Vec<Service>,
    pub applied: Applied,
    pub tls: Tls,
    pub http: Client,
    /// All db nodes, this one first if it is one.
    pub etcd: Etcd,
    pub registry: Registry,
    pub shared: Shared,
    /// Of an edge.
    pub site: Option<Site>,
    /// Of a node with the role web, from the main phase on.
    pub web: Option<Web>,
    pub health: Health,
    /// Units that were started, or found running, since this agent started.
    pub started: BTreeSet<&'static str>,
    /// Since when this node looks for the Redis master.
    pub cache_since: Option<Instant>,
    /// This agent has written down that this node is the first Redis master.
    pub cache_claimed: bool,
}

impl Node {
    pub fn new(places: Places, board: Board, seed: Seed) -> Result<Self> {
        let entry = seed.entry().context("the seed's node is not in its cluster")?.clone();
        let tls = Tls::from_seed(&seed)?;
        let http = tls.make_http_client()?;
        let seed = Arc::new(seed);
        let mut databases: Vec<&Entry> = seed.cluster.list_nodes(Role::Db).collect();
        databases.sort_by_key(|node| node.name != entry.name);
        let endpoints = databases.iter().map(|node| etcd_url(node)).collect();
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let mut facts = Facts::from_seed(seed.clone(), read_memory(&places), cpus);
        // An etcd that systemd restarts while it joins must not think it forms a cluster.
        if !matches!(read_record(&places)?, Record::Nothing | Record::Forming { .. }) {
            facts.etcd.state = "existing";
        }
        {
            let mut status = board.lock();
            status.node = seed.node.clone();
            status.cluster = seed.cluster.name.clone();
            status.members = seed.cluster.nodes.clone();
        }
        let etcd = Etcd::new(http.clone(), endpoints);
        let known = seed.cluster.nodes.iter().map(|node| node.name.clone());
        let registry = Registry::new(&seed.cluster.name, known);
        let services = list_services(&entry.roles);
        Ok(Node {
            applied: Applied::read(&places, &services),
            services,
            site: Site::new(&places, &board, &etcd, &registry, &seed)?,
            etcd,
            registry,
            shared: Shared::default(),
            web: None,
            health: Health::default(),
            started: BTreeSet::new(),
            cache_since: None,
            cache_claimed: false,
            places,
            board,
            entry,
            facts,
            tls,
            http,
            seed,
        })
    }

    pub fn has(&self, role: Role) -> bool {
        self.entry.has(role)
    }

    /// The units that this node starts for some of its roles, in their order.
    pub fn list_units(&self, roles: &[Role]) -> Vec<&'static str> {
        let services = list_role_services(roles);
        // Without an address to hold there is nothing for it to do.
        let wanted = |unit: &str| unit != "keepalived.service" || self.seed.cluster.vip.is_some();
        services.map(|service| service.unit).filter(|unit| wanted(unit)).collect()
    }

    /// The units that may run now: NetBox waits for its database, and its workers rest during
    /// maintenance.
    pub fn list_wanted(&self) -> Vec<&'static str> {
        let prepared = self.web.as_ref().is_some_and(Web::is_prepared);
        let is_web = |unit: &str| web::SERVICES.iter().any(|service| service.unit == unit);
        let may_run = |unit: &&'static str| match *unit {
            web::PROXY => true,
            web::WORKER => prepared && self.facts.maintenance.is_none(),
            unit => prepared || !is_web(unit),
        };
        self.list_units(&self.entry.roles).into_iter().filter(may_run).collect()
    }

    /// Render everything with the present facts and lay down what changed.
    ///
    /// # Errors
    /// When nothing can be rendered at all; one bad template is told as a problem.
    pub async fn lay_files(&mut self) -> Result<Vec<String>> {
        let (files, failed) = render_all(&self.places, &self.facts)?;
        match failed.first() {
            None => self.board.clear("templates"),
            Some(first) => {
                let more = failed.len() - 1;
                let rest = if more > 0 { format!(" (and {more} more)") } else { String::new() };
                self.board.raise("templates", format!("{first}{rest}"));
            }
        }
        let (services, applied) = (&self.services, &mut self.applied);
        apply(&self.places, &self.board, services, applied, files, tell_service).await
    }

    /// A client of one node's etcd alone.
    pub fn ask_etcd_of(&self, node: &Entry) -> Etcd {
        Etcd::new(self.http.clone(), vec![etcd_url(node)])
    }
}

/// Where a node's etcd answers clients.
pub fn etcd_url(node: &Entry) -> String {
    format!("https://{}:2379", node.address)
}

/// Lock a mutex that no panic can have left half-changed.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
