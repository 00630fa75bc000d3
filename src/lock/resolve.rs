//! From what is asked for and what is to be had to a lock.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, Result};

use super::{FORMAT, Lock, LockedPackage, LockedSet, LockedSuite, SetRequest, Update};
use crate::debian::index::{self, Package};
use crate::debian::solve::{self, Universe};
use crate::debian::version::Version;
use crate::digest::Digest;
use crate::error::{UserError, find_nearest};

/// Solve all sets. Versions of `previous` are kept where they are still to be had and
/// `update` does not name them; the newest versions of what it names are taken, and of
/// other packages what those force. What a request insists on holds for all of them.
///
/// # Errors
/// A [`UserError`] where there is no solution, or no such version or package.
pub fn resolve(
    requests: &[SetRequest],
    universe: &Universe,
    suites: Vec<LockedSuite>,
    previous: Option<&Lock>,
    update: &Update,
) -> Result<Lock> {
    let keep = choose_kept(previous, update)?;
    let pins = list_pins(requests)?;
    check_pins(&pins, universe, previous)?;
    let pinned: Versions<'_> =
        pins.iter().map(|(name, pin)| (name.as_str(), &pin.version)).collect();

    let mut solved = None;
    if let Update::Named(names) = update {
        // A kept package that is tied to the old version would hold the named one back.
        let newest = names.iter().filter_map(|name| Some((name, universe.find(name).next()?)));
        let mut only: Versions<'_> =
            newest.map(|(name, package)| (name.as_str(), &package.version)).collect();
        only.extend(&pinned);
        solved = solve_all(requests, &restrict(universe, &only), &keep).ok();
    }
    let (sets, packages) = match solved {
        Some(solved) => solved,
        None if pinned.is_empty() => solve_all(requests, universe, &keep)?,
        None => solve_all(requests, &restrict(universe, &pinned), &keep)?,
    };

    if let Some(previous) = previous
        && previous.sets == sets
        && previous.packages == packages
    {
        // Newer metadata that changes nothing is no reason to build everything anew.
        return Ok(previous.clone());
    }
    let newest = suites.iter().map(|suite| suite.date).max().unwrap_or_default();
    let epoch = match (previous, update) {
        (Some(previous), Update::Nothing | Update::Named(_)) => previous.epoch,
        _ => newest,
    };
    // What is from outside stays until it is locked anew.
    let (artifacts, pythons) =
        previous.map(|lock| (lock.artifacts.clone(), lock.pythons.clone())).unwrap_or_default();
    Ok(Lock { version: FORMAT, epoch, suites, packages, sets, artifacts, pythons })
}

/// One version of each of some packages.
type Versions<'a> = BTreeMap<&'a str, &'a Version>;

/// A version that a request insists on.
#[derive(Debug, Clone, PartialEq)]
pub struct Pin {
    pub version: Version,
    /// The set that asks for it.
    pub set: String,
}

/// What the requests insist on, by package.
///
/// # Errors
/// A [`UserError`] for a text that is no version, and for two versions of one package.
pub fn list_pins(requests: &[SetRequest]) -> Result<BTreeMap<String, Pin>> {
    let mut pins: BTreeMap<String, Pin> = BTreeMap::new();
    for request in requests {
        let versions = request.wanted.iter().filter_map(|wanted| wanted.split_once('='));
        for (name, version) in versions {
            let version: Version = version.parse().map_err(|error| {
                UserError::new(format!("`{}` asks for `{name}={version}`", request.name))
                    .why(format!("{error}"))
            })?;
            let pin = Pin { version, set: request.name.clone() };
            let first = pins.entry(name.to_string()).or_insert_with(|| pin.clone());
            if first.version != pin.version {
                return Err(UserError::new(format!(
                    "`{}` insists on {name} {}, `{}` on {name} {}",
                    first.set, first.version, pin.set, pin.version
                ))
                .why("one lock holds one version of a package")
                .help("ask for the same version in both layers")
                .into());
            }
        }
    }
    Ok(pins)
}

fn check_pins(
    pins: &BTreeMap<String, Pin>,
    universe: &Universe,
    previous: Option<&Lock>,
) -> Result<()> {
    for (name, pin) in pins {
        let versions: Vec<&Version> = universe.find(name).map(|package| &package.version).collect();
        if versions.contains(&&pin.version) {
            continue;
        }
        let what = format!("{name} is not to be had in version {}", pin.version);
        let asked = format!("`{}` insists on it", pin.set);
        if versions.is_empty() {
            let error = UserError::new(what)
                .why(format!("{asked}, and none of the suites has a package of that name"));
            let known = universe.packages().iter().map(|package| package.name.as_str());
            return Err(match find_nearest(name, known) {
                Some(nearest) => error.help(format!("did you mean `{nearest}`?")),
                None => error,
            }
            .into());
        }
        let is_locked = previous
            .and_then(|lock| lock.find_package(name))
            .is_some_and(|package| package.version == pin.version);
        let why = match is_locked {
            true => "; the lock has it, but neither the mirror's lists nor the store",
            false => "",
        };
        let shown: Vec<&str> = versions.iter().map(|version| version.as_str()).collect();
        return Err(UserError::new(what)
            .why(format!("{asked}{why}"))
            .help(format!("ask for one of {}, or for none", shown.join(", ")))
            .into());
    }
    Ok(())
}

