//! Keeping the record: reading it, changing it under the lock, and showing what it holds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::decide::{Decision, Expiry, Held, Own, decide, judge_expiry};
use super::record::{Record, Seal};
use super::show::show;
use crate::agent::board::{Board, log};
use crate::agent::etcd::{Etcd, Outcome};
use crate::agent::places::Places;
use crate::agent::registry::Registry;
use crate::clock::read_clock;
use crate::config::cluster::Role;
use crate::error::UserError;
use crate::pki::{Chain, SiteAuthority, list_site_names};
use crate::secrets::{SITE_KEY, SITE_SEAL};
use crate::seed::Seed;

/// The record is looked at so often even when nothing was told.
const TICK: Duration = Duration::from_secs(10);
/// Seconds for which the lock outlives an edge that dies with it.
const LOCK_LEASE: u32 = 10;
/// How long an edge waits for the lock: a dead one's runs out in between.
const PATIENCE: Duration = Duration::from_secs(15);
/// What status calls it.
const THING: &str = "site";

/// An edge's part in the certificate for users.
#[derive(Clone)]
pub struct Site {
    inner: Arc<Inner>,
}

struct Inner {
    places: Places,
    board: Board,
    etcd: Etcd,
    registry: Registry,
    seed: Arc<Seed>,
    seal: Seal,
    authority: Option<SiteAuthority>,
    /// What this node's seed brings.
    brought: Option<Chain>,
    brings: bool,
    place: String,
    lock: String,
    /// One task at a time hands certificates to HAProxy.
    turn: tokio::sync::Mutex<()>,
}

/// What came of a renewal that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// This edge has made it; otherwise another edge did at the same time.
    pub made: bool,
    /// SHA-256 of the certificate, 64 hexadecimal digits.
    pub fingerprint: String,
    /// Seconds since 1970, UTC.
    pub not_after: u64,
}

/// A record as it was read: what it holds, and its revision.
struct Found {
    chain: Chain,
    held: Held,
    revision: i64,
}

impl Site {
    /// `None` on a node that is no edge.
    pub fn new(
        places: &Places,
        board: &Board,
        etcd: &Etcd,
        registry: &Registry,
        seed: &Arc<Seed>,
    ) -> Result<Option<Self>> {
        let site = seed.site.as_ref().filter(|_| seed.entry().is_some_and(|n| n.has(Role::Edge)));
        let Some(site) = site else { return Ok(None) };
        let secret = |name: &str| {
            seed.secrets.get(name).with_context(|| format!("the seed has no secret {name}"))
        };
        let place = registry.key("site", "certificate");
        let read = |pem: &String| SiteAuthority::read(pem, secret(SITE_KEY)?.reveal());
        let brought = site.brought.as_ref().and_then(|brought| {
            let read = Chain::read(&brought.chain, &brought.key);
            read.map_err(|error| log(&format!("site: what the seed brings: {error:#}"))).ok()
        });
        let inner = Inner {
            seal: Seal::new(secret(SITE_SEAL)?, &place)?,
            authority: site.authority.as_ref().map(read).transpose()?,
            brought,
            brings: site.brought.is_some(),
            lock: registry.key("locks", "site"),
            turn: tokio::sync::Mutex::default(),
            places: places.clone(),
            board: board.clone(),
            etcd: etcd.clone(),
            registry: registry.clone(),
            seed: seed.clone(),
            place,
        };
        Ok(Some(Site { inner: Arc::new(inner) }))
    }

