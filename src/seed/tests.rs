use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use proptest::prelude::*;

use super::document::Envelope;
use super::volume::{read_seed, write_seed};
use super::*;
use crate::cluster_dir::ClusterDir;
use crate::config::cluster::{Cluster, Ipv4Network, Node, ObjectStorage, Role, Tuning};
use crate::pki::Authority;
use crate::secrets::{Secret, make_secrets};

const NOW: u64 = 1_800_000_000;
const YEAR: u64 = 365 * 86_400;

fn make_cluster(name: &str) -> Cluster {
    let node = |i: u8, roles: &[Role]| Node {
        name: format!("n{i}"),
        address: Ipv4Addr::new(10, 0, 0, i),
        zone: format!("z{i}"),
        profile: "node".into(),
        roles: roles.to_vec(),
    };
    let all = [Role::Db, Role::Cache, Role::Edge];
    Cluster {
        name: name.into(),
        domain: "netbox.test".into(),
        vip: Some(Ipv4Addr::new(10, 0, 0, 100)),
        network: Ipv4Network::new(Ipv4Addr::new(10, 0, 0, 0), 24).unwrap(),
        gateway: None,
        dns: vec![],
        ntp: vec![],
        nodes: vec![node(1, &all), node(2, &all), node(3, &all), node(4, &[Role::Cache])],
        storage: None,
        backup: None,
        external: Default::default(),
        tuning: Tuning::default(),
    }
}

fn make_directory(cluster: &str) -> ClusterDir {
    let (authority, ca) = Authority::make(cluster, NOW).unwrap();
    let secrets = make_secrets(
        &Cluster { storage: Some(make_storage()), ..make_cluster(cluster) },
        &BTreeMap::new(),
    )
    .unwrap();
    ClusterDir { authority, ca: ca.certificate, secrets }
}

fn make_storage() -> ObjectStorage {
    ObjectStorage {
        endpoint: "https://s3.test".into(),
        bucket: "media".into(),
        region: "eu".into(),
    }
}

/// The seed of the node `n1` in a cluster, and its directory.
fn make_seed(name: &str) -> (Vec<u8>, Cluster, ClusterDir) {
    let (cluster, directory) = (make_cluster(name), make_directory(name));
    let seed = issue_seed(&cluster, &cluster.nodes[0], &directory, None, NOW).unwrap();
    (seed, cluster, directory)
}

fn accept(bytes: &[u8]) -> Seed {
    match verify_seed(Some(bytes), NOW, None) {
        Verdict::Accepted(seed) => *seed,
        refused => panic!("{refused}"),
    }
}

/// Change the seed of `n1` and sign it with its cluster's CA, as somebody who has the CA's
/// key could.
fn forge(change: impl FnOnce(&mut Seed, &Cluster, &ClusterDir)) -> Verdict {
    let (bytes, cluster, directory) = make_seed("lab");
    let mut seed = accept(&bytes);
    change(&mut seed, &cluster, &directory);
    verify_seed(Some(&seal(&serde_json::to_string(&seed).unwrap(), &directory)), NOW, None)
}

fn seal(text: &str, directory: &ClusterDir) -> Vec<u8> {
    let signature = STANDARD.encode(directory.authority.sign(text.as_bytes()).unwrap());
    serde_json::to_vec(&Envelope { seed: text.into(), signature }).unwrap()
}

#[track_caller]
fn expect_tampered(verdict: Verdict, why: &str) {
    match &verdict {
        Verdict::Tampered(said) => assert!(said.contains(why), "{said}"),
        other => panic!("{other}"),
    }
}

#[test]
fn a_seed_is_accepted_by_its_node_and_again_after_it() {
    let (bytes, cluster, directory) = make_seed("lab");
    let seed = accept(&bytes);
    assert_eq!((seed.node.as_str(), seed.issued, &seed.cluster), ("n1", NOW, &cluster));
    let identity = Identity::of(&seed).unwrap();
    let renewed = issue_seed(&cluster, &cluster.nodes[0], &directory, None, NOW + YEAR).unwrap();
    assert_ne!(renewed, bytes);
    for bytes in [&bytes, &renewed] {
        let verdict = verify_seed(Some(bytes), NOW + YEAR, Some(&identity));
        assert!(matches!(verdict, Verdict::Accepted(_)), "{verdict}");
    }
    // A cluster that has grown.
    let mut grown = cluster.clone();
    grown.nodes[3].name = "n5".into();
    let bytes = issue_seed(&grown, &grown.nodes[0], &directory, None, NOW).unwrap();
    assert!(matches!(verify_seed(Some(&bytes), NOW, Some(&identity)), Verdict::Accepted(_)));
}

