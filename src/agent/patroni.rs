//! Patroni's REST interface, and whether a PostgreSQL answers at all.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use reqwest::Client;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::etcd::describe_transport;
use crate::secrets::Secret;

const PORT: u16 = 8008;
const POSTGRES: u16 = 5432;
/// A node that does not answer for so long counts as silent this time.
const PROBE: Duration = Duration::from_secs(1);
const MAX_ANSWER: usize = 256 << 10;

/// What one Patroni says about its own PostgreSQL.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Own {
    #[serde(default)]
    pub state: String,
    #[serde(default)]
    pub role: String,
}

impl Own {
    pub fn is_running_replica(&self) -> bool {
        // "standby_leader" and "primary" are none.
        self.role == "replica" && self.state == "running"
    }
}

/// One line of Patroni's view of its cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Member {
    pub name: String,
    /// `leader`, `sync_standby`, `replica`, ...
    #[serde(default)]
    pub role: String,
    #[serde(default)]
    pub state: String,
    /// Bytes, or the text "unknown".
    #[serde(default)]
    lag: Value,
}

impl Member {
    pub fn lag(&self) -> Option<u64> {
        self.lag.as_u64()
    }
}

/// Patroni's view of its cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct View {
    #[serde(default)]
    pub members: Vec<Member>,
    #[serde(default)]
    pub pause: bool,
}

pub async fn read_own(http: &Client, address: Ipv4Addr) -> Result<Own> {
    let value = get(http, address, "patroni").await?;
    serde_json::from_value(value).context("reading Patroni's status")
}

pub async fn read_view(http: &Client, address: Ipv4Addr) -> Result<View> {
    let value = get(http, address, "cluster").await?;
    serde_json::from_value(value).context("reading Patroni's cluster")
}

/// The dynamic settings that differ from what they should be, as they should be.
pub async fn find_changes(
    http: &Client,
    address: Ipv4Addr,
    wanted: &Value,
) -> Result<Map<String, Value>> {
    let present = get(http, address, "config").await?;
    Ok(find_difference(&present, wanted))
}

/// Set dynamic settings.
pub async fn change_settings(
    http: &Client,
    address: Ipv4Addr,
    secret: &Secret,
    changes: Map<String, Value>,
) -> Result<()> {
    let url = format!("https://{address}:{PORT}/config");
    let body = Value::Object(changes).to_string();
    let response = http
        .patch(url)
        .basic_auth("patroni", Some(secret.reveal()))
        .timeout(Duration::from_secs(5))
        .header("content-type", "application/json")
        .body(body)
        .send()
        .await
        .map_err(|error| anyhow::anyhow!(describe_transport(&error)))?;
    if !response.status().is_success() {
        bail!("Patroni answers {} to new settings", response.status());
    }
    Ok(())
}

/// Ask the leader's Patroni to hand over; it answers when it is done.
pub async fn switch_over(
    http: &Client,
    leader: Ipv4Addr,
    secret: &Secret,
    from: &str,
    to: &str,
    limit: Duration,
) -> Result<()> {
    let body = json!({"leader": from, "candidate": to});
    post(http, leader, secret, "switchover", &body, limit).await
}

/// Ask a replica's Patroni to delete its data and copy the leader's.
pub async fn reinitialize(http: &Client, address: Ipv4Addr, secret: &Secret) -> Result<()> {
    let body = json!({"force": true});
    post(http, address, secret, "reinitialize", &body, Duration::from_secs(60)).await
}

async fn post(
    http: &Client,
    address: Ipv4Addr,
    secret: &Secret,
    path: &str,
    body: &Value,
    limit: Duration,
) -> Result<()> {
    let request = http
        .post(format!("https://{address}:{PORT}/{path}"))
        .basic_auth("patroni", Some(secret.reveal()))
        .timeout(limit)
        .header("content-type", "application/json")
        .body(body.to_string());
    let response =
        request.send().await.map_err(|error| anyhow::anyhow!(describe_transport(&error)))?;
    let status = response.status();
    if status.is_success() {
        return Ok(());
    }
    let said = response.text().await.unwrap_or_default();
    bail!("Patroni answers {status}: {}", said.chars().take(300).collect::<String>());
}

/// What of `wanted` is not in `present`, to be sent as a patch.
fn find_difference(present: &Value, wanted: &Value) -> Map<String, Value> {
    let mut difference = Map::new();
    for (name, value) in wanted.as_object().into_iter().flatten() {
        match &present[name] {
            old if old == value => {}
            old if old.is_object() && value.is_object() => {
                let inner = find_difference(old, value);
                if !inner.is_empty() {
                    difference.insert(name.clone(), Value::Object(inner));
                }
            }
            _ => drop(difference.insert(name.clone(), value.clone())),
        }
    }
    difference
}

