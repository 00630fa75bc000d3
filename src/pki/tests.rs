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
        backup: None,
        external: Default::default(),
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

/// Whether rustls believes a chain, as a server's for a name, and as a client's.
fn verify(ca: &str, chain: &str, name: &str) -> (Result<(), String>, Result<(), String>) {
    use rustls::client::WebPkiServerVerifier;
    use rustls::client::danger::ServerCertVerifier;
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::server::WebPkiClientVerifier;

    let read = |pem: &str| -> Vec<CertificateDer<'static>> {
        CertificateDer::pem_slice_iter(pem.as_bytes()).map(Result::unwrap).collect()
    };
    let mut roots = rustls::RootCertStore::empty();
    roots.add(read(ca).remove(0)).unwrap();
    let (roots, chain) = (std::sync::Arc::new(roots), read(chain));
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let now = UnixTime::since_unix_epoch(Duration::from_secs(NOW + DAY));
    let server = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone());
    let name = ServerName::try_from(name.to_string()).unwrap();
    let server =
        server.build().unwrap().verify_server_cert(&chain[0], &chain[1..], &name, &[], now);
    let client = WebPkiClientVerifier::builder_with_provider(roots, provider).build().unwrap();
    let client = client.verify_client_cert(&chain[0], &chain[1..], now);
    (server.map(drop).map_err(|e| e.to_string()), client.map(drop).map_err(|e| e.to_string()))
}

#[test]
fn the_site_ca_certifies_what_users_see_and_nothing_else() {
    let cluster = make_cluster();
    let (authority, made) = Authority::make("lab", NOW).unwrap();
    let key = make_site_key().unwrap();
    let pem = authority.certify_site_authority(&cluster, &key, NOW).unwrap();
    let site = SiteAuthority::read(&pem, &key).unwrap();
    assert!(authority.certificate().has_issued(site.certificate()));
    assert_eq!(site.certificate().not_after, authority.certificate().not_after);
    assert_eq!((site.certificate().is_ca, site.certificate().depth), (true, Some(0)));
    assert!(SiteAuthority::read(&pem, &make_site_key().unwrap()).is_err());

    let issued = site.certify(&cluster, NOW).unwrap();
    let chain = Chain::read(&issued.certificate, &issued.key).unwrap();
    assert_eq!(chain.not_after, NOW + 90 * DAY);
    for name in ["netbox.test", "netbox.netbox.test", "db.netbox.test", "10.0.0.100"] {
        let (server, client) = verify(&made.certificate, &issued.certificate, name);
        server.unwrap();
        client.unwrap_err();
    }
    // With the site CA's key one still cannot be a node, or anybody else.
    for (vip, domain, asked) in
        [(100, "n1", "n1"), (100, "other.test", "other.test"), (1, "netbox.test", "10.0.0.1")]
    {
        let other = Cluster {
            vip: Some(Ipv4Addr::new(10, 0, 0, vip)),
            domain: domain.into(),
            ..cluster.clone()
        };
        let forged = site.certify(&other, NOW).unwrap();
        verify(&made.certificate, &forged.certificate, asked).0.unwrap_err();
    }
}

#[test]
fn a_chain_is_read_only_with_its_key_and_in_its_order() {
    let cluster = make_cluster();
    let (authority, made) = Authority::make("lab", NOW).unwrap();
    let key = make_site_key().unwrap();
    let pem = authority.certify_site_authority(&cluster, &key, NOW).unwrap();
    let issued = SiteAuthority::read(&pem, &key).unwrap().certify(&cluster, NOW).unwrap();
    let commented = format!("a comment\n{}\n\n{}", issued.certificate, made.certificate);
    let chain = Chain::read(&commented, &issued.key).unwrap();
    assert_eq!(chain.pem.certificate, issued.certificate.clone() + &made.certificate);
    assert_eq!(chain.pem.key, issued.key);
    assert!(chain.covers("netbox.test") && !chain.covers("test"));
    let leaf = issued.certificate.replace(&pem, "");
    let cases = [
        (format!("{pem}{leaf}"), issued.key.clone(), "number 1 is not of the CA"),
        (format!("{leaf}{}", made.certificate), issued.key.clone(), "number 1 is not of the CA"),
        (issued.certificate.clone(), made.key.clone(), "not that of the first certificate"),
        (issued.certificate.clone(), String::new(), "no private key"),
        (String::new(), issued.key.clone(), "no certificate"),
        ("x".repeat(20 << 10), issued.key.clone(), "more than 16 KiB"),
    ];
    for (chain, key, why) in cases {
        let error = Chain::read(&chain, &key).err().unwrap();
        assert!(error.to_string().contains(why), "{error:#}");
    }
}

#[test]
fn an_old_authority_certifies_no_other() {
    let mut old = Authority::make("lab", NOW).unwrap().0;
    old.certificate.depth = Some(0);
    let key = make_site_key().unwrap();
    let error = old.certify_site_authority(&make_cluster(), &key, NOW).err().unwrap();
    assert!(error.is::<UserError>(), "{error:#}");
}
