//! Where packages come from: the lock, the mirror and the store together.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::sets;
use crate::config::Project;
use crate::config::profile::Profile;
use crate::debian::index::{self, Package};
use crate::debian::mirror::{Mirror, Places};
use crate::debian::package;
use crate::debian::solve::Universe;
use crate::digest::Digest;
use crate::error::UserError;
use crate::fetch::{Download, Fetcher, Vanished};
use crate::lock::{self, Change, Lock, LockedPackage, LockedSuite, SetRequest, Update};
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
        for (name, pin) in lock::list_pins(requests)? {
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

    /// Solve all requests anew, keeping what `previous` has where `update` allows it.
    fn solve(
        &self,
        requests: &[SetRequest],
        previous: Option<&Lock>,
        update: &Update,
    ) -> Result<Lock> {
        let (mut packages, suites) = self.refresh(previous)?;
        if let Some(previous) = previous {
            packages.extend(self.recall(requests, previous, &packages)?);
        }
        let universe = Universe::new(packages);
        let step = self.progress.begin("solving");
        let lock = lock::resolve(requests, &universe, suites, previous, update)?;
        step.finish(format!("{} packages in {} sets", lock.packages.len(), lock.sets.len()));
        Ok(lock)
    }

    /// The packages of the named sets in the store, by digest.
    fn fetch_packages(&self, packages: &[&LockedPackage]) -> Result<()> {
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

    /// Files of the layers from outside the archive.
    pub fn fetch_artifacts(&self, profile: &Profile) -> Result<()> {
        let mut downloads = Vec::new();
        for layer in &profile.layers {
            downloads.extend(layer.artifacts.iter().map(|artifact| Download {
                name: format!("artifact `{}` of layer `{}`", artifact.name, layer.name),
                urls: vec![artifact.url.clone()],
                digest: artifact.sha256,
                size: None,
            }));
        }
        let fetched = self.fetcher.fetch_all(&self.store, &downloads, &self.progress);
        fetched.map(drop).map_err(|error| match error.downcast::<Vanished>() {
            Ok(vanished) => explain_missing_artifacts(&vanished, &downloads).into(),
            Err(error) => error,
        })
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

/// Lock what the project's profiles ask for; say what changed.
pub fn relock(project: &Project, source: &Source, update: &Update) -> Result<Vec<Change>> {
    let path = lock_path(project);
    let previous = Lock::load(&path)?;
    if let (Some(previous), Update::Named(names)) = (&previous, update) {
        previous.check_names(names)?;
    }
    let requests = sets::list_requests(&load_all(project)?);
    let lock = match &previous {
        Some(previous)
            if *update == Update::Nothing && previous.find_stale(&requests).is_empty() =>
        {
            previous.prune(&requests)
        }
        _ => {
            if source.options.offline {
                return Err(UserError::new("packages cannot be solved without a network")
                    .why("the mirror's package lists are needed, and `--offline` forbids to fetch them")
                    .help("run again without `--offline`")
                    .into());
            }
            source.solve(&requests, previous.as_ref(), update)?
        }
    };
    if previous.as_ref() != Some(&lock) {
        lock.save(&path)?;
    }
    Ok(previous.map(|previous| lock.compare(&previous)).unwrap_or_default())
}

/// The lock that a build of `profiles` uses, with all its packages in the store.
pub fn prepare_lock(
    project: &Project,
    source: &Source,
    profiles: &[Profile],
    locked: bool,
) -> Result<Lock> {
    let path = lock_path(project);
    let requests = sets::list_requests(profiles);
    let lock = match Lock::load(&path)? {
        Some(lock) if lock.find_stale(&requests).is_empty() => lock,
        previous if locked || source.options.offline => {
            let why = match previous {
                Some(lock) => format!("these changed: {}", lock.find_stale(&requests).join(", ")),
                None => "there is none".to_string(),
            };
            let help = match locked {
                true => "run `stanchion lock`, or leave --locked out",
                false => "run `stanchion lock` with a network first",
            };
            return Err(UserError::new("the lock does not hold what the profiles ask for")
                .in_file(path)
                .why(why)
                .help(help)
                .into());
        }
        previous => {
            let all = sets::list_requests(&load_all(project)?);
            let lock = source.solve(&all, previous.as_ref(), &Update::Nothing)?;
            announce(source, previous.as_ref(), &lock);
            lock.save(&path)?;
            lock
        }
    };
    let names = match fetch_sets(source, &lock, &requests) {
        Ok(()) => return Ok(lock),
        Err(error) => name_vanished(error)?,
    };
    if locked {
        return Err(explain_vanished(&lock, &names)
            .in_file(path)
            .help(format!("{}, or leave --locked out", advise_update(&names)))
            .into());
    }
    let renewed = replace_vanished(project, source, &lock, &names)?;
    match fetch_sets(source, &renewed, &requests) {
        Ok(()) => {}
        Err(error) => return Err(explain_torn(&renewed, &name_vanished(error)?).into()),
    }
    renewed.save(&path)?;
    Ok(renewed)
}

/// Solve anew without the locked versions of what has vanished, and say what changed.
fn replace_vanished(
    project: &Project,
    source: &Source,
    lock: &Lock,
    names: &BTreeSet<String>,
) -> Result<Lock> {
    let all = sets::list_requests(&load_all(project)?);
    let renewed = source.solve(&all, Some(lock), &Update::Named(names.clone()))?;
    let places = |lock: &Lock, name: &str| {
        lock.find_package(name).map(|p| (p.suite.clone(), p.path.clone(), p.sha256))
    };
    let (stuck, moved): (BTreeSet<String>, BTreeSet<String>) =
        names.iter().cloned().partition(|name| places(lock, name) == places(&renewed, name));
    if !stuck.is_empty() {
        return Err(explain_torn(lock, &stuck).into());
    }
    let warn = |text: &str| source.progress.warn(text);
    warn("the mirror no longer has packages that the lock names; they were replaced:");
    let changes = renewed.compare(lock);
    for change in &changes {
        warn(&change.to_string());
    }
    for name in moved.iter().filter(|name| changes.iter().all(|change| change.package != **name)) {
        warn(&format!("{}, now from elsewhere", show_versions(&renewed, [name])));
    }
    Ok(renewed)
}

/// The packages that could not be fetched because they are nowhere; else the error itself.
fn name_vanished(error: anyhow::Error) -> Result<BTreeSet<String>> {
    let vanished = error.downcast::<Vanished>()?;
    // As `Source::fetch_packages` names its downloads.
    let names = vanished.names.iter().filter_map(|shown| shown.split(' ').next());
    Ok(names.map(str::to_string).collect())
}

fn explain_vanished(lock: &Lock, names: &BTreeSet<String>) -> UserError {
    UserError::new("the mirror no longer has packages that the lock names")
        .why(show_versions(lock, names))
}

/// The mirror's lists and its files do not fit.
fn explain_torn(lock: &Lock, names: &BTreeSet<String>) -> UserError {
    UserError::new("the mirror lists packages that it does not have")
        .why(show_versions(lock, names))
        .help("it may be in the midst of an update: try again later, or name another with --mirror")
}

fn advise_update(names: &BTreeSet<String>) -> String {
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    format!("run `stanchion lock --update {}` to take what replaced them", names.join(" "))
}

fn show_versions<'a>(lock: &Lock, names: impl IntoIterator<Item = &'a String>) -> String {
    let packages = names.into_iter().filter_map(|name| lock.find_package(name));
    let shown = packages.map(|package| format!("{} {}", package.name, package.version));
    shown.collect::<Vec<_>>().join(", ")
}

fn announce(source: &Source, previous: Option<&Lock>, lock: &Lock) {
    if let Some(previous) = previous {
        for change in lock.compare(previous) {
            source.progress.note(&format!("locked {change}"));
        }
    }
}

fn fetch_sets(source: &Source, lock: &Lock, requests: &[SetRequest]) -> Result<()> {
    let mut packages: HashMap<Digest, &LockedPackage> = HashMap::new();
    for request in requests.iter().filter(|request| !crate::tools::is_optional(&request.name)) {
        for package in lock.list_set(&request.name)? {
            packages.insert(package.sha256, package);
        }
    }
    let mut packages: Vec<_> = packages.into_values().collect();
    packages.sort_by(|a, b| a.name.cmp(&b.name));
    source.fetch_packages(&packages)
}

/// Fetch one set and give the files of its packages, by package name.
pub fn fetch_set(source: &Source, lock: &Lock, set: &str) -> Result<Vec<(String, PathBuf)>> {
    let packages = lock.list_set(set)?;
    if let Err(error) = source.fetch_packages(&packages) {
        let names = name_vanished(error)?;
        return Err(explain_vanished(lock, &names).help(advise_update(&names)).into());
    }
    Ok(packages
        .iter()
        .map(|package| (package.name.clone(), source.store.file_path(&package.sha256)))
        .collect())
}

fn explain_missing_artifacts(vanished: &Vanished, downloads: &[Download]) -> UserError {
    let missing: Vec<String> = downloads
        .iter()
        .filter(|download| vanished.names.contains(&download.name))
        .map(|download| format!("{}: {}", download.name, download.urls.join(", ")))
        .collect();
    UserError::new("there is no such file (any more) at the URL of an artifact")
        .why(missing.join("\n"))
        .help("mend its `url` in layer.toml, and its `sha256` when it is another version")
}

fn load_all(project: &Project) -> Result<Vec<Profile>> {
    project.list_profiles()?.iter().map(|name| project.load_profile(name)).collect()
}

pub fn lock_path(project: &Project) -> PathBuf {
    project.root.join(lock::FILE_NAME)
}
