//! What must hold of a cluster, asked of the validated form: when the file is read, and
//! again on a node of what a seed brings.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use super::{Cluster, External, Node, ObjectStorage, Role, Tuning};
use crate::config::source::quote;

/// Nodes of a cluster, resolvers and time servers of a node.
const MAX_NODES: usize = 64;
const MAX_SERVERS: usize = 8;
/// Bytes of the domain: a node's name before it must still fit a certificate.
const MAX_DOMAIN: usize = 180;
/// Bytes of the certificates of a CA.
const MAX_CA: usize = 16 << 10;
/// Names that the cluster's services have below the domain, or that mean something else.
const TAKEN: [&str; 7] = ["db", "cache", "netbox", "localhost", "operator", "ca", "seeds"];

const LABEL_HELP: &str =
    "write lower-case letters, digits and `-`, beginning and ending with none, at most 63";

/// A value in the cluster file: its key with that of its table, and which of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub key: &'static str,
    pub index: usize,
}

/// A rule that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub place: Place,
    pub what: String,
    pub why: Option<String>,
    pub help: Option<String>,
    /// The value that this one repeats.
    pub first: Option<Place>,
}

impl Fault {
    fn new(key: &'static str, index: usize, what: impl Into<String>) -> Self {
        let place = Place { key, index };
        Fault { place, what: what.into(), why: None, help: None, first: None }
    }

    fn why(mut self, why: impl Into<String>) -> Self {
        self.why = Some(why.into());
        self
    }

    fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

type Checked = Result<(), Fault>;

/// Every rule, in the order of the file; the first that does not hold.
pub fn check_rules(cluster: &Cluster) -> Checked {
    check_label("name", 0, "cluster name", &cluster.name)?;
    check_domain(&cluster.domain)?;
    check_network(cluster)?;
    check_servers(cluster)?;
    check_nodes(cluster)?;
    check_addresses(cluster)?;
    check_counts(cluster)?;
    cluster.storage.as_ref().map_or(Ok(()), check_storage)?;
    check_backup(cluster)?;
    check_external(&cluster.external)?;
    check_tuning(&cluster.tuning)
}

/// RFC 1123, in lower case; not a number alone, which would read as an address.
fn is_label(text: &str) -> bool {
    let is_fine = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    matches!(text.len(), 1..=63)
        && text.bytes().all(|b| is_fine(b) || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
        && !text.bytes().all(|b| b.is_ascii_digit())
}

fn is_domain(text: &str) -> bool {
    let is_number = |label: &str| label.bytes().all(|b| b.is_ascii_digit());
    !text.is_empty()
        && text.split('.').all(|label| is_label(label) || (is_number(label) && !label.is_empty()))
        && !text.rsplit('.').next().is_none_or(is_number)
}

fn check_label(key: &'static str, index: usize, what: &str, text: &str) -> Checked {
    if is_label(text) {
        return Ok(());
    }
    Err(Fault::new(key, index, format!("bad {what} {}", quote(text))).help(LABEL_HELP))
}

fn check_domain(domain: &str) -> Checked {
    if is_domain(domain) && domain.len() <= MAX_DOMAIN {
        return Ok(());
    }
    let help = format!(
        "write labels with dots between, at most {MAX_DOMAIN} characters, such as netbox.example.org"
    );
    Err(Fault::new("domain", 0, format!("bad domain {}", quote(domain))).help(help))
}

fn check_network(cluster: &Cluster) -> Checked {
    let network = cluster.network;
    if !(8..=30).contains(&network.prefix()) {
        let what = format!("the network {network} has a prefix of {} bits", network.prefix());
        return Err(Fault::new("network", 0, what).help("take one from 8 to 30"));
    }
    let (first, last) = (network.address(), network.broadcast());
    let is_unicast = |address: Ipv4Addr| {
        address.octets()[0] != 0 && !address.is_loopback() && address.octets()[0] < 224
    };
    if !is_unicast(first) || !is_unicast(last) {
        let what = format!("machines cannot have addresses of the network {network}");
        return Err(Fault::new("network", 0, what));
    }
    Ok(())
}

fn check_servers(cluster: &Cluster) -> Checked {
    for (key, count) in [("dns", cluster.dns.len()), ("ntp", cluster.ntp.len())] {
        if count > MAX_SERVERS {
            let what = format!("`{key}` has {count} servers");
            return Err(Fault::new(key, 0, what).help(format!("{MAX_SERVERS} are enough")));
        }
    }
    for (i, address) in cluster.dns.iter().enumerate() {
        if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
            let what = format!("`{address}` in `dns` is no server's address");
            return Err(Fault::new("dns", i, what));
        }
    }
    for (i, server) in cluster.ntp.iter().enumerate() {
        let is_address = server.parse::<std::net::IpAddr>().is_ok();
        let is_name = is_domain(server) && server.len() <= 253;
        if !is_address && !is_name {
            let what = format!("bad time server {}", quote(server));
            return Err(Fault::new("ntp", i, what).help("write a name or an address"));
        }
    }
    Ok(())
}

fn check_nodes(cluster: &Cluster) -> Checked {
    if !(1..=MAX_NODES).contains(&cluster.nodes.len()) {
        let what = format!("the cluster has {} nodes", cluster.nodes.len());
        let help = "write a `[[node]]` for each machine: three or more, or one for development";
        return Err(match cluster.nodes.len() {
            0 => Fault::new("node", 0, what).help(help),
            _ => Fault::new("node.name", MAX_NODES, what).help(format!("{MAX_NODES} are the most")),
        });
    }
    let mut names = BTreeMap::new();
    for (i, node) in cluster.nodes.iter().enumerate() {
        check_label("node.name", i, "node name", &node.name)?;
        if TAKEN.contains(&node.name.as_str()) {
            let what = format!("no node can be called `{}`", node.name);
            let why = format!("in a cluster these names mean something else: {}", TAKEN.join(", "));
            return Err(Fault::new("node.name", i, what).why(why));
        }
        if let Some(first) = names.insert(&node.name, i) {
            let what = format!("the node `{}` is there twice", node.name);
            return Err(repeat("node.name", i, first, what));
        }
        check_label("node.zone", i, "zone", &node.zone)?;
        check_roles(i, node)?;
    }
    Ok(())
}

fn check_roles(i: usize, node: &Node) -> Checked {
    if node.roles.is_empty() {
        let what = format!("the profile {} has no role", quote(&node.profile));
        let help = "add a layer with a `role` to the profile, or take another";
        return Err(Fault::new("node.profile", i, what).help(help));
    }
    if !node.roles.is_sorted_by(|a, b| a < b) {
        let what = format!("the roles of `{}` are doubled or out of order", node.name);
        return Err(Fault::new("node.profile", i, what));
    }
    Ok(())
}

fn repeat(key: &'static str, index: usize, first: usize, what: String) -> Fault {
    Fault { first: Some(Place { key, index: first }), ..Fault::new(key, index, what) }
}

fn check_addresses(cluster: &Cluster) -> Checked {
    let network = cluster.network;
    let check_inside = |key, index, address: Ipv4Addr| match network.has_host(address) {
        true => Ok(()),
        false => {
            let what = format!("no machine on the network {network} can have {address}");
            let hosts = network.address().to_bits() + 1..network.broadcast().to_bits();
            let (first, last) =
                (Ipv4Addr::from_bits(hosts.start), Ipv4Addr::from_bits(hosts.end - 1));
            Err(Fault::new(key, index, what).help(format!("take one from {first} to {last}")))
        }
    };
    let mut owners: BTreeMap<Ipv4Addr, usize> = BTreeMap::new();
    for (i, node) in cluster.nodes.iter().enumerate() {
        check_inside("node.address", i, node.address)?;
        if let Some(first) = owners.insert(node.address, i) {
            let what = format!("two nodes have the address {}", node.address);
            return Err(repeat("node.address", i, first, what));
        }
    }
    for (key, address) in [("vip", cluster.vip), ("gateway", cluster.gateway)] {
        let Some(address) = address else { continue };
        check_inside(key, 0, address)?;
        if let Some(owner) = owners.get(&address) {
            let owner = &cluster.nodes[*owner].name;
            let what = format!("`{key}` is {address}, the address of the node `{owner}`");
            return Err(Fault::new(key, 0, what).help("take one that is free"));
        }
    }
    if let (Some(vip), true) = (cluster.vip, cluster.vip == cluster.gateway) {
        let what = format!("`vip` is {vip}, the address of the gateway");
        return Err(Fault::new("vip", 0, what).help("take one that is free"));
    }
    Ok(())
}

fn check_counts(cluster: &Cluster) -> Checked {
    let count = |role| cluster.list_nodes(role).count();
    let at = cluster.nodes.len() - 1;
    let members = count(Role::Db);
    if members.is_multiple_of(2) || (members == 1 && !cluster.is_single()) {
        let what = match members {
            0 => "no node has the role db".to_string(),
            1 => "1 of several nodes has the role db".to_string(),
            _ => format!("{members} nodes have the role db"),
        };
        let why = "etcd decides by majority, so there must be three or more, and an odd number";
        let help = "make it three or five; one node alone is a development cluster";
        return Err(Fault::new("node.profile", at, what).why(why).help(help));
    }
    let edges = count(Role::Edge);
    if cluster.vip.is_some() && edges == 0 {
        let what = "there is a `vip`, and no node that can hold it";
        return Err(Fault::new("vip", 0, what).help("give a node a profile with the role edge"));
    }
    if cluster.vip.is_none() && edges > 1 {
        let what = format!("{edges} nodes have the role edge, and there is no `vip`");
        let help = "add `vip`: a free address on the network that clients talk to";
        return Err(Fault::new("name", 0, what).help(help));
    }
    if cluster.storage.is_none() && count(Role::Web) > 1 {
        let what =
            format!("{} nodes have the role web, and there is no `[storage]`", count(Role::Web));
        let why = "media that lie on one node are gone with it";
        let help = "add `[storage]` with `endpoint`, `bucket` and `region`";
        return Err(Fault::new("name", 0, what).why(why).help(help));
    }
    Ok(())
}

fn check_storage(storage: &ObjectStorage) -> Checked {
    let endpoint = &storage.endpoint;
    let rest = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
    let is_endpoint = rest.is_some_and(|rest| {
        let (host, port) = rest.split_once(':').unwrap_or((rest, "443"));
        let is_port = port.bytes().all(|b| b.is_ascii_digit())
            && port.parse::<u16>().is_ok_and(|port| port > 0);
        is_port && host.len() <= 253 && (is_domain(host) || host.parse::<Ipv4Addr>().is_ok())
    });
    if !is_endpoint {
        let what = format!("bad endpoint {}", quote(endpoint));
        let help = "write https://HOST or https://HOST:PORT, without a path";
        return Err(Fault::new("storage.endpoint", 0, what).help(help));
    }
    let is_word = |text: &str, most: usize| {
        (1..=most).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b))
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
    };
    if storage.bucket.len() < 3 || !is_word(&storage.bucket, 63) {
        let what = format!("bad bucket {}", quote(&storage.bucket));
        let help = "write 3 to 63 lower-case letters, digits, `-` and `.`";
        return Err(Fault::new("storage.bucket", 0, what).help(help));
    }
    if !is_word(&storage.region, 63) {
        let what = format!("bad region {}", quote(&storage.region));
        let help = "write what the storage calls it, such as us-east-1";
        return Err(Fault::new("storage.region", 0, what).help(help));
    }
    Ok(())
}

