//! A lock of the whole cluster: work that one node does at a time, and that ends with the
//! node that does it.

use std::sync::{Arc, Mutex as StdMutex};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinHandle;

use super::super::board::log;
use super::super::etcd::{Etcd, Outcome};
use super::super::node::lock;
use super::super::registry::Registry;
use crate::error::UserError;

/// Seconds for which a lock outlives its holder.
const LEASE: u32 = 15;
/// A holder trusts its lock for less, since clocks differ and a step takes its time.
const TRUSTED: Duration = Duration::from_secs(LEASE as u64 - 4);
const GIVE_BACK: Duration = Duration::from_secs(5);

/// One exclusive work of this agent at a time, whatever etcd says.
static OWN: Mutex<()> = Mutex::const_new(());

/// Begin work that this node does alone, where etcd cannot be asked; it ends with the guard.
///
/// # Errors
/// A [`UserError`] when this node is at such work already.
pub fn begin_alone() -> Result<MutexGuard<'static, ()>, UserError> {
    OWN.try_lock().map_err(|_| {
        UserError::new("this node is busy with something else")
            .help("wait until it has ended, and ask again")
    })
}

/// Held until it is given back, or dropped.
pub struct ClusterLock {
    etcd: Etcd,
    lease: i64,
    keeper: JoinHandle<()>,
    /// When the lease was asked for that holds now; `None` when it is lost.
    kept: Arc<StdMutex<Option<Instant>>>,
    is_given_back: bool,
    _own: MutexGuard<'static, ()>,
}

impl ClusterLock {
    /// Take a lock, or refuse at once. `doing` says what for, to whoever comes second.
    ///
    /// # Errors
    /// A [`UserError`] when another holds it.
    pub async fn take(etcd: &Etcd, registry: &Registry, name: &str, doing: &str) -> Result<Self> {
        let own = begin_alone()?;
        let key = registry.key("locks", name);
        let asked = Instant::now();
        let lease = etcd.grant(LEASE).await?;
        if etcd.create(&key, doing, Some(lease)).await? == Outcome::Refused {
            // It runs out anyway.
            let _ = etcd.revoke(lease).await;
            let holder = etcd.get(&key).await?.map(|entry| entry.value);
            return Err(UserError::new("the cluster is busy with something else")
                .why(holder.unwrap_or_else(|| "it has ended this moment".to_string()))
                .help("wait until it has ended, and ask again")
                .into());
        }
        let kept = Arc::new(StdMutex::new(Some(asked)));
        let keeper = tokio::spawn(keep(etcd.clone(), lease, kept.clone(), doing.to_string()));
        let etcd = etcd.clone();
        Ok(ClusterLock { etcd, lease, keeper, kept, is_given_back: false, _own: own })
    }

    /// Look before what cannot be undone: another may hold the lock by now.
    ///
    /// # Errors
    /// A [`UserError`] when the lock is lost, or may be.
    pub fn expect_held(&self) -> Result<(), UserError> {
        if is_held(*lock(&self.kept), Instant::now()) {
            return Ok(());
        }
        Err(UserError::new("this node has lost the cluster's lock")
            .why("etcd has not answered it for too long: another node may be at work by now")
            .help("see `stanchion status`, then ask again: what was begun goes on"))
    }

    /// End it before the outcome is told, so that whoever asks for the next thing finds it free.
    pub async fn give_back(mut self) {
        self.keeper.abort();
        let revoked = tokio::time::timeout(GIVE_BACK, self.etcd.revoke(self.lease)).await;
        self.is_given_back = matches!(revoked, Ok(Ok(())));
    }
}

async fn keep(etcd: Etcd, lease: i64, kept: Arc<StdMutex<Option<Instant>>>, doing: String) {
    loop {
        tokio::time::sleep(Duration::from_secs(3)).await;
        let asked = Instant::now();
        match etcd.keep_alive(lease).await {
            Ok(true) => *lock(&kept) = Some(asked),
            Ok(false) => {
                *lock(&kept) = None;
                log(&format!("the lock for {doing} is lost: etcd has let it run out"));
                return;
            }
            // It may answer again before the lease has run out.
            Err(_) => {}
        }
    }
}

fn is_held(kept: Option<Instant>, now: Instant) -> bool {
    kept.is_some_and(|kept| now.saturating_duration_since(kept) < TRUSTED)
}

impl Drop for ClusterLock {
    fn drop(&mut self) {
        self.keeper.abort();
        if !self.is_given_back {
            let (etcd, lease) = (self.etcd.clone(), self.lease);
            tokio::spawn(async move { etcd.revoke(lease).await });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_was_not_kept_in_time_is_lost() {
        let now = Instant::now();
        assert!(is_held(Some(now), now));
        assert!(is_held(Some(now), now + TRUSTED - Duration::from_millis(1)));
        assert!(!is_held(Some(now), now + TRUSTED));
        assert!(!is_held(None, now));
    }

    #[test]
    fn one_node_does_one_exclusive_work() {
        let first = begin_alone().unwrap();
        assert!(begin_alone().is_err());
        drop(first);
        assert!(begin_alone().is_ok());
    }
}
