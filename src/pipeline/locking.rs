//! The lock of a build, with its packages in the store. A profile that cannot be locked
//! does not keep the others from being built.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::artifacts::{self, GivenArtifact};
use super::source::Source;
use super::{python, sets};
use crate::config::Project;
use crate::config::profile::Profile;
use crate::digest::Digest;
use crate::error::UserError;
use crate::fetch::Vanished;
use crate::lock::{self, Change, Lock, LockedPackage, OutsideRequests, SetRequest, Update};
use crate::tools;

/// What is wrong with a profile, by its name.
pub type Failures = BTreeMap<String, anyhow::Error>;

pub fn lock_path(project: &Project) -> PathBuf {
    project.root.join(lock::FILE_NAME)
}

/// The project's lock, for looking at a profile and not for building it.
///
/// # Errors
/// A [`UserError`] when there is none, or it does not hold what the profile asks for.
pub fn load_current(project: &Project, profile: &Profile) -> Result<Lock> {
    let path = lock_path(project);
    let lock = Lock::load(&path)?.ok_or_else(|| {
        UserError::new("nothing is locked yet").in_file(&path).help("run `stanchion lock` first")
    })?;
    let profiles = std::slice::from_ref(profile);
    let (requests, outside) = (sets::list_requests(profiles), sets::list_outside(profiles));
    let mut stale: Vec<String> = lock.find_stale(&requests).into_iter().map(Into::into).collect();
    stale.extend(lock.find_stale_outside(&outside).into_iter().map(|name| name.to_string()));
    if !stale.is_empty() {
        return Err(UserError::new("the lock does not hold what the profile asks for")
            .in_file(&path)
            .why(format!("these changed: {}", stale.join(", ")))
            .help("run `stanchion lock`")
            .into());
    }
    Ok(lock)
}

/// Lock what the project's profiles ask for; say what changed.
pub fn relock(
    project: &Project,
    source: &Source,
    update: &Update,
    given: &[GivenArtifact],
) -> Result<Vec<Change>> {
    let path = lock_path(project);
    let previous = Lock::load(&path)?;
    if let (Some(previous), Update::Named(names)) = (&previous, update) {
        previous.check_names(names)?;
    }
    let profiles = load_all(project)?;
    let (requests, outside) = (sets::list_requests(&profiles), sets::list_outside(&profiles));
    let taken = artifacts::take(source, &profiles, given)?;
    let mut lock = match &previous {
        Some(previous)
            if *update == Update::Nothing && previous.find_stale(&requests).is_empty() =>
        {
            previous.clone()
        }
        _ => {
            if source.is_offline() {
                return Err(UserError::new("packages cannot be solved without a network")
                    .why("the mirror's package lists are needed, and `--offline` forbids to fetch them")
                    .help("run again without `--offline`")
                    .into());
            }
            let offered = source.list_offered(&requests, previous.as_ref())?;
            source.solve(&offered, &requests, previous.as_ref(), update)?
        }
    };
    if *update == Update::Everything {
        (lock.artifacts, lock.pythons) = Default::default();
    }
    artifacts::lock_taken(source, &mut lock, &outside.artifacts, &taken)?;
    lock_outside(source, &mut lock, &outside)?;
    let lock = lock.prune(&requests, &outside);
    if previous.as_ref() != Some(&lock) {
        lock.save(&path)?;
    }
    Ok(previous.map(|previous| lock.compare(&previous)).unwrap_or_default())
}