fn check_backup(cluster: &Cluster) -> Checked {
    let Some(backup) = &cluster.backup else { return Ok(()) };
    if !(1..=100).contains(&backup.keep) {
        let what = format!("bad `backup.keep` `{}`", backup.keep);
        return Err(Fault::new("backup.keep", 0, what).help("keep 1 to 100 full backups"));
    }
    let Some(directory) = &backup.directory else {
        let help = "name the bucket in [storage], or a `directory` that is mounted on the nodes";
        return match &cluster.storage {
            None => Err(Fault::new("backup", 0, "there is no place for backups").help(help)),
            Some(storage) if !storage.endpoint.starts_with("https://") => {
                let what = "backups need a storage that speaks TLS";
                Err(Fault::new("storage.endpoint", 0, what).help("write https://HOST"))
            }
            Some(_) => Ok(()),
        };
    };
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"/-_.".contains(&b);
    let is_fine = directory.len() <= 200
        && directory.starts_with("/var/")
        && directory.bytes().all(is_plain)
        && directory.split('/').skip(1).all(|part| !matches!(part, "" | "." | ".."));
    if is_fine {
        return Ok(());
    }
    let what = format!("bad directory {}", quote(directory));
    let why = "the system's own disk is read-only: only below /var something can be mounted";
    let help = "write it like /var/backups/stanchion, with letters, digits, `-`, `_` and `.`";
    Err(Fault::new("backup.directory", 0, what).why(why).help(help))
}

