use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

#[path = "../../../tests/support/etcd.rs"]
mod etcd;

use etcd::provide_etcd;

use super::*;

fn member(id: u64, megabytes: u64, in_use: u64) -> Member {
    let (size, in_use) = (megabytes << 20, in_use << 20);
    Member { id, is_leader: id == 1, learner: false, size, in_use }
}

#[test]
fn one_member_at_a_time_and_the_leader_last() {
    let mut members = vec![member(1, 300, 10), member(2, 200, 10), member(3, 200, 10)];
    let turns = |members: &[Member]| [1, 2, 3].map(|own| choose_turn(own, members, 3));
    assert_eq!(turns(&members), [Turn::Nothing, Turn::Own, Turn::Nothing]);
    members[1].size = members[1].in_use;
    assert_eq!(turns(&members), [Turn::Nothing, Turn::Nothing, Turn::Own]);
    members[2].size = members[2].in_use;
    assert_eq!(turns(&members), [Turn::HandOver(2), Turn::Nothing, Turn::Nothing]);
}

#[test]
fn small_full_and_incomplete_clusters_are_left_alone() {
    let small = [member(1, 20, 1), member(2, 20, 1), member(3, 20, 1)];
    let full = [member(1, 300, 290), member(2, 300, 290), member(3, 300, 290)];
    let silent = [member(1, 300, 10), member(2, 300, 10)];
    let mut learning = [member(1, 300, 10), member(2, 300, 10), member(3, 300, 10)];
    learning[2].learner = true;
    for members in [&small[..], &full, &silent, &learning] {
        assert_eq!(choose_turn(2, members, 3), Turn::Nothing, "{members:?}");
    }
    assert_eq!(choose_turn(1, &[member(1, 300, 10)], 1), Turn::Own);
}

/// Members on loopback, without TLS.
struct Members {
    children: Vec<Child>,
    urls: Vec<String>,
    _folder: tempfile::TempDir,
}

impl Members {
    fn start(program: &Path, count: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // All are held until all are chosen, so that they differ.
        let held: Vec<TcpListener> =
            (0..2 * count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let name = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let urls: Vec<String> = held.iter().map(name).collect();
        drop(held);
        let (clients, peers) = urls.split_at(count);
        let plan: Vec<String> =
            peers.iter().enumerate().map(|(n, peer)| format!("m{n}={peer}")).collect();
        let start = |n: usize| {
            Command::new(program)
                .args(["--name", &format!("m{n}")])
                .arg("--data-dir")
                .arg(folder.path().join(format!("m{n}")))
                .args(["--listen-client-urls", &clients[n], "--advertise-client-urls", &clients[n]])
                .args(["--listen-peer-urls", &peers[n], "--initial-advertise-peer-urls", &peers[n]])
                .args(["--initial-cluster", &plan.join(",")])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        };
        let children = (0..count).map(start).collect();
        Members { children, urls: clients.to_vec(), _folder: folder }
    }
}

impl Drop for Members {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Three real members, full of what was deleted: each gives it back when it is its turn.
#[tokio::test]
async fn real_members_give_back_what_was_deleted_the_leader_last() {
    const FULL: u64 = 70;
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("etcd");
    // It fetches, with a runtime of its own.
    let program = tokio::task::spawn_blocking(move || provide_etcd(&place)).await.unwrap();
    let Some(program) = program else { return };
    let members = Members::start(&program, 3);
    // Not used, but reqwest wants to know whose TLS it would be.
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let http = reqwest::Client::builder().tls_backend_preconfigured(tls).no_proxy();
    let http = http.build().unwrap();
    let client = |url: &String| Etcd::new(http.clone(), vec![url.clone()]);
    let each: Vec<Etcd> = members.urls.iter().map(client).collect();
    let etcd = Etcd::new(http.clone(), members.urls.clone());
    let is_up = async {
        while etcd.put("/up", "yes", None).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), is_up).await.expect("etcd does not start");

    let value = "x".repeat(1 << 20);
    for _ in 0..FULL {
        etcd.put("/big", &value, None).await.unwrap();
    }
    etcd.delete("/big").await.unwrap();
    let revision = etcd.list("/").await.unwrap().revision;
    let compact = serde_json::json!({"revision": revision.to_string(), "physical": true});
    let url = format!("{}/v3/kv/compaction", members.urls[0]);
    let done = http.post(url).body(compact.to_string()).send().await.unwrap();
    assert!(done.status().is_success(), "{done:?}");

    let registry = Registry::new("trial");
    let lock = registry.key("locks", "defragment");
    let looker = |n: usize| Defragmenter {
        etcd: etcd.clone(),
        own: each[n].clone(),
        each: each.clone(),
        registry: registry.clone(),
        name: format!("m{n}"),
    };
    let count_full = async || {
        let mut full = 0;
        for member in &each {
            full += usize::from(member.read_status().await.unwrap().size >= FULL << 20);
        }
        full
    };
    // Members compact in their own time, and count their pages at the next write.
    let is_compacted = async {
        for member in &each {
            while !describe(member.read_status().await.unwrap()).is_wasteful() {
                etcd.put("/up", "yes", None).await.unwrap();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), is_compacted).await.expect("not compacted");
    assert_eq!(count_full().await, 3);

    // While another has the lock, nobody does anything.
    assert_eq!(etcd.create(&lock, "other", None).await.unwrap(), Outcome::Done);
    for n in 0..3 {
        looker(n).look().await.unwrap();
    }
    assert_eq!(count_full().await, 3);
    etcd.delete(&lock).await.unwrap();

    let leader = each[0].read_status().await.unwrap().leader;
    let mut left = 3;
    for _ in 0..4 {
        for n in 0..3 {
            looker(n).look().await.unwrap();
            let now = count_full().await;
            if now == 1 && left > 1 {
                let status = each[0].read_status().await.unwrap();
                assert_eq!(status.leader, leader, "the lead is handed over last");
            }
            left = now;
        }
    }
    assert_eq!(left, 0);
    assert_ne!(each[0].read_status().await.unwrap().leader, leader);
    assert!(etcd.get(&lock).await.unwrap().is_none(), "the lock is kept");
}
