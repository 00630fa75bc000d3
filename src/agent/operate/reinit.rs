//! A replica takes its data anew from the leader.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::switchover::read_view;
use super::{ClusterLock, Desk, Say};
use crate::agent::patroni::{self, View};
use crate::error::UserError;

/// Copying takes its time.
const LIMIT: Duration = Duration::from_secs(12 * 3600);

/// Whether a member's data may be deleted and copied anew.
///
/// # Errors
/// A [`UserError`] with the reason when somebody may need them.
pub fn judge_reinit(view: &View, name: &str) -> Result<(), UserError> {
    let refuse = |why: &str| {
        UserError::new(format!("{name} cannot take its data anew now")).why(why.to_string())
    };
    if view.pause {
        return Err(refuse("Patroni is paused").help("`patronictl resume` first"));
    }
    let Some(leader) = view.members.iter().find(|m| m.role == "leader" && m.state == "running")
    else {
        return Err(refuse("there is no leader to copy from: its data may be the newest"));
    };
    if leader.name == name {
        return Err(refuse("it is the leader").help("`stanchion switchover` first"));
    }
    let streams = |m: &&patroni::Member| m.state == "streaming" && m.name != name;
    let is_synchronous = view.members.iter().any(|m| m.name == name && m.role == "sync_standby");
    if is_synchronous && view.members.iter().find(streams).is_none() {
        return Err(refuse(
            "it is the synchronous standby, and nobody else has what was written last but the leader",
        )
        .help("bring another replica up first"));
    }
    Ok(())
}

pub async fn reinit(desk: &Desk, say: &Say) -> Result<Value> {
    let name = desk.entry.name.as_str();
    judge_reinit(&read_view(desk).await?, name)?;
    let doing = format!("{name} takes its data anew");
    let lock = ClusterLock::take(&desk.etcd, &desk.registry, "operate", &doing).await?;
    let copied = copy_anew(desk, &lock, say).await;
    lock.give_back().await;
    Ok(json!({ "node": name, "seconds": copied?.as_secs_f64() }))
}

/// How long it took.
async fn copy_anew(desk: &Desk, lock: &ClusterLock, say: &Say) -> Result<Duration> {
    let name = desk.entry.name.as_str();
    // What was seen before may have changed until the lock was there.
    judge_reinit(&read_view(desk).await?, name)?;
    let secret = desk.seed.secrets.get("patroni_rest").context("this node has no such secret")?;
    let begun = Instant::now();
    lock.expect_held()?;
    patroni::reinitialize(&desk.http, desk.entry.address, secret).await?;
    say.say("the old data are deleted; copying from the leader");
    // Patroni's view is from before for a moment.
    tokio::time::sleep(Duration::from_secs(4)).await;
    while begun.elapsed() < LIMIT {
        if let Ok(view) = read_view(desk).await
            && view.members.iter().any(|m| m.name == name && m.state == "streaming")
        {
            return Ok(begun.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    bail!("{name} does not follow after {} h", LIMIT.as_secs() / 3600)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(members: &[(&str, &str, &str)]) -> View {
        let members: Vec<_> = members
            .iter()
            .map(|(name, role, state)| json!({"name": name, "role": role, "state": state}))
            .collect();
        serde_json::from_value(json!({ "members": members })).unwrap()
    }

    #[test]
    fn only_data_that_nobody_needs_are_deleted() {
        let whole = view(&[
            ("n1", "leader", "running"),
            ("n2", "sync_standby", "streaming"),
            ("n3", "replica", "start failed"),
        ]);
        let refused = |view: &View, name| judge_reinit(view, name).unwrap_err().to_string();
        assert_eq!(judge_reinit(&whole, "n3"), Ok(()));
        assert!(refused(&whole, "n1").contains("it is the leader"));
        assert!(refused(&whole, "n2").contains("synchronous standby"));
        let third = view(&[
            ("n1", "leader", "running"),
            ("n2", "sync_standby", "streaming"),
            ("n3", "replica", "streaming"),
        ]);
        assert_eq!(judge_reinit(&third, "n2"), Ok(()));
        assert!(refused(&view(&[("n3", "replica", "running")]), "n3").contains("no leader"));
        let paused = View { pause: true, ..third };
        assert!(refused(&paused, "n3").contains("paused"));
    }
}