fn check_external(external: &External) -> Checked {
    let is_host =
        |host: &str| host.len() <= 253 && (is_domain(host) || host.parse::<Ipv4Addr>().is_ok());
    let check_host = |key, host: &str| match is_host(host) {
        true => Ok(()),
        false => Err(Fault::new(key, 0, format!("bad host {}", quote(host)))
            .help("write a name or an IPv4 address, without a port")),
    };
    let check_ca = |key, ca: &str| match ca.contains("-----BEGIN CERTIFICATE-----") {
        true if ca.len() <= MAX_CA && ca.is_ascii() => Ok(()),
        _ => Err(Fault::new(key, 0, "the CA is no certificate in PEM")
            .help(format!("name a file with certificates in PEM, at most {} KiB", MAX_CA >> 10))),
    };
    if let Some(postgres) = &external.postgres {
        check_host("external.postgres.host", &postgres.host)?;
        check_ca("external.postgres.ca", &postgres.ca)?;
        for (key, name) in [
            ("external.postgres.database", &postgres.database),
            ("external.postgres.user", &postgres.user),
        ] {
            let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"_-".contains(&b);
            if !(1..=63).contains(&name.len()) || !name.bytes().all(is_plain) {
                let what = format!("bad `{key}` {}", quote(name));
                let help = "write letters, digits, `_` and `-`, at most 63";
                return Err(Fault::new(key, 0, what).help(help));
            }
        }
    }
    if let Some(redis) = &external.redis {
        check_host("external.redis.host", &redis.host)?;
        check_ca("external.redis.ca", &redis.ca)?;
    }
    Ok(())
}

/// The bounds are Patroni's own; what lies above is no use to anybody.
fn check_tuning(tuning: &Tuning) -> Checked {
    for (key, seconds, least) in [
        ("tuning.patroni_ttl", tuning.patroni_ttl, 20),
        ("tuning.patroni_loop_wait", tuning.patroni_loop_wait, 1),
        ("tuning.patroni_retry_timeout", tuning.patroni_retry_timeout, 3),
    ] {
        if !(least..=600).contains(&seconds) {
            let help = format!("take one from {least} to 600 seconds");
            return Err(Fault::new(key, 0, format!("bad `{key}` `{seconds}`")).help(help));
        }
    }
    let needed = tuning.patroni_loop_wait + 2 * tuning.patroni_retry_timeout;
    if needed > tuning.patroni_ttl {
        let what = format!("`tuning.patroni_ttl` is {}, and too short", tuning.patroni_ttl);
        let why = format!(
            "a leader must be able to try twice within its lease: patroni_loop_wait + 2 x patroni_retry_timeout is {needed}"
        );
        return Err(Fault::new("tuning.patroni_ttl", 0, what).why(why));
    }
    if tuning.vrrp_router_id == 0 {
        let what = "bad `tuning.vrrp_router_id` `0`";
        return Err(Fault::new("tuning.vrrp_router_id", 0, what).help("take one from 1 to 255"));
    }
    Ok(())
}
