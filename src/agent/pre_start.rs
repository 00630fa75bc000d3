//! pre-start: who this node is, its files and network, and whether the machine is fit.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use tokio::net::TcpStream;

use super::board::{Board, CLOCK as CLOCK_PROBLEM, log};
use super::checks;
use super::files::{Access, make_private_folder, read_bounded, write_file};
use super::find_seed::find_seeds;
use super::node::Node;
use super::places::Places;
use super::runner::{Retry, Step, Verdict, back_off};
use super::systemd::run_program;
use super::{server, tls};
use crate::config::cluster::Role;
use crate::seed::{Identity, Seed, verify_seed};

/// So long may a clock take; then the node goes on and says so.
const CLOCK: Duration = Duration::from_secs(60);

/// A node that does not yet know who it is.
pub struct Unknown {
    pub places: Places,
    pub board: Board,
    pub seed: Option<Seed>,
}

pub const FIND_SEED: [Step<Unknown>; 1] = [Step {
    name: "seed",
    purpose: "finding this node's seed",
    retry: back_off(5, 5),
    run: |unknown| Box::pin(async { accept_seed(unknown) }),
}];

pub const STEPS: [Step<Node>; 9] = [
    Step {
        name: "certificate",
        purpose: "writing the node's certificate for its services",
        retry: back_off(1, 10),
        run: |node| {
            Box::pin(async {
                tls::write_files(&node.places, &node.seed)?;
                Ok(Verdict::Done)
            })
        },
    },
    Step {
        name: "files",
        purpose: "rendering the node's files",
        retry: back_off(1, 10),
        run: |node| {
            Box::pin(async {
                node.lay_files().await?;
                Ok(Verdict::Done)
            })
        },
    },
    Step {
        name: "hostname",
        purpose: "setting the host's name",
        retry: Retry::GoOn,
        run: |node| Box::pin(set_hostname(node)),
    },
    Step {
        name: "network",
        purpose: "bringing the node's address up",
        retry: back_off(1, 2),
        run: |node| Box::pin(bring_up_network(node)),
    },
    Step {
        name: "answers",
        purpose: "answering the other agents",
        retry: back_off(1, 5),
        run: |node| {
            Box::pin(async {
                server::serve(node).await?;
                Ok(Verdict::Done)
            })
        },
    },
    Step {
        name: "clock",
        purpose: "waiting for the clock",
        retry: Retry::GoOn,
        run: |node| Box::pin(wait_for_clock(node)),
    },
    Step {
        name: "machine",
        purpose: "looking at memory and disk",
        retry: Retry::GoOn,
        run: |node| {
            Box::pin(async {
                let memory = checks::check_memory(node.facts.memory_mb, node.has(Role::Db));
                let disk = checks::check_disk(&node.places.join("/var"))?;
                let found: Vec<String> = memory.into_iter().chain(disk).collect();
                Ok(warn_if(found))
            })
        },
    },
    Step {
        name: "fsync",
        purpose: "measuring how fast /var is",
        retry: Retry::GoOn,
        run: |node| {
            Box::pin(async {
                let folder = node.places.state();
                let measured = tokio::task::spawn_blocking(move || checks::measure_fsync(&folder));
                let p99 = measured.await.context("measuring the disk")??;
                log(&format!("fsync: p99 {:.2} ms", p99.as_secs_f64() * 1000.0));
                Ok(warn_if(checks::check_fsync(p99).into_iter().collect()))
            })
        },
    },
    Step {
        name: "peers",
        purpose: "looking for the other nodes",
        retry: Retry::GoOn,
        run: |node| Box::pin(look_for_peers(node)),
    },
];

fn warn_if(found: Vec<String>) -> Verdict {
    if found.is_empty() { Verdict::Done } else { Verdict::Warn(found.join("; ")) }
}

