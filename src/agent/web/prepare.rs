//! Bringing the database to this node's version, on one node at a time, under a lock in etcd
//! and one in the database itself.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::Web;
use super::database::{
    has_superuser, read_schema, record_version, restore, try_lock, unpack_schema,
};
use super::decide::{Decision, Version, decide};
use crate::agent::board::log;
use crate::agent::etcd::Outcome;
use crate::agent::files::read_bounded;
use crate::agent::runner::Verdict;
use crate::agent::systemd::{forget_failure, run_to_end};

/// What the image brings.
const VERSION: &str = "/usr/share/stanchion/netbox/version";
const SCHEMA: &str = "/usr/share/stanchion/netbox/schema.sql.gz";
const MAX_PACKED: u64 = 32 << 20;
const UPGRADE: &str = "stanchion-netbox-upgrade.service";
const ADMIN: &str = "stanchion-netbox-admin.service";
/// Seconds for which the lock outlives a node that dies with it.
const LOCK_LEASE: u32 = 15;
const PAUSE: Duration = Duration::from_millis(500);
/// What status calls it.
const THING: &str = "netbox";

/// Do what is to be done until NetBox may serve, and has a superuser.
pub async fn prepare(web: Web) {
    let inner = &web.inner;
    loop {
        match web.prepare_once().await {
            Ok(Verdict::Done) => {
                inner.board.clear(THING);
                return;
            }
            Ok(Verdict::Wait(reason) | Verdict::Warn(reason)) => inner.board.raise(THING, reason),
            Err(error) => inner.board.raise(THING, format!("{error:#}")),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

impl Web {
    async fn prepare_once(&self) -> Result<Verdict> {
        let inner = &self.inner;
        let code = read_version(&self.inner.places.join(VERSION))?;
        let client = inner.database.connect().await?;
        match decide(&code, &read_schema(&client).await?) {
            Decision::Refuse(why) => return Ok(Verdict::Wait(why)),
            Decision::Serve => {
                if !inner.prepared.swap(true, Ordering::Relaxed) {
                    log(&format!("netbox: the database is of NetBox {code}"));
                    inner.board.clear(THING);
                    inner.registry.tell_change();
                }
                if has_superuser(&client).await? {
                    return Ok(Verdict::Done);
                }
            }
            Decision::Restore | Decision::Upgrade => {}
        }
        drop(client);
        self.change(&code).await
    }

    /// Change the database under the lock; the others wait, and say so.
    async fn change(&self, code: &Version) -> Result<Verdict> {
        let inner = &self.inner;
        let key = inner.registry.key("locks", "migrate");
        let lease = inner.etcd.grant(LOCK_LEASE).await?;
        if inner.etcd.create(&key, &inner.seed.node, Some(lease)).await? == Outcome::Refused {
            let _ = inner.etcd.revoke(lease).await;
            let holder = inner.etcd.get(&key).await?.map(|entry| entry.value);
            let holder = holder.unwrap_or_else(|| "another node".to_string());
            return Ok(Verdict::Wait(format!(
                "{holder} brings the database to its version of NetBox; this node waits for it"
            )));
        }
        let (etcd, every) = (inner.etcd.clone(), Duration::from_secs(u64::from(LOCK_LEASE) / 5));
        let keeping = tokio::spawn(async move {
            loop {
                tokio::time::sleep(every).await;
                // A lease that is lost is told by the lock in the database.
                let _ = etcd.keep_alive(lease).await;
            }
        });
        let changed = self.change_under_lock(code).await;
        keeping.abort();
        // It runs out anyway.
        let _ = inner.etcd.revoke(lease).await;
        changed
    }

    async fn change_under_lock(&self, code: &Version) -> Result<Verdict> {
        let inner = &self.inner;
        let mut client = inner.database.connect().await?;
        if !try_lock(&client).await? {
            return Ok(Verdict::Wait("another node still works on the database".to_string()));
        }
        let began = Instant::now();
        // It may have been done since.
        match decide(code, &read_schema(&client).await?) {
            Decision::Refuse(why) => return Ok(Verdict::Wait(why)),
            Decision::Restore => {
                let packed = read_bounded(&inner.places.join(SCHEMA), MAX_PACKED)?;
                let packed = packed.with_context(|| format!("this image has no {SCHEMA}"))?;
                let schema = unpack_schema(&packed)?;
                restore(&mut client, &schema, code).await?;
                let seconds = began.elapsed().as_secs_f64();
                log(&format!("netbox: made the database of NetBox {code} in {seconds:.2} s"));
            }
            Decision::Upgrade => {
                let doing = format!("this node brings the database to NetBox {code}");
                inner.board.raise(THING, doing);
                run_unit(UPGRADE).await.context("upgrading NetBox's database")?;
                record_version(&client, code).await?;
                let seconds = began.elapsed().as_secs_f64();
                log(&format!("netbox: upgraded the database to {code} in {seconds:.0} s"));
            }
            Decision::Serve if has_superuser(&client).await? => {}
            Decision::Serve => {
                run_unit(ADMIN).await.context("making NetBox's first superuser")?;
                log("netbox: made the superuser admin");
            }
        }
        Ok(Verdict::Wait("the database was changed; looking at it again".to_string()))
    }
}

/// Run a unit that ends by itself, to its end.
async fn run_unit(unit: &str) -> Result<()> {
    // Of an earlier try.
    let _ = forget_failure(unit).await;
    let ran = run_to_end(&["systemctl", "start", unit]).await;
    ran.with_context(|| format!("see `journalctl -u {unit}`")).map(drop)
}

fn read_version(path: &std::path::Path) -> Result<Version> {
    let bytes = read_bounded(path, 256)?.context("this image has no NetBox")?;
    let text = String::from_utf8_lossy(&bytes);
    Version::read(&text).with_context(|| format!("{} names no version", path.display()))
}