#[test]
fn each_refusal_has_its_verdict() {
    let (bytes, cluster, directory) = make_seed("lab");
    let identity = Identity::of(&accept(&bytes)).unwrap();
    assert_eq!(verify_seed(None, NOW, Some(&identity)), Verdict::Missing);

    let (other, ..) = make_seed("other");
    let (namesake, ..) = make_seed("lab");
    for (foreign, why) in [(other, "the seed to `other`"), (namesake, "has another CA")] {
        match verify_seed(Some(&foreign), NOW, Some(&identity)) {
            Verdict::Foreign(said) => assert!(said.contains(why), "{said}"),
            verdict => panic!("{verdict}"),
        }
    }
    let second = issue_seed(&cluster, &cluster.nodes[1], &directory, None, NOW).unwrap();
    let verdict = verify_seed(Some(&second), NOW, Some(&identity));
    assert_eq!(
        verdict.to_string(),
        "the seed is for another node: this node is `n1`, the seed is for `n2`"
    );
    for (now, why) in [(NOW + 2 * YEAR, "has expired 0 days ago"), (NOW - 2 * 86_400, "clock is")] {
        match verify_seed(Some(&bytes), now, Some(&identity)) {
            Verdict::Expired(said) => assert!(said.contains(why), "{said}"),
            verdict => panic!("{verdict}"),
        }
    }
}

#[test]
fn what_does_not_fit_together_is_refused_though_it_is_signed() {
    assert!(matches!(forge(|_, _, _| {}), Verdict::Accepted(_)));
    expect_tampered(forge(|seed, _, _| seed.format = 2), "its format is 2");
    expect_tampered(forge(|seed, _, _| seed.node = "n9".into()), "has no node `n9`");
    expect_tampered(forge(|seed, _, _| seed.node = "n2".into()), "names another node");
    expect_tampered(
        forge(|seed, _, _| seed.cluster.nodes[0].address = Ipv4Addr::new(10, 0, 0, 77)),
        "another address",
    );
    expect_tampered(forge(|seed, _, _| seed.cluster.name = "lub".into()), "names another node or");
    expect_tampered(
        forge(|seed, _, _| seed.cluster.nodes[1].name = "x\nrogue: true".into()),
        "bad node name `x\\nrogue: true`",
    );
    expect_tampered(
        forge(|seed, _, _| drop(seed.secrets.remove("redis"))),
        "lacks the secret `redis`",
    );
    expect_tampered(
        forge(|seed, cluster, directory| {
            let other = directory.authority.certify_node(cluster, &cluster.nodes[0], NOW).unwrap();
            seed.key = other.key;
        }),
        "its key is not that",
    );
    expect_tampered(
        forge(|seed, cluster, _| {
            let issued = make_directory("lab")
                .authority
                .certify_node(cluster, &cluster.nodes[0], NOW)
                .unwrap();
            (seed.certificate, seed.key) = (issued.certificate, issued.key);
        }),
        "certificate is not the CA's",
    );
    // The CA of another cluster, under a signature of this one's.
    expect_tampered(forge(|seed, _, _| seed.ca = make_directory("lab").ca), "signature is wrong");
}

#[test]
fn a_node_gets_the_secrets_of_its_roles() {
    let (_, cluster, directory) = make_seed("lab");
    let bytes = issue_seed(&cluster, &cluster.nodes[3], &directory, None, NOW).unwrap();
    let seed = accept(&bytes);
    assert_eq!(seed.secrets.keys().collect::<Vec<_>>(), ["fingerprint", "redis", "sentinel"]);
    let text = String::from_utf8(bytes).unwrap();
    for (name, secret) in &directory.secrets {
        assert_eq!(text.contains(secret.reveal()), seed.secrets.contains_key(name), "{name}");
    }
}

#[test]
fn what_is_shown_of_a_seed_is_no_secret() {
    let (bytes, ..) = make_seed("lab");
    let seed = accept(&bytes);
    let shown = format!("{seed:?} {:?}", verify_seed(Some(&bytes), NOW, None));
    assert!(shown.contains("n1") && !shown.contains("PRIVATE KEY"), "{shown}");
    for secret in seed.secrets.values() {
        assert!(!shown.contains(secret.reveal()), "{shown}");
    }
}

#[test]
fn what_is_no_seed_at_all_is_refused() {
    let (bytes, _, directory) = make_seed("lab");
    let deep = format!("{}1{}", "[".repeat(30_000), "]".repeat(30_000));
    for bad in [
        b"".to_vec(),
        b"{}".to_vec(),
        b"null".to_vec(),
        b"#cloud-config\nusers: []\n".to_vec(),
        vec![0xff; 1000],
        vec![b' '; MAX_BYTES + 1],
        deep.clone().into_bytes(),
        seal(&deep, &directory),
        seal(&format!("{{\"seed\":{deep}}}"), &directory),
        seal("{\"format\":1}", &directory),
        [&bytes[..], b"\n"].concat(),
        [&bytes[..], &bytes[..]].concat(),
        bytes[..bytes.len() - 2].to_vec(),
        String::from_utf8(bytes.clone()).unwrap().replacen(':', ": ", 1).into_bytes(),
    ] {
        let start = String::from_utf8_lossy(&bad[..bad.len().min(30)]).into_owned();
        let verdict = verify_seed(Some(&bad), NOW, None);
        assert!(matches!(verdict, Verdict::Tampered(_)), "{start}: {verdict}");
        assert!(verdict.to_string().len() < 300);
    }
    // A newline lost at its end is no change of it.
    accept(bytes.strip_suffix(b"\n").unwrap());
}

