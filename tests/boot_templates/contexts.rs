//! What the agent tells the templates, for each kind of node.

use serde_json::{Map, Value, json};

/// A node and its cluster.
#[derive(Clone, Copy)]
pub struct Kind {
    pub label: &'static str,
    pub profile: &'static str,
    pub roles: &'static [&'static str],
    /// Which of the cluster's nodes, from 1 on.
    pub number: u8,
    pub single: bool,
    pub vip: Option<&'static str>,
    pub redis_master: Option<&'static str>,
}

impl Kind {
    pub fn address(&self) -> &'static str {
        ["10.9.0.1", "10.9.0.2", "10.9.0.3", "10.9.0.4", "10.9.0.5"][usize::from(self.number) - 1]
    }
}

/// The first one has all roles, like the others of its cluster.
pub fn list_kinds() -> Vec<Kind> {
    let node = Kind {
        label: "node",
        profile: "node",
        roles: &["db", "cache", "web", "edge"],
        number: 1,
        single: false,
        vip: Some("10.9.0.100"),
        redis_master: Some("10.9.0.1"),
    };
    vec![
        node,
        Kind { label: "second", number: 2, ..node },
        Kind { label: "third", number: 3, ..node },
        Kind { label: "single", single: true, vip: None, ..node },
        Kind { label: "single-with-vip", single: true, ..node },
        Kind { label: "db", profile: "db", roles: &["db"], ..node },
        Kind { label: "single-db", profile: "db", roles: &["db"], single: true, vip: None, ..node },
        Kind { label: "cache", profile: "cache", roles: &["cache"], ..node },
        Kind { label: "web", profile: "web", roles: &["web"], ..node },
        Kind { label: "edge", profile: "edge", roles: &["edge"], ..node },
    ]
}

/// Secrets and the roles whose nodes get them; `fingerprint` is for all.
const SECRETS: [(&str, &[&str]); 15] = [
    ("postgres_superuser", &["db"]),
    ("postgres_replication", &["db"]),
    ("postgres_rewind", &["db"]),
    ("postgres_netbox", &["db", "web"]),
    ("patroni_rest", &["db"]),
    ("redis", &["cache", "web", "edge"]),
    ("sentinel", &["cache"]),
    ("keepalived", &["edge"]),
    ("haproxy_stats", &["edge"]),
    ("netbox_secret_key", &["web"]),
    ("netbox_pepper", &["web"]),
    ("netbox_admin", &["web"]),
    ("s3_access_key", &["db", "web"]),
    ("s3_secret_key", &["db", "web"]),
    ("backup_cipher", &["db"]),
];

/// The variables of the templates. A node knows no secret that its roles do not need, and
/// nothing of etcd or Redis without the role.
pub fn describe(kind: &Kind) -> Value {
    let count = if kind.single { 1 } else { 3 };
    let nodes: Vec<Value> = (1..=count)
        .map(|number| {
            json!({
                "name": format!("n{number}"),
                "address": format!("10.9.0.{number}"),
                "zone": format!("z{number}"),
                "roles": ["db", "cache", "web", "edge"],
                "ordinal": number,
            })
        })
        .collect();
    let has = |role: &str| kind.roles.contains(&role);
    let mut secrets = Map::new();
    secrets.insert("fingerprint".to_string(), json!("secret-fingerprint"));
    for (name, roles) in SECRETS {
        if roles.iter().any(|role| has(role)) {
            secrets.insert(name.to_string(), json!(format!("secret-{name}-_0123456789abcdef")));
        }
    }
    let mut context = json!({
        "node": {
            "name": format!("n{}", kind.number),
            "address": kind.address(),
            "zone": format!("z{}", kind.number),
            "profile": kind.profile,
            "roles": kind.roles,
        },
        "cluster": {
            "name": "lab",
            "domain": "netbox.example.org",
            "vip": kind.vip,
            "network": "10.9.0.0/24",
            "prefix": 24,
            "gateway": if kind.single { Value::Null } else { json!("10.9.0.254") },
            "dns": if kind.single { json!([]) } else { json!(["10.9.0.253", "2001:db8::1"]) },
            "ntp": if kind.single { json!([]) } else { json!(["ntp.example.org"]) },
            "single": kind.single,
            "storage": (!kind.single).then(|| json!({
                "endpoint": "https://s3.example.org:9000", "bucket": "netbox", "region": "us-east-1",
            })),
            "backup": match (kind.single, kind.profile) {
                (true, _) => Value::Null,
                (_, "db") => json!({"directory": null, "keep": 8}),
                _ => json!({"directory": "/var/backups/stanchion", "keep": 4}),
            },
        },
        "nodes": nodes,
        "db_nodes": nodes,
        "cache_nodes": nodes,
        "web_nodes": nodes,
        "edge_nodes": nodes,
        "secrets": secrets,
        "tuning": {
            "early_failover": true,
            "patroni_ttl": 20,
            "patroni_loop_wait": 2,
            "patroni_retry_timeout": 3,
            "vrrp_router_id": 51,
        },
        "tls": {
            "ca": "/run/stanchion/tls/ca.pem",
            "cert": "/run/stanchion/tls/node.pem",
            "key": "/run/stanchion/tls/node.key",
        },
        "external": {"postgres": null, "redis": null},
        "maintenance": null,
        "memory_mb": 2048,
        "cpus": 2,
    });
    let table = context.as_object_mut().unwrap();
    if has("db") {
        let members: Vec<String> =
            (1..=count).map(|n| format!("n{n}=https://10.9.0.{n}:2380")).collect();
        let etcd = json!({"state": "new", "initial_cluster": members.join(",")});
        table.insert("etcd".to_string(), etcd);
    }
    if has("cache") {
        let redis = json!({
            "master": kind.redis_master,
            "is_master": kind.redis_master == Some(kind.address()),
            "myid": format!("{:040x}", kind.number),
        });
        table.insert("redis".to_string(), redis);
    }
    context
}