/// The universe without other versions of the packages that `only` names.
fn restrict(universe: &Universe, only: &Versions<'_>) -> Universe {
    let is_left = |package: &&Package| {
        only.get(package.name.as_str()).is_none_or(|version| package.version == **version)
    };
    Universe::new(universe.packages().iter().filter(is_left).cloned().collect())
}

/// The sets, and all their packages sorted by name.
fn solve_all(
    requests: &[SetRequest],
    universe: &Universe,
    keep: &HashMap<String, Version>,
) -> Result<(Vec<LockedSet>, Vec<LockedPackage>)> {
    let stand_ins = requests
        .iter()
        .map(|request| Ok((request.name.as_str(), make_stand_ins(request)?)))
        .collect::<Result<HashMap<_, _>>>()?;

    // One set's choice is the next one's preference: a lock holds one version of each.
    let mut keep = keep.clone();
    // Everything that is installed once a set is, by the set's name.
    let mut installed: HashMap<&str, Vec<&Package>> = HashMap::new();
    let mut sets = Vec::new();
    let mut packages: BTreeMap<&str, &Package> = BTreeMap::new();
    for request in requests {
        let mut under = match &request.parent {
            Some(parent) => installed.get(parent.as_str()).cloned().with_context(|| {
                format!("set `{}` stands on `{parent}`, which is not solved yet", request.name)
            })?,
            None => Vec::new(),
        };
        under.extend(&stand_ins[request.name.as_str()]);
        let name = |wanted: &String| wanted.split('=').next().unwrap_or_default().to_string();
        let added = solve::solve(
            universe,
            &solve::Request {
                installed: &under,
                wanted: &request.wanted.iter().map(name).collect::<Vec<_>>(),
                recommends: request.recommends,
                essential: request.essential,
                keep: &keep,
            },
        )
        .with_context(|| format!("solving `{}`", request.name))?;
        for package in &added {
            let known = packages.entry(&package.name).or_insert(package);
            if known.version != package.version {
                return Err(UserError::new(format!(
                    "`{}` needs {} {}, another set has {}",
                    request.name, package.name, package.version, known.version
                ))
                .why("one lock holds one version of a package")
                .help(format!(
                    "insist on one in a layer: `packages = [\"{}={}\"]`",
                    package.name, package.version
                ))
                .into());
            }
            keep.insert(package.name.clone(), package.version.clone());
        }
        sets.push(LockedSet {
            name: request.name.clone(),
            request: request.digest(),
            packages: added.iter().map(|package| package.name.clone()).collect(),
        });
        under.extend(added);
        installed.insert(&request.name, under);
    }
    Ok((sets, packages.into_values().map(lock_package).collect()))
}

fn choose_kept(previous: Option<&Lock>, update: &Update) -> Result<HashMap<String, Version>> {
    let none = BTreeSet::new();
    let left = match update {
        Update::Nothing => &none,
        Update::Named(names) => names,
        Update::Everything => return Ok(HashMap::new()),
    };
    let Some(previous) = previous else {
        return match left.first() {
            None => Ok(HashMap::new()),
            Some(name) => Err(UserError::new(format!("there is no lock to update `{name}` in"))
                .help("run `stanchion lock`")
                .into()),
        };
    };
    previous.check_names(left)?;
    let kept = previous.packages.iter().filter(|package| !left.contains(&package.name));
    Ok(kept.map(|package| (package.name.clone(), package.version.clone())).collect())
}

/// Packages that exist only by name, for what a layer says that it provides.
fn make_stand_ins(request: &SetRequest) -> Result<Vec<Package>> {
    if request.provides.is_empty() {
        return Ok(Vec::new());
    }
    let text = format!(
        "Package: {}\nVersion: 1\nArchitecture: all\nProvides: {}\nFilename: none\nSize: 0\nSHA256: {}\n",
        name_stand_in(&request.name),
        request.provides.join(", "),
        Digest::of(b""),
    );
    index::parse_packages(&text, "stanchion")
        .with_context(|| format!("reading what `{}` provides", request.name))
}

/// The package name under which a layer's `provides` are registered with dpkg.
pub fn name_stand_in(set: &str) -> String {
    format!("stanchion-{}", set.replace(['+', ':'], "-"))
}

fn lock_package(package: &Package) -> LockedPackage {
    LockedPackage {
        name: package.name.clone(),
        version: package.version.clone(),
        architecture: package.architecture.clone(),
        suite: package.suite.clone(),
        path: package.path.clone(),
        size: package.size,
        installed_size: package.installed_size,
        sha256: package.sha256,
    }
}
