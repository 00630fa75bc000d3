//! A lock of the whole cluster: work that one node does at a time, and that ends with the
//! node that does it.

use std::time::Duration;

use anyhow::Result;
use tokio::task::JoinHandle;

use super::super::etcd::{Etcd, Outcome};
use super::super::registry::Registry;
use crate::error::UserError;

/// Seconds for which a lock outlives its holder.
const LEASE: u32 = 15;

/// Held until it is dropped.
pub struct ClusterLock {
    etcd: Etcd,
    lease: i64,
    keeper: JoinHandle<()>,
}

impl ClusterLock {
    /// Take a lock, or refuse at once. `doing` says what for, to whoever comes second.
    ///
    /// # Errors
    /// A [`UserError`] when another holds it.
    pub async fn take(etcd: &Etcd, registry: &Registry, name: &str, doing: &str) -> Result<Self> {
        let key = registry.key("locks", name);
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
        let keeping = etcd.clone();
        let keeper = tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_secs(3)).await;
                let _ = keeping.keep_alive(lease).await;
            }
        });
        Ok(ClusterLock { etcd: etcd.clone(), lease, keeper })
    }
}

impl Drop for ClusterLock {
    fn drop(&mut self) {
        self.keeper.abort();
        let (etcd, lease) = (self.etcd.clone(), self.lease);
        tokio::spawn(async move { etcd.revoke(lease).await });
    }
}
