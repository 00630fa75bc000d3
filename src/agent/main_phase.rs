//! main: start the services of the roles, then keep their files in step with the cluster.

use std::time::Duration;

use anyhow::{Context, Result};

use super::backup::{keep_backups, withhold};
use super::board::{CLOCK, log};
use super::cache_start::{choose_master, set_master};
use super::checks;
use super::defragment::Defragmenter;
use super::files::read_bounded;
use super::node::{Node, lock};
use super::observe::{Observer, Shared, keep_registration};
use super::operate::{Desk, end_in_time};
use super::patroni;
use super::render::{NodeView, merge_nodes};
use super::roles::web;
use super::runner::{Retry, Step, Verdict};
use super::slots::{drop_lost_slots, list_owners};
use super::system_id;
use super::systemd::{Active, query_unit, reload_daemon, start_unit, stop_unit_later};
use super::watch_leader::Watcher;
use super::web::Web;
use crate::clock::read_clock;
use crate::config::cluster::Role;
use crate::pki::Certificate;

const QUICK: Retry =
    Retry::Until { first: Duration::from_millis(300), longest: Duration::from_secs(2) };
/// Files are rendered anew so often even when nothing was told.
const TICK: Duration = Duration::from_secs(10);
/// So long before its end a certificate is told of.
const EXPIRES_SOON: Duration = Duration::from_secs(30 * 24 * 3600);

/// The edge does not wait longer for the certificate that it shows.
const SITE_PATIENCE: Duration = Duration::from_secs(15);

pub const STEPS: [Step<Node>; 7] = [
    Step {
        name: "register",
        purpose: "telling the others about this node",
        retry: QUICK,
        run: |node| Box::pin(register(node)),
    },
    Step {
        name: "db",
        purpose: "starting the database",
        retry: QUICK,
        run: |node| Box::pin(start_role(node, Role::Db)),
    },
    Step {
        name: "site",
        purpose: "fetching the certificate that users see",
        retry: Retry::GoOn,
        run: |node| Box::pin(fetch_site(node)),
    },
    Step {
        name: "edge",
        purpose: "starting the edge",
        retry: QUICK,
        run: |node| Box::pin(start_role(node, Role::Edge)),
    },
    Step {
        name: "cache",
        purpose: "starting Redis and Sentinel",
        retry: QUICK,
        run: |node| {
            Box::pin(async {
                if node.has(Role::Cache) {
                    match choose_master(node).await? {
                        Verdict::Done => {}
                        other => return Ok(other),
                    }
                }
                start_role(node, Role::Cache).await
            })
        },
    },
    Step {
        name: "web",
        purpose: "starting the way to NetBox's database",
        retry: QUICK,
        run: |node| Box::pin(start_web(node)),
    },
    Step {
        name: "exporters",
        purpose: "starting what tells figures",
        retry: Retry::GoOn,
        run: |node| {
            Box::pin(async { start_units(node, &["prometheus-node-exporter.service"]).await })
        },
    },
];

async fn register(node: &mut Node) -> Result<Verdict> {
    let shared = Shared::default();
    node.shared = shared.clone();
    let units = node.list_units(&node.entry.roles);
    tokio::spawn(Observer::new(node, shared.clone(), units).run());
    let key = node.registry.key("nodes", &node.entry.name);
    tokio::spawn(keep_registration(node.etcd.clone(), key, shared.clone()));
    if node.has(Role::Db) {
        tokio::spawn(Watcher::new(node, shared.lease).run());
        tokio::spawn(Defragmenter::new(node).run());
        tokio::spawn(drop_lost_slots(node.board.clone(), list_owners(node)));
        tokio::spawn(keep_backups(Desk::of(node)));
        tokio::spawn(end_in_time(Desk::of(node)));
    }
    Ok(Verdict::Done)
}