#[test]
fn a_seed_that_its_node_would_refuse_is_not_written() {
    let (cluster, mut directory) = (make_cluster("lab"), make_directory("lab"));
    let mut bad = cluster.clone();
    bad.ntp = vec!["no server".into()];
    issue_seed(&bad, &bad.nodes[0], &directory, None, NOW).unwrap_err();
    let elsewhere = make_cluster("other");
    issue_seed(&elsewhere, &elsewhere.nodes[0], &directory, None, NOW).unwrap_err();
    directory.secrets = BTreeMap::new();
    issue_seed(&cluster, &cluster.nodes[0], &directory, None, NOW).unwrap_err();
}

#[test]
fn the_largest_cluster_has_seeds() {
    let mut cluster = make_cluster(&"c".repeat(63));
    cluster.domain = format!("{0}.{0}.{1}", "d".repeat(63), "e".repeat(52));
    let node = |i: u8| Node {
        name: format!("n{i}{}", "x".repeat(50)),
        address: Ipv4Addr::new(10, 0, 0, i + 1),
        zone: "z".repeat(63),
        profile: "p".repeat(60),
        roles: if i < 5 { Role::ALL.to_vec() } else { Role::ALL[1..].to_vec() },
    };
    cluster.nodes = (0..64).map(node).collect();
    cluster.storage = Some(make_storage());
    let directory = make_directory(&cluster.name);
    let bytes = issue_seed(&cluster, &cluster.nodes[0], &directory, None, NOW).unwrap();
    assert_eq!(accept(&bytes).cluster, cluster);
}

#[test]
fn a_seed_comes_back_from_its_volume() {
    let (bytes, ..) = make_seed("lab");
    let file = tempfile::tempfile().unwrap();
    write_seed(&file, &bytes, NOW).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 4 << 20);
    assert_eq!(read_seed(&file).unwrap().unwrap(), bytes);
}

#[test]
fn a_volume_of_cloud_init_may_carry_it_and_any_other_does_not() {
    use crate::disk::fat16::{SIZE, write_volume};
    use crate::disk::region::Region;
    let write = |label: &str, name: &str, content: &[u8]| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        let place = Region::new(&file, 0, SIZE);
        write_volume(&place, label, name, content, NOW, 1).unwrap();
        read_seed(&file).unwrap()
    };
    assert_eq!(write("CIDATA", "user-data", b"x"), Some(b"x".to_vec()));
    assert_eq!(write("CIDATA", FILE_NAME, b"x"), Some(b"x".to_vec()));
    assert_eq!(write("STANCHION", "user-data", b"x"), None);
    assert_eq!(write("OTHER", FILE_NAME, b"x"), None);
    let long = write("STANCHION", FILE_NAME, &vec![b'x'; 200_000]).unwrap();
    assert_eq!(long.len(), MAX_BYTES + 1);
    assert!(matches!(verify_seed(Some(&long), NOW, None), Verdict::Tampered(_)));
    let empty = tempfile::tempfile().unwrap();
    assert_eq!(read_seed(&empty).unwrap(), None);
}

#[test]
fn no_flipped_bit_of_a_seed_is_accepted() {
    // Every byte once, by one bit that wanders.
    let (bytes, ..) = make_seed("lab");
    let mut changed = bytes.clone();
    for at in 0..bytes.len() {
        changed[at] ^= 1 << (at % 8);
        let verdict = verify_seed(Some(&changed), NOW, None);
        assert!(matches!(verdict, Verdict::Tampered(_)), "byte {at}: {verdict}");
        changed[at] = bytes[at];
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_bytes_make_the_verifier_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(matches!(verify_seed(Some(&bytes), NOW, None), Verdict::Tampered(_)));
    }

    #[test]
    fn no_changed_text_is_accepted_under_the_old_signature(
        changes in prop::collection::vec((0.0..1.0f64, any::<u8>()), 1..5),
    ) {
        let (bytes, ..) = make_seed("lab");
        let mut changed = bytes.clone();
        for (place, value) in changes {
            changed[(place * bytes.len() as f64) as usize] = value;
        }
        if changed != bytes {
            let verdict = verify_seed(Some(&changed), NOW, None);
            prop_assert!(!matches!(verdict, Verdict::Accepted(_)), "{}", verdict);
        }
    }

    #[test]
    fn no_signed_text_makes_the_verifier_panic(
        place in 0.0..1.0f64,
        value in "[\\PC\"{}\\[\\]:,]{0,8}",
    ) {
        let (bytes, _, directory) = make_seed("lab");
        let envelope: Envelope = serde_json::from_slice(&bytes).unwrap();
        let mut text = envelope.seed;
        let at = (place * text.len() as f64) as usize;
        text.insert_str(at, &value);
        let _ = verify_seed(Some(&seal(&text, &directory)), NOW, None).to_string();
    }

    #[test]
    fn a_secret_holds_nothing_that_a_config_could_read_as_its_end(text in "\\PC{0,20}") {
        let secret = Secret::new(text.clone());
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "+/=_.-".contains(c);
        prop_assert_eq!(secret.is_some(), !text.is_empty() && text.chars().all(is_plain));
    }
}
