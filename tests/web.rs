//! NetBox on three nodes of all roles: it is there by itself, keeps what users gave it when a
//! node dies, and a fourth node takes its part.
//!
//! It needs NetBox's source, which not every machine can fetch: `STANCHION_TEST_NETBOX` names
//! the tarball.

#[path = "web/client.rs"]
mod client;
#[allow(dead_code, reason = "other tests steer the cluster elsewhere")]
#[path = "support/ha.rs"]
mod ha;
#[allow(dead_code, reason = "other tests look into the image")]
#[path = "support/image.rs"]
mod image;
#[path = "support/s3.rs"]
mod s3;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use client::{Netbox, PNG};
use ha::{Ha, Images, WHOLE};
use reqwest::Method;
use s3::S3;
use serde_json::json;
use stanchion::cluster_dir::ClusterDir;
use stanchion::config::cluster::{Cluster, Node, Role};
use stanchion::lab::Lab;
use stanchion::seed::issue_seed;

/// On a busy machine; alone it is less than a minute.
const LOGIN: Duration = Duration::from_secs(300);
const FOURTH: &str = "n4";

/// The tarball. `None`, with a line that says why, where there is none.
fn find_tarball() -> Option<PathBuf> {
    let found = std::env::var_os("STANCHION_TEST_NETBOX").map(PathBuf::from);
    let found = found.filter(|path| path.is_file());
    if found.is_none() {
        eprintln!("skipped: no NetBox: STANCHION_TEST_NETBOX names no tarball of its source");
    }
    found
}

/// Three nodes of all roles, and room for one of the role web, which the three do not know.
fn create(tarball: &std::path::Path) -> Option<Ha> {
    let [node, web] = image::provide_netbox(tarball)?;
    let add_fourth = |cluster: &mut Cluster| {
        cluster.nodes.push(Node {
            name: FOURTH.to_string(),
            address: [10, 89, 0, 14].into(),
            zone: "z4".to_string(),
            profile: "web".to_string(),
            roles: vec![Role::Web],
        });
    };
    let hide_fourth = |lab: &Lab, cluster: &Cluster| {
        let directory = ClusterDir::open(&lab.secrets(), cluster).unwrap();
        let mut known = cluster.clone();
        known.nodes.retain(|node| node.name != FOURTH);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = now.unwrap().as_secs();
        for node in &known.nodes {
            let seed = issue_seed(&known, node, &directory, None, now);
            lab.set_seed(&node.name, Some(&seed.unwrap())).unwrap();
        }
    };
    let images = Images { project: "netbox", node, others: vec![("web", web)] };
    Ha::create_of("netbox", &images, add_fourth, hide_fourth, |_| Some(Vec::new()))
}

#[test]
fn netbox_serves_from_three_nodes_whatever_happens_to_one() {
    let Some(tarball) = find_tarball() else { return };
    let Some(ha) = create(&tarball) else { return };
    let Some(_s3) = S3::start(image::scratch(), &ha.lab, &ha.cluster) else { return };
    let began = Instant::now();
    for node in ["n1", "n2", "n3"] {
        ha.lab.start(node).unwrap();
    }
    let base = format!("https://{}", ha.vip());
    let http = ha.tls.make_http_client().unwrap();
    let anybody = Netbox::new(http, &base);
    ha.wait_for("NetBox's login page", LOGIN, || {
        let mut anybody = anybody.clone();
        let page = ask(&ha, async { anybody.get("/login/").await }).ok()?;
        (page.0 == 200 && page.1.contains("csrfmiddlewaretoken")).then_some(())
    });
    eprintln!("login page after {:.1} s", began.elapsed().as_secs_f64());
    ha.wait_for("three nodes serve", LOGIN, || (count_serving(&ha) == 3).then_some(()));

    let mut user = log_in(&ha, &anybody);
    look_at_the_start(&ha);
    share_a_picture(&ha, &mut user);
    kill_a_node(&ha, &mut user);
    ask_users_to_wait(&ha, &mut user);
    join_a_fourth(&ha, &user);
    leave_again(&ha, &mut user);
}

/// Work of a client in the lab's network.
fn ask<T: Send>(ha: &Ha, work: impl Future<Output = T> + Send) -> T {
    ha.lab.enter_network(|| ha.runtime.block_on(work)).unwrap()
}

fn count_serving(ha: &Ha) -> usize {
    ha.list_registered().iter().filter(|node| node["web"] == "serving").count()
}

