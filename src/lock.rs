//! `stanchion.lock`: every package of every profile by version and SHA-256.
//!
//! The lock holds **sets**. A set is what one layer adds to the layers under it, named by
//! the chain (`base+kernel+etcd`), or a group of packages that are only unpacked
//! (`initrd:kernel`, `tools:build`). Each set remembers a digest of what it was asked for,
//! so that a changed layer is noticed. Paths are relative to the archive; which mirror
//! serves them is no business of the lock.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::debian::index::{self, Package};
use crate::debian::solve::{self, Universe};
use crate::debian::version::Version;
use crate::digest::{Digest, Key};
use crate::error::UserError;
use crate::store;

pub const FILE_NAME: &str = "stanchion.lock";
const FORMAT: u32 = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    version: u32,
    /// Seconds since 1970: the newest date of the metadata this lock was first made from,
    /// and the time of every file that a build makes.
    pub epoch: u64,
    #[serde(rename = "suite")]
    pub suites: Vec<LockedSuite>,
    #[serde(rename = "package")]
    pub packages: Vec<LockedPackage>,
    #[serde(rename = "set")]
    pub sets: Vec<LockedSet>,
}

/// The metadata that the lock was solved against.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedSuite {
    pub name: String,
    /// Date of its Release file, in seconds since 1970.
    pub date: u64,
    /// Digest of its signed InRelease file.
    pub sha256: Digest,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedPackage {
    pub name: String,
    pub version: Version,
    pub architecture: String,
    pub suite: String,
    /// Relative to the archive's root.
    pub path: String,
    /// Bytes of the .deb.
    pub size: u64,
    /// kB that it says it takes when unpacked.
    pub installed_size: u64,
    pub sha256: Digest,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedSet {
    pub name: String,
    /// Digest of the [`SetRequest`] it answers.
    pub request: Digest,
    /// Names of packages, sorted.
    pub packages: Vec<String>,
}

/// What a set is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct SetRequest {
    pub name: String,
    /// The set that is installed under this one.
    pub parent: Option<String>,
    pub wanted: Vec<String>,
    /// Package names (`name` or `name (= version)`) that count as installed.
    pub provides: Vec<String>,
    pub recommends: bool,
    /// Add all essential packages.
    pub essential: bool,
}

impl SetRequest {
    /// What a [`LockedSet`] remembers of it.
    pub fn digest(&self) -> Digest {
        let mut key = Key::new("set", 1);
        key.add("parent", self.parent.as_deref().unwrap_or(""));
        self.wanted.iter().for_each(|name| {
            key.add("wanted", name);
        });
        self.provides.iter().for_each(|name| {
            key.add("provides", name);
        });
        key.add("recommends", [u8::from(self.recommends)]);
        key.add("essential", [u8::from(self.essential)]);
        key.digest()
    }
}

/// Which packages may leave their locked versions.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    Nothing,
    Named(BTreeSet<String>),
    Everything,
}

/// One difference between two locks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    pub package: String,
    pub old: Option<Version>,
    pub new: Option<Version>,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.old, &self.new) {
            (Some(old), Some(new)) => write!(f, "{} {old} -> {new}", self.package),
            (None, Some(new)) => write!(f, "{} {new} added", self.package),
            (Some(old), None) => write!(f, "{} {old} removed", self.package),
            (None, None) => write!(f, "{} unchanged", self.package),
        }
    }
}

