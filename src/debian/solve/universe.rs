//! Every package that could be installed.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::sync::OnceLock;

use crate::debian::index::{MultiArch, Package};
use crate::debian::relation::{ARCHITECTURE, Relation};

/// A package by its place in a [`Universe`], or beyond that in a request's installed.
pub type Id = u32;

/// The packages of several suites, and what each of them provides.
pub struct Universe {
    packages: Vec<Package>,
    /// By name: the versions, newest first.
    versions: HashMap<Box<str>, Vec<Id>>,
    /// By the name that is provided: who provides it, in the order of the lists.
    providers: HashMap<Box<str>, Vec<Id>>,
    /// See [`Universe::meet`].
    meetings: OnceLock<Vec<u32>>,
}

impl Universe {
    /// From the lists of the suites, one after the other. Left out: what is for another
    /// architecture, and a version that stands in an earlier list.
    pub fn new(packages: Vec<Package>) -> Self {
        let mut universe = Universe {
            packages: Vec::with_capacity(packages.len()),
            versions: HashMap::with_capacity(packages.len()),
            providers: HashMap::new(),
            meetings: OnceLock::new(),
        };
        for package in packages {
            if [ARCHITECTURE, "all"].contains(&package.architecture.as_str()) {
                universe.add(package);
            }
        }
        let packages = &universe.packages;
        for ids in universe.versions.values_mut() {
            ids.sort_by_key(|id| Reverse(&packages[*id as usize].version));
        }
        universe
    }

    fn add(&mut self, package: Package) {
        let id = self.packages.len() as Id;
        let ids = match self.versions.get_mut(package.name.as_str()) {
            Some(ids) => ids,
            None => self.versions.entry(package.name.as_str().into()).or_default(),
        };
        if ids.iter().any(|id| self.packages[*id as usize].version == package.version) {
            return;
        }
        ids.push(id);
        for (name, _) in &package.provides {
            match self.providers.get_mut(name.as_str()) {
                Some(ids) => ids.push(id),
                None => {
                    self.providers.insert(name.as_str().into(), vec![id]);
                }
            }
        }
        self.packages.push(package);
    }

    pub fn packages(&self) -> &[Package] {
        &self.packages
    }

    /// Every version of a package, newest first.
    pub fn find(&self, name: &str) -> impl Iterator<Item = &Package> {
        self.versions_of(name).iter().map(|id| &self.packages[*id as usize])
    }

    pub(super) fn get(&self, id: Id) -> Option<&Package> {
        self.packages.get(id as usize)
    }

    pub(super) fn versions_of(&self, name: &str) -> &[Id] {
        self.versions.get(name).map_or(&[], Vec::as_slice)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.versions.keys().chain(self.providers.keys()).map(|name| &**name)
    }

    /// When the name of a package is first met by who reads the lists from the start: in
    /// a relation or as a package. It is what apt numbers packages by.
    pub(super) fn meet(&self, id: Id) -> u32 {
        self.meetings.get_or_init(|| self.number_meetings())[id as usize]
    }

    fn number_meetings(&self) -> Vec<u32> {
        let mut meetings = vec![u32::MAX; self.packages.len()];
        let mut count = 0;
        for package in &self.packages {
            // The order of the fields is that of `debListParser::NewVersion` in apt.
            let names = [
                &package.pre_depends,
                &package.depends,
                &package.conflicts,
                &package.breaks,
                &package.recommends,
                &package.suggests,
                &package.replaces,
                &package.enhances,
            ];
            let names = names.into_iter().flat_map(|relations| relations.names());
            let provided = package.provides.iter().map(|(name, _)| name.as_str());
            for name in std::iter::once(package.name.as_str()).chain(names).chain(provided) {
                let Some(ids) = self.versions.get(name) else { continue };
                if meetings[ids[0] as usize] == u32::MAX {
                    for id in ids {
                        meetings[*id as usize] = count;
                    }
                    count += 1;
                }
            }
        }
        meetings
    }

    /// The packages that satisfy a relation: those of the name, newest first, then those
    /// that provide it, in the order of the lists.
    pub(super) fn satisfy(&self, relation: &Relation<'_>) -> Vec<Id> {
        let provide = |name: &str| self.providers.get(name).map_or(&[][..], Vec::as_slice);
        let literal = relation.qualifier.map(|qualifier| format!("{}:{qualifier}", relation.name));
        let literal = literal.map_or(&[][..], |name| provide(name.as_str()));
        let mut seen = HashSet::new();
        let versions = self.versions_of(relation.name).iter();
        versions
            .chain(provide(relation.name))
            .chain(literal)
            .copied()
            .filter(|id| satisfies(&self.packages[*id as usize], relation) && seen.insert(*id))
            .collect()
    }
}

/// Whether a package fits a relation, by its own name or by one that it provides.
///
/// `name:any` takes packages that are `Multi-Arch: allowed`, as apt has it, and what
/// says that it provides `name:any`.
pub(super) fn satisfies(package: &Package, relation: &Relation<'_>) -> bool {
    let fits = match relation.qualifier {
        None | Some(ARCHITECTURE | "native") => true,
        Some("any") => package.multi_arch == MultiArch::Allowed,
        Some(_) => false,
    };
    if fits && package.name == relation.name && relation.admits(Some(package.version.as_str())) {
        return true;
    }
    package.provides.iter().any(|(name, version)| {
        let matches = match (name.split_once(':'), relation.qualifier) {
            (None, _) => fits && name == relation.name,
            (Some(provided), Some(qualifier)) => provided == (relation.name, qualifier),
            (Some(_), None) => false,
        };
        matches && relation.admits(version.as_ref().map(|version| version.as_str()))
    })
}