fn log_in(ha: &Ha, anybody: &Netbox) -> Netbox {
    let password = ha.secret("netbox_admin");
    // The superuser is made once NetBox serves.
    ha.wait_for("the superuser logs in", LOGIN, || {
        let mut user = anybody.clone();
        ask(ha, async { user.log_in("admin", &password).await }).ok()?;
        Some(user)
    })
}

/// One node has made the database, NetBox agrees with it, and no unit can do more than it must.
fn look_at_the_start(ha: &Ha) {
    let count = |said: &str| {
        let nodes = ["n1", "n2", "n3"].into_iter();
        let count = |node: &str| {
            let argv = ["journalctl", "-b", "-u", "stanchion-agent", "-o", "cat", "--no-pager"];
            ha.run(node, &argv).lines().filter(|line| line.contains(said)).count()
        };
        nodes.map(count).sum::<usize>()
    };
    assert_eq!(count("netbox: made the database"), 1);
    assert_eq!(count("netbox: made the superuser"), 1);
    ha.run_long("n2", &["systemctl", "start", "stanchion-netbox-check.service"]);
}

/// An upload is in the object storage, whichever node is asked for it.
fn share_a_picture(ha: &Ha, user: &mut Netbox) {
    let (id, link) = ask(ha, async {
        let body = json!({"name": "Berlin", "slug": "berlin"});
        let site = user.call(Method::POST, "/api/dcim/sites/", Some(body)).await.unwrap();
        let id = site["id"].as_u64().unwrap();
        (id, user.attach(id, PNG).await.unwrap())
    });
    assert!(id > 0);
    // Least busy first: in turn, when nobody else is there.
    for _ in 0..3 {
        let bytes = ask(ha, async {
            let found = user.call(Method::GET, &link, None).await.unwrap();
            user.fetch(found["image"].as_str().unwrap()).await.unwrap()
        });
        assert_eq!(bytes, PNG);
    }
    for node in ["n1", "n2", "n3"] {
        let left = ha.run(node, &["find", "/var/lib/netbox", "-type", "f"]);
        assert_eq!(left.trim(), "", "nothing is kept on {node}");
    }
}

/// Requests at work, and the longest time in which none was answered well.
struct Load {
    stop: Arc<AtomicBool>,
    readers: std::thread::JoinHandle<Duration>,
    writers: std::thread::JoinHandle<(Duration, Vec<String>)>,
}

impl Load {
    fn start(ha: &Ha, user: &Netbox, prefix: &'static str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let spawn = |user: Netbox, stop: Arc<AtomicBool>, prefix: Option<&'static str>| {
            ha.lab.enter_network(|| std::thread::spawn(move || work(user, &stop, prefix))).unwrap()
        };
        let writers = spawn(user.clone(), stop.clone(), Some(prefix));
        let readers = spawn(user.clone(), stop.clone(), None);
        let readers = std::thread::spawn(move || readers.join().unwrap().0);
        Load { stop, readers, writers }
    }

    /// The longest pauses of reads and of writes, and what was written.
    fn end(self) -> (Duration, Duration, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let reads = self.readers.join().unwrap();
        let (writes, written) = self.writers.join().unwrap();
        (reads, writes, written)
    }
}

fn work(mut user: Netbox, stop: &AtomicBool, prefix: Option<&str>) -> (Duration, Vec<String>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut longest, mut last, mut written) = (Duration::ZERO, Instant::now(), Vec::new());
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let slug = format!("{}-{number}", prefix.unwrap_or_default());
        let done = runtime.block_on(async {
            match prefix {
                None => user.call(Method::GET, "/api/dcim/sites/?limit=1", None).await,
                Some(_) => {
                    let body = json!({"name": slug, "slug": slug});
                    user.call(Method::POST, "/api/dcim/sites/", Some(body)).await
                }
            }
        });
        match done {
            Ok(_) => {
                longest = longest.max(last.elapsed());
                last = Instant::now();
                written.push(slug);
            }
            Err(error) => eprintln!("{:?}: {}", Instant::now(), error.lines().next().unwrap_or("")),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    (longest.max(last.elapsed()), written)
}

/// What was acknowledged is there.
fn expect_written(ha: &Ha, user: &mut Netbox, written: &[String]) {
    let list = "/api/dcim/sites/?limit=1000&fields=slug&brief=true";
    let found = ha.wait_for("the sites are listed", WHOLE, || {
        ask(ha, async { user.clone().call(Method::GET, list, None).await }).ok()
    });
    let slugs: Vec<&str> = found["results"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|site| site["slug"].as_str())
        .collect();
    let lost: Vec<&String> =
        written.iter().filter(|slug| !slugs.contains(&slug.as_str())).collect();
    assert!(lost.is_empty(), "{lost:?} of {} are lost", written.len());
}

