//! A machine of the profile `edge` that neither the cluster file of the others nor their seeds
//! name: it joins, serves users and databases, and goes again, with no change anywhere else.
//! And a web server that only the registry names, on the machine that holds the lab.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, Stream};
use serde_json::json;
use stanchion::cluster_dir::ClusterDir;
use stanchion::config::cluster::{Cluster, Node, Role};
use stanchion::lab::NodeSpec;
use stanchion::seed::{Verdict, issue_seed, verify_seed};

use crate::ha::{Ha, WHOLE};
use crate::image;
use crate::users::Users;

const NAME: &str = "n4";
const WEB: &str = "w1";
const SOON: Duration = Duration::from_secs(20);
/// HAProxy's limit for one client, and some more: requests in ten seconds.
const TOO_MANY: usize = 1500;

/// The machine, which lies in the rack from the beginning.
pub fn describe(cluster: &Cluster) -> Option<Vec<NodeSpec>> {
    let image = image::provide_edge()?.raw.clone();
    Some(vec![NodeSpec { name: NAME.into(), address: find_address(cluster), image }])
}

fn find_address(cluster: &Cluster) -> Ipv4Addr {
    Ipv4Addr::from_bits(cluster.network.address().to_bits() + 14)
}

/// The machine that holds the lab has the last address of its network.
fn find_host(cluster: &Cluster) -> Ipv4Addr {
    Ipv4Addr::from_bits(cluster.network.broadcast().to_bits() - 1)
}

pub fn join_serve_and_leave(ha: &Ha) {
    let ca = fs::read_to_string(ha.lab.secrets().join("ca.pem")).unwrap();
    let users = Users::new(ha, &[&ca]);
    let (seed, _) = issue(ha, NAME, find_address(&ha.cluster), Role::Edge);
    ha.lab.set_seed(NAME, Some(&seed)).unwrap();
    let answers = |code| {
        let all = || ha.nodes().into_iter().all(|node| ask(ha, &users, node) == Some(code));
        let what = format!("all edges answer {code}");
        ha.wait_for(&what, SOON, || all().then_some(()));
    };
    answers(503);
    ha.lab.start(NAME).unwrap();
    ha.wait_for("the newcomer is ready", WHOLE, || is_ready(ha).then_some(()));
    ha.wait_for("the others are whole", WHOLE, || ha.is_whole().then_some(()));
    serve_the_web(ha);
    announce_web(ha, true);
    answers(200);
    ha.wait_for("its own edge answers", SOON, || (ask(ha, &users, NAME)? == 200).then_some(()));
    let names = ha.run("n2", &["cat", "/etc/stanchion-dns/hosts"]);
    assert!(names.contains(&format!("{NAME}.{}", ha.cluster.domain)), "{names}");
    hold_the_vip(ha, &users);
    leave(ha);
    announce_web(ha, false);
    answers(503);
    ban(ha, &users);
}

/// A seed of a cluster file that names it, by the same CA; and its certificate and key, PEM.
fn issue(ha: &Ha, name: &str, address: Ipv4Addr, role: Role) -> (Vec<u8>, [String; 2]) {
    let mut cluster = ha.cluster.clone();
    let node = Node {
        name: name.into(),
        address,
        zone: "z4".into(),
        profile: role.name().into(),
        roles: vec![role],
    };
    cluster.nodes.push(node.clone());
    let directory = ClusterDir::open(&ha.lab.secrets(), &ha.cluster).unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let bytes = issue_seed(&cluster, &node, &directory, None, now).unwrap();
    let Verdict::Accepted(seed) = verify_seed(Some(&bytes), now, None) else {
        panic!("a right seed is refused");
    };
    (bytes, [seed.certificate, seed.key])
}

fn is_ready(ha: &Ha) -> bool {
    ha.get_status(NAME).is_some_and(|page| page["ready"] == true)
}

fn ask(ha: &Ha, users: &Users, node: &str) -> Option<u16> {
    users.ask(ha.lab.address(node).unwrap()).ok()
}

/// What stands in for NetBox: it has the certificate of a web node, and says yes to everybody.
fn serve_the_web(ha: &Ha) {
    let host = find_host(&ha.cluster);
    let (_, [certificate, key]) = issue(ha, WEB, host, Role::Web);
    let chain = CertificateDer::pem_slice_iter(certificate.as_bytes());
    let chain = chain.collect::<Result<Vec<_>, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let config = Arc::new(config);
    let listener = ha.lab.enter_network(|| TcpListener::bind((host, 8443))).unwrap().unwrap();
    // It ends with the test's process.
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let config = config.clone();
            std::thread::spawn(move || drop(say_yes(stream, config)));
        }
    });
}

