//! A client of etcd over its JSON gateway: keys, leases, transactions, watches, members.
//!
//! Keys and values are base64 in that protocol and 64-bit numbers are strings; neither
//! shows outside this folder.

mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use reqwest::Client;
use serde_json::{Value, json};

pub use wire::{Event, KeyValue};

use super::join::Live;

/// Bytes that one answer may have.
const MAX_ANSWER: usize = 4 << 20;
const TIMEOUT: Duration = Duration::from_secs(2);

/// Endpoints of one cluster; the one that answered last is asked first.
#[derive(Clone)]
pub struct Etcd {
    http: Client,
    endpoints: Arc<Vec<String>>,
    preferred: Arc<AtomicUsize>,
    /// For one endpoint's answer.
    limit: Duration,
}

/// Keys under a prefix, and the revision at which they were read.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    pub revision: i64,
    pub entries: Vec<KeyValue>,
}

/// What one member says about itself.
#[derive(Debug, Clone, Default)]
pub struct MemberStatus {
    pub member: u64,
    pub leader: u64,
    /// Bytes on disk, and bytes in use.
    pub size: u64,
    pub in_use: u64,
    pub learner: bool,
}

/// A transaction's outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// The comparison did not hold; nothing was changed.
    Refused,
}

impl Etcd {
    /// `endpoints`: URLs such as `https://10.0.0.1:2379`, the nearest first.
    pub fn new(http: Client, endpoints: Vec<String>) -> Self {
        Etcd { http, endpoints: Arc::new(endpoints), preferred: Arc::default(), limit: TIMEOUT }
    }

    /// A client that gives an endpoint up sooner, and asks those at `without` last: they are
    /// thought to be gone.
    pub fn make_hasty(&self, limit: Duration, without: Option<&str>) -> Self {
        let mut endpoints = self.endpoints.to_vec();
        endpoints.sort_by_key(|endpoint| Some(endpoint.as_str()) == without);
        Etcd {
            http: self.http.clone(),
            endpoints: endpoints.into(),
            preferred: Arc::default(),
            limit,
        }
    }

    /// One key; `None` when there is none.
    pub async fn get(&self, key: &str) -> Result<Option<KeyValue>> {
        let answer = self.call("kv/range", json!({"key": wire::encode(key)})).await?;
        Ok(wire::read_listing(&answer)?.entries.into_iter().next())
    }

    /// All keys with this prefix.
    pub async fn list(&self, prefix: &str) -> Result<Listing> {
        let body = json!({
            "key": wire::encode(prefix), "range_end": wire::encode_bytes(&wire::end_of(prefix))
        });
        wire::read_listing(&self.call("kv/range", body).await?)
    }

    /// Write a key; with a lease it goes when the lease goes.
    pub async fn put(&self, key: &str, value: &str, lease: Option<i64>) -> Result<()> {
        let lease = lease.unwrap_or(0).to_string();
        let body = json!({"key": wire::encode(key), "value": wire::encode(value), "lease": lease});
        self.call("kv/put", body).await.map(drop)
    }

    pub async fn delete(&self, key: &str) -> Result<()> {
        self.call("kv/deleterange", json!({"key": wire::encode(key)})).await.map(drop)
    }

    /// Write a key unless there is one.
    pub async fn create(&self, key: &str, value: &str, lease: Option<i64>) -> Result<Outcome> {
        let lease = lease.unwrap_or(0).to_string();
        let put = json!({"key": wire::encode(key), "value": wire::encode(value), "lease": lease});
        let compare = json!({
            "key": wire::encode(key), "target": "CREATE", "result": "EQUAL", "create_revision": "0"
        });
        self.transact(json!([compare]), json!({"request_put": put})).await
    }

    /// Write a key if its last change was at this revision (0: there is none), and a lock is
    /// held: its key, and the lease that it is under.
    pub async fn put_if(
        &self,
        key: &str,
        value: &str,
        mod_revision: i64,
        holder: (&str, i64),
    ) -> Result<Outcome> {
        let (lock, lease) = holder;
        let compare = json!([
            {
                "key": wire::encode(key), "target": "MOD", "result": "EQUAL",
                "mod_revision": mod_revision.to_string()
            },
            {
                "key": wire::encode(lock), "target": "LEASE", "result": "EQUAL",
                "lease": lease.to_string()
            }
        ]);
        let put = json!({"key": wire::encode(key), "value": wire::encode(value)});
        self.transact(compare, json!({"request_put": put})).await
    }

