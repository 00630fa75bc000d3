//! The complete search: conflict-driven clause learning (Marques-Silva and Sakallah,
//! GRASP, 1996; two watched literals and first unique implication points as in Chaff,
//! 2001), one variable a package of one version.
//!
//! A decision is the next alternative of a walk through the dependencies from what is
//! wanted, in the order of apt's choices; so the search goes another way only where a
//! conflict makes it. The clauses of a package are made when it is first chosen.

use std::collections::HashSet;

use anyhow::{Result, bail};

use super::problem::Problem;
use super::universe::Id;

/// More conflicts than any archive leads to; hostile lists could make exponentially many.
const MAX_CONFLICTS: usize = 20_000;

/// Why something cannot be otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The place of a package in the list of what is wanted.
    Wanted(usize),
    /// A package, and the place of a group among its groups.
    Needs(Id, usize),
    /// A package, and the place of an exclusion among its exclusions.
    Excludes(Id, usize),
    /// Two versions of one package.
    OneVersion(Id, Id),
}

/// The packages to add, or the causes that together leave no way.
pub fn search(problem: &mut Problem<'_>) -> Result<Result<Vec<Id>, Vec<Cause>>> {
    let count = problem.count();
    let mut search = Search {
        clauses: Vec::new(),
        watches: vec![Vec::new(); 2 * count],
        values: vec![None; count],
        trail: Vec::new(),
        propagated: 0,
        levels: Vec::new(),
        expanded: vec![false; count],
        problem,
    };
    for id in search.problem.installed() {
        search.assign(Literal::yes(id), None);
    }
    let mut conflict = None;
    for place in 0..search.problem.wanted.len() {
        let choices = &search.problem.wanted[place].choices;
        let literals = choices.iter().map(|id| Literal::yes(*id)).collect();
        conflict = conflict.or(search.add(literals, Origin::Cause(Cause::Wanted(place))));
    }
    for _ in 0..MAX_CONFLICTS {
        let found = match conflict.take() {
            Some(found) => found,
            None => match search.run()? {
                Ok(solution) => return Ok(Ok(solution)),
                Err(found) => found,
            },
        };
        if search.levels.is_empty() {
            return Ok(Err(search.find_core(found)));
        }
        search.learn(found);
    }
    bail!("gave up after {MAX_CONFLICTS} conflicts between packages");
}

/// A package is there, or is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Literal(u32);

impl Literal {
    fn yes(id: Id) -> Self {
        Literal(2 * id)
    }

    fn no(id: Id) -> Self {
        Literal(2 * id + 1)
    }

    fn id(self) -> Id {
        self.0 / 2
    }

    fn is_yes(self) -> bool {
        self.0.is_multiple_of(2)
    }

    fn negate(self) -> Self {
        Literal(self.0 ^ 1)
    }
}

type ClauseId = usize;

struct Clause {
    /// The first two are watched.
    literals: Vec<Literal>,
    origin: Origin,
}

enum Origin {
    Cause(Cause),
    /// The clauses it follows from, and the packages whose values at the root it uses.
    Learnt(Vec<ClauseId>, Vec<Id>),
}

#[derive(Clone, Copy)]
struct Value {
    is_there: bool,
    level: usize,
    reason: Option<ClauseId>,
}

struct Search<'p, 'a> {
    problem: &'p mut Problem<'a>,
    clauses: Vec<Clause>,
    /// By literal: the clauses that watch it.
    watches: Vec<Vec<ClauseId>>,
    values: Vec<Option<Value>>,
    trail: Vec<Literal>,
    /// How much of the trail is propagated.
    propagated: usize,
    /// For each decision, the length of the trail before it.
    levels: Vec<usize>,
    /// Packages whose clauses are made.
    expanded: Vec<bool>,
}

impl Search<'_, '_> {
    /// Propagate and decide, up to a solution or a conflict.
    fn run(&mut self) -> Result<Result<Vec<Id>, ClauseId>> {
        loop {
            if let Some(conflict) = self.propagate()? {
                return Ok(Err(conflict));
            }
            match self.walk()? {
                Walk::Open(id) => {
                    self.levels.push(self.trail.len());
                    self.assign(Literal::yes(id), None);
                }
                Walk::Done(solution) => return Ok(Ok(solution)),
            }
        }
    }

    fn value(&self, literal: Literal) -> Option<bool> {
        self.values[literal.id() as usize].map(|value| value.is_there == literal.is_yes())
    }

    fn level(&self, literal: Literal) -> usize {
        self.values[literal.id() as usize].map_or(0, |value| value.level)
    }

    fn reason(&self, id: Id) -> Option<ClauseId> {
        self.values[id as usize].and_then(|value| value.reason)
    }

    fn assign(&mut self, literal: Literal, reason: Option<ClauseId>) {
        let level = self.levels.len();
        self.values[literal.id() as usize] =
            Some(Value { is_there: literal.is_yes(), level, reason });
        self.trail.push(literal);
    }

