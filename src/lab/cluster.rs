//! The throw-away cluster of a lab: its file, its CA and secrets, and its nodes' seeds, all
//! made anew and gone with the lab.

use std::fmt::Write;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result};

use crate::clock::read_clock;
use crate::cluster_dir::{self, ClusterDir};
use crate::config::cluster::{
    Backup, Cluster, External, Ipv4Network, Node, ObjectStorage, Role, Tuning, check_rules,
};
use crate::error::UserError;
use crate::secrets::{list_brought, make_secret};
use crate::seed::issue_seed;

/// The nodes' host numbers count from here.
const FIRST: u32 = 11;
/// The host number of the VIP.
const VIP: u32 = 100;

/// The machine itself, and where an S3 server on it is looked for.
const HOST: u32 = 254;
const S3_PORT: u16 = 3900;

/// Describe a cluster of `count` nodes `n1`, `n2`, … on `network`, each in a zone of its own,
/// all made of `profile`, which has these roles.
///
/// # Errors
/// A [`UserError`] when no cluster can be like that.
pub fn plan_cluster(
    name: &str,
    network: Ipv4Network,
    count: u8,
    profile: &str,
    roles: &[Role],
) -> Result<Cluster> {
    let address = |host: u32| Ipv4Addr::from_bits(network.address().to_bits() + host);
    let node = |number: u32| Node {
        name: format!("n{number}"),
        address: address(FIRST + number - 1),
        zone: format!("z{number}"),
        profile: profile.to_string(),
        roles: roles.to_vec(),
    };
    let cluster = Cluster {
        name: name.to_string(),
        domain: format!("{name}.test"),
        vip: roles.contains(&Role::Edge).then(|| address(VIP)),
        network,
        gateway: None,
        dns: Vec::new(),
        ntp: Vec::new(),
        nodes: (1..=u32::from(count)).map(node).collect(),
        backup: None,
        storage: roles.contains(&Role::Web).then(|| ObjectStorage {
            endpoint: format!("http://{}:{S3_PORT}", address(HOST)),
            bucket: "netbox".to_string(),
            region: "garage".to_string(),
        }),
        external: External::default(),
        tuning: Tuning::default(),
    };
    check_rules(&cluster).map_err(|fault| {
        let mut error = UserError::new(fault.what);
        if let Some(why) = fault.why {
            error = error.why(why);
        }
        match fault.help {
            Some(help) => error.help(help),
            None => error,
        }
    })?;
    Ok(cluster)
}

/// Backups in the directory that the lab shares among its nodes.
pub fn plan_backup() -> Backup {
    Backup { directory: Some("/var/backups/stanchion".to_string()), keep: Backup::KEEP }
}

/// The cluster as a cluster file.
pub fn write_file(cluster: &Cluster) -> Result<String> {
    let quote = |text: &str| toml::Value::from(text).to_string();
    let mut text =
        format!("name = {}\ndomain = {}\n", quote(&cluster.name), quote(&cluster.domain));
    if let Some(vip) = cluster.vip {
        writeln!(text, "vip = \"{vip}\"")?;
    }
    writeln!(text, "network = \"{}\"", cluster.network)?;
    for node in &cluster.nodes {
        write!(
            text,
            "\n[[node]]\nname = {}\naddress = \"{}\"\nzone = {}\nprofile = {}\n",
            quote(&node.name),
            node.address,
            quote(&node.zone),
            quote(&node.profile)
        )?;
    }
    if let Some(backup) = &cluster.backup {
        let backup = toml::to_string(backup).context("writing the cluster file")?;
        write!(text, "\n[backup]\n{backup}")?;
    }
    if let Some(storage) = &cluster.storage {
        let storage = toml::to_string(storage).context("writing the cluster file")?;
        write!(text, "\n[storage]\n{storage}")?;
    }
    let tuning = toml::to_string(&cluster.tuning).context("writing the cluster file")?;
    write!(text, "\n[tuning]\n{tuning}")?;
    Ok(text)
}

/// Make the CA and the secrets at `path`.
pub fn make_secrets(path: &Path, cluster: &Cluster) -> Result<ClusterDir> {
    // Whoever runs an S3 server for the lab finds its keys there.
    let names = list_brought(cluster).into_iter();
    let given = names.map(|name| Ok((name.to_string(), make_secret(name)?)));
    let given = given.collect::<Result<_>>()?;
    cluster_dir::make_directory(path, cluster, &given, read_clock()?)?;
    ClusterDir::open(path, cluster)
}

/// A new seed for a node, with a new key and certificate.
pub fn make_seed(cluster: &Cluster, directory: &ClusterDir, node: &str) -> Result<Vec<u8>> {
    let entry =
        cluster.find_node(node).with_context(|| format!("no node {node} in the cluster"))?;
    issue_seed(cluster, entry, directory, None, read_clock()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Project;
    use crate::config::cluster::load_cluster;

    fn network() -> Ipv4Network {
        "10.88.0.0/24".parse().unwrap()
    }

    #[test]
    fn the_cluster_file_says_what_was_planned() {
        let project = Project::find(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
        for (profile, count) in [("node", 3), ("db", 3), ("db", 1)] {
            let roles = project.load_profile(profile).unwrap().roles();
            let cluster = plan_cluster("lab", network(), count, profile, &roles).unwrap();
            assert_eq!(cluster.vip.is_some(), profile == "node");
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("cluster.toml");
            std::fs::write(&path, write_file(&cluster).unwrap()).unwrap();
            assert_eq!(load_cluster(&path, &project).unwrap(), cluster);
        }
    }

    #[test]
    fn what_no_cluster_can_be_is_refused() {
        let error = plan_cluster("lab", network(), 2, "db", &[Role::Db]).unwrap_err();
        assert_eq!(crate::error::exit_code(&error), 2);
        assert!(error.to_string().contains("2 nodes"), "{error}");
    }
}