/// An edge starts with the certificate that all edges show, if that can be had soon.
async fn fetch_site(node: &mut Node) -> Result<Verdict> {
    let Some(site) = node.site.clone() else { return Ok(Verdict::Done) };
    let settled = tokio::time::timeout(SITE_PATIENCE, site.settle()).await;
    tokio::spawn(site.run());
    let reason = match settled {
        Ok(Ok(())) => return Ok(Verdict::Done),
        Ok(Err(error)) => format!("{error:#}"),
        Err(_) => format!("etcd has not answered for {} s", SITE_PATIENCE.as_secs()),
    };
    Ok(Verdict::Warn(format!("users see this node's own certificate until then: {reason}")))
}

/// NetBox itself is started when its database is there, which nothing else waits for.
async fn start_web(node: &mut Node) -> Result<Verdict> {
    if !node.has(Role::Web) {
        return Ok(Verdict::Done);
    }
    node.applied.forget_refusals();
    node.lay_files().await?;
    let started = start_units(node, &[web::PROXY]).await?;
    if node.web.is_none() {
        let web = Web::new(node)?;
        web.start();
        node.web = Some(web);
    }
    Ok(started)
}

/// Workers end the job at hand and take no other while users are asked to wait.
async fn rest_worker(node: &mut Node) -> Result<()> {
    if node.facts.maintenance.is_none() || !node.started.contains(web::WORKER) {
        return Ok(());
    }
    log("maintenance: the workers rest");
    stop_unit_later(web::WORKER).await?;
    node.started.remove(web::WORKER);
    Ok(())
}

async fn start_role(node: &mut Node, role: Role) -> Result<Verdict> {
    if !node.has(role) {
        return Ok(Verdict::Done);
    }
    node.applied.forget_refusals();
    node.lay_files().await?;
    // What the first rendering laid over the units counts before they start.
    reload_daemon().await?;
    let units = node.list_units(&[role]);
    start_units(node, &units).await
}