impl Lock {
    /// The lock of a project, or `None` when it has none yet.
    pub fn load(path: &Path) -> Result<Option<Self>> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("reading {}", path.display()));
            }
        };
        let broken = |why: String| {
            UserError::new("the lock cannot be used")
                .in_file(path)
                .why(why)
                .help("restore it from version control, or delete it and run `stanchion lock`")
        };
        let lock: Lock = toml::from_str(&text).map_err(|error| broken(error.to_string()))?;
        if lock.version != FORMAT {
            let why = format!("it has format {}, this stanchion reads {FORMAT}", lock.version);
            return Err(broken(why).into());
        }
        lock.check().map_err(broken)?;
        Ok(Some(lock))
    }

    pub fn save(&self, path: &Path) -> Result<()> {
        let text = toml::to_string(self).context("writing the lock as TOML")?;
        let head = "# Made by `stanchion lock`; commit it, do not edit it.\n\n";
        store::write_atomically(path, format!("{head}{text}").as_bytes())
    }

    /// Names of sets that are missing or answer another request.
    pub fn find_stale<'a>(&self, requests: &'a [SetRequest]) -> Vec<&'a str> {
        requests
            .iter()
            .filter(|request| {
                !self
                    .sets
                    .iter()
                    .any(|set| set.name == request.name && set.request == request.digest())
            })
            .map(|request| request.name.as_str())
            .collect()
    }

    /// The packages of one set, sorted by name.
    pub fn list_set(&self, name: &str) -> Result<Vec<&LockedPackage>> {
        let set = self
            .sets
            .iter()
            .find(|set| set.name == name)
            .with_context(|| format!("the lock has no set `{name}`"))?;
        let by_name: HashMap<&str, &LockedPackage> =
            self.packages.iter().map(|package| (package.name.as_str(), package)).collect();
        set.packages
            .iter()
            .map(|name| {
                by_name.get(name.as_str()).copied().with_context(|| {
                    format!("the lock's set `{}` names the unlocked package `{name}`", set.name)
                })
            })
            .collect()
    }

    /// What differs from `older`, by name.
    pub fn compare(&self, older: &Lock) -> Vec<Change> {
        let versions = |lock: &Lock| -> BTreeMap<String, Version> {
            lock.packages.iter().map(|p| (p.name.clone(), p.version.clone())).collect()
        };
        let (old, new) = (versions(older), versions(self));
        let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        names
            .into_iter()
            .filter(|name| old.get(*name) != new.get(*name))
            .map(|name| Change {
                package: name.clone(),
                old: old.get(name).cloned(),
                new: new.get(name).cloned(),
            })
            .collect()
    }

    fn check(&self) -> Result<(), String> {
        let mut names = BTreeSet::new();
        for package in &self.packages {
            if !names.insert(package.name.as_str()) {
                return Err(format!("package `{}` is locked twice", package.name));
            }
            let relative = !package.path.starts_with('/')
                && !package.path.contains("://")
                && package.path.split('/').all(|part| !matches!(part, "" | "." | ".."));
            if !relative {
                return Err(format!("`{}` is no path relative to an archive", package.path));
            }
        }
        for set in &self.sets {
            if let Some(name) = set.packages.iter().find(|name| !names.contains(name.as_str())) {
                return Err(format!("set `{}` names the unlocked package `{name}`", set.name));
            }
        }
        Ok(())
    }
}

/// Solve all sets. Versions of `previous` are kept where they are still to be had and
/// `update` does not name them.
pub fn resolve(
    requests: &[SetRequest],
    universe: &Universe,
    suites: Vec<LockedSuite>,
    previous: Option<&Lock>,
    update: &Update,
) -> Result<Lock> {
    let keep = choose_kept(previous, update)?;
    let stand_ins = requests
        .iter()
        .map(|request| Ok((request.name.as_str(), make_stand_ins(request)?)))
        .collect::<Result<HashMap<_, _>>>()?;

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
        let added = solve::solve(
            universe,
            &solve::Request {
                installed: &under,
                wanted: &request.wanted,
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
                    "`{}` needs {} {}, another set needs {}",
                    request.name, package.name, package.version, known.version
                ))
                .why("one lock holds one version of a package")
                .help("ask for the same version in both layers")
                .into());
            }
        }
        sets.push(LockedSet {
            name: request.name.clone(),
            request: request.digest(),
            packages: added.iter().map(|package| package.name.clone()).collect(),
        });
        under.extend(added);
        installed.insert(&request.name, under);
    }

    let newest = suites.iter().map(|suite| suite.date).max().unwrap_or_default();
    let epoch = match (previous, update) {
        (Some(previous), Update::Nothing | Update::Named(_)) => previous.epoch,
        _ => newest,
    };
    let packages = packages.into_values().map(lock_package).collect();
    Ok(Lock { version: FORMAT, epoch, suites, packages, sets })
}