fn accept_seed(unknown: &mut Unknown) -> Result<Verdict> {
    let places = &unknown.places;
    let remembered: Option<Identity> = match read_bounded(&places.identity(), 64 << 10)? {
        None => None,
        Some(bytes) => Some(serde_json::from_slice(&bytes).with_context(|| {
            format!("reading {}, which says who this node is", places.identity().display())
        })?),
    };
    let (found, broken) = find_seeds(places);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let mut refusals = Vec::new();
    let mut accepted = None;
    // A wrong seed in one place does not hide the right one in another.
    for found in &found {
        match verify_seed(Some(&found.bytes), now, remembered.as_ref()) {
            crate::seed::Verdict::Accepted(seed) => {
                accepted = Some((seed, &found.place));
                break;
            }
            refused => refusals.push(format!("{refused} (from {})", found.place)),
        }
    }
    let Some((seed, place)) = accepted else {
        if refusals.is_empty() {
            refusals.push(format!(
                "{}: attach a volume labelled STANCHION made by `stanchion seed`, or give the \
                 machine the credential stanchion.seed",
                crate::seed::Verdict::Missing
            ));
        }
        refusals.extend(broken);
        return Ok(Verdict::Wait(refusals.join("; ")));
    };
    if remembered.is_none() {
        let identity = Identity::of(&seed).context("reading the seed's CA")?;
        make_private_folder(&places.state())?;
        let text = serde_json::to_vec(&identity).context("writing down who this node is")?;
        write_file(&places.identity(), &text, Access::PRIVATE, true)?;
    }
    for refusal in refusals.iter().chain(&broken) {
        log(&format!("seed: passed over: {refusal}"));
    }
    log(&format!("seed: {} of cluster {}, from {place}", seed.node, seed.cluster.name));
    if seed.cluster.is_single() {
        log("THIS IS A CLUSTER OF ONE NODE, FOR DEVELOPMENT: NOT HIGHLY AVAILABLE");
    }
    unknown.seed = Some(*seed);
    Ok(Verdict::Done)
}

async fn set_hostname(node: &mut Node) -> Result<Verdict> {
    let name = node.entry.name.as_str();
    let file = node.places.join("/etc/hostname");
    let text = format!("{name}\n");
    if read_bounded(&file, 4096)?.as_deref() != Some(text.as_bytes()) {
        write_file(&file, text.as_bytes(), Access { mode: 0o644, owner: None }, false)?;
    }
    if rustix::system::uname().nodename().to_bytes() == name.as_bytes() {
        return Ok(Verdict::Done);
    }
    // With the rights for it directly, else through systemd's own service.
    if rustix::system::sethostname(name.as_bytes()).is_err() {
        run_program(&["hostnamectl", "--transient", "hostname", name]).await?;
    }
    Ok(Verdict::Done)
}

async fn bring_up_network(node: &mut Node) -> Result<Verdict> {
    let address = node.entry.address;
    let is_up = || -> Result<bool> {
        let trie = checks::read_kernel_file(&node.places.join("/proc/net/fib_trie"))?;
        Ok(checks::has_address(&trie, address))
    };
    if is_up()? {
        return Ok(Verdict::Done);
    }
    run_program(&["networkctl", "reload"]).await?;
    for _ in 0..20 {
        if is_up()? {
            return Ok(Verdict::Done);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(Verdict::Wait(format!(
        "no interface has the address {address}: is there a network card, and is it connected?"
    )))
}

async fn wait_for_clock(node: &mut Node) -> Result<Verdict> {
    let status = checks::read_kernel_file(&node.places.join("/proc/1/status"))?;
    if !checks::owns_clock(&status) {
        log("clock: this is a container, whose clock is its host's");
        return Ok(Verdict::Done);
    }
    let begun = Instant::now();
    loop {
        let reason = match checks::check_clock(!node.seed.cluster.ntp.is_empty()).await {
            Ok(None) => return Ok(Verdict::Done),
            Ok(Some(reason)) => reason,
            Err(error) => format!("{error:#}"),
        };
        // With no time server of its own a lone node has nothing to wait for.
        if begun.elapsed() > CLOCK || node.seed.cluster.ntp.is_empty() {
            // Certificates and Sentinels hang on it: until it is right, the node is not ready.
            node.board.raise(CLOCK_PROBLEM, reason.clone());
            return Ok(Verdict::Warn(reason));
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn look_for_peers(node: &mut Node) -> Result<Verdict> {
    let mut looks = tokio::task::JoinSet::new();
    for peer in node.seed.cluster.nodes.iter().filter(|peer| peer.name != node.entry.name) {
        let (name, address, db) = (peer.name.clone(), peer.address, peer.has(Role::Db));
        looks.spawn(async move {
            let up = can_connect(address, 7443).await || (db && can_connect(address, 2380).await);
            (name, address, up)
        });
    }
    let mut silent = Vec::new();
    while let Some(look) = looks.join_next().await {
        if let Ok((name, address, false)) = look {
            silent.push(format!("{name} ({address})"));
        }
    }
    silent.sort();
    // On a cold start the others are not there yet: readiness speaks of it later.
    if !silent.is_empty() {
        log(&format!("peers: not there yet: {}", silent.join(", ")));
    }
    Ok(Verdict::Done)
}

/// Whether a port takes connections.
pub async fn can_connect(address: Ipv4Addr, port: u16) -> bool {
    let connect = TcpStream::connect((address, port));
    tokio::time::timeout(Duration::from_millis(500), connect).await.is_ok_and(|made| made.is_ok())
}
