//! What a node's firewall lets in, against the list of ways that must be open.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;

use serde_json::json;
use stanchion::config::cluster::ports::{Protocol, Side, list_ports};
use stanchion::config::cluster::{Cluster, Ipv4Network, Node, Role, Tuning};
use stanchion::template;

use crate::root;

const TEMPLATE: &str = "layers/base/boot/etc/nftables.conf.j2";
const OTHER_ON_NETWORK: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 200);
const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 7, 7);

/// Nodes of one role each, one of two, and one of none.
fn make_cluster() -> Cluster {
    let roles: [&[Role]; 7] = [
        &[Role::Db],
        &[Role::Db],
        &[Role::Db, Role::Cache],
        &[Role::Cache],
        &[Role::Web],
        &[Role::Edge],
        &[],
    ];
    let node = |(index, roles): (usize, &&[Role])| Node {
        name: format!("n{}", index + 1),
        address: Ipv4Addr::new(10, 9, 0, index as u8 + 1),
        zone: "z".into(),
        profile: "p".into(),
        roles: roles.to_vec(),
    };
    Cluster {
        name: "lab".into(),
        domain: "netbox.example.org".into(),
        vip: Some(Ipv4Addr::new(10, 9, 0, 100)),
        network: Ipv4Network::new(Ipv4Addr::new(10, 9, 0, 0), 24).unwrap(),
        gateway: None,
        dns: Vec::new(),
        ntp: Vec::new(),
        nodes: roles.iter().enumerate().map(node).collect(),
        storage: None,
        backup: None,
        external: Default::default(),
        tuning: Tuning::default(),
    }
}

/// The rules of a node, as the agent renders them.
pub fn render_rules(cluster: &Cluster, node: &Node) -> String {
    let with = |role| cluster.list_nodes(role).collect::<Vec<_>>();
    let context = json!({
        "node": node,
        "nodes": cluster.nodes,
        "db_nodes": with(Role::Db),
        "edge_nodes": with(Role::Edge),
        "cluster": {
            "network": cluster.network.to_string(),
            "prefix": cluster.network.prefix(),
        },
    });
    let text = fs::read_to_string(root().join(TEMPLATE)).unwrap();
    template::render(&text, TEMPLATE.as_ref(), &context).unwrap()
}

/// All rules of clusters that are put together in different ways.
pub fn list_rules() -> Vec<String> {
    let whole = make_cluster();
    let without = |role: Role| {
        let mut cluster = make_cluster();
        cluster.nodes.retain(|node| !node.has(role));
        cluster
    };
    [whole, without(Role::Edge), without(Role::Web), without(Role::Cache)]
        .iter()
        .flat_map(|cluster| cluster.nodes.iter().map(|node| render_rules(cluster, node)))
        .collect()
}

/// One line that lets something in.
struct Rule {
    /// `None`: from everywhere.
    from: Option<Vec<Ipv4Network>>,
    protocol: Protocol,
    ports: Vec<(u16, u16)>,
}

/// Read the lines that the template writes; any other is a fault of this test.
fn read_rules(text: &str) -> Vec<Rule> {
    let mut sets = BTreeMap::new();
    let mut rules = Vec::new();
    for line in text.lines() {
        if let Some(definition) = line.strip_prefix("define ") {
            let (name, value) = definition.split_once(" = ").unwrap();
            sets.insert(format!("${name}"), read_networks(value));
        } else if line.starts_with("add set inet filter local_networks") {
            assert!(line.contains("elements = $local;"), "{line}");
            sets.insert("@local_networks".to_string(), sets["$local"].clone());
        } else if let Some(rule) = line.strip_prefix("add rule inet filter input ") {
            let rule = rule.strip_suffix(" accept").unwrap_or_else(|| panic!("{line}"));
            let (from, what) = match rule.strip_prefix("ip saddr ") {
                Some(rest) => {
                    let (from, what) = rest.split_once(' ').unwrap();
                    let known = sets.get(from).cloned();
                    (Some(known.unwrap_or_else(|| read_networks(from))), what)
                }
                None => (None, rule),
            };
            rules.push(read_rule(from, what));
        } else {
            assert!(
                line.is_empty() || line.starts_with('#') || line.starts_with("include "),
                "{line}"
            );
        }
    }
    rules
}