/// Answer each request on a connection until it ends.
fn say_yes(mut stream: TcpStream, config: Arc<ServerConfig>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut connection = ServerConnection::new(config).map_err(std::io::Error::other)?;
    let mut tls = Stream::new(&mut connection, &mut stream);
    let mut asked = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let length = tls.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        asked.extend_from_slice(&buffer[..length]);
        while let Some(end) = asked.windows(4).position(|four| four == b"\r\n\r\n") {
            asked.drain(..end + 4);
            tls.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhere")?;
        }
    }
}

/// Let the registry have it, as its agent would, or no longer.
fn announce_web(ha: &Ha, is_there: bool) {
    let node = json!({
        "name": WEB, "address": find_host(&ha.cluster), "zone": "z5", "profile": "web",
        "roles": ["web"], "ordinal": 5, "version": "1", "phase": "main", "ready": true,
        "reasons": [],
    });
    let key = format!("/stanchion/{}/nodes/{WEB}", ha.cluster.name);
    ha.change_etcd("n1", &key, is_there.then(|| node.to_string()).as_deref());
}

/// It takes the address when the others give it up, and what comes there goes everywhere.
fn hold_the_vip(ha: &Ha, users: &Users) {
    for node in ha.nodes() {
        ha.run(node, &["systemctl", "stop", "keepalived"]);
    }
    let holds = || (ha.find_vip_holder()? == NAME).then_some(());
    ha.wait_for("the newcomer holds the VIP", SOON, holds);
    for node in ha.nodes() {
        ha.run(node, &["systemctl", "start", "keepalived"]);
    }
    assert_eq!(users.ask(ha.vip()), Ok(200));
    ha.write().wait_for_write(SOON).unwrap();
    let redis = ha.write_redis();
    ha.wait_for("Redis can be written to", SOON, || redis.timeline().last());
    ha.wait_for("whole with the VIP at the newcomer", WHOLE, || ha.is_whole().then_some(()));
    ha.wait_for("ready with the VIP", WHOLE, || is_ready(ha).then_some(()));
    assert_eq!(ha.find_vip_holder().as_deref(), Some(NAME), "it was taken away again");
}

/// As if its power had gone, with the VIP.
fn leave(ha: &Ha) {
    let ledger = ha.write();
    ledger.wait_for_write(SOON).unwrap();
    ha.lab.kill(NAME).unwrap();
    ledger.wait_for_write(SOON).unwrap();
    let is_forgotten = || {
        let names = |path| ha.run("n1", &["cat", path]).contains(NAME);
        let files = ["/etc/haproxy/haproxy.cfg", "/etc/stanchion-dns/hosts"];
        let registered = ha.list_registered();
        let is_there = registered.iter().any(|node| node["name"] == NAME);
        let is_gone = !is_there && !files.into_iter().any(names);
        (is_gone && ha.is_whole()).then_some(())
    };
    ha.wait_for("nobody speaks of it any more", WHOLE, is_forgotten);
    assert!(ha.find_lost(&ledger.stop()).is_empty());
}

/// Who is banned at one edge is so at all; who keeps on, also at one that comes later.
fn ban(ha: &Ha, users: &Users) {
    let edge = ha.lab.address("n1").unwrap();
    let mut user = users.open(edge);
    let banned = (0..TOO_MANY).find(|_| {
        let code = user.as_mut().ok().and_then(|user| user.ask().ok());
        if code.is_none() {
            // Ended by a reload, which the newcomer's going has brought.
            user = users.open(edge);
        }
        code == Some(429)
    });
    eprintln!("banned after {banned:?} requests");
    assert!(banned.is_some_and(|count| count >= 900), "{banned:?}");
    for node in ha.nodes() {
        let is_banned = || (ask(ha, users, node)? == 429).then_some(());
        ha.wait_for("banned at each edge", Duration::from_secs(3), is_banned);
    }
    ha.lab.start(NAME).unwrap();
    ha.wait_for("the newcomer is back", WHOLE, || is_ready(ha).then_some(()));
    // Edges tell what they see anew: it may have come too late for what they know already.
    ha.wait_for("banned there, too", SOON, || {
        users.ask(edge).ok()?;
        (ask(ha, users, NAME)? == 429).then_some(())
    });
    // A node is no user.
    let script = "import ssl, sys, urllib.request as r
c = ssl.create_default_context(cafile='/run/stanchion/tls/ca.pem')
c.check_hostname = False
try: print(r.urlopen('https://' + sys.argv[1], timeout=5, context=c).status)
except r.HTTPError as e: print(e.code)";
    let vip = ha.vip().to_string();
    assert_eq!(ha.run("n2", &["python3", "-I", "-c", script, &vip]), "503");
    ha.lab.kill(NAME).unwrap();
    ha.wait_for("whole without it", WHOLE, || {
        (ha.list_registered().len() == 3 && ha.is_whole()).then_some(())
    });
}