    /// Delete a key if its last change was at this revision, and each of the `unchanged` keys
    /// is as it was at its revision: 0 for one that does not exist.
    pub async fn delete_if(
        &self,
        key: &str,
        mod_revision: i64,
        unchanged: &[(&str, i64)],
    ) -> Result<Outcome> {
        let same = |(key, revision): &(&str, i64)| {
            json!({
                "key": wire::encode(key), "target": "MOD", "result": "EQUAL",
                "mod_revision": revision.to_string()
            })
        };
        let mut compare = vec![same(&(key, mod_revision))];
        compare.extend(unchanged.iter().map(same));
        let delete = json!({"request_delete_range": {"key": wire::encode(key)}});
        self.transact(Value::Array(compare), delete).await
    }

    async fn transact(&self, compare: Value, success: Value) -> Result<Outcome> {
        let answer = self.call("kv/txn", json!({"compare": compare, "success": [success]})).await?;
        Ok(match answer["succeeded"].as_bool() {
            Some(true) => Outcome::Done,
            _ => Outcome::Refused,
        })
    }

    /// A lease of `seconds` (at least 2); its id.
    pub async fn grant(&self, seconds: u32) -> Result<i64> {
        let answer = self.call("lease/grant", json!({"TTL": seconds.to_string()})).await?;
        wire::read_i64(&answer["ID"]).context("reading the id of a lease")
    }

    /// Keep a lease; `false` when it has run out.
    pub async fn keep_alive(&self, lease: i64) -> Result<bool> {
        let answer = self.call("lease/keepalive", json!({"ID": lease.to_string()})).await?;
        Ok(wire::read_i64(&answer["result"]["TTL"]).unwrap_or(0) > 0)
    }

    pub async fn revoke(&self, lease: i64) -> Result<()> {
        self.call("lease/revoke", json!({"ID": lease.to_string()})).await.map(drop)
    }

    /// Follow the keys with this prefix, from `revision` on.
    pub async fn watch(&self, prefix: &str, revision: i64) -> Result<Watch> {
        let body = json!({"create_request": {
            "key": wire::encode(prefix),
            "range_end": wire::encode_bytes(&wire::end_of(prefix)),
            "start_revision": revision.to_string()
        }});
        for endpoint in self.in_order() {
            let url = format!("{endpoint}/v3/watch");
            let request = self.http.post(url).body(body.to_string()).send();
            match tokio::time::timeout(TIMEOUT, request).await {
                Ok(Ok(response)) if response.status().is_success() => {
                    return Ok(Watch { response, pending: Vec::new() });
                }
                _ => continue,
            }
        }
        bail!("no etcd endpoint accepts a watch");
    }

    /// The cluster's members, by a linearizable read: only a cluster with a majority answers.
    pub async fn list_members(&self) -> Result<Live> {
        let answer = self.call("cluster/member/list", json!({"linearizable": true})).await?;
        wire::read_members(&answer)
    }

    /// Add a learner; its id, and the members with it among them.
    pub async fn add_learner(&self, peer_url: &str) -> Result<(u64, Live)> {
        let body = json!({"peerURLs": [peer_url], "isLearner": true});
        let answer = self.call("cluster/member/add", body).await?;
        let id = wire::read_u64(&answer["member"]["ID"]).context("reading the new member's id")?;
        Ok((id, wire::read_members(&answer)?))
    }

    pub async fn remove_member(&self, id: u64) -> Result<()> {
        self.call("cluster/member/remove", json!({"ID": id.to_string()})).await.map(drop)
    }

    /// Give a learner its vote; fails until it has caught up.
    pub async fn promote(&self, id: u64) -> Result<()> {
        self.call("cluster/member/promote", json!({"ID": id.to_string()})).await.map(drop)
    }

    /// Status of the member behind the first endpoint that answers.
    pub async fn read_status(&self) -> Result<MemberStatus> {
        wire::read_status(&self.call("maintenance/status", json!({})).await?)
    }

    /// Alarms that are raised, as (member, kind).
    pub async fn list_alarms(&self) -> Result<Vec<(u64, String)>> {
        let body = json!({"action": "GET", "memberID": "0", "alarm": "NONE"});
        Ok(wire::read_alarms(&self.call("maintenance/alarm", body).await?))
    }

    /// Give the space of old revisions back to the file system (the member stands still).
    pub async fn defragment(&self) -> Result<()> {
        let endpoint = self.endpoints.first().context("no endpoint")?;
        let limit = Duration::from_secs(60);
        self.ask(endpoint, "maintenance/defragment", &json!({}), limit).await.map(drop)
    }

    /// Let another member lead; asked of the leader itself.
    pub async fn transfer_leadership(&self, target: u64) -> Result<()> {
        let body = json!({"targetID": target.to_string()});
        self.call("maintenance/transfer-leadership", body).await.map(drop)
    }

