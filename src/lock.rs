//! `stanchion.lock`: every package of every profile by version and SHA-256.
//!
//! The lock holds **sets**. A set is what one layer adds to the layers under it, named by
//! the chain (`base+kernel+etcd`), or a group of packages that are only unpacked
//! (`initrd:kernel`, `tools:build`). Each set remembers a digest of what it was asked for,
//! so that a changed layer is noticed. Paths are relative to the archive; which mirror
//! serves them is no business of the lock.

mod outside;
mod resolve;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::debian::relation::is_package_name;
use crate::debian::version::Version;
use crate::digest::{Digest, Key};
use crate::error::{UserError, find_nearest};
use crate::store;

pub use outside::{
    ArtifactRequest, LockedArtifact, LockedDistribution, LockedPython, OutsideRequests,
    PythonRequest,
};
pub use resolve::{list_pins, name_stand_in, resolve};

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
    #[serde(rename = "artifact", default, skip_serializing_if = "Vec::is_empty")]
    pub artifacts: Vec<LockedArtifact>,
    #[serde(rename = "python", default, skip_serializing_if = "Vec::is_empty")]
    pub pythons: Vec<LockedPython>,
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
    /// `name`, or `name=version` for one version and no other.
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
    /// A Debian package, `artifact NAME`, or a distribution of Python as `LAYER/NAME`.
    pub package: String,
    pub old: Option<String>,
    pub new: Option<String>,
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
        let versions = |lock: &Lock| -> BTreeMap<String, String> {
            lock.packages.iter().map(|p| (p.name.clone(), p.version.to_string())).collect()
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
            .chain(self.compare_outside(older))
            .collect()
    }

    /// Without what nothing asks for any more, and what only that holds.
    pub fn prune(&self, requests: &[SetRequest], outside: &OutsideRequests) -> Lock {
        let mut lock = self.clone();
        lock.sets.retain(|set| requests.iter().any(|request| request.name == set.name));
        let used: BTreeSet<&String> = lock.sets.iter().flat_map(|set| &set.packages).collect();
        lock.packages.retain(|package| used.contains(&package.name));
        lock.prune_outside(outside);
        lock
    }

    /// The package of this name.
    pub fn find_package(&self, name: &str) -> Option<&LockedPackage> {
        self.packages.iter().find(|package| package.name == name)
    }

    /// Refuse names of packages that it does not have.
    ///
    /// # Errors
    /// A [`UserError`] with the nearest name.
    pub fn check_names(&self, names: &BTreeSet<String>) -> Result<()> {
        let Some(unknown) = names.iter().find(|name| self.find_package(name).is_none()) else {
            return Ok(());
        };
        let known = self.packages.iter().map(|package| package.name.as_str());
        let error = UserError::new(format!("the lock has no package `{unknown}` to update"));
        Err(match find_nearest(unknown, known) {
            Some(nearest) => error.help(format!("did you mean `{nearest}`?")),
            None => error,
        }
        .into())
    }

    fn check(&self) -> Result<(), String> {
        let mut names = BTreeSet::new();
        for package in &self.packages {
            if !is_package_name(&package.name) {
                return Err(format!("`{}` is no package's name", package.name.escape_debug()));
            }
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
        let mut sets = BTreeSet::new();
        for set in &self.sets {
            if !sets.insert(set.name.as_str()) {
                return Err(format!("set `{}` is there twice", set.name));
            }
            if let Some(name) = set.packages.iter().find(|name| !names.contains(name.as_str())) {
                return Err(format!("set `{}` names the unlocked package `{name}`", set.name));
            }
        }
        self.check_outside()
    }
}