/// A lock that holds for all profiles but those of the failures, with its packages in the
/// store; none when all have failed.
///
/// # Errors
/// What concerns all profiles: a lock that cannot be read, a mirror that cannot be reached.
pub fn prepare_lock(
    project: &Project,
    source: &Source,
    profiles: &[Profile],
    locked: bool,
) -> Result<(Option<Lock>, Failures)> {
    let path = lock_path(project);
    let previous = Lock::load(&path)?;
    let mut failures = Failures::new();
    let is_stale = |profile: &Profile, lock: &Lock| !lock.find_stale(&request(profile)).is_empty();
    let saved = previous.clone();
    let mut is_savable = !locked;
    let mut lock = match previous {
        Some(lock) if !profiles.iter().any(|profile| is_stale(profile, &lock)) => lock,
        previous if locked || source.is_offline() => {
            let explain = |profile| explain_stale(&path, previous.as_ref(), profile, locked);
            for profile in profiles {
                if previous.as_ref().is_none_or(|lock| is_stale(profile, lock)) {
                    failures.insert(profile.name.clone(), explain(profile).into());
                }
            }
            match previous {
                Some(lock) => lock,
                None => return Ok((None, failures)),
            }
        }
        previous => {
            let update = Update::Nothing;
            let Some((lock, is_whole)) =
                solve(project, source, profiles, previous.as_ref(), &update, &mut failures)?
            else {
                return Ok((None, failures));
            };
            is_savable &= is_whole;
            lock
        }
    };
    lock_outside_each(source, &path, &mut lock, profiles, locked, &mut failures);
    announce(source, saved.as_ref(), &lock);
    if is_savable && saved.as_ref() != Some(&lock) {
        lock.save(&path)?;
    }

    let left = |failures: &Failures| -> Vec<Profile> {
        profiles.iter().filter(|profile| !failures.contains_key(&profile.name)).cloned().collect()
    };
    let fetch = |lock: &Lock, failures: &Failures| {
        let requests = sets::list_requests(&left(failures));
        match left(failures).is_empty() {
            true => Ok(BTreeSet::new()),
            false => fetch_sets(source, lock, &requests),
        }
    };
    let gone = fetch(&lock, &failures)?;
    if gone.is_empty() {
        return Ok((Some(lock), failures));
    }
    if locked {
        let explain = |names: &BTreeSet<String>| {
            explain_vanished(&lock, names)
                .in_file(&path)
                .help(format!("{}, or leave --locked out", advise_update(names)))
        };
        fail_without(&mut failures, &lock, profiles, &gone, explain);
        return Ok((Some(lock), failures));
    }
    let update = Update::Named(gone.clone());
    let Some((renewed, is_whole)) =
        solve(project, source, &left(&failures), Some(&lock), &update, &mut failures)?
    else {
        return Ok((None, failures));
    };
    let stuck = announce_replaced(source, &lock, &renewed, &gone);
    let explain = |names: &BTreeSet<String>| explain_torn(&renewed, names);
    fail_without(&mut failures, &renewed, profiles, &stuck, explain);
    let gone = fetch(&renewed, &failures)?;
    fail_without(&mut failures, &renewed, profiles, &gone, explain);
    if is_whole && stuck.is_empty() && gone.is_empty() {
        renewed.save(&path)?;
    }
    Ok((Some(renewed), failures))
}

/// Lock for each profile what it needs from outside; a profile for which that cannot be done
/// joins the failures. Other profiles' answers stay as they are.
fn lock_outside_each(
    source: &Source,
    path: &Path,
    lock: &mut Lock,
    profiles: &[Profile],
    locked: bool,
    failures: &mut Failures,
) {
    for profile in profiles {
        if failures.contains_key(&profile.name) {
            continue;
        }
        let outside = sets::list_outside(std::slice::from_ref(profile));
        let stale = lock.find_stale_outside(&outside);
        let done = match locked && !stale.is_empty() {
            true => {
                let why = format!("these changed: {}", stale.join(", "));
                Err(explain_stale_names(path, why, locked).into())
            }
            false => lock_outside(source, lock, &outside),
        };
        if let Err(error) = done {
            failures.insert(profile.name.clone(), error);
        }
    }
}

/// Answer what is asked for from outside and not locked yet.
fn lock_outside(source: &Source, lock: &mut Lock, outside: &OutsideRequests) -> Result<()> {
    for request in &outside.artifacts {
        if lock.find_artifact(request).is_none() {
            lock.put_artifact(request, request.sha256);
        }
    }
    for request in &outside.pythons {
        if lock.find_python(request).is_some() {
            continue;
        }
        if source.is_offline() {
            return Err(UserError::new(
                "distributions of Python cannot be chosen without a network",
            )
            .why(format!("the lock does not hold what layer `{}` asks for", request.layer))
            .help("run `stanchion lock` with a network first")
            .into());
        }
        let distributions = python::resolve(source, lock, request)?;
        lock.put_python(request, distributions);
    }
    Ok(())
}

/// Solve for all profiles of the project, so that they have the same versions. Where that
/// cannot be, for those of `profiles` that can be solved: then the second is false, and the
/// lock is for this build alone. Nothing when none of them can be.
fn solve(
    project: &Project,
    source: &Source,
    profiles: &[Profile],
    previous: Option<&Lock>,
    update: &Update,
    failures: &mut Failures,
) -> Result<Option<(Lock, bool)>> {
    let all = load_all(project);
    let requests = sets::list_requests(all.as_deref().unwrap_or(profiles));
    let offered = source.list_offered(&requests, previous)?;
    let solve = |profiles: &[Profile]| {
        source.solve(&offered, &sets::list_requests(profiles), previous, update)
    };
    let error = match all.and_then(|all| solve(&all)) {
        Ok(lock) => return Ok(Some((lock, true))),
        Err(error) => error,
    };
    let mut sound = Vec::new();
    for profile in profiles {
        match solve(std::slice::from_ref(profile)) {
            Ok(_) => sound.push(profile.clone()),
            Err(error) => drop(failures.insert(profile.name.clone(), error)),
        }
    }
    if sound.is_empty() {
        return Ok(None);
    }
    let lock = solve(&sound)?;
    let why = format!("{error:#}");
    let why = why.lines().next().unwrap_or_default();
    source
        .progress
        .warn(&format!("the lock is not written, because not all profiles can be locked: {why}"));
    Ok(Some((lock, false)))
}