    /// Write a snapshot of the first endpoint's database; its bytes, with etcd's own checksum
    /// at the end.
    pub async fn write_snapshot(&self, to: &mut impl std::io::Write) -> Result<u64> {
        let endpoint = self.endpoints.first().context("no endpoint")?;
        let url = format!("{endpoint}/v3/maintenance/snapshot");
        let request = self.http.post(url).body("{}").timeout(Duration::from_secs(300));
        let mut response = request
            .send()
            .await
            .map_err(|error| anyhow!(describe_transport(&error)))?
            .error_for_status()?;
        let (mut pending, mut written, mut left) = (Vec::new(), 0, None);
        while let Some(chunk) = response.chunk().await.context("reading a snapshot")? {
            pending.extend_from_slice(&chunk);
            while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                let (blob, remaining) = wire::read_blob(&line)?;
                to.write_all(&blob).context("writing a snapshot")?;
                written += blob.len() as u64;
                left = Some(remaining);
            }
            if pending.len() > MAX_ANSWER {
                bail!("a part of a snapshot is longer than {MAX_ANSWER} bytes");
            }
        }
        if left != Some(0) {
            bail!("the snapshot broke off");
        }
        Ok(written)
    }

    fn in_order(&self) -> impl Iterator<Item = &String> {
        let first = self.preferred.load(Ordering::Relaxed);
        let count = self.endpoints.len();
        (0..count).map(move |i| &self.endpoints[(first + i) % count])
    }

    async fn call(&self, path: &str, body: Value) -> Result<Value> {
        let mut failure = anyhow!("there is no etcd endpoint");
        for _ in 0..self.endpoints.len() {
            let at = self.preferred.load(Ordering::Relaxed) % self.endpoints.len();
            match self.ask(&self.endpoints[at], path, &body, self.limit).await {
                Ok(answer) => return Ok(answer),
                // The cluster itself has said no; another member would say the same.
                Err(error) if error.downcast_ref::<Rejected>().is_some() => return Err(error),
                Err(error) => failure = error,
            }
            let _ = self.preferred.compare_exchange(
                at,
                (at + 1) % self.endpoints.len(),
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        }
        Err(failure)
    }

    async fn ask(
        &self,
        endpoint: &str,
        path: &str,
        body: &Value,
        limit: Duration,
    ) -> Result<Value> {
        let asked = async {
            let url = format!("{endpoint}/v3/{path}");
            let mut response = self
                .http
                .post(url)
                .body(body.to_string())
                .send()
                .await
                .map_err(|error| anyhow!(describe_transport(&error)))?;
            let status = response.status();
            let mut bytes = Vec::new();
            while let Some(chunk) = response.chunk().await.context("reading etcd's answer")? {
                bytes.extend_from_slice(&chunk);
                if bytes.len() > MAX_ANSWER {
                    bail!("etcd's answer is longer than {MAX_ANSWER} bytes");
                }
            }
            // An answer to a keepalive is a stream: its first line is all that counts.
            let first = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
            let answer: Value = serde_json::from_slice(first)
                .with_context(|| format!("etcd answered {status} and no JSON"))?;
            if status.is_success() && answer.get("error").is_none() {
                return Ok(answer);
            }
            Err(wire::read_error(&answer, status.as_u16()))
        };
        match tokio::time::timeout(limit, asked).await {
            Ok(answer) => answer.with_context(|| format!("asking etcd at {endpoint} for {path}")),
            Err(_) => bail!("etcd at {endpoint} has not answered for {limit:?}"),
        }
    }
}

/// The cluster's own refusal, such as "member not found".
#[derive(Debug, thiserror::Error)]
#[error("etcd refuses: {0}")]
pub struct Rejected(pub String);

/// Changes under a prefix, as they come.
pub struct Watch {
    response: reqwest::Response,
    pending: Vec<u8>,
}

impl Watch {
    /// The next batch of changes; empty when the watch was only confirmed.
    ///
    /// # Errors
    /// When the stream ends or the revision was compacted: list again and watch anew.
    pub async fn next(&mut self) -> Result<Vec<Event>> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return wire::read_events(&line);
            }
            let chunk = self.response.chunk().await.context("reading a watch")?;
            self.pending.extend_from_slice(&chunk.context("the watch has ended")?);
            if self.pending.len() > MAX_ANSWER {
                bail!("a watch's answer is longer than {MAX_ANSWER} bytes");
            }
        }
    }
}

/// A transport error without the URL that the caller names anyway.
pub fn describe_transport(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = inner.to_string();
        cause = inner.source();
    }
    if text.is_empty() { error.to_string() } else { text }
}