/// Start units that have not been started in this boot. One that somebody has stopped
/// since is left alone: systemd restarts what crashes.
async fn start_units(node: &mut Node, units: &[&'static str]) -> Result<Verdict> {
    let mut obstacles = Vec::new();
    for unit in units {
        if node.started.contains(unit) {
            continue;
        }
        let service = node.services.iter().find(|service| service.unit == *unit);
        if let Some(file) = service.and_then(|service| node.applied.find_obstacle(service)) {
            obstacles.push(format!("{unit} waits: {file} was refused"));
            continue;
        }
        if *unit == "patroni.service"
            && let Some(reason) = withhold_database(node).await?
        {
            obstacles.push(format!("{unit} waits: {reason}"));
            continue;
        }
        match query_unit(unit).await? {
            Active::Missing => obstacles.push(format!("this image has no {unit}")),
            Active::Running | Active::Starting => drop(node.started.insert(unit)),
            Active::Stopped | Active::Failed => {
                start_unit(unit).await?;
                node.started.insert(unit);
            }
        }
    }
    if obstacles.is_empty() {
        return Ok(Verdict::Done);
    }
    Ok(Verdict::Warn(obstacles.join("; ")))
}

/// Why PostgreSQL must not start now; `None` when it may.
async fn withhold_database(node: &Node) -> Result<Option<String>> {
    // A restore says by itself whose data count.
    match withhold(node).await? {
        Some(reason) => Ok(Some(reason)),
        None => system_id::withhold(node).await,
    }
}

/// Keep the node's files in step with the cluster, for ever.
pub async fn keep_up(node: &mut Node) {
    let registry = node.registry.clone();
    loop {
        if let Err(error) = catch_up(node).await {
            node.board.raise("files", format!("{error:#}"));
        } else {
            node.board.clear("files");
        }
        tokio::select! {
            () = registry.wait_for_change() => {
                // Nodes that come together are taken in together.
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            () = tokio::time::sleep(TICK) => {}
        }
    }
}

async fn catch_up(node: &mut Node) -> Result<()> {
    let registered = node.registry.list_nodes();
    let views = registered.into_iter().map(|(name, entry)| (name, entry.node));
    let views: std::collections::BTreeMap<String, NodeView> = views.collect();
    // Nodes that are not in the cluster file are in the list only while they are there.
    node.facts.nodes = merge_nodes(&node.seed.cluster, &views);
    let master = *lock(&node.shared.redis_master);
    if let Some(master) = master {
        set_master(node, master);
    }
    node.facts.maintenance = node.registry.find_maintenance();
    node.applied.forget_refusals();
    let changed = node.lay_files().await?;
    if changed.iter().any(|target| target.starts_with("/etc/systemd/system/")) {
        reload_daemon().await?;
    }
    check_clock_again(node).await;
    tell_expiry(node)?;
    tell_watchdog(node);
    // What could not start for a file that was refused may do so now.
    rest_worker(node).await?;
    let units = node.list_wanted();
    if let Verdict::Warn(reason) = start_units(node, &units).await? {
        node.board.raise("services", reason);
    } else {
        node.board.clear("services");
    }
    if node.has(Role::Db) {
        match reconcile_settings(node).await {
            Ok(()) => node.board.clear("settings"),
            Err(error) => node.board.raise("settings", format!("{error:#}")),
        }
    }
    Ok(())
}

/// The node's own certificate ends all its connections when it ends; a new seed renews it.
fn tell_expiry(node: &Node) -> Result<()> {
    const THING: &str = "certificate";
    let end = Certificate::read(&node.seed.certificate)?.not_after;
    let now = read_clock()?;
    let help = "make a new seed with `stanchion seed`, attach it, and restart the node";
    if end <= now {
        node.board.raise(THING, format!("this node's certificate has expired: {help}"));
    } else if end - now < EXPIRES_SOON.as_secs() {
        let days = (end - now) / (24 * 3600);
        node.board.warn(THING, format!("this node's certificate expires in {days} days: {help}"));
    }
    Ok(())
}

/// Patroni takes a watchdog where there is one. Without it, only the other nodes notice that
/// Patroni stands still beside a PostgreSQL that goes on.
fn tell_watchdog(node: &Node) {
    const THING: &str = "watchdog";
    if node.places.join("/dev/watchdog").exists() || !node.has(Role::Db) {
        node.board.forget_warning(THING);
    } else {
        let text = "this machine has none: nothing restarts it should Patroni stand still while \
                    it leads; give it one, such as QEMU's i6300esb";
        node.board.warn(THING, text.to_string());
    }
}

/// A clock that was not right when the node started may be so by now.
async fn check_clock_again(node: &Node) {
    if node.board.lock().problems.contains_key(CLOCK) {
        match checks::check_clock(!node.seed.cluster.ntp.is_empty()).await {
            Ok(None) => node.board.clear(CLOCK),
            Ok(Some(reason)) => node.board.raise(CLOCK, reason),
            Err(error) => node.board.raise(CLOCK, format!("{error:#}")),
        }
    }
}

/// Patroni reads its dynamic settings from its file once; later they come through its
/// interface, from one node only: the leader's.
///
/// # Errors
/// When it refuses them. A Patroni that does not answer is told by readiness.
async fn reconcile_settings(node: &Node) -> Result<()> {
    let (http, address) = (&node.http, node.entry.address);
    let Ok(own) = patroni::read_own(http, address).await else { return Ok(()) };
    let path = node.places.join("/etc/patroni/dynamic.json");
    let Some(bytes) = read_bounded(&path, 64 << 10)?.filter(|_| own.role == "primary") else {
        return Ok(());
    };
    let wanted = serde_json::from_slice(&bytes).context("reading Patroni's dynamic settings")?;
    let Some(secret) = node.seed.secrets.get("patroni_rest") else { return Ok(()) };
    let Ok(changes) = patroni::find_changes(http, address, &wanted).await else { return Ok(()) };
    if changes.is_empty() {
        return Ok(());
    }
    let names = changes.keys().cloned().collect::<Vec<String>>().join(", ");
    let changed = patroni::change_settings(http, address, secret, changes).await;
    changed.with_context(|| format!("setting {names}"))?;
    log(&format!("patroni: set {names}"));
    Ok(())
}