fn read_rule(from: Option<Vec<Ipv4Network>>, what: &str) -> Rule {
    if what == "ip protocol 112" {
        return Rule { from, protocol: Protocol::Vrrp, ports: Vec::new() };
    }
    let (protocol, ports) = what.split_once(" dport ").unwrap_or_else(|| panic!("{what}"));
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        other => panic!("{other}"),
    };
    let read = |port: &str| port.trim().parse().unwrap_or_else(|_| panic!("{what}"));
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        (read(first), read(last))
    };
    let ports = ports.trim_matches(['{', '}', ' ']).split(',').map(range).collect();
    Rule { from, protocol, ports }
}

fn read_networks(text: &str) -> Vec<Ipv4Network> {
    let parts = text.trim_matches(['{', '}', ' ']).split(',').map(str::trim);
    let read = |part: &str| -> Ipv4Network {
        let (address, prefix) = part.split_once('/').unwrap_or((part, "32"));
        let address: Ipv4Addr = address.parse().unwrap_or_else(|_| panic!("{text}"));
        Ipv4Network::new(address, prefix.parse().unwrap()).unwrap()
    };
    parts.filter(|part| !part.is_empty()).map(read).collect()
}

fn contains(network: &Ipv4Network, address: Ipv4Addr) -> bool {
    let mask = u32::MAX.checked_shl(32 - u32::from(network.prefix())).unwrap_or(0);
    address.to_bits() & mask == network.address().to_bits() & mask
}

impl Rule {
    fn lets_in(&self, from: Ipv4Addr, protocol: Protocol, port: Option<u16>) -> bool {
        let is_known = self
            .from
            .as_ref()
            .is_none_or(|networks| networks.iter().any(|network| contains(network, from)));
        let is_open = port.is_none_or(|port| {
            self.ports.iter().any(|(first, last)| (*first..=*last).contains(&port))
        });
        is_known && self.protocol == protocol && is_open
    }
}

/// Every node and two strangers knock at every port that anything listens on, at every node.
#[test]
fn the_firewall_and_the_list_of_ways_say_the_same() {
    let cluster = make_cluster();
    let ways = list_ports(&cluster);
    let knocks: Vec<(Protocol, Option<u16>)> =
        ways.iter().map(|way| (way.protocol, way.port)).collect();
    let mut checked = 0;
    for node in &cluster.nodes {
        let rules = read_rules(&render_rules(&cluster, node));
        let is_node = |side: &Side, other: &Node| match side {
            Side::Nodes(role) => other.has(*role),
            Side::EveryNode | Side::Network | Side::Clients | Side::Operator => true,
        };
        let sources = cluster.nodes.iter().filter(|other| *other != node).map(|other| {
            (
                other.address,
                Box::new(move |side: &Side| is_node(side, other)) as Box<dyn Fn(&_) -> _>,
            )
        });
        let open_to = |sides: &'static [Side]| {
            Box::new(move |side: &Side| sides.contains(side)) as Box<dyn Fn(&_) -> _>
        };
        let strangers = [
            (OTHER_ON_NETWORK, open_to(&[Side::Network, Side::Clients, Side::Operator])),
            (CLIENT, open_to(&[Side::Clients, Side::Operator])),
        ];
        for (address, belongs) in sources.chain(strangers) {
            for (protocol, port) in &knocks {
                let mut here = ways.iter().filter(|way| {
                    (way.protocol, way.port) == (*protocol, *port) && is_node(&way.to, node)
                });
                let wanted = here.any(|way| way.from.iter().any(&belongs));
                let found = rules.iter().any(|rule| rule.lets_in(address, *protocol, *port));
                assert_eq!(found, wanted, "{protocol} {port:?} from {address} to {}", node.name);
                checked += 1;
            }
        }
        // Nothing is open that is not on the list.
        for rule in &rules {
            for port in rule.ports.iter().flat_map(|(first, last)| *first..=*last) {
                assert!(knocks.contains(&(rule.protocol, Some(port))), "{port} at {}", node.name);
            }
        }
    }
    assert!(checked > 500, "{checked}");
}

/// Names are not for the whole world, whoever may come from there.
#[test]
fn only_private_networks_get_names() {
    let cluster = make_cluster();
    let edge = cluster.list_nodes(Role::Edge).next().unwrap();
    let rules = read_rules(&render_rules(&cluster, edge));
    let outside = Ipv4Addr::new(203, 0, 113, 9);
    let is_open = |protocol, port| rules.iter().any(|r| r.lets_in(outside, protocol, Some(port)));
    assert!(!is_open(Protocol::Udp, 53) && !is_open(Protocol::Tcp, 53));
    assert!(is_open(Protocol::Tcp, 443));
}
