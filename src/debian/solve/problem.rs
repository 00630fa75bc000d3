//! A request against a universe: what can satisfy what, asked for package by package
//! and kept.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::rc::Rc;

use anyhow::{Context, Result};

use super::explain;
use super::universe::{Id, Universe, satisfies};
use super::{Request, Version};
use crate::debian::index::Package;
use crate::debian::relation::{Relation, Relations};

pub struct Problem<'a> {
    pub universe: &'a Universe,
    pub wanted: Vec<Want<'a>>,
    installed: &'a [&'a Package],
    installed_names: HashMap<&'a str, Id>,
    /// By own or provided name.
    installed_by_any_name: HashMap<&'a str, Vec<Id>>,
    keep: &'a HashMap<String, Version>,
    recommends: bool,
    groups: HashMap<Id, Rc<[Group<'a>]>>,
    exclusions: HashMap<Id, Rc<[Exclusion<'a>]>>,
}

/// A package that was asked for.
pub struct Want<'a> {
    pub name: &'a str,
    /// Its versions, the preferred one first.
    pub choices: Vec<Id>,
}

/// The field that a relation stands in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    PreDepends,
    Depends,
    Recommends,
    Conflicts,
    Breaks,
}

impl Kind {
    /// How a sentence says it.
    pub fn verb(self) -> &'static str {
        match self {
            Kind::PreDepends | Kind::Depends => "needs",
            Kind::Recommends => "recommends",
            Kind::Conflicts => "conflicts with",
            Kind::Breaks => "breaks",
        }
    }
}

/// Alternatives of which one must be there.
pub struct Group<'a> {
    pub kind: Kind,
    pub alternatives: Vec<Relation<'a>>,
    /// The candidates that satisfy it, in the order apt tries them.
    pub candidates: Vec<Id>,
    /// Versions that satisfy it and are no candidates.
    pub others: Vec<Id>,
}

impl Group<'_> {
    pub fn choices(&self) -> impl Iterator<Item = Id> {
        self.candidates.iter().chain(&self.others).copied()
    }

    pub fn is_hard(&self) -> bool {
        self.kind != Kind::Recommends
    }
}

/// A package that cannot be there together with the one that says so.
pub struct Exclusion<'a> {
    pub kind: Kind,
    pub relation: Relation<'a>,
    pub other: Id,
}

impl<'a> Problem<'a> {
    pub fn new(universe: &'a Universe, request: &Request<'a>) -> Result<Self> {
        let first = universe.packages().len() as Id;
        let mut installed_names = HashMap::new();
        let mut installed_by_any_name: HashMap<_, Vec<Id>> = HashMap::new();
        for (id, package) in (first..).zip(request.installed) {
            installed_names.insert(package.name.as_str(), id);
            let provided = package.provides.iter().map(|(name, _)| name.as_str());
            for name in provided.chain([package.name.as_str()]) {
                let name = name.split_once(':').map_or(name, |(name, _)| name);
                installed_by_any_name.entry(name).or_default().push(id);
            }
        }
        let mut problem = Problem {
            universe,
            wanted: Vec::new(),
            installed: request.installed,
            installed_names,
            installed_by_any_name,
            keep: request.keep,
            recommends: request.recommends,
            groups: HashMap::new(),
            exclusions: HashMap::new(),
        };
        if request.essential {
            problem.want_essential();
        }
        problem.want_all(request.wanted)?;
        Ok(problem)
    }

    fn want_essential(&mut self) {
        for (id, package) in (0..).zip(self.universe.packages()) {
            if package.essential && self.candidate(&package.name) == Some(id) {
                let choices = self.choose_versions(&package.name);
                self.wanted.push(Want { name: &package.name, choices });
            }
        }
    }

    fn want_all(&mut self, names: &'a [String]) -> Result<()> {
        let mut unknown = Vec::new();
        for name in names {
            let mut choices = self.choose_versions(name);
            if choices.is_empty() {
                let any = Relation { name, qualifier: None, constraint: None };
                let mut providers: Vec<&str> = self
                    .satisfy(&any)
                    .into_iter()
                    .map(|id| self.package(id).name.as_str())
                    .collect();
                providers.sort_unstable();
                providers.dedup();
                match providers[..] {
                    [] => unknown.push(name.as_str()),
                    [only] => choices = self.choose_versions(only),
                    _ => return Err(explain::describe_virtual(name, &providers).into()),
                }
            }
            self.wanted.push(Want { name, choices });
        }
        if !unknown.is_empty() {
            return Err(explain::describe_unknown(self.universe, &unknown).into());
        }
        Ok(())
    }

