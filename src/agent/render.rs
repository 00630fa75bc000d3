//! The files of a node: what the layers' templates become with what is known now.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::files::{Access, read_bounded};
use super::places::Places;
use super::registry::{MAX_STRANGERS, Maintenance};
use super::tls::{POSTGRES_CA, REDIS_CA};
use crate::config::cluster::{Cluster, Role};
use crate::seed::Seed;
use crate::template;

/// Bytes that one template may have.
const MAX_TEMPLATE: u64 = 128 << 10;
/// Files that all layers may have together.
const MAX_FILES: usize = 2000;
/// What a node that the cluster file does not name may be.
const LATER_ROLES: [Role; 2] = [Role::Web, Role::Edge];

/// A node as templates see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    pub name: String,
    pub address: Ipv4Addr,
    pub zone: String,
    pub profile: String,
    pub roles: Vec<Role>,
    /// From 1; the place in the cluster file, then that among later comers by name.
    pub ordinal: usize,
}

/// What etcd's configuration hangs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EtcdFacts {
    pub state: &'static str,
    /// `n1=https://10.0.0.1:2380,n2=...`
    pub initial_cluster: String,
}

/// What Redis' configuration hangs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RedisFacts {
    pub master: Option<Ipv4Addr>,
    pub is_master: bool,
    /// 40 hexadecimal digits: the same Sentinel after every boot.
    pub myid: String,
}

/// Everything a template may ask for.
#[derive(Clone)]
pub struct Facts {
    pub seed: std::sync::Arc<Seed>,
    pub nodes: Vec<NodeView>,
    pub etcd: EtcdFacts,
    pub redis: RedisFacts,
    /// Users are asked to wait.
    pub maintenance: Option<Maintenance>,
    pub memory_mb: u64,
    pub cpus: usize,
}

impl Facts {
    /// What is known before anything else is: the cluster file.
    pub fn from_seed(seed: std::sync::Arc<Seed>, memory_mb: u64, cpus: usize) -> Self {
        let nodes = merge_nodes(&seed.cluster, &BTreeMap::new());
        let etcd = EtcdFacts { state: "new", initial_cluster: make_plan(&seed) };
        let redis = RedisFacts {
            master: None,
            is_master: false,
            myid: derive_id(&seed.cluster.name, &seed.node),
        };
        Facts { seed, nodes, etcd, redis, maintenance: None, memory_mb, cpus }
    }

    fn context(&self) -> Result<Value> {
        let (seed, cluster) = (&self.seed, &self.seed.cluster);
        let node = self
            .nodes
            .iter()
            .find(|node| node.name == seed.node)
            .context("the seed's node is not in its cluster")?;
        let with = |role: Role| -> Vec<&NodeView> {
            self.nodes.iter().filter(|node| node.roles.contains(&role)).collect()
        };
        let file = |name: &str| format!("/run/stanchion/tls/{name}.pem");
        let external = &cluster.external;
        let postgres = external.postgres.as_ref().map(|postgres| {
            json!({
                "host": postgres.host, "port": postgres.port, "database": postgres.database,
                "user": postgres.user, "ca_file": file(POSTGRES_CA),
            })
        });
        let redis = external.redis.as_ref().map(
            |redis| json!({"host": redis.host, "port": redis.port, "ca_file": file(REDIS_CA)}),
        );
        let secrets: BTreeMap<&str, &str> =
            seed.secrets.iter().map(|(name, secret)| (name.as_str(), secret.reveal())).collect();
        Ok(json!({
            "node": node,
            "cluster": {
                "name": cluster.name,
                "domain": cluster.domain,
                "vip": cluster.vip,
                "network": cluster.network.to_string(),
                "prefix": cluster.network.prefix(),
                "gateway": cluster.gateway,
                "dns": cluster.dns,
                "ntp": cluster.ntp,
                "single": cluster.is_single(),
                "storage": cluster.storage,
                "backup": cluster.backup,
            },
            "nodes": self.nodes,
            "db_nodes": with(Role::Db),
            "cache_nodes": with(Role::Cache),
            "web_nodes": with(Role::Web),
            "edge_nodes": with(Role::Edge),
            "secrets": secrets,
            "tuning": cluster.tuning,
            "tls": {
                "ca": "/run/stanchion/tls/ca.pem",
                "cert": "/run/stanchion/tls/node.pem",
                "key": "/run/stanchion/tls/node.key",
            },
            "etcd": self.etcd,
            "redis": self.redis,
            "external": {"postgres": postgres, "redis": redis},
            "maintenance": self.maintenance,
            "memory_mb": self.memory_mb,
            "cpus": self.cpus,
        }))
    }
}