    /// Add a clause and draw its conclusion. Returns it if it is a conflict.
    fn add(&mut self, mut literals: Vec<Literal>, origin: Origin) -> Option<ClauseId> {
        literals.sort_by_key(|literal| match self.value(*literal) {
            Some(false) => usize::MAX - self.level(*literal),
            _ => 0,
        });
        let clause = self.clauses.len();
        if let [first, second, ..] = literals[..] {
            self.watches[first.0 as usize].push(clause);
            self.watches[second.0 as usize].push(clause);
        }
        let first = literals.first().copied();
        let others_fail = literals.iter().skip(1).all(|other| self.value(*other) == Some(false));
        self.clauses.push(Clause { literals, origin });
        match first {
            Some(first) if self.value(first).is_none() => {
                if others_fail {
                    self.assign(first, Some(clause));
                }
                None
            }
            Some(first) if self.value(first) == Some(true) => None,
            _ => Some(clause),
        }
    }

    fn propagate(&mut self) -> Result<Option<ClauseId>> {
        while let Some(literal) = self.trail.get(self.propagated).copied() {
            self.propagated += 1;
            if literal.is_yes() && !self.expanded[literal.id() as usize] {
                self.expanded[literal.id() as usize] = true;
                let conflict = self.expand(literal.id())?;
                if conflict.is_some() {
                    return Ok(conflict);
                }
            }
            let conflict = self.visit_watches(literal.negate());
            if conflict.is_some() {
                return Ok(conflict);
            }
        }
        Ok(None)
    }

    /// Look at the clauses that watch a literal which has become false.
    fn visit_watches(&mut self, fallen: Literal) -> Option<ClauseId> {
        let mut watching = std::mem::take(&mut self.watches[fallen.0 as usize]);
        let mut conflict = None;
        watching.retain(|clause| {
            if conflict.is_some() {
                return true;
            }
            let literals = &mut self.clauses[*clause].literals;
            if literals[0] == fallen {
                literals.swap(0, 1);
            }
            let value = |literal: Literal| {
                self.values[literal.id() as usize].map(|value| value.is_there == literal.is_yes())
            };
            let first = literals[0];
            if value(first) == Some(true) {
                return true;
            }
            if let Some(next) = (2..literals.len()).find(|i| value(literals[*i]) != Some(false)) {
                literals.swap(1, next);
                self.watches[literals[1].0 as usize].push(*clause);
                return false;
            }
            match value(first) {
                None => {
                    let level = self.levels.len();
                    let reason = Some(*clause);
                    self.values[first.id() as usize] =
                        Some(Value { is_there: first.is_yes(), level, reason });
                    self.trail.push(first);
                }
                _ => conflict = Some(*clause),
            }
            true
        });
        self.watches[fallen.0 as usize].append(&mut watching);
        conflict
    }

    /// Make the clauses that follow from the presence of a package.
    fn expand(&mut self, id: Id) -> Result<Option<ClauseId>> {
        let mut conflict = None;
        let is_installed = self.problem.is_installed(id);
        let exclusions = self.problem.exclusions(id)?;
        for (place, exclusion) in exclusions.iter().enumerate() {
            if is_installed && self.problem.is_installed(exclusion.other) {
                continue;
            }
            let literals = vec![Literal::no(id), Literal::no(exclusion.other)];
            let found = self.add(literals, Origin::Cause(Cause::Excludes(id, place)));
            conflict = conflict.or(found);
        }
        if is_installed {
            return Ok(conflict);
        }
        for other in self.problem.choose_versions(&self.problem.package(id).name) {
            if other != id {
                let literals = vec![Literal::no(id), Literal::no(other)];
                let found = self.add(literals, Origin::Cause(Cause::OneVersion(id, other)));
                conflict = conflict.or(found);
            }
        }
        let groups = self.problem.groups(id)?;
        for (place, group) in groups.iter().enumerate().filter(|(_, group)| group.is_hard()) {
            if group.choices().any(|choice| choice == id) {
                continue;
            }
            let literals = group.choices().map(Literal::yes).chain([Literal::no(id)]).collect();
            let found = self.add(literals, Origin::Cause(Cause::Needs(id, place)));
            // A clause of one literal is watched by nobody: it must be learnt from now.
            let is_single = found.is_some_and(|found| self.clauses[found].literals.len() == 1);
            conflict = if is_single { found } else { conflict.or(found) };
        }
        Ok(conflict)
    }

