//! A machine of the profile `edge` that neither the cluster file of the others nor their seeds
//! name: it joins, serves users and databases, and goes again, with no change anywhere else.

use std::fs;
use std::net::Ipv4Addr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stanchion::cluster_dir::ClusterDir;
use stanchion::config::cluster::{Cluster, Node, ObjectStorage, Role};
use stanchion::lab::NodeSpec;
use stanchion::seed::issue_seed;

use crate::ha::{Ha, WHOLE};
use crate::image;
use crate::users::Users;

const NAME: &str = "n4";
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

pub fn join_serve_and_leave(ha: &Ha) {
    let ca = fs::read_to_string(ha.lab.secrets().join("ca.pem")).unwrap();
    let users = Users::new(ha, &[&ca]);
    ha.lab.set_seed(NAME, Some(&issue(ha))).unwrap();
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
    answers(200);
    ha.wait_for("its own edge answers", SOON, || (ask(ha, &users, NAME)? == 200).then_some(()));
    let names = ha.run("n2", &["cat", "/etc/stanchion-dns/hosts"]);
    assert!(names.contains(&format!("{NAME}.{}", ha.cluster.domain)), "{names}");
    hold_the_vip(ha, &users);
    leave(ha);
    answers(503);
    ban(ha, &users);
}

/// A seed of a cluster file that names it, by the same CA.
fn issue(ha: &Ha) -> Vec<u8> {
    let mut cluster = ha.cluster.clone();
    let node = Node {
        name: NAME.into(),
        address: find_address(&cluster),
        zone: "z4".into(),
        profile: "edge".into(),
        roles: vec![Role::Web, Role::Edge],
    };
    cluster.nodes.push(node.clone());
    // Without it, a cluster with web nodes says that it is not highly available.
    cluster.storage = Some(ObjectStorage {
        endpoint: "https://s3.example.org".into(),
        bucket: "media".into(),
        region: "here".into(),
    });
    let directory = ClusterDir::open(&ha.lab.secrets(), &cluster).unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    issue_seed(&cluster, &node, &directory, None, now).unwrap()
}

/// Whether it lacks nothing but a second web node, by the cluster file that it knows.
fn is_ready(ha: &Ha) -> bool {
    let alone = format!("not HA: {NAME} alone has the role web: NetBox is gone with it");
    ha.get_status(NAME).is_some_and(|page| page["reasons"] == serde_json::json!([alone]))
}

fn ask(ha: &Ha, users: &Users, node: &str) -> Option<u16> {
    users.ask(ha.lab.address(node).unwrap()).ok()
}

/// What stands in for a web server: one that has only the node's certificate.
fn serve_the_web(ha: &Ha) {
    let config = format!(
        "defaults
    mode http
    timeout connect 1s
    timeout client 60s
    timeout server 60s
frontend web
    bind {}:8443 ssl crt /run/stanchion/tls/haproxy/both.pem
    http-request return status 200 content-type text/plain string here
",
        find_address(&ha.cluster)
    );
    ha.run(NAME, &["sh", "-c", "printf %s \"$1\" > /run/web.cfg", "sh", &config]);
    let argv = ["systemd-run", "--quiet", "--unit=web", "haproxy", "-db", "-f", "/run/web.cfg"];
    ha.run(NAME, &argv);
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
        let is_gone = registered.len() == 3 && !files.into_iter().any(names);
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