/// The profiles whose sets name one of the packages cannot be built.
fn fail_without(
    failures: &mut Failures,
    lock: &Lock,
    profiles: &[Profile],
    gone: &BTreeSet<String>,
    explain: impl Fn(&BTreeSet<String>) -> UserError,
) {
    for profile in profiles {
        let mut lacks = BTreeSet::new();
        for request in request(profile).iter().filter(|set| !tools::is_optional(&set.name)) {
            let Ok(packages) = lock.list_set(&request.name) else { continue };
            let names = packages.iter().map(|package| &package.name);
            lacks.extend(names.filter(|name| gone.contains(*name)).cloned());
        }
        if !lacks.is_empty() && !failures.contains_key(&profile.name) {
            failures.insert(profile.name.clone(), explain(&lacks).into());
        }
    }
}

/// Say what replaces packages that have vanished. Returned are those that nothing replaces.
fn announce_replaced(
    source: &Source,
    lock: &Lock,
    renewed: &Lock,
    gone: &BTreeSet<String>,
) -> BTreeSet<String> {
    let places = |lock: &Lock, name: &str| {
        lock.find_package(name).map(|p| (p.suite.clone(), p.path.clone(), p.sha256))
    };
    let (stuck, moved): (BTreeSet<String>, BTreeSet<String>) =
        gone.iter().cloned().partition(|name| places(lock, name) == places(renewed, name));
    if moved.is_empty() {
        return stuck;
    }
    let warn = |text: &str| source.progress.warn(text);
    warn("the mirror no longer has packages that the lock names; they were replaced:");
    let changes = renewed.compare(lock);
    for change in &changes {
        warn(&change.to_string());
    }
    for name in moved.iter().filter(|name| changes.iter().all(|change| change.package != **name)) {
        warn(&format!("{}, now from elsewhere", show_versions(renewed, [name])));
    }
    stuck
}

fn announce(source: &Source, previous: Option<&Lock>, lock: &Lock) {
    if let Some(previous) = previous {
        for change in lock.compare(previous) {
            source.progress.note(&format!("locked {change}"));
        }
    }
}

/// Have the packages of the sets in the store. Returned are the names of those that are
/// nowhere any more.
fn fetch_sets(source: &Source, lock: &Lock, requests: &[SetRequest]) -> Result<BTreeSet<String>> {
    let mut packages: HashMap<Digest, &LockedPackage> = HashMap::new();
    for request in requests.iter().filter(|request| !tools::is_optional(&request.name)) {
        for package in lock.list_set(&request.name)? {
            packages.insert(package.sha256, package);
        }
    }
    let mut packages: Vec<_> = packages.into_values().collect();
    packages.sort_by(|a, b| a.name.cmp(&b.name));
    match source.fetch_packages(&packages) {
        Ok(()) => Ok(BTreeSet::new()),
        Err(error) => name_vanished(error),
    }
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

/// The packages that could not be fetched because they are nowhere; else the error itself.
fn name_vanished(error: anyhow::Error) -> Result<BTreeSet<String>> {
    let vanished = error.downcast::<Vanished>()?;
    // As `Source::fetch_packages` names its downloads.
    let names = vanished.names.iter().filter_map(|shown| shown.split(' ').next());
    Ok(names.map(str::to_string).collect())
}

fn explain_stale(path: &Path, lock: Option<&Lock>, profile: &Profile, locked: bool) -> UserError {
    let why = match lock {
        Some(lock) => {
            format!("these changed: {}", lock.find_stale(&request(profile)).join(", "))
        }
        None => "there is none".to_string(),
    };
    explain_stale_names(path, why, locked)
}

fn explain_stale_names(path: &Path, why: String, locked: bool) -> UserError {
    UserError::new("the lock does not hold what the profiles ask for").in_file(path).why(why).help(
        match locked {
            true => "run `stanchion lock`, or leave --locked out",
            false => "run `stanchion lock` with a network first",
        },
    )
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

/// What one profile needs, and the tools.
fn request(profile: &Profile) -> Vec<SetRequest> {
    sets::list_requests(std::slice::from_ref(profile))
}

fn load_all(project: &Project) -> Result<Vec<Profile>> {
    project.list_profiles()?.iter().map(|name| project.load_profile(name)).collect()
}