    /// Learn from a conflict, and go back to where it would have been avoided.
    fn learn(&mut self, conflict: ClauseId) {
        let current = self.levels.len();
        let mut seen = HashSet::new();
        let (mut lower, mut from, mut at_root) = (Vec::new(), vec![conflict], Vec::new());
        let mut open = 0;
        let mut position = self.trail.len();
        let mut clause = conflict;
        let asserted = loop {
            for literal in &self.clauses[clause].literals {
                if self.value(*literal) == Some(true) || !seen.insert(literal.id()) {
                    continue;
                }
                match self.level(*literal) {
                    0 => at_root.push(literal.id()),
                    level if level == current => open += 1,
                    _ => lower.push(*literal),
                }
            }
            let implied = loop {
                position -= 1;
                if seen.contains(&self.trail[position].id()) {
                    break self.trail[position];
                }
            };
            open -= 1;
            match self.reason(implied.id()) {
                Some(reason) if open > 0 => {
                    from.push(reason);
                    clause = reason;
                }
                _ => break implied.negate(),
            }
        };
        let level = lower.iter().map(|literal| self.level(*literal)).max().unwrap_or(0);
        self.go_back(level);
        lower.insert(0, asserted);
        self.add(lower, Origin::Learnt(from, at_root));
    }

    fn go_back(&mut self, level: usize) {
        let length = self.levels[level];
        self.levels.truncate(level);
        for literal in self.trail.drain(length..) {
            self.values[literal.id() as usize] = None;
        }
        self.propagated = self.propagated.min(length);
    }

    /// The causes behind a conflict that no decision leads to.
    fn find_core(&self, conflict: ClauseId) -> Vec<Cause> {
        let mut core = Vec::new();
        let mut seen_clauses = HashSet::from([conflict]);
        let mut seen_ids = HashSet::new();
        let mut clauses = vec![conflict];
        let mut ids: Vec<Id> =
            self.clauses[conflict].literals.iter().map(|literal| literal.id()).collect();
        loop {
            if let Some(clause) = clauses.pop() {
                match &self.clauses[clause].origin {
                    Origin::Cause(cause) => core.push(*cause),
                    Origin::Learnt(from, at_root) => {
                        clauses.extend(from.iter().filter(|clause| seen_clauses.insert(**clause)));
                        ids.extend(at_root);
                    }
                }
            } else if let Some(id) = ids.pop() {
                let Some(reason) = self.reason(id).filter(|_| seen_ids.insert(id)) else {
                    continue;
                };
                ids.extend(self.clauses[reason].literals.iter().map(|literal| literal.id()));
                clauses.extend(Some(reason).filter(|reason| seen_clauses.insert(*reason)));
            } else {
                return core;
            }
        }
    }

    /// Walk from what is wanted along what is chosen, to the first thing still open.
    ///
    /// What was met on the way satisfies; else the first alternative that is not ruled
    /// out, even where a later one is known to come anyway: so apt does it.
    fn walk(&mut self) -> Result<Walk> {
        let mut met = HashSet::new();
        let mut roots = Vec::new();
        for want in &self.problem.wanted {
            match self.choose(want.choices.iter().copied(), &met) {
                Choice::Open(id) => return Ok(Walk::Open(id)),
                Choice::Made(id) => roots.push(id),
                Choice::Met | Choice::None => {}
            }
            met.extend(roots.last());
        }
        let mut solution = Vec::new();
        let mut recommended = None;
        for root in roots {
            let mut stack: Vec<(Id, usize)> = vec![(root, 0)];
            while let Some((id, next)) = stack.pop() {
                if self.problem.is_installed(id) {
                    continue;
                }
                if next == 0 {
                    solution.push(id);
                }
                let groups = self.problem.groups(id)?;
                let Some(group) = groups.get(next) else { continue };
                stack.push((id, next + 1));
                match self.choose(group.choices(), &met) {
                    Choice::Met | Choice::None => {}
                    Choice::Made(chosen) => {
                        met.insert(chosen);
                        stack.push((chosen, 0));
                    }
                    Choice::Open(chosen) if group.is_hard() => return Ok(Walk::Open(chosen)),
                    Choice::Open(chosen) => recommended = recommended.or(Some(chosen)),
                }
            }
        }
        Ok(recommended.map_or(Walk::Done(solution), Walk::Open))
    }

    fn choose(&self, choices: impl Iterator<Item = Id>, met: &HashSet<Id>) -> Choice {
        let mut choice = Choice::None;
        for id in choices {
            if met.contains(&id) {
                return Choice::Met;
            }
            if !matches!(choice, Choice::None) {
                continue;
            }
            match self.value(Literal::yes(id)) {
                Some(true) => choice = Choice::Made(id),
                None => choice = Choice::Open(id),
                Some(false) => {}
            }
        }
        choice
    }
}

enum Walk {
    /// The package to decide on next.
    Open(Id),
    /// Nothing is open: what to add.
    Done(Vec<Id>),
}

enum Choice {
    /// One of the choices was met before.
    Met,
    /// Chosen, and not met before.
    Made(Id),
    Open(Id),
    /// All are ruled out.
    None,
}
