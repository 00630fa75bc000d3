//! The order of choices that apt-get has (`pkgDepCache::MarkInstall` in its
//! depcache.cc): depth first; what is there already satisfies; else the first
//! alternative that can be installed; a choice is taken back only where a later one
//! conflicts with it.

use std::collections::{HashMap, HashSet};

use anyhow::Result;

use super::problem::{Group, Problem};
use super::universe::Id;

/// Deeper chains of dependencies are left to the search, which does not recurse.
const MAX_DEPTH: usize = 500;

/// The packages to add, or `None` where a choice would have to be taken back.
pub fn choose(problem: &mut Problem<'_>) -> Result<Option<Vec<Id>>> {
    let mut greedy = Greedy {
        chosen: HashMap::new(),
        excluded: HashMap::new(),
        settled: HashSet::new(),
        forbidden: HashSet::new(),
        dead: HashSet::new(),
        active: HashSet::new(),
        is_too_deep: false,
        problem,
    };
    for id in greedy.problem.installed() {
        greedy.place(id)?;
    }
    let wanted: Vec<Id> =
        greedy.problem.wanted.iter().filter_map(|want| want.choices.first().copied()).collect();
    for id in &wanted {
        match greedy.find_chosen(*id) {
            Some(chosen) if chosen != *id => return Ok(None),
            Some(_) => {}
            None => greedy.place(*id)?,
        }
        greedy.settled.insert(*id);
    }
    for id in &wanted {
        if !greedy.complete(*id, 0)? {
            return Ok(None);
        }
    }
    if greedy.is_too_deep {
        return Ok(None);
    }
    let solution = greedy.collect(&wanted)?;
    Ok(greedy.is_sound(&solution)?.then_some(solution))
}

struct Greedy<'p, 'a> {
    problem: &'p mut Problem<'a>,
    chosen: HashMap<&'a str, Id>,
    /// What something chosen cannot be with, and how many say so.
    excluded: HashMap<Id, u32>,
    /// What is wanted, and what that cannot do without.
    settled: HashSet<Id>,
    /// What something settled cannot be with.
    forbidden: HashSet<Id>,
    /// What was tried in vain.
    dead: HashSet<Id>,
    /// What is being completed.
    active: HashSet<Id>,
    is_too_deep: bool,
}

impl Greedy<'_, '_> {
    fn find_chosen(&self, id: Id) -> Option<Id> {
        self.chosen.get(self.problem.package(id).name.as_str()).copied()
    }

    fn is_chosen(&self, id: Id) -> bool {
        self.find_chosen(id) == Some(id)
    }

    fn is_satisfied(&self, group: &Group<'_>) -> bool {
        group.choices().any(|id| self.is_chosen(id))
    }

    fn place(&mut self, id: Id) -> Result<()> {
        self.chosen.insert(&self.problem.package(id).name, id);
        for exclusion in self.problem.exclusions(id)?.iter() {
            *self.excluded.entry(exclusion.other).or_default() += 1;
        }
        Ok(())
    }

    fn take_back(&mut self, id: Id) -> Result<()> {
        self.chosen.remove(self.problem.package(id).name.as_str());
        self.settled.remove(&id);
        for exclusion in self.problem.exclusions(id)?.iter() {
            if let Some(count) = self.excluded.get_mut(&exclusion.other) {
                *count -= 1;
            }
        }
        Ok(())
    }

    fn is_excluded(&mut self, id: Id) -> Result<bool> {
        if self.excluded.get(&id).is_some_and(|count| *count > 0) {
            return Ok(true);
        }
        let exclusions = self.problem.exclusions(id)?;
        Ok(exclusions.iter().any(|exclusion| self.is_chosen(exclusion.other)))
    }

