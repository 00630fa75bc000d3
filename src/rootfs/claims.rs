//! Which package placed what, while several threads unpack into one root.
//!
//! Paths are those of [`super::place::Folder`], without links, so that `bin/sh` and
//! `usr/bin/sh` are one file where `bin` is a link. Each path has a lock that is held
//! while something is put there; nothing else decides who was first, because no result
//! may depend on how threads are scheduled:
//! - a folder gets the metadata that the first package in order gives it, at the end;
//! - of two packages with one file, the one that replaces the other keeps it, and when
//!   neither does, the first in order does and a [`Conflict`] says so;
//! - a folder in one package and a link or a file in another is a [`Conflict`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, MutexGuard, OnceLock};

use anyhow::{Result, bail};

use super::installed::Facts;
use crate::debian::archive::show;

/// Few enough to walk at the end, enough that threads seldom meet.
const SHARDS: usize = 64;

/// Two packages that hold one path, without leave to do so.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conflict {
    /// As in dpkg's lists: `/usr/bin/x`.
    pub path: Vec<u8>,
    /// The package whose file stayed.
    pub kept: String,
    /// The package whose file was left out.
    pub dropped: String,
}

/// What stands at a path.
#[derive(Debug, Clone)]
pub enum Claim {
    /// A folder that was there before.
    Folder,
    /// A folder that this run made; `by` is the first package in order that holds it, or
    /// `usize::MAX` when only what lies in it was in an archive.
    Made { by: usize, metadata: Metadata },
    /// A file or a link. `settled`: placed before the threads began.
    Object { owner: usize, settled: bool },
}

/// What a folder gets at the end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: u64,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The packages of this run that hold one path.
#[derive(Debug, Default)]
struct Contest {
    packages: BTreeSet<usize>,
    /// Of a folder and something else: no Replaces helps.
    mixed: bool,
}

/// How a contest ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    pub winner: usize,
    pub loser: usize,
    /// The winner replaces the loser.
    pub allowed: bool,
}

/// A package by its place in the order, and a path without links.
pub type PackagePath = (usize, Vec<u8>);

type Shard = HashMap<Vec<u8>, Claim>;

pub struct Claims {
    shards: Vec<Mutex<Shard>>,
    hashing: RandomState,
    contests: Mutex<BTreeMap<Vec<u8>, Contest>>,
    conflicts: Mutex<Vec<Conflict>>,
    facts: Vec<OnceLock<Facts>>,
}

impl Claims {
    pub fn new(packages: usize) -> Self {
        Claims {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hashing: RandomState::new(),
            contests: Mutex::default(),
            conflicts: Mutex::default(),
            facts: (0..packages).map(|_| OnceLock::new()).collect(),
        }
    }

    /// Says who a package is; before it claims anything.
    pub fn introduce(&self, package: usize, facts: Facts) {
        // A second introduction would be the same.
        let _ = self.facts[package].set(facts);
    }

    pub fn facts(&self, package: usize) -> Option<&Facts> {
        self.facts[package].get()
    }

    /// A file that an installed package has and keeps.
    pub fn conflict(&self, path: &[u8], owner: &str, dropped: &Facts) {
        let conflict = Conflict {
            path: path.to_vec(),
            kept: owner.to_string(),
            dropped: dropped.name.clone(),
        };
        self.conflicts.lock().expect("no panic while held").push(conflict);
    }

    /// The lock of a path, and the claims beside it.
    pub fn lock(&self, path: &[u8]) -> MutexGuard<'_, Shard> {
        let shard = self.hashing.hash_one(path) as usize % SHARDS;
        self.shards[shard].lock().expect("no panic while held")
    }

    /// Writes down that two packages hold `path`.
    pub fn contest(&self, path: &[u8], a: usize, b: usize, mixed: bool) {
        let mut contests = self.contests.lock().expect("no panic while held");
        let contest = contests.entry(path.to_vec()).or_default();
        contest.packages.extend([a, b]);
        contest.mixed |= mixed;
    }

    /// Who keeps a file that two packages hold. dpkg asks when the second in order comes,
    /// the second first.
    pub fn judge(&self, a: usize, b: usize) -> Verdict {
        let (first, second) = (a.min(b), a.max(b));
        let replaces = |x: usize, y: usize| match (self.facts[x].get(), self.facts[y].get()) {
            (Some(x), Some(y)) => x.replaces(y),
            _ => false,
        };
        if replaces(second, first) {
            Verdict { winner: second, loser: first, allowed: true }
        } else {
            Verdict { winner: first, loser: second, allowed: replaces(first, second) }
        }
    }

    /// What has been placed so far counts as there before.
    pub fn settle(&self) {
        for shard in &self.shards {
            for claim in shard.lock().expect("no panic while held").values_mut() {
                if let Claim::Object { settled, .. } = claim {
                    *settled = true;
                }
            }
        }
    }

    /// The folders this run made, those within others first.
    pub fn take_folders(&self) -> Vec<(Vec<u8>, Metadata)> {
        let mut folders = Vec::new();
        for shard in &self.shards {
            for (path, claim) in shard.lock().expect("no panic while held").iter_mut() {
                if let Claim::Made { metadata, .. } = claim {
                    folders.push((path.clone(), std::mem::take(metadata)));
                }
            }
        }
        folders.sort_by(|a, b| b.0.cmp(&a.0));
        folders
    }

    /// Settles the contests one package after the other in their order, as dpkg would have
    /// met them: the paths that packages lost to another that replaces them, and the
    /// conflicts.
    ///
    /// Errors: a hard link (`links`: packages and the paths of targets) to a file that
    /// another package replaces, or replacements that go round in a circle: what is in
    /// the root would depend on who came first.
    pub fn close(&self, links: &[PackagePath]) -> Result<(Vec<PackagePath>, Vec<Conflict>)> {
        let name = |package: usize| {
            self.facts[package].get().map(|facts| facts.name.clone()).unwrap_or_default()
        };
        let mut lost = Vec::new();
        let mut conflicts = self.conflicts.lock().expect("no panic while held").clone();
        for (path, contest) in self.contests.lock().expect("no panic while held").iter() {
            let mut packages = contest.packages.iter().copied();
            let Some(mut owner) = packages.next() else { continue };
            let mut allowed = true;
            for package in packages {
                let verdict = self.judge(owner, package);
                owner = verdict.winner;
                if verdict.allowed && !contest.mixed {
                    lost.push((verdict.loser, path.clone()));
                    continue;
                }
                allowed = false;
                conflicts.push(Conflict {
                    path: [b"/", &path[..]].concat(),
                    kept: name(verdict.winner),
                    dropped: name(verdict.loser),
                });
            }
            if !allowed {
                continue;
            }
            match self.lock(path).get(path) {
                Some(Claim::Object { owner: placed, .. }) if *placed == owner => {}
                _ => bail!("{}: packages replace each other's file in a circle", show(path)),
            }
            if let Some((package, _)) = links.iter().find(|(_, target)| target == path) {
                let package = name(*package);
                bail!("{}: replaced by another package, and {package} links to it", show(path));
            }
        }
        conflicts.sort();
        Ok((lost, conflicts))
    }
}