    /// Follow the record for ever.
    pub async fn run(self) {
        loop {
            let pause = match self.settle().await {
                Ok(()) => {
                    self.inner.board.clear(THING);
                    TICK
                }
                Err(error) => {
                    self.inner.board.raise(THING, format!("{error:#}"));
                    TICK / 5
                }
            };
            tokio::select! {
                () = self.inner.registry.wait_for_site() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// One look: change the record if it is time, and show what it holds.
    pub async fn settle(&self) -> Result<()> {
        let mut found = self.read().await?;
        if self.decide(found.as_ref())? != Decision::Keep {
            found = self.change(None).await?.0;
        }
        let Some(found) = found else {
            bail!("there is no certificate for users, and this edge can make none");
        };
        self.tell_expiry(&found.held, read_clock()?)?;
        let _turn = self.inner.turn.lock().await;
        show(&self.inner.places, &found.chain).await
    }

    /// Renew the certificate now, for whoever asks on this node. Of several edges that are
    /// asked at once, one makes it and all show that one.
    ///
    /// # Errors
    /// A [`UserError`] when the operator brings the certificate.
    pub async fn renew(&self) -> Result<Renewal> {
        let found = self.read().await?;
        if found.as_ref().is_some_and(|found| found.held.brought) {
            return Err(UserError::new("this certificate is not the cluster's to renew")
                .why("the operator brought it")
                .help("name a newer one in `[certificate]`, and make a new seed for an edge")
                .into());
        }
        if self.inner.authority.is_none() {
            return Err(UserError::new("this node's seed has no site CA").into());
        }
        let known = found.map_or(0, |found| found.revision);
        let (found, made) = self.change(Some(known)).await?;
        let found = found.context("there is no certificate for users")?;
        let _turn = self.inner.turn.lock().await;
        show(&self.inner.places, &found.chain).await?;
        Ok(Renewal {
            made,
            fingerprint: found.chain.fingerprint.to_string(),
            not_after: found.chain.not_after,
        })
    }

    async fn read(&self) -> Result<Option<Found>> {
        let inner = &self.inner;
        let Some(entry) = inner.etcd.get(&inner.place).await? else { return Ok(None) };
        match self.read_entry(&entry.value, entry.mod_revision) {
            Ok(found) => Ok(Some(found)),
            // Nobody's: it is replaced like one that is not there, at this revision.
            Err(error) => {
                log(&format!("site: what etcd holds is of no use: {error:#}"));
                Ok(None)
            }
        }
    }

    fn read_entry(&self, value: &str, revision: i64) -> Result<Found> {
        let record = self.inner.seal.open(value)?;
        let chain = Chain::read(&record.chain, &record.key)?;
        let (names, addresses) = list_site_names(&self.inner.seed.cluster);
        let held = Held {
            brought: record.brought,
            issued: record.issued,
            fits: names.iter().all(|name| chain.dns_names.contains(name))
                && addresses.iter().all(|address| chain.addresses.contains(address)),
            not_before: chain.not_before,
            not_after: chain.not_after,
            chain: record.chain,
        };
        Ok(Found { chain, held, revision })
    }

    fn decide(&self, found: Option<&Found>) -> Result<Decision> {
        let (inner, now) = (&self.inner, read_clock()?);
        let own = Own {
            issued: inner.seed.issued,
            brought: inner
                .brought
                .as_ref()
                .filter(|chain| (chain.not_before..chain.not_after).contains(&now))
                .map(|chain| chain.pem.certificate.clone()),
            brings: inner.brings,
            next_end: inner.authority.as_ref().map(|authority| authority.find_end(now)),
        };
        Ok(decide(found.map(|found| &found.held), &own, now))
    }

    /// Change the record under the lock, if it is still to be changed once the lock is had.
    /// `known` is the revision that whoever forces a renewal wants to see replaced. What the
    /// record holds then, and whether this edge wrote it.
    async fn change(&self, known: Option<i64>) -> Result<(Option<Found>, bool)> {
        let etcd = &self.inner.etcd;
        let lease = etcd.grant(LOCK_LEASE).await?;
        let changed = self.change_under(lease, known).await;
        // It runs out anyway.
        let _ = etcd.revoke(lease).await;
        changed
    }

    async fn change_under(&self, lease: i64, known: Option<i64>) -> Result<(Option<Found>, bool)> {
        let inner = &self.inner;
        let begun = Instant::now();
        loop {
            let taken = inner.etcd.create(&inner.lock, &inner.seed.node, Some(lease)).await?;
            let entry = inner.etcd.get(&inner.place).await?;
            let revision = entry.as_ref().map_or(0, |entry| entry.mod_revision);
            let found = entry.and_then(|entry| self.read_entry(&entry.value, revision).ok());
            let wanted = match known {
                Some(known) if found.as_ref().map_or(0, |found| found.revision) == known => {
                    Decision::Make
                }
                Some(_) => Decision::Keep,
                None => self.decide(found.as_ref())?,
            };
            if wanted == Decision::Keep {
                return Ok((found, false));
            }
            if taken == Outcome::Done {
                return Ok((Some(self.write(wanted, revision, lease).await?), true));
            }
            ensure!(begun.elapsed() < PATIENCE, "another edge has held the lock for too long");
            // The lease must last until this edge has its turn.
            inner.etcd.keep_alive(lease).await?;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn write(&self, wanted: Decision, revision: i64, lease: i64) -> Result<Found> {
        let inner = &self.inner;
        let (chain, key, word) = match (wanted, &inner.brought, &inner.authority) {
            (Decision::Bring, Some(brought), _) => {
                (brought.pem.certificate.clone(), brought.pem.key.clone(), "brought")
            }
            (_, _, Some(authority)) => {
                let made = authority.certify(&inner.seed.cluster, read_clock()?)?;
                (made.certificate, made.key, "made")
            }
            _ => bail!("this edge has nothing to make a certificate with"),
        };
        let record = Record {
            brought: wanted == Decision::Bring,
            issued: inner.seed.issued,
            by: inner.seed.node.clone(),
            chain,
            key,
        };
        let text = inner.seal.seal(&record)?;
        let holder = (inner.lock.as_str(), lease);
        let put = inner.etcd.put_if(&inner.place, &text, revision, holder).await?;
        ensure!(put == Outcome::Done, "the lock was lost; looking again");
        log(&format!("site: {word} a new certificate for users"));
        let entry = inner.etcd.get(&inner.place).await?.context("the record has vanished")?;
        self.read_entry(&entry.value, entry.mod_revision)
    }

    fn tell_expiry(&self, held: &Held, now: u64) -> Result<()> {
        let board = &self.inner.board;
        match judge_expiry(held, now) {
            Expiry::Far => board.forget_warning(THING),
            Expiry::Near(warning) => board.warn(THING, warning),
            Expiry::Past(problem) => bail!(problem),
        }
        Ok(())
    }
}
