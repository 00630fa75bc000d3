//! `stanchion-agent`: the program in every image that makes a node of it.
//!
//! Three phases (`runner`): pre-start, bootstrap, main. What can be decided without
//! looking is decided by pure functions (`join`, `failover`, `ready`); elections are
//! etcd's, Patroni's, Sentinel's and keepalived's.

pub mod advice;
pub mod apply;
pub mod ask;
pub mod backup;
pub mod board;
pub mod bootstrap;
pub mod cache_start;
pub mod checks;
pub mod defragment;
pub mod etcd;
pub mod failover;
pub mod files;
pub mod find_seed;
pub mod join;
pub mod join_act;
pub mod main_phase;
pub mod node;
pub mod observe;
pub mod operate;
pub mod page;
pub mod patroni;
pub mod pause;
pub mod places;
pub mod postgres_tls;
pub mod pre_start;
pub mod psql;
pub mod ready;
pub mod redis;
pub mod registry;
pub mod render;
pub mod roles;
pub mod runner;
pub mod server;
pub mod site;
pub mod slots;
mod system_id;
pub mod systemd;
pub mod table;
pub mod tls;
pub mod watch_leader;
pub mod web;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result};

use board::{Board, Phase, log};
use node::Node;
use places::Places;
use pre_start::Unknown;
use runner::run_phase;

/// Run the agent until it is stopped.
pub fn run(places: Places) -> Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Programs and templates wait on threads of their own; few at a time.
        .max_blocking_threads(4)
        .thread_stack_size(512 << 10)
        .build()
        .context("starting the agent's runtime")?
        .block_on(run_phases(places))
}

async fn run_phases(places: Places) -> Result<()> {
    let board = Board::new(env!("CARGO_PKG_VERSION"));
    let known = Arc::new(OnceLock::new());
    server::serve_socket(&places, &board, known.clone())?;
    keep_watchdog();
    // A node that waits for its seed is up: it shows why it waits.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let mut unknown = Unknown { places: places.clone(), board: board.clone(), seed: None };
    run_phase(&board, Phase::PreStart, &pre_start::FIND_SEED, &mut unknown).await;
    let seed = unknown.seed.context("no seed was accepted")?;
    let mut node = Node::new(places, board.clone(), seed)?;
    let _ = known.set(server::Known { registry: node.registry.clone(), site: node.site.clone() });
    run_phase(&board, Phase::PreStart, &pre_start::STEPS, &mut node).await;
    run_phase(&board, Phase::Bootstrap, &bootstrap::STEPS, &mut node).await;
    run_phase(&board, Phase::Main, &main_phase::STEPS, &mut node).await;
    log("main: all services are started");
    main_phase::keep_up(&mut node).await;
    Ok(())
}

/// Tell systemd that the agent's loop turns, as often as it wants to know.
fn keep_watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let pause = (limit / 3).max(Duration::from_millis(100));
    tokio::spawn(async move {
        loop {
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
            tokio::time::sleep(pause).await;
        }
    });
}