/// The nodes of the cluster file, then those that registered and are not in it: web nodes and
/// edges only, since nobody votes or holds data by registering.
pub fn merge_nodes(cluster: &Cluster, registered: &BTreeMap<String, NodeView>) -> Vec<NodeView> {
    let mut nodes: Vec<NodeView> = Vec::new();
    for node in &cluster.nodes {
        nodes.push(NodeView {
            name: node.name.clone(),
            address: node.address,
            zone: node.zone.clone(),
            profile: node.profile.clone(),
            roles: node.roles.clone(),
            ordinal: nodes.len() + 1,
        });
    }
    let most = nodes.len() + MAX_STRANGERS;
    for (name, node) in registered {
        let roles: Vec<Role> =
            LATER_ROLES.into_iter().filter(|role| node.roles.contains(role)).collect();
        let known = nodes.iter().any(|n| n.name == *name || n.address == node.address);
        let taken = [cluster.vip, cluster.gateway].contains(&Some(node.address));
        let fits = !known && !taken && cluster.network.has_host(node.address);
        if fits && !roles.is_empty() && nodes.len() < most {
            let (name, ordinal) = (name.clone(), nodes.len() + 1);
            nodes.push(NodeView { name, ordinal, roles, ..node.clone() });
        }
    }
    nodes
}

/// The db nodes of the cluster file as etcd's list of first members.
pub fn make_plan(seed: &Seed) -> String {
    let members: Vec<String> = seed
        .cluster
        .list_nodes(Role::Db)
        .map(|node| format!("{}=https://{}:2380", node.name, node.address))
        .collect();
    members.join(",")
}

fn derive_id(cluster: &str, node: &str) -> String {
    let digest = Sha256::digest(format!("stanchion sentinel {cluster} {node}").as_bytes());
    digest.iter().take(20).map(|byte| format!("{byte:02x}")).collect()
}

/// A file as it should be on the node.
#[derive(Clone, PartialEq, Eq)]
pub struct Rendered {
    /// Absolute, without the root of the [`Places`].
    pub target: PathBuf,
    pub bytes: Vec<u8>,
    pub access: Access,
}

/// Render every file of every layer. A template that fails is an error of its own; the
/// others are still made.
pub fn render_all(places: &Places, facts: &Facts) -> Result<(Vec<Rendered>, Vec<String>)> {
    let context = facts.context()?;
    let (mut made, mut failed) = (BTreeMap::new(), Vec::new());
    for (source, target) in list_sources(&places.templates())? {
        match render_one(&source, &target, &context) {
            Ok(rendered) => drop(made.insert(rendered.target.clone(), rendered)),
            Err(error) => failed.push(format!("{error:#}")),
        }
    }
    Ok((made.into_values().collect(), failed))
}

fn render_one(source: &Path, target: &Path, context: &Value) -> Result<Rendered> {
    let meta = fs::metadata(source).with_context(|| format!("reading {}", source.display()))?;
    let bytes = read_bounded(source, MAX_TEMPLATE)?.context("a template has vanished")?;
    let is_template = target.extension().is_some_and(|extension| extension == "j2");
    let (target, bytes) = if is_template {
        let text = String::from_utf8(bytes)
            .with_context(|| format!("{} is no UTF-8 text", source.display()))?;
        (target.with_extension(""), template::render(&text, source, context)?.into_bytes())
    } else {
        (target.to_path_buf(), bytes)
    };
    let owner = rustix::process::geteuid().is_root().then_some((meta.uid(), meta.gid()));
    Ok(Rendered { target, bytes, access: Access { mode: meta.mode() & 0o7777, owner } })
}

/// Where the layers' files go on the node, absolute, sorted.
pub fn list_targets(places: &Places) -> Result<Vec<PathBuf>> {
    let strip = |target: PathBuf| match target.extension().is_some_and(|end| end == "j2") {
        true => target.with_extension(""),
        false => target,
    };
    let sources = list_sources(&places.templates())?;
    Ok(sources.into_iter().map(|(_, target)| strip(target)).collect())
}

