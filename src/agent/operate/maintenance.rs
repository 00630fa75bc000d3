//! Maintenance: a key in etcd. While it is there, edges ask users to wait, and workers take
//! no jobs. It goes when the operator says so, or at the time that it names.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Desk, Say};
use crate::agent::board::log;
use crate::agent::etcd::{KeyValue, Outcome};
use crate::agent::registry::Maintenance;
use crate::clock::read_clock;
use crate::error::UserError;

const PAUSE: Duration = Duration::from_secs(3);
/// Bytes of a reason.
const REASON: usize = 300;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case", tag = "do")]
enum Wish {
    On {
        #[serde(default)]
        reason: String,
        seconds: Option<u64>,
    },
    Off,
    Show,
}

/// Turn it on or off, or tell how it is; what holds then, or null.
pub async fn maintain(desk: &Desk, body: Value, say: &Say) -> Result<Value> {
    let wish: Wish = serde_json::from_value(body).context("reading what is wanted")?;
    let key = desk.registry.name_maintenance();
    match wish {
        Wish::Show => {}
        Wish::Off => desk.etcd.delete(&key).await?,
        Wish::On { reason, seconds } => {
            if reason.len() > REASON || reason.chars().any(char::is_control) {
                return Err(UserError::new("that is no reason to show")
                    .why(format!("it has control characters, or more than {REASON} bytes"))
                    .into());
            }
            let now = read_clock()?;
            let entry = desk.etcd.get(&key).await?;
            let since = entry.and_then(|entry| read(&entry)).map_or(now, |old| old.since);
            let until = seconds.map(|seconds| now.saturating_add(seconds));
            let wanted = Maintenance { since, until, by: "the operator".to_string(), reason };
            desk.etcd.put(&key, &serde_json::to_string(&wanted)?, None).await?;
            say.say("edges ask users to wait from now on");
        }
    }
    match desk.etcd.get(&key).await? {
        None => Ok(json!({ "maintenance": null })),
        Some(entry) => match read(&entry) {
            Some(found) => Ok(json!({ "maintenance": found })),
            None => bail!("what etcd holds about maintenance cannot be read; turn it off"),
        },
    }
}

fn read(entry: &KeyValue) -> Option<Maintenance> {
    serde_json::from_str(&entry.value).ok()
}

/// Whether it is over by now.
fn is_over(maintenance: &Maintenance, now: u64) -> bool {
    maintenance.until.is_some_and(|until| until <= now)
}

/// End maintenance at its time, for ever; on every db node, so that one of them does.
pub async fn end_in_time(desk: Desk) {
    let key = desk.registry.name_maintenance();
    loop {
        tokio::time::sleep(PAUSE).await;
        // What fails is done at the next look.
        let Ok(Some(entry)) = desk.etcd.get(&key).await else { continue };
        let Ok(now) = read_clock() else { continue };
        if read(&entry).is_some_and(|found| is_over(&found, now))
            && let Ok(Outcome::Done) = desk.etcd.delete_if(&key, entry.mod_revision, &[]).await
        {
            log("maintenance: its time is over");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maintenance_ends_at_the_time_that_it_names() {
        let mut maintenance: Maintenance = serde_json::from_str("{\"since\": 5}").unwrap();
        assert!(!is_over(&maintenance, u64::MAX));
        maintenance.until = Some(100);
        assert!(!is_over(&maintenance, 99));
        assert!(is_over(&maintenance, 100));
    }
}
