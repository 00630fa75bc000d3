use super::*;
use crate::config::cluster::{Ipv4Network, Role, Tuning};

const NOW: u64 = 1_800_000_000;

fn make_cluster() -> Cluster {
    let node = |i: u8| Node {
        name: format!("n{i}"),
        address: Ipv4Addr::new(10, 0, 0, i),
        zone: "a".into(),
        profile: "node".into(),
        roles: vec![Role::Db],
    };
    Cluster {
        name: "lab".into(),
        domain: "netbox.test".into(),
        vip: Some(Ipv4Addr::new(10, 0, 0, 100)),
        network: Ipv4Network::new(Ipv4Addr::new(10, 0, 0, 0), 24).unwrap(),
        gateway: None,
        dns: vec![],
        ntp: vec![],
        nodes: (1..=3).map(node).collect(),
        storage: None,
        tuning: Tuning::default(),
    }
}

#[test]
fn a_node_is_certified_under_all_its_names() {
    let cluster = make_cluster();
    let (authority, made) = Authority::make("lab", NOW).unwrap();
    let issued = authority.certify_node(&cluster, &cluster.nodes[1], NOW).unwrap();
    let (ca, node) =
        (Certificate::read(&made.certificate).unwrap(), Certificate::read(&issued.certificate));
    let node = node.unwrap();
    assert_eq!((node.name.as_str(), node.organization.as_str()), ("n2", "lab"));
    assert_eq!(
        node.dns_names,
        [
            "n2",
            "n2.netbox.test",
            "db.netbox.test",
            "cache.netbox.test",
            "netbox.netbox.test",
            "netbox.test",
            "localhost"
        ]
    );
    let addresses: Vec<String> = node.addresses.iter().map(IpAddr::to_string).collect();
    assert_eq!(addresses, ["10.0.0.2", "10.0.0.100", "127.0.0.1"]);
    assert_eq!((node.not_before, node.not_after), (NOW - DAY, NOW + 2 * YEAR));
    assert_eq!((ca.not_before, ca.not_after), (NOW - DAY, NOW + 10 * YEAR));
    assert!(ca.is_ca && !node.is_ca);
    assert!(ca.has_issued(&node) && ca.has_issued(&ca) && !node.has_issued(&node));
    assert!(node.fits(&issued.key) && !node.fits(&made.key) && !node.fits("x"));
}

#[test]
fn another_authority_of_the_same_name_has_issued_nothing() {
    let cluster = make_cluster();
    let (authority, _) = Authority::make("lab", NOW).unwrap();
    let (other, _) = Authority::make("lab", NOW).unwrap();
    let issued = authority.certify_node(&cluster, &cluster.nodes[0], NOW).unwrap();
    let node = Certificate::read(&issued.certificate).unwrap();
    assert!(!other.certificate().has_issued(&node));
    assert_ne!(other.certificate().fingerprint, authority.certificate().fingerprint);
    let signature = authority.sign(b"text").unwrap();
    assert!(authority.certificate().has_signed(b"text", &signature));
    assert!(!authority.certificate().has_signed(b"texT", &signature));
    assert!(!other.certificate().has_signed(b"text", &signature));
}

#[test]
fn an_authority_is_read_back_with_its_own_key_only() {
    let (_, made) = Authority::make("lab", NOW).unwrap();
    let (_, other) = Authority::make("lab", NOW).unwrap();
    let again = Authority::read(&made.certificate, &made.key).unwrap();
    let operator = again.certify_operator(NOW).unwrap();
    let read = Certificate::read(&operator.certificate).unwrap();
    assert_eq!((read.name.as_str(), read.not_after), ("operator", NOW + 10 * YEAR));
    assert!(again.certificate().has_issued(&read));
    assert!(Authority::read(&made.certificate, &other.key).is_err());
    assert!(Authority::read(&operator.certificate, &operator.key).is_err());
    let error = Authority::read(&made.certificate, "-----BEGIN secret").err().unwrap();
    assert!(!format!("{error:#}").contains("secret"), "{error:#}");
}

#[test]
fn no_certificate_outlives_the_authority() {
    let cluster = make_cluster();
    let (authority, _) = Authority::make("lab", NOW).unwrap();
    let late = NOW + 10 * YEAR - 5;
    let issued = authority.certify_node(&cluster, &cluster.nodes[0], late).unwrap();
    assert_eq!(Certificate::read(&issued.certificate).unwrap().not_after, NOW + 10 * YEAR);
    let error = authority.certify_node(&cluster, &cluster.nodes[0], late + 10).err().unwrap();
    assert!(error.is::<UserError>(), "{error:#}");
}