/// Each file below `folder/<layer>/` with its absolute target, sorted.
fn list_sources(folder: &Path) -> Result<Vec<(PathBuf, PathBuf)>> {
    let mut sources = Vec::new();
    let mut open: Vec<(PathBuf, Option<PathBuf>)> = vec![(folder.to_path_buf(), None)];
    while let Some((here, target)) = open.pop() {
        let entries = match fs::read_dir(&here) {
            Ok(entries) => entries,
            Err(error) if target.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(sources);
            }
            Err(error) => {
                return Err(error).with_context(|| format!("listing {}", here.display()));
            }
        };
        for entry in entries {
            let entry = entry?;
            let kind = entry.file_type()?;
            // The folders right under the top are layers; what is in them are targets.
            let next = match &target {
                None => PathBuf::from("/"),
                Some(target) => target.join(entry.file_name()),
            };
            if kind.is_dir() {
                open.push((entry.path(), Some(next)));
            } else if kind.is_file() && target.is_some() {
                sources.push((entry.path(), next));
            }
            if sources.len() + open.len() > MAX_FILES {
                bail!("{} holds more than {MAX_FILES} files", folder.display());
            }
        }
    }
    sources.sort();
    Ok(sources)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::cluster::{Ipv4Network, Node, Tuning};

    fn cluster() -> Cluster {
        let node = Node {
            name: "n1".into(),
            address: [10, 0, 0, 1].into(),
            zone: "z1".into(),
            profile: "node".into(),
            roles: vec![Role::Db, Role::Cache, Role::Edge],
        };
        Cluster {
            name: "c".into(),
            domain: "c.example".into(),
            vip: Some([10, 0, 0, 100].into()),
            network: Ipv4Network::new([10, 0, 0, 0].into(), 24).unwrap(),
            gateway: Some([10, 0, 0, 254].into()),
            dns: Vec::new(),
            ntp: Vec::new(),
            nodes: vec![node],
            storage: None,
            backup: None,
            external: Default::default(),
            tuning: Tuning::default(),
        }
    }

    fn view(name: &str, address: [u8; 4], roles: &[Role]) -> (String, NodeView) {
        let view = NodeView {
            name: name.into(),
            address: address.into(),
            zone: "z4".into(),
            profile: "edge".into(),
            roles: roles.to_vec(),
            ordinal: 9,
        };
        (name.to_string(), view)
    }

    fn merge(registered: impl IntoIterator<Item = (String, NodeView)>) -> Vec<NodeView> {
        merge_nodes(&cluster(), &registered.into_iter().collect())
    }

    #[test]
    fn later_comers_are_web_nodes_and_edges_and_nothing_else() {
        let merged = merge([
            view("n1", [10, 0, 0, 1], &[Role::Web]),
            view("w1", [10, 0, 0, 4], &[Role::Edge, Role::Web]),
            view("x1", [10, 0, 0, 5], &[Role::Db, Role::Cache, Role::Web]),
            view("x2", [10, 0, 0, 6], &[Role::Db, Role::Cache]),
            view("x3", [10, 0, 0, 7], &[]),
        ]);
        let seen: Vec<(&str, &[Role], usize)> =
            merged.iter().map(|n| (n.name.as_str(), n.roles.as_slice(), n.ordinal)).collect();
        let expected: [(&str, &[Role], usize); 3] = [
            ("n1", &[Role::Db, Role::Cache, Role::Edge], 1),
            ("w1", &[Role::Web, Role::Edge], 2),
            ("x1", &[Role::Web], 3),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn later_comers_take_nobodys_address_and_are_bounded() {
        for address in [
            [10, 0, 0, 1],
            [10, 0, 0, 100],
            [10, 0, 0, 254],
            [10, 0, 0, 0],
            [10, 0, 1, 4],
            [127, 0, 0, 1],
        ] {
            assert_eq!(merge([view("w1", address, &[Role::Web])]).len(), 1, "{address:?}");
        }
        let twice = ["w1", "w2"].map(|name| view(name, [10, 0, 0, 4], &[Role::Web]));
        assert_eq!(merge(twice).len(), 2);
        let flood = (2..90).map(|n| view(&format!("w{n}"), [10, 0, 0, n], &[Role::Edge]));
        assert_eq!(merge(flood).len(), 1 + MAX_STRANGERS);
    }
}
