//! What a healthy cluster offers besides its databases: names, figures, its own pages; and
//! how little its units may do.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use crate::ha::Ha;

const EXPOSURE: f64 = 4.0;
/// Bytes of the agent, on the disk and in memory.
const AGENT_LIMIT: u64 = 15_000_000;
const UNITS: [&str; 12] = [
    "chrony.service",
    "dnsmasq.service",
    "etcd.service",
    "haproxy.service",
    "keepalived.service",
    "patroni.service",
    "prometheus-node-exporter.service",
    "stanchion-agent.service",
    "stanchion-postgres-exporter.service",
    "stanchion-redis-exporter.service",
    "stanchion-redis.service",
    "stanchion-sentinel.service",
];

pub fn look_at_services(ha: &Ha) {
    for node in ha.nodes() {
        assert_eq!(ha.run(node, &["systemctl", "is-system-running"]), "running", "{node}");
        look_at_names(ha, ha.lab.address(node).unwrap());
        look_at_figures(ha, node);
    }
    for node in ha.nodes() {
        // A container has none, and Patroni does without.
        let page = ha.get_status(node).unwrap();
        assert!(page["warnings"]["watchdog"].is_string(), "{page}");
        let config = ha.run(node, &["cat", "/etc/patroni/config.yml"]);
        assert!(config.contains("watchdog:\n  mode: automatic\n"), "{node}");
    }
    look_at_names(ha, ha.vip());
    look_at_agents(ha);
    look_at_statistics(ha);
    look_at_exposure(ha);
}

/// The names of nodes and services, from any edge and from the VIP.
fn look_at_names(ha: &Ha, server: Ipv4Addr) {
    let domain = &ha.cluster.domain;
    for (name, address) in [
        (domain.clone(), ha.vip()),
        (format!("db.{domain}"), ha.vip()),
        (format!("n2.{domain}"), ha.lab.address("n2").unwrap()),
    ] {
        let found = ha.lab.enter_network(|| resolve(server, &name)).unwrap();
        assert_eq!(found, Some(address), "{name} at {server}");
    }
    let nowhere = ha.lab.enter_network(|| resolve(server, &format!("nobody.{domain}"))).unwrap();
    assert_eq!(nowhere, None);
}

/// The first address of a name (RFC 1035).
fn resolve(server: Ipv4Addr, name: &str) -> Option<Ipv4Addr> {
    let mut question = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        question.push(u8::try_from(label.len()).unwrap());
        question.extend(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    socket.connect(SocketAddr::from((server, 53))).unwrap();
    socket.send(&question).unwrap();
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer).unwrap_or_else(|error| panic!("{server}: {error}"));
    let answer = &answer[..length];
    assert_eq!(answer[..2], [0x12, 0x34]);
    // The answer's data lies at the end: name, type, class, time to live, length, address.
    let count = u16::from_be_bytes([answer[6], answer[7]]);
    let address: [u8; 4] = answer[length - 4..].try_into().unwrap();
    (count > 0).then(|| Ipv4Addr::from(address))
}

/// The agent's own figures, and those of the exporters that listen on loopback only.
fn look_at_figures(ha: &Ha, node: &str) {
    for (path, figure) in [
        ("metrics", "stanchion_ready 1"),
        ("metrics/node", "node_memory_MemTotal_bytes"),
        ("metrics/postgres", "pg_up 1"),
        ("metrics/redis", "redis_up 1"),
    ] {
        let (status, text) = ha.get(node, 7443, path).unwrap();
        assert_eq!(status, 200, "{node} {path}: {text}");
        assert!(text.contains(figure), "{node} {path} lacks {figure}");
    }
}

/// How much an agent takes: of memory, and, where it is what would be shipped, of the disk. The
/// code of a build for tests is many times larger, so there only what it has allocated counts.
fn look_at_agents(ha: &Ha) {
    let is_shipped = !cfg!(debug_assertions);
    let script =
        "pid=$(systemctl show --value -p MainPID stanchion-agent) && cat /proc/$pid/status";
    for node in ha.nodes() {
        let status = ha.run(node, &["sh", "-c", script]);
        let read = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim_start_matches(':').trim_end_matches("kB").trim().parse().unwrap()
        };
        let (allocated, resident) = (read("RssAnon"), read("VmRSS"));
        eprintln!("{node}: the agent has {allocated} kB of its own, {resident} kB resident");
        assert!(allocated <= AGENT_LIMIT / 1024, "{node}: {status}");
        assert!(!is_shipped || resident <= AGENT_LIMIT / 1024, "{node}: {status}");
    }
    let size = ha.run("n1", &["stat", "--format=%s", "/usr/bin/stanchion-agent"]);
    assert!(!is_shipped || size.parse::<u64>().unwrap() <= AGENT_LIMIT, "{size} bytes");
}

/// HAProxy's page: a certificate of the cluster, and the password on top.
fn look_at_statistics(ha: &Ha) {
    let (status, _) = ha.get("n1", 8404, "").unwrap();
    assert_eq!(status, 401);
    let (status, text) = ha.get("n1", 8404, "metrics").unwrap();
    assert!(status == 200 && text.contains("haproxy_"), "{status} {text:.200}");
}

fn look_at_exposure(ha: &Ha) {
    for unit in UNITS {
        let said = ha.run("n1", &["systemd-analyze", "security", "--no-pager", unit]);
        let line = said.lines().last().unwrap_or_default();
        let level = line.split(": ").nth(1).and_then(|rest| rest.split(' ').next());
        let level: f64 = level.unwrap_or_default().parse().unwrap_or(10.0);
        assert!(level <= EXPOSURE, "{unit}: {line}");
    }
}
