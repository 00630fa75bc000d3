//! What a lab is made of, and its making on this machine's disk and network.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::state::{Folder, NodeFolder, NodeState, Places, State, is_name};
use super::{Lab, Nspawn, check_host, cluster, find_operator, network};
use crate::config::cluster::{Cluster, Ipv4Network};
use crate::error::UserError;
use crate::store;

/// A lab to make.
#[derive(Debug, Clone)]
pub struct Spec {
    pub name: String,
    /// With a prefix of 8 to 29 bits.
    pub network: Ipv4Network,
    pub nspawn: Nspawn,
    pub nodes: Vec<NodeSpec>,
    /// What the nodes are to be seeded for. A node that it does not have, and every node of a
    /// lab without one, gets its address, and nothing else is set up in it.
    pub cluster: Option<Cluster>,
}

impl Spec {
    /// A lab of a whole cluster; `find_image` gives the raw disk of a profile.
    pub fn of_cluster(
        name: &str,
        nspawn: Nspawn,
        cluster: Cluster,
        find_image: impl Fn(&str) -> PathBuf,
    ) -> Self {
        let node = |node: &crate::config::cluster::Node| NodeSpec {
            name: node.name.clone(),
            address: node.address,
            image: find_image(&node.profile),
        };
        Spec {
            name: name.to_string(),
            network: cluster.network,
            nspawn,
            nodes: cluster.nodes.iter().map(node).collect(),
            cluster: Some(cluster),
        }
    }
}

#[derive(Debug, Clone)]
pub struct NodeSpec {
    /// Lower-case letters, digits and `-`, at most 40.
    pub name: String,
    /// In the lab's network, not the last usable one.
    pub address: Ipv4Addr,
    /// A raw disk as `stanchion build` writes it; only read.
    pub image: PathBuf,
}

impl Lab {
    /// Make a lab; its nodes are not started.
    ///
    /// # Errors
    /// A [`UserError`] for a lab of this name that is there, for names and addresses that
    /// cannot be, and for what this machine lacks. What was made until then is removed.
    pub fn create(places: &Places, spec: &Spec) -> Result<Self> {
        check_host()?;
        check(spec)?;
        let folder = places.find_folder(&spec.name)?;
        if folder.exists() {
            return Err(UserError::new(format!("there is a lab `{}` already", spec.name))
                .in_file(&folder.path)
                .help(format!(
                    "stanchion lab down --name {0}, or name another with --name",
                    spec.name
                ))
                .into());
        }
        folder.create()?;
        let turn = folder.lock(true)?;
        let made = describe(spec).and_then(|state| {
            make(&folder, spec, &state)?;
            Ok(Lab { folder, program: places.program.clone(), state })
        });
        drop(turn);
        made.map_err(|error| match Lab::remove(places, &spec.name) {
            Ok(()) => error,
            Err(left) => error.context(format!("taking the lab down again: {left:#}")),
        })
    }
}

fn check(spec: &Spec) -> Result<()> {
    let mistake = |text: String| Err(UserError::new(text).into());
    let network = spec.network;
    if !(8..=29).contains(&network.prefix()) {
        return mistake(format!("{network} is no lab's network"));
    }
    if spec.nodes.is_empty() || spec.nodes.len() > 99 {
        return mistake(format!("a lab has 1 to 99 nodes, not {}", spec.nodes.len()));
    }
    for (index, node) in spec.nodes.iter().enumerate() {
        let earlier = &spec.nodes[..index];
        if !is_name(&node.name) || earlier.iter().any(|other| other.name == node.name) {
            return mistake(format!("`{}` is no name for one node", node.name));
        }
        let taken = node.address == find_operator(network)
            || earlier.iter().any(|other| other.address == node.address);
        if taken || !network.has_host(node.address) {
            return mistake(format!("node `{}` cannot have {}", node.name, node.address));
        }
        if !node.image.is_file() {
            return Err(UserError::new(format!("node `{}` has no image", node.name))
                .in_file(&node.image)
                .help("stanchion build")
                .into());
        }
    }
    Ok(())
}

fn describe(spec: &Spec) -> Result<State> {
    let describe = |(index, node): (usize, &NodeSpec)| -> Result<NodeState> {
        Ok(NodeState {
            name: node.name.clone(),
            address: node.address,
            image: node.image.canonicalize().context("finding the image")?,
            machine: format!("node{}", index + 1),
        })
    };
    let nodes = spec.nodes.iter().enumerate().map(describe).collect::<Result<_>>()?;
    let (nspawn, cluster) = (spec.nspawn.clone(), spec.cluster.clone());
    Ok(State::new(&spec.name, spec.network, nspawn, nodes, cluster))
}

fn make(folder: &Folder, spec: &Spec, state: &State) -> Result<()> {
    folder.save(state)?;
    let secrets = match &spec.cluster {
        Some(cluster) => {
            fs::write(folder.cluster_file(), cluster::write_file(cluster)?)
                .context("writing the cluster file")?;
            Some((cluster, cluster::make_secrets(&folder.secrets(), cluster)?))
        }
        None => None,
    };
    for node in &spec.nodes {
        let place = folder.node(&node.name);
        place.create()?;
        let known = secrets.as_ref().filter(|(cluster, _)| cluster.find_node(&node.name).is_some());
        let seed = match known {
            Some((cluster, directory)) => Some(cluster::make_seed(cluster, directory, &node.name)?),
            None => None,
        };
        give_seed(&place, spec.network, node.address, seed.as_deref())?;
    }
    let group = folder.find_group()?;
    group.create()?;
    group.delegate();
    network::create(spec.network, &folder.pin())
}

pub(super) fn give_seed(
    folder: &NodeFolder,
    network: Ipv4Network,
    address: Ipv4Addr,
    seed: Option<&[u8]>,
) -> Result<()> {
    let remove = |path: &Path| store::remove_tree(path);
    match seed {
        Some(bytes) => {
            remove(&folder.address())?;
            // Its folder is for root alone.
            store::write_atomically(&folder.seed(), bytes)
        }
        None => {
            remove(&folder.seed())?;
            let text = format!(
                "[Match]\nName=host0\n\n[Network]\nAddress={address}/{}\n",
                network.prefix()
            );
            store::write_atomically(&folder.address(), text.as_bytes())
        }
    }
}
