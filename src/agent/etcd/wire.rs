//! What stands in the gateway's JSON.

use anyhow::{Context, Error, Result, anyhow, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;

use super::{Listing, MemberStatus, Rejected};
use crate::agent::join::{Listed, Live};

/// A key with its value; text, since everything we keep is text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    pub key: String,
    pub value: String,
    pub mod_revision: i64,
    pub lease: i64,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Put(KeyValue),
    Delete { key: String },
}

pub fn encode(text: &str) -> String {
    encode_bytes(text.as_bytes())
}

pub fn encode_bytes(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(bytes)
}

/// The first key behind all keys with this prefix.
pub fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

pub fn read_i64(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_str()?.parse().ok())
}

pub fn read_u64(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

fn decode(value: &Value) -> Result<String> {
    let bytes = BASE64_STANDARD.decode(value.as_str().unwrap_or("")).context("reading base64")?;
    String::from_utf8(bytes).context("a key or value in etcd is no text")
}

fn read_key_value(value: &Value) -> Result<KeyValue> {
    Ok(KeyValue {
        key: decode(&value["key"])?,
        value: decode(&value["value"])?,
        mod_revision: read_i64(&value["mod_revision"]).unwrap_or(0),
        lease: read_i64(&value["lease"]).unwrap_or(0),
    })
}

pub fn read_listing(answer: &Value) -> Result<Listing> {
    let entries = answer["kvs"].as_array().map(Vec::as_slice).unwrap_or_default();
    Ok(Listing {
        revision: read_i64(&answer["header"]["revision"]).unwrap_or(0),
        entries: entries.iter().map(read_key_value).collect::<Result<_>>()?,
    })
}

/// A part of a snapshot, and how many bytes are to come.
pub fn read_blob(line: &[u8]) -> Result<(Vec<u8>, u64)> {
    let answer: Value = serde_json::from_slice(line).context("reading a snapshot's JSON")?;
    if let Some(error) = answer.get("error") {
        bail!("etcd ends the snapshot: {}", error["message"].as_str().unwrap_or("no reason given"));
    }
    let result = &answer["result"];
    let blob = BASE64_STANDARD.decode(result["blob"].as_str().unwrap_or(""));
    // A number that is zero is left out.
    Ok((blob.context("reading base64")?, read_u64(&result["remaining_bytes"]).unwrap_or(0)))
}

pub fn read_events(line: &[u8]) -> Result<Vec<Event>> {
    let answer: Value = serde_json::from_slice(line).context("reading a watch's JSON")?;
    if let Some(error) = answer.get("error") {
        bail!("etcd ends the watch: {}", error["message"].as_str().unwrap_or("no reason given"));
    }
    let result = &answer["result"];
    if result["canceled"].as_bool() == Some(true) {
        bail!("etcd cancels the watch");
    }
    let events = result["events"].as_array().map(Vec::as_slice).unwrap_or_default();
    events
        .iter()
        .map(|event| match event["type"].as_str() {
            Some("DELETE") => Ok(Event::Delete { key: decode(&event["kv"]["key"])? }),
            _ => Ok(Event::Put(read_key_value(&event["kv"])?)),
        })
        .collect()
}

pub fn read_members(answer: &Value) -> Result<Live> {
    let members = answer["members"].as_array().context("etcd's answer has no members")?;
    let texts = |value: &Value| -> Vec<String> {
        let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
        items.iter().filter_map(|item| item.as_str().map(String::from)).collect()
    };
    Ok(Live {
        cluster: read_u64(&answer["header"]["cluster_id"]).context("reading the cluster's id")?,
        members: members
            .iter()
            .map(|member| {
                Ok(Listed {
                    id: read_u64(&member["ID"]).context("reading a member's id")?,
                    name: member["name"].as_str().unwrap_or("").to_string(),
                    peer_urls: texts(&member["peerURLs"]),
                    learner: member["isLearner"].as_bool().unwrap_or(false),
                })
            })
            .collect::<Result<_>>()?,
    })
}

pub fn read_status(answer: &Value) -> Result<MemberStatus> {
    Ok(MemberStatus {
        member: read_u64(&answer["header"]["member_id"]).context("reading the member's id")?,
        leader: read_u64(&answer["leader"]).unwrap_or(0),
        size: read_u64(&answer["dbSize"]).unwrap_or(0),
        in_use: read_u64(&answer["dbSizeInUse"]).unwrap_or(0),
        learner: answer["isLearner"].as_bool().unwrap_or(false),
    })
}

pub fn read_alarms(answer: &Value) -> Vec<(u64, String)> {
    let alarms = answer["alarms"].as_array().map(Vec::as_slice).unwrap_or_default();
    alarms
        .iter()
        .map(|alarm| {
            let kind = alarm["alarm"].as_str().unwrap_or("UNKNOWN").to_string();
            (read_u64(&alarm["memberID"]).unwrap_or(0), kind)
        })
        .collect()
}

/// The error in an answer. Codes of gRPC: 4 deadline, 14 unavailable and 13 internal may
/// be this member's alone; the rest is the cluster's word.
pub fn read_error(answer: &Value, status: u16) -> Error {
    let error = if answer["error"].is_object() { &answer["error"] } else { answer };
    let message = error["message"]
        .as_str()
        .or_else(|| error["error"].as_str())
        .unwrap_or("no reason given")
        .to_string();
    let code = error["code"].as_i64().or_else(|| error["grpc_code"].as_i64()).unwrap_or(2);
    match code {
        3 | 5 | 6 | 8 | 9 | 10 | 11 if status != 503 && status != 504 => Rejected(message).into(),
        _ => anyhow!("etcd answers {status}: {message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_end_of_a_prefix_is_the_next_key() {
        assert_eq!(end_of("/a/"), b"/a0");
        assert_eq!(end_of(""), b"\0");
    }

    #[test]
    fn a_range_answer_becomes_keys() {
        let answer = json!({
            "header": {"revision": "17"},
            "kvs": [{"key": encode("/a"), "value": encode("x"), "mod_revision": "9", "lease": "5"}]
        });
        let listing = read_listing(&answer).unwrap();
        assert_eq!(listing.revision, 17);
        let expected = KeyValue { key: "/a".into(), value: "x".into(), mod_revision: 9, lease: 5 };
        assert_eq!(listing.entries, [expected]);
        assert!(read_listing(&json!({"kvs": [{"key": "%"}]})).is_err());
    }

    #[test]
    fn refusals_of_the_cluster_differ_from_a_member_that_cannot() {
        let gone = json!({"code": 5, "message": "etcdserver: member not found"});
        assert!(read_error(&gone, 404).downcast_ref::<Rejected>().is_some());
        let leaderless = json!({"code": 14, "message": "etcdserver: no leader"});
        assert!(read_error(&leaderless, 503).downcast_ref::<Rejected>().is_none());
    }
}