async fn get(http: &Client, address: Ipv4Addr, path: &str) -> Result<Value> {
    let url = format!("https://{address}:{PORT}/{path}");
    let ask = async {
        let mut response = http
            .get(url)
            .send()
            .await
            .map_err(|error| anyhow::anyhow!(describe_transport(&error)))?;
        let mut bytes = Vec::new();
        // A replica that is not ready answers 503 with the same JSON.
        while let Some(chunk) = response.chunk().await.context("reading Patroni's answer")? {
            bytes.extend_from_slice(&chunk);
            anyhow::ensure!(bytes.len() <= MAX_ANSWER, "Patroni's answer is too long");
        }
        serde_json::from_slice(&bytes).context("Patroni's answer is no JSON")
    };
    match tokio::time::timeout(Duration::from_secs(3), ask).await {
        Ok(answer) => answer.with_context(|| format!("asking Patroni at {address} for {path}")),
        Err(_) => bail!("Patroni at {address} has not answered for 3 s"),
    }
}

/// Whether a node's Patroni or its PostgreSQL answers: not just their kernel, which still
/// accepts connections for a process that stands still.
pub async fn is_reachable(http: &Client, address: Ipv4Addr) -> bool {
    // Asked together: a node is silent after one second, not two.
    let patroni = async {
        let url = format!("https://{address}:{PORT}/liveness");
        http.get(url).timeout(PROBE).send().await.is_ok()
    };
    let postgres = async {
        // Patroni's answer comes first where there is one; PostgreSQL logs such visits.
        tokio::time::sleep(PROBE / 4).await;
        let left = PROBE - PROBE / 4;
        tokio::time::timeout(left, knock((address, POSTGRES).into()))
            .await
            .is_ok_and(|knocked| knocked.is_ok())
    };
    tokio::pin!(patroni, postgres);
    tokio::select! {
        answered = &mut patroni => answered || postgres.await,
        answered = &mut postgres => answered || patroni.await,
    }
}

/// PostgreSQL's request for TLS, which it answers with one byte.
async fn knock(address: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(&[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f]).await?;
    match stream.read_u8().await? {
        b'S' | b'N' | b'E' => Ok(()),
        _ => bail!("it is no PostgreSQL"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_settings_that_differ_are_sent() {
        let present = json!({"ttl": 30, "loop_wait": 2, "postgresql": {"a": 1, "b": 2}, "x": 1});
        let wanted = json!({"ttl": 20, "loop_wait": 2, "postgresql": {"a": 1, "b": 3}});
        let expected = json!({"ttl": 20, "postgresql": {"b": 3}});
        assert_eq!(Value::Object(find_difference(&present, &wanted)), expected);
        assert!(find_difference(&wanted, &wanted).is_empty());
        assert_eq!(find_difference(&json!(null), &json!({"ttl": 20})).len(), 1);
    }

    #[test]
    fn patronis_answers_are_read() {
        let own: Own =
            serde_json::from_value(json!({"state": "running", "role": "replica"})).unwrap();
        assert!(own.is_running_replica());
        let view: View = serde_json::from_value(json!({
            "members": [
                {"name": "n1", "role": "leader", "state": "running", "port": 5432},
                {"name": "n2", "role": "sync_standby", "state": "streaming", "lag": 16},
                {"name": "n3", "role": "replica", "state": "starting", "lag": "unknown"}],
            "scope": "c"
        }))
        .unwrap();
        assert_eq!(view.members[1].lag(), Some(16));
        assert_eq!(view.members[2].lag(), None);
        assert!(!view.pause);
    }

    /// What `knock` finds behind a port that answers so; nothing: it stays silent.
    async fn knock_at(answer: Option<&'static [u8]>) -> Result<()> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let serve = async {
            let (mut stream, _) = listener.accept().await?;
            let mut request = [0; 8];
            stream.read_exact(&mut request).await?;
            assert_eq!(request, [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f]);
            match answer {
                Some(bytes) => stream.write_all(bytes).await?,
                None => std::future::pending().await,
            }
            anyhow::Ok(())
        };
        let knocked = tokio::time::timeout(Duration::from_millis(200), knock(address));
        tokio::select! {
            // It ends only by what it says.
            Ok(()) = async { serve.await?; std::future::pending::<Result<()>>().await } => Ok(()),
            knocked = knocked => knocked.context("no answer in time")?,
        }
    }

    #[tokio::test]
    async fn a_postgresql_is_there_when_it_answers_and_not_when_its_port_is_open() {
        // With TLS, without, and one that is full.
        for answer in [b"S", b"N", b"E"] {
            knock_at(Some(answer)).await.unwrap();
        }
        assert!(knock_at(None).await.unwrap_err().to_string().contains("in time"));
        let error = knock_at(Some(b"HTTP/1.1 400")).await.unwrap_err();
        assert!(error.to_string().contains("no PostgreSQL"), "{error}");
        assert!(knock_at(Some(b"")).await.is_err());
        let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = closed.local_addr().unwrap();
        drop(closed);
        assert!(knock(address).await.is_err());
    }
}