/// The node that leads everything dies; the session goes on.
fn kill_a_node(ha: &Ha, user: &mut Netbox) {
    let victim = ha.wait_for("a leader", WHOLE, || ha.find_leader());
    let load = Load::start(ha, user, "killed");
    std::thread::sleep(Duration::from_secs(3));
    ha.lab.kill(&victim).unwrap();
    std::thread::sleep(Duration::from_secs(30));
    let (reads, writes, written) = load.end();
    eprintln!(
        "kill of {victim}: reads stood still {:.1} s, writes {:.1} s, {} writes",
        reads.as_secs_f64(),
        writes.as_secs_f64(),
        written.len()
    );
    expect_written(ha, user, &written);
    // Measured on a machine that others use, too: the goals are 5 and 10.
    assert!(reads < Duration::from_secs(30) && writes < Duration::from_secs(40));
    ha.lab.start(&victim).unwrap();
    ha.wait_for("three nodes serve again", LOGIN, || (count_serving(ha) == 3).then_some(()));
}

/// While there is maintenance users see a page, and no jobs are taken.
fn ask_users_to_wait(ha: &Ha, user: &mut Netbox) {
    let key = format!("/stanchion/{}/maintenance", ha.cluster.name);
    let get = |user: &mut Netbox, path: &str| ask(ha, async { user.get(path).await });
    let rests = |node: &str| {
        let argv = ["systemctl", "is-active", "stanchion-netbox-worker.service"];
        let ran = ha.lab.exec(node, &argv, Duration::from_secs(20)).unwrap();
        ran.text() != "active"
    };
    let value = r#"{"since":1,"by":"operator","reason":"a test"}"#;
    ha.change_etcd("n1", &key, Some(value));
    ha.wait_for("users are asked to wait", WHOLE, || {
        let (status, page) = get(&mut user.clone(), "/login/").ok()?;
        (status == 503 && page.contains("under maintenance")).then_some(())
    });
    let (status, text) = get(user, "/api/status/").unwrap();
    assert!(status == 503 && text.contains("\"detail\""), "{status} {text}");
    ha.wait_for("the workers rest", WHOLE, || {
        ["n1", "n2", "n3"].into_iter().all(&rests).then_some(())
    });
    ha.change_etcd("n1", &key, None);
    ha.wait_for("users come in again", WHOLE, || {
        (get(&mut user.clone(), "/api/status/").ok()?.0 == 200).then_some(())
    });
    ha.wait_for("the workers work", LOGIN, || {
        (!["n1", "n2", "n3"].into_iter().any(&rests)).then_some(())
    });
}

/// Requests that an edge has sent to a web node.
fn count_sent(ha: &Ha, edge: &str, node: &str) -> Option<u64> {
    let (_, figures) = ha.get(edge, 8404, "metrics")?;
    let name = format!("haproxy_server_sessions_total{{proxy=\"web\",server=\"{node}\"}} ");
    figures.lines().find_map(|line| line.strip_prefix(&name)?.trim().parse().ok())
}

fn join_a_fourth(ha: &Ha, user: &Netbox) {
    let began = Instant::now();
    ha.lab.start(FOURTH).unwrap();
    ha.wait_for("the fourth node serves", LOGIN, || (count_serving(ha) == 4).then_some(()));
    let edge = ha.wait_for("an edge has the VIP", WHOLE, || ha.find_vip_holder());
    ha.wait_for("the fourth node takes requests", WHOLE, || {
        for _ in 0..8 {
            let mut user = user.clone();
            ask(ha, async { user.get("/api/status/").await }).ok()?;
        }
        (count_sent(ha, &edge, FOURTH)? > 0).then_some(())
    });
    eprintln!("a fourth node took requests after {:.1} s", began.elapsed().as_secs_f64());
}

fn leave_again(ha: &Ha, user: &mut Netbox) {
    ha.lab.stop(FOURTH).unwrap();
    ha.wait_for("the edges have forgotten the fourth node", WHOLE, || {
        ["n1", "n2", "n3"]
            .into_iter()
            .all(|edge| count_sent(ha, edge, FOURTH).is_none())
            .then_some(())
    });
    for _ in 0..6 {
        assert_eq!(ask(ha, async { user.get("/api/status/").await }).unwrap().0, 200);
    }
}