fn choose_kept(previous: Option<&Lock>, update: &Update) -> Result<HashMap<String, Version>> {
    let Some(previous) = previous else { return Ok(HashMap::new()) };
    let is_kept = |name: &str| match update {
        Update::Nothing => true,
        Update::Named(names) => !names.contains(name),
        Update::Everything => false,
    };
    if let Update::Named(names) = update {
        let known: BTreeSet<&str> = previous.packages.iter().map(|p| p.name.as_str()).collect();
        if let Some(unknown) = names.iter().find(|name| !known.contains(name.as_str())) {
            let nearest = crate::error::find_nearest(unknown, known.iter().copied());
            let error = UserError::new(format!("the lock has no package `{unknown}` to update"));
            return Err(match nearest {
                Some(nearest) => error.help(format!("did you mean `{nearest}`?")),
                None => error,
            }
            .into());
        }
    }
    Ok(previous
        .packages
        .iter()
        .filter(|package| is_kept(&package.name))
        .map(|package| (package.name.clone(), package.version.clone()))
        .collect())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn universe(text: &str) -> Universe {
        let zero = "0".repeat(64);
        let text = text
            .trim()
            .split("\n\n")
            .map(|p| {
                format!("{p}\nArchitecture: amd64\nFilename: pool/x.deb\nSize: 1\nSHA256: {zero}\n")
            })
            .collect::<Vec<_>>()
            .join("\n");
        Universe::new(index::parse_packages(&text, "trixie").unwrap())
    }

    fn request(name: &str, parent: Option<&str>, wanted: &[&str]) -> SetRequest {
        SetRequest {
            name: name.into(),
            parent: parent.map(str::to_string),
            wanted: wanted.iter().map(|name| name.to_string()).collect(),
            provides: Vec::new(),
            recommends: false,
            essential: false,
        }
    }

    fn solve_names(lock: &Lock, set: &str) -> Vec<String> {
        lock.list_set(set).unwrap().iter().map(|p| format!("{} {}", p.name, p.version)).collect()
    }

    #[test]
    fn a_set_adds_only_what_its_parent_lacks() {
        let universe = universe(
            "Package: a\nVersion: 1\nDepends: c\n\nPackage: b\nVersion: 1\nDepends: c, d\n\nPackage: c\nVersion: 1\n\nPackage: d\nVersion: 1",
        );
        let requests = [request("x", None, &["a"]), request("x+y", Some("x"), &["b"])];
        let lock = resolve(&requests, &universe, vec![], None, &Update::Nothing).unwrap();
        assert_eq!(solve_names(&lock, "x"), ["a 1", "c 1"]);
        assert_eq!(solve_names(&lock, "x+y"), ["b 1", "d 1"]);
    }

    #[test]
    fn what_a_layer_provides_is_not_installed() {
        let universe =
            universe("Package: a\nVersion: 1\nDepends: big (>= 2)\n\nPackage: big\nVersion: 3");
        let mut request = request("x", None, &["a"]);
        request.provides = vec!["big (= 2.5)".into()];
        let lock = resolve(&[request], &universe, vec![], None, &Update::Nothing).unwrap();
        assert_eq!(solve_names(&lock, "x"), ["a 1"]);
    }

    #[test]
    fn locked_versions_stay_until_an_update_names_them() {
        let old = universe("Package: a\nVersion: 1\n\nPackage: b\nVersion: 1");
        let new = universe(
            "Package: a\nVersion: 1\n\nPackage: a\nVersion: 2\n\nPackage: b\nVersion: 1\n\nPackage: b\nVersion: 2",
        );
        let requests = [request("x", None, &["a", "b"])];
        let solve = |universe: &Universe, previous: Option<&Lock>, update: Update| {
            resolve(&requests, universe, vec![], previous, &update).unwrap()
        };
        let first = solve(&old, None, Update::Nothing);
        let kept = solve(&new, Some(&first), Update::Nothing);
        assert!(kept.compare(&first).is_empty());
        let named = solve(&new, Some(&first), Update::Named(["b".to_string()].into()));
        let changes: Vec<String> = named.compare(&first).iter().map(Change::to_string).collect();
        assert_eq!(changes, ["b 1 -> 2"]);
        let all = solve(&new, Some(&first), Update::Everything);
        assert_eq!(all.compare(&first).len(), 2);
    }

    #[test]
    fn a_changed_request_is_stale_and_an_unchanged_one_is_not() {
        let universe = universe("Package: a\nVersion: 1\n\nPackage: b\nVersion: 1");
        let requests = [request("x", None, &["a"])];
        let lock = resolve(&requests, &universe, vec![], None, &Update::Nothing).unwrap();
        assert!(lock.find_stale(&requests).is_empty());
        assert_eq!(lock.find_stale(&[request("x", None, &["a", "b"])]), ["x"]);
        assert_eq!(lock.find_stale(&[request("y", None, &["a"])]), ["y"]);
    }

    #[test]
    fn a_lock_survives_its_file_and_an_absolute_path_in_it_does_not() {
        let universe = universe("Package: a\nVersion: 1");
        let requests = [request("x", None, &["a"])];
        let lock = resolve(&requests, &universe, vec![], None, &Update::Nothing).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        assert_eq!(Lock::load(&path).unwrap(), None);
        lock.save(&path).unwrap();
        assert_eq!(Lock::load(&path).unwrap().as_ref(), Some(&lock));
        let text = std::fs::read_to_string(&path).unwrap();
        for hostile in ["/pool/x.deb", "../x.deb", "http://example.org/x.deb"] {
            std::fs::write(&path, text.replace("pool/x.deb", hostile)).unwrap();
            let error = Lock::load(&path).unwrap_err();
            assert_eq!(crate::error::exit_code(&error), 2, "{error:#}");
        }
    }
}
