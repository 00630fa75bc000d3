//! Where packages come from: the mirror and the store together.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};

use crate::debian::index::{self, Package};
use crate::debian::mirror::{Mirror, Places};
use crate::debian::package;
use crate::debian::solve::Universe;
use crate::digest::Digest;
use crate::error::UserError;
use crate::fetch::{Download, Fetcher};
use crate::lock::{self, Lock, LockedPackage, LockedSuite, SetRequest, Update};
use crate::progress::Progress;
use crate::repository;
use crate::store::Store;

/// How to reach packages.
#[derive(Debug, Clone, Default)]
pub struct FetchOptions {
    pub mirror: Option<String>,
    pub offline: bool,
    pub jobs: Option<u16>,
}

/// A store, and a mirror to fill it from.
pub struct Source {
    pub store: Store,
    pub progress: Progress,
    pub threads: usize,
    fetcher: Fetcher,
    options: FetchOptions,
    /// Looked for only when something must be fetched.
    mirror: OnceCell<Mirror>,
}

/// Packages to choose from.
pub struct Offered {
    universe: Universe,
    suites: Vec<LockedSuite>,
}

impl Source {
    pub fn open(options: &FetchOptions, progress: &Progress) -> Result<Self> {
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        let jobs = options.jobs.map_or(2 * threads, usize::from);
        Ok(Source {
            store: Store::open(&Store::default_root()?)?,
            progress: progress.clone(),
            threads: options.jobs.map_or(threads, usize::from),
            fetcher: Fetcher::new(jobs, options.offline)?,
            options: options.clone(),
            mirror: OnceCell::new(),
        })
    }

    pub fn is_offline(&self) -> bool {
        self.options.offline
    }

    fn find_mirror(&self) -> Result<&Mirror> {
        if let Some(mirror) = self.mirror.get() {
            return Ok(mirror);
        }
        let mirror = Mirror::find(&Places::of_this_machine(self.options.mirror.as_deref()))?;
        Ok(self.mirror.get_or_init(|| mirror))
    }

    /// Verified metadata of the mirror, parsed.
    fn refresh(&self, known: Option<&Lock>) -> Result<(Vec<Package>, Vec<LockedSuite>)> {
        let not_before: BTreeMap<String, u64> = known
            .map(|lock| lock.suites.iter().map(|suite| (suite.name.clone(), suite.date)).collect())
            .unwrap_or_default();
        let step = self.progress.begin("package lists");
        let suites = repository::refresh(
            &self.fetcher,
            &self.store,
            self.find_mirror()?,
            &self.progress,
            &not_before,
        )?;
        let mut packages = Vec::new();
        for suite in &suites {
            packages.extend(index::parse_packages(&suite.packages_text, &suite.name)?);
        }
        step.finish(format!("{} packages", packages.len()));
        let locked = suites
            .iter()
            .map(|suite| LockedSuite {
                name: suite.name.clone(),
                date: suite.release.date,
                sha256: suite.release_digest,
            })
            .collect();
        Ok((packages, locked))
    }

    /// What the requests insist on in the locked version and the lists have no more, from
    /// the packages in the store.
    fn recall(
        &self,
        requests: &[SetRequest],
        previous: &Lock,
        listed: &[Package],
    ) -> Result<Vec<Package>> {
        let mut recalled = Vec::new();
        // Requests that contradict each other are told when they are solved.
        for (name, pin) in lock::list_pins(requests).unwrap_or_default() {
            let is_listed =
                |package: &Package| package.name == name && package.version == pin.version;
            let Some(locked) = previous.find_package(&name) else { continue };
            if locked.version != pin.version
                || listed.iter().any(is_listed)
                || !self.store.has_file(&locked.sha256, Some(locked.size))
            {
                continue;
            }
            recalled.extend(read_locked(locked, &self.store.file_path(&locked.sha256))?);
        }
        Ok(recalled)
    }

    /// What the mirror offers, and what the requests insist on and the store still has.
    pub fn list_offered(
        &self,
        requests: &[SetRequest],
        previous: Option<&Lock>,
    ) -> Result<Offered> {
        let (mut packages, suites) = self.refresh(previous)?;
        if let Some(previous) = previous {
            packages.extend(self.recall(requests, previous, &packages)?);
        }
        Ok(Offered { universe: Universe::new(packages), suites })
    }

    /// Solve all requests anew, keeping what `previous` has where `update` allows it.
    pub fn solve(
        &self,
        offered: &Offered,
        requests: &[SetRequest],
        previous: Option<&Lock>,
        update: &Update,
    ) -> Result<Lock> {
        let step = self.progress.begin("solving");
        let suites = offered.suites.clone();
        let lock = lock::resolve(requests, &offered.universe, suites, previous, update)?;
        step.finish(format!("{} packages in {} sets", lock.packages.len(), lock.sets.len()));
        Ok(lock)
    }

    /// The packages of the named sets in the store, by digest.
    pub fn fetch_packages(&self, packages: &[&LockedPackage]) -> Result<()> {
        let missing: Vec<_> = packages
            .iter()
            .filter(|package| !self.store.has_file(&package.sha256, Some(package.size)))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let mirror = match self.options.offline {
            true => None,
            false => Some(self.find_mirror()?),
        };
        let downloads: Vec<Download> = missing
            .iter()
            .map(|package| Download {
                name: format!("{} {}", package.name, package.version),
                urls: mirror
                    .map(|mirror| {
                        mirror.locate(repository::find_archive(&package.suite), &package.path)
                    })
                    .into_iter()
                    .collect(),
                digest: package.sha256,
                size: Some(package.size),
            })
            .collect();
        self.fetcher.fetch_all(&self.store, &downloads, &self.progress).map(drop)
    }

    /// When what was made of packages fails, look whether their files have rotted in the
    /// store. Those are removed.
    pub fn explain_rot(&self, packages: &[&LockedPackage], error: anyhow::Error) -> anyhow::Error {
        let rotten: Vec<_> = packages
            .iter()
            .filter(|package| {
                Digest::of_file(&self.store.file_path(&package.sha256))
                    .is_ok_and(|found| found != package.sha256)
            })
            .collect();
        if rotten.is_empty() {
            return error;
        }
        let mut names = Vec::new();
        for package in rotten {
            // One that cannot be removed is found again by the next build.
            let _ = self.store.discard_file(&package.sha256);
            names.push(format!("{} {}", package.name, package.version));
        }
        UserError::new("files in the store are damaged")
            .in_file(self.store.root())
            .why(names.join(", "))
            .help("they were removed: build again, and they are fetched anew")
            .into()
    }

    /// Files from outside the archive.
    pub fn fetch_files(&self, downloads: &[Download]) -> Result<()> {
        self.fetcher.fetch_all(&self.store, downloads, &self.progress).map(drop)
    }
}

/// The description of a locked package, from its .deb.
fn read_locked(locked: &LockedPackage, path: &Path) -> Result<Vec<Package>> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let limit = package::limit_data(locked.installed_size);
    let deb = package::open_package(file, &locked.name, limit)?;
    let (_, control) = deb.control.get("control").context("a package has a control file")?;
    let control = std::str::from_utf8(control)
        .with_context(|| format!("reading the control file of {}", locked.name))?;
    let place =
        format!("Filename: {}\nSize: {}\nSHA256: {}\n", locked.path, locked.size, locked.sha256);
    index::parse_packages(&format!("{}\n{place}", control.trim_end()), &locked.suite)
}
