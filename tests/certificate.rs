//! What three edges show users on 443: one certificate for all, renewed under a lock while
//! requests go on, kept through restarts, and replaced by one that the operator brings.

#[allow(dead_code, reason = "other tests do more to the cluster")]
#[path = "support/ha.rs"]
mod ha;
#[allow(dead_code, reason = "other tests look into the image")]
#[path = "support/image.rs"]
mod image;
#[allow(dead_code, reason = "other tests have users that are unwelcome")]
#[path = "support/users.rs"]
mod users;

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use ha::Ha;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use stanchion::cluster_dir::ClusterDir;
use stanchion::seed::{Brought, issue_seed};
use users::Users;

const SOON: Duration = Duration::from_secs(20);
const WHOLE: Duration = Duration::from_secs(120);

#[test]
fn all_edges_show_users_one_certificate_whatever_happens_to_them() {
    let Some(ha) = Ha::create("certificate", |_| {}) else { return };
    ha.start_all();
    ha.wait_until_whole();
    let cluster_ca = fs::read_to_string(ha.lab.secrets().join("ca.pem")).unwrap();
    let users = Users::new(&ha, &[&cluster_ca]);
    let first = wait_for_one(&ha, &users, None);
    eprintln!("after the formation all show {first}");

    let second = renew_at_two_edges_at_once(&ha, &users, &first);
    let third = renew_under_load(&ha, &users, &second);
    let fourth = renew_while_one_is_dead(&ha, &users, &third);
    power_off_all(&ha, &users, &fourth);
    bring_one(&ha, &cluster_ca, &fourth);
}

/// Wait until all edges show the same, and something else than before.
#[track_caller]
fn wait_for_one(ha: &Ha, users: &Users, before: Option<&str>) -> String {
    ha.wait_for("all edges show the same certificate", SOON, || {
        let mut shown = Vec::new();
        for node in ha.nodes() {
            shown.push(users.look(ha.lab.address(node).unwrap()).ok()?);
        }
        shown.push(users.look(ha.vip()).ok()?);
        shown.dedup();
        (shown.len() == 1 && Some(shown[0].as_str()) != before).then(|| shown.remove(0))
    })
}

fn renew(ha: &Ha, node: &str) -> Value {
    let text = ha.run(node, &["stanchion-agent", "renew-certificate", "--json"]);
    serde_json::from_str(&text).unwrap()
}

/// Somebody else has the lock when both are asked: neither has finished before the other has
/// begun.
fn renew_at_two_edges_at_once(ha: &Ha, users: &Users, before: &str) -> String {
    let lock = BASE64_STANDARD.encode(format!("/stanchion/{}/locks/site", ha.cluster.name));
    let lease = call_etcd(ha, "lease/grant", &json!({"TTL": "60"}));
    let put = json!({"key": lock, "value": "", "lease": lease["ID"]});
    call_etcd(ha, "kv/put", &put);
    let lab = &ha.lab;
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let ask = |node: &'static str| {
            let argv = ["stanchion-agent", "renew-certificate", "--json"];
            scope.spawn(move || lab.exec(node, &argv, Duration::from_secs(30)).unwrap().text())
        };
        let asked = ["n1", "n3"].map(ask);
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(wait_for_one(ha, users, None), before, "it was renewed without the lock");
        call_etcd(ha, "kv/deleterange", &json!({"key": lock}));
        asked.map(|asked| serde_json::from_str(&asked.join().unwrap()).unwrap()).to_vec()
    });
    let made = answers.iter().filter(|answer| answer["made"] == true).count();
    assert_eq!(made, 1, "{answers:?}");
    let after = wait_for_one(ha, users, Some(before));
    assert!(answers.iter().all(|answer| answer["fingerprint"] == after.as_str()), "{answers:?}");
    after
}