    pub fn package(&self, id: Id) -> &'a Package {
        let universe: &'a Universe = self.universe;
        match universe.get(id) {
            Some(package) => package,
            None => self.installed[id as usize - universe.packages().len()],
        }
    }

    pub fn installed(&self) -> impl Iterator<Item = Id> + use<> {
        let first = self.universe.packages().len() as Id;
        first..first + self.installed.len() as Id
    }

    pub fn is_installed(&self, id: Id) -> bool {
        self.universe.get(id).is_none()
    }

    /// All ids are below it.
    pub fn count(&self) -> usize {
        self.universe.packages().len() + self.installed.len()
    }

    /// The version of a package that is installed, else the one to keep, else the newest.
    pub fn candidate(&self, name: &str) -> Option<Id> {
        if let Some(id) = self.installed_names.get(name) {
            return Some(*id);
        }
        let versions = self.universe.versions_of(name);
        let kept = self.keep.get(name);
        let kept = versions.iter().find(|id| Some(&self.package(**id).version) == kept);
        kept.or(versions.first()).copied()
    }

    /// Every version that could be installed, the candidate first, then newest first.
    pub fn choose_versions(&self, name: &str) -> Vec<Id> {
        let Some(candidate) = self.candidate(name) else { return Vec::new() };
        let mut choices = vec![candidate];
        if !self.is_installed(candidate) {
            let others = self.universe.versions_of(name).iter().copied();
            choices.extend(others.filter(|id| *id != candidate));
        }
        choices
    }

    fn satisfy(&self, relation: &Relation<'_>) -> Vec<Id> {
        let installed = self.installed_by_any_name.get(relation.name).into_iter().flatten();
        let mut ids: Vec<Id> =
            installed.copied().filter(|id| satisfies(self.package(*id), relation)).collect();
        ids.dedup();
        let others = self.universe.satisfy(relation).into_iter();
        ids.extend(
            others.filter(|id| !self.installed_names.contains_key(self.package(*id).name.as_str())),
        );
        ids
    }

    /// What a package needs to be installed, in the order of its fields: Pre-Depends,
    /// Depends, and Recommends if the request has it.
    pub fn groups(&mut self, id: Id) -> Result<Rc<[Group<'a>]>> {
        if let Some(groups) = self.groups.get(&id) {
            return Ok(groups.clone());
        }
        let package = self.package(id);
        let mut groups = Vec::new();
        let mut fields =
            vec![(Kind::PreDepends, &package.pre_depends), (Kind::Depends, &package.depends)];
        if self.recommends {
            fields.push((Kind::Recommends, &package.recommends));
        }
        for (kind, relations) in fields {
            for alternatives in parse(package, relations)? {
                groups.push(self.make_group(kind, alternatives));
            }
        }
        let groups: Rc<[Group<'a>]> = groups.into();
        self.groups.insert(id, groups.clone());
        Ok(groups)
    }

    fn make_group(&self, kind: Kind, alternatives: Vec<Relation<'a>>) -> Group<'a> {
        let (mut candidates, mut others) = (Vec::new(), Vec::new());
        for relation in &alternatives {
            let (mut first, then): (Vec<Id>, Vec<Id>) = self
                .satisfy(relation)
                .into_iter()
                .partition(|id| self.candidate(&self.package(*id).name) == Some(*id));
            if first.len() > 1 {
                first.sort_by_cached_key(|id| self.rank_provider(relation.name, *id));
            }
            candidates.extend(first);
            others.extend(then);
        }
        for ids in [&mut candidates, &mut others] {
            let mut seen = std::collections::HashSet::new();
            ids.retain(|id| seen.insert(*id));
        }
        Group { kind, alternatives, candidates, others }
    }

    /// Sorts what satisfies one relation as apt does (`CompareProviders` in its
    /// depcache.cc): a package of that very name, then essential, then protected ones,
    /// then by priority, and at last what is met later in the lists.
    fn rank_provider(&self, name: &str, id: Id) -> impl Ord + use<> {
        let package = self.package(id);
        // Without a priority a package goes first: apt counts it as 0.
        let priorities = ["", "required", "important", "standard", "optional"];
        let priority = priorities.iter().position(|priority| package.priority == *priority);
        (
            package.name != name,
            !package.essential,
            !package.protected,
            priority.unwrap_or(priorities.len()),
            Reverse(if self.is_installed(id) { u32::MAX } else { self.universe.meet(id) }),
        )
    }

    /// What cannot be there with a package by the package's own word. Other versions of
    /// itself are not among it.
    pub fn exclusions(&mut self, id: Id) -> Result<Rc<[Exclusion<'a>]>> {
        if let Some(exclusions) = self.exclusions.get(&id) {
            return Ok(exclusions.clone());
        }
        let package = self.package(id);
        let mut exclusions = Vec::new();
        for (kind, relations) in
            [(Kind::Conflicts, &package.conflicts), (Kind::Breaks, &package.breaks)]
        {
            for relation in parse(package, relations)?.into_iter().flatten() {
                let others = self.satisfy(&relation).into_iter();
                let others = others.filter(|other| self.package(*other).name != package.name);
                exclusions.extend(others.map(|other| Exclusion { kind, relation, other }));
            }
        }
        let exclusions: Rc<[Exclusion<'a>]> = exclusions.into();
        self.exclusions.insert(id, exclusions.clone());
        Ok(exclusions)
    }
}

fn parse<'a>(package: &Package, relations: &'a Relations) -> Result<Vec<Vec<Relation<'a>>>> {
    relations.parse().with_context(|| {
        format!(
            "reading what `{}` {} of `{}` relates to",
            package.name, package.version, package.suite
        )
    })
}