    /// Take back what a package cannot be with, unless that is settled or in the making:
    /// a later choice goes before an earlier one.
    fn make_room(&mut self, id: Id) -> Result<bool> {
        for exclusion in self.problem.exclusions(id)?.iter() {
            let other = exclusion.other;
            if !self.is_chosen(other) {
                continue;
            }
            let is_firm = self.settled.contains(&other)
                || self.active.contains(&other)
                || self.problem.is_installed(other);
            if is_firm {
                return Ok(false);
            }
            self.take_back(other)?;
        }
        Ok(true)
    }

    /// Choose all that a chosen package needs; `false` where that cannot be.
    fn complete(&mut self, id: Id, depth: usize) -> Result<bool> {
        if self.problem.is_installed(id) {
            return Ok(true);
        }
        if depth > MAX_DEPTH {
            self.is_too_deep = true;
            return Ok(false);
        }
        let is_settled = self.settled.contains(&id);
        if is_settled {
            if !self.make_room(id)? {
                return Ok(false);
            }
            let exclusions = self.problem.exclusions(id)?;
            self.forbidden.extend(exclusions.iter().map(|exclusion| exclusion.other));
        }
        self.active.insert(id);
        let is_complete = self.meet_needs(id, is_settled, depth)?;
        self.active.remove(&id);
        Ok(is_complete)
    }

    fn meet_needs(&mut self, id: Id, is_settled: bool, depth: usize) -> Result<bool> {
        let groups = self.problem.groups(id)?;
        // What is satisfied before the first choice stays so.
        let open: Vec<&Group<'_>> =
            groups.iter().filter(|group| is_settled || !self.is_satisfied(group)).collect();
        for group in open {
            let mut usable = group.candidates.clone();
            usable.retain(|id| !self.forbidden.contains(id) && !self.dead.contains(id));
            let is_forced = is_settled && group.is_hard() && usable.len() == 1;
            if self.is_satisfied(group) {
                let settles =
                    is_forced && self.is_chosen(usable[0]) && self.settled.insert(usable[0]);
                if settles && !self.complete(usable[0], depth + 1)? {
                    return Ok(false);
                }
                continue;
            }
            let mut is_done = false;
            for choice in usable {
                is_done = self.install(choice, is_forced, depth + 1)?;
                if is_done {
                    break;
                }
            }
            if !is_done && group.is_hard() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Choose a package with all that it needs. Otherwise `false`; what was chosen on the
    /// way stays, and can satisfy others.
    fn install(&mut self, id: Id, settle: bool, depth: usize) -> Result<bool> {
        if let Some(chosen) = self.find_chosen(id) {
            return Ok(chosen == id);
        }
        if self.dead.contains(&id) {
            return Ok(false);
        }
        // Like apt, see here only what could never be, not what was tried in vain.
        let groups = self.problem.groups(id)?;
        if groups.iter().any(|group| group.is_hard() && group.candidates.is_empty()) {
            self.dead.insert(id);
            return Ok(false);
        }
        if !self.make_room(id)? || self.is_excluded(id)? {
            return Ok(false);
        }
        self.place(id)?;
        if settle {
            self.settled.insert(id);
        }
        if self.complete(id, depth)? {
            return Ok(true);
        }
        self.take_back(id)?;
        self.dead.insert(id);
        Ok(false)
    }

    /// What is chosen and of use: not what was left by a choice that failed.
    fn collect(&mut self, wanted: &[Id]) -> Result<Vec<Id>> {
        let mut solution = Vec::new();
        let mut seen = HashSet::new();
        let mut open = wanted.to_vec();
        while let Some(id) = open.pop() {
            if self.problem.is_installed(id) || !seen.insert(id) {
                continue;
            }
            solution.push(id);
            for group in self.problem.groups(id)?.iter() {
                open.extend(group.choices().filter(|id| self.is_chosen(*id)));
            }
        }
        Ok(solution)
    }

    fn is_sound(&mut self, solution: &[Id]) -> Result<bool> {
        for id in solution {
            let groups = self.problem.groups(*id)?;
            let is_broken = groups.iter().any(|group| group.is_hard() && !self.is_satisfied(group));
            if is_broken || self.is_excluded(*id)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
