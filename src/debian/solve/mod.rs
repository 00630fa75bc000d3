//! Which packages must be added to an image so that what was asked for works.
//!
//! First apt-get's own way of choosing (`greedy`), which ends with what apt would
//! install. Where it ends in a conflict, a complete search (`search`), which tries the
//! same choices first. The former sees of each package only the newest version, or the
//! one that a lock keeps; the latter may take an older one.

mod explain;
mod greedy;
mod problem;
mod search;
#[cfg(test)]
mod tests;
mod universe;

use std::collections::HashMap;

use anyhow::Result;

use super::index::Package;
use super::version::Version;
use problem::Problem;

pub use universe::Universe;

/// What to solve.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// What is there already; it is neither changed nor removed, and its own
    /// dependencies are taken as satisfied.
    pub installed: &'a [&'a Package],
    /// Names of packages, or of virtual packages that only one package provides.
    pub wanted: &'a [String],
    /// Install what is recommended too, where that is possible.
    pub recommends: bool,
    /// Add every package that is `Essential: yes`.
    pub essential: bool,
    /// Versions to prefer over newer ones, of those that are still to be had.
    pub keep: &'a HashMap<String, Version>,
}

/// The packages to add to `request.installed`, sorted by name.
///
/// Errors: a [`UserError`](crate::error::UserError) where no set of packages will do, or
/// a name is unknown; another error where the lists have a relation that is none.
pub fn solve<'u>(universe: &'u Universe, request: &Request<'_>) -> Result<Vec<&'u Package>> {
    let mut problem = Problem::new(universe, request)?;
    let solution = match greedy::choose(&mut problem)? {
        Some(solution) => solution,
        None => match search::search(&mut problem)? {
            Ok(solution) => solution,
            Err(core) => return Err(explain::describe_failure(&mut problem, &core)?.into()),
        },
    };
    let mut packages: Vec<_> = solution.into_iter().filter_map(|id| universe.get(id)).collect();
    packages.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(packages)
}

/// Why `name` is in `solution`: one line for each step from a wanted package down to it.
/// Empty if it is not there.
pub fn explain(
    universe: &Universe,
    request: &Request<'_>,
    solution: &[&Package],
    name: &str,
) -> Result<Vec<String>> {
    explain::describe_reason(universe, request, solution, name)
}