/// Ask etcd from a node: nobody else may.
fn call_etcd(ha: &Ha, verb: &str, body: &Value) -> Value {
    const ASK: &str = "import ssl, sys, urllib.request as r
t = '/run/stanchion/tls/'
c = ssl.create_default_context(cafile=t + 'ca.pem')
c.load_cert_chain(t + 'node.pem', t + 'node.key')
print(r.urlopen(sys.argv[1], sys.argv[2].encode(), 5, context=c).read().decode())";
    let url = format!("https://{}:2379/v3/{verb}", ha.lab.address("n2").unwrap());
    let text = ha.run("n2", &["python3", "-I", "-c", ASK, &url, &body.to_string()]);
    serde_json::from_str(&text).unwrap()
}

/// Connections that are open stay open, and no request is lost.
fn renew_under_load(ha: &Ha, users: &Users, before: &str) -> String {
    let mut silent = users.open(ha.vip()).unwrap();
    assert_eq!(silent.ask().unwrap(), 503);
    let load = users.load(ha.vip());
    std::thread::sleep(Duration::from_secs(1));
    let mut last = before.to_string();
    for node in ["n1", "n2", "n3"] {
        assert_eq!(renew(ha, node)["made"], true);
        last = wait_for_one(ha, users, Some(&last));
    }
    std::thread::sleep(Duration::from_secs(1));
    let (answered, failed) = load.stop();
    eprintln!("{answered} requests were answered during three renewals");
    assert!(answered > 50 && failed.is_empty(), "{answered} answered, failed: {failed:?}");
    // Opened under the first of four certificates.
    assert_eq!(silent.ask().unwrap(), 503);
    last
}

fn renew_while_one_is_dead(ha: &Ha, users: &Users, before: &str) -> String {
    ha.lab.kill("n2").unwrap();
    assert_eq!(renew(ha, "n3")["made"], true);
    ha.lab.start("n2").unwrap();
    ha.wait_for("whole after the kill", WHOLE, || ha.is_whole().then_some(()));
    wait_for_one(ha, users, Some(before))
}

fn power_off_all(ha: &Ha, users: &Users, before: &str) {
    for node in ha.nodes() {
        ha.lab.kill(node).unwrap();
    }
    ha.start_all();
    ha.wait_for("whole after the power-off", WHOLE, || ha.is_whole().then_some(()));
    assert_eq!(wait_for_one(ha, users, None), before);
}

/// In the seed of one edge; all show it, and nobody but the operator renews it.
fn bring_one(ha: &Ha, cluster_ca: &str, before: &str) {
    let (ca, brought) = make_brought(&ha.cluster.domain);
    let users = Users::new(ha, &[cluster_ca, &ca]);
    let directory = ClusterDir::open(&ha.lab.secrets(), &ha.cluster).unwrap();
    let node = ha.cluster.find_node("n1").unwrap();
    let seed = issue_seed(&ha.cluster, node, &directory, Some(&brought), read_clock()).unwrap();
    ha.lab.kill("n1").unwrap();
    ha.lab.set_seed("n1", Some(&seed)).unwrap();
    ha.lab.start("n1").unwrap();
    ha.wait_for("whole with a new seed", WHOLE, || ha.is_whole().then_some(()));
    wait_for_one(ha, &users, Some(before));
    let argv = ["stanchion-agent", "renew-certificate"];
    let refused = ha.lab.exec("n2", &argv, SOON).unwrap();
    assert_eq!(refused.code, Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("the operator brought it"));
    // Its end is near: told everywhere, and no reason not to be ready.
    for node in ha.nodes() {
        let status = ha.get_status(node).unwrap();
        let warning = status["warnings"]["site"].as_str().unwrap_or_default();
        assert!(warning.contains("expires in 9 days"), "{status}");
        assert_eq!(status["ready"], true, "{status}");
    }
}

/// A CA that the cluster knows nothing of, and its certificate for a domain, valid for ten
/// days.
fn make_brought(domain: &str) -> (String, Brought) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "the company's CA");
    let key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    let mut params = CertificateParams::new(vec![domain.to_string()]).unwrap();
    let now = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(read_clock());
    params.not_before = now - Duration::from_secs(3600);
    params.not_after = now + Duration::from_secs(10 * 86_400);
    let key = KeyPair::generate().unwrap();
    let chain = params.signed_by(&key, &issuer).unwrap().pem();
    (ca, Brought { chain, key: key.serialize_pem() })
}

fn read_clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}
