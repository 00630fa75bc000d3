//! Answers for people: why a request cannot be met, and why a package is there.

use std::collections::{HashMap, HashSet, VecDeque};

use anyhow::Result;

use super::Request;
use super::problem::{Kind, Problem};
use super::search::Cause;
use super::universe::{Id, Universe, satisfies};
use crate::debian::index::Package;
use crate::debian::relation::Relation;
use crate::error::{UserError, find_nearest};

/// More obstacles than anybody reads.
const MAX_LINES: usize = 8;

pub fn describe_unknown(universe: &Universe, names: &[&str]) -> UserError {
    let mut known: Vec<&str> = universe.names().collect();
    known.sort_unstable();
    let help = names.iter().filter_map(|name| {
        let nearest = find_nearest(name, known.iter().copied())?;
        Some(format!("did you mean `{nearest}` for `{name}`?"))
    });
    let help: Vec<String> = help.collect();
    let what = match names {
        [name] => format!("no package is called `{name}`"),
        _ => format!("no packages are called {}", quote_all(names)),
    };
    let error =
        UserError::new(what).why("none of the suites has it, nor a package that provides it");
    if help.is_empty() { error } else { error.help(help.join("\n")) }
}

pub fn describe_virtual(name: &str, providers: &[&str]) -> UserError {
    UserError::new(format!("`{name}` is no package of its own"))
        .why(format!("{} packages provide it", providers.len()))
        .help(format!("name one of {}", quote_all(&providers[..providers.len().min(12)])))
}

fn quote_all(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// The obstacles in `core`, each with the way from a wanted package to it.
pub fn describe_failure(problem: &mut Problem<'_>, core: &[Cause]) -> Result<UserError> {
    let mut wanted: Vec<&str> = Vec::new();
    for cause in core {
        if let Cause::Wanted(place) = cause {
            wanted.push(problem.wanted[*place].name);
        }
    }
    wanted.sort_unstable();
    wanted.dedup();
    let ways = find_ways(problem, core)?;
    let (mut missing, mut clashes) = (Vec::new(), Vec::new());
    for cause in core {
        match *cause {
            Cause::Wanted(_) => {}
            Cause::Needs(id, place) => {
                let groups = problem.groups(id)?;
                let group = &groups[place];
                if group.choices().next().is_none() {
                    let reasons: Vec<String> = group
                        .alternatives
                        .iter()
                        .map(|relation| describe_missing(problem, relation))
                        .collect();
                    missing.push(format!(
                        "{} needs {}",
                        describe_way(problem, &ways, id),
                        reasons.join(", or ")
                    ));
                }
            }
            Cause::Excludes(id, place) => {
                let exclusions = problem.exclusions(id)?;
                let exclusion = &exclusions[place];
                clashes.push(format!(
                    "{} {} `{}`; {}",
                    describe_way(problem, &ways, id),
                    exclusion.kind.verb(),
                    exclusion.relation,
                    describe_way(problem, &ways, exclusion.other)
                ));
            }
            Cause::OneVersion(a, b) => clashes.push(format!(
                "only one version of a package can be there: {}; {}",
                describe_way(problem, &ways, a),
                describe_way(problem, &ways, b)
            )),
        }
    }
    let help = match (missing.is_empty(), wanted.len()) {
        (false, _) => "add the suite that has what is missing, or do without what needs it",
        (true, 0..=1) => "do without it, or without what it cannot be with",
        (true, _) => "do without one of them",
    };
    let mut lines = Vec::new();
    for line in missing.into_iter().chain(clashes) {
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    if lines.len() > MAX_LINES {
        let more = lines.len() - MAX_LINES;
        lines.truncate(MAX_LINES);
        lines.push(format!("and {more} more obstacles"));
    }
    let what = match wanted[..] {
        [name] => format!("cannot install `{name}`"),
        _ => format!("cannot install {} together", quote_all(&wanted)),
    };
    Ok(UserError::new(what).why(lines.join("\n")).help(help))
}

/// For each package that the core leads to: who needs it, and as what; `None` is a
/// package that is wanted itself.
type Ways<'a> = HashMap<Id, Option<(Id, Relation<'a>)>>;

fn find_ways<'a>(problem: &mut Problem<'a>, core: &[Cause]) -> Result<Ways<'a>> {
    let mut ways = Ways::new();
    let mut queue = VecDeque::new();
    let mut needs: HashMap<Id, Vec<usize>> = HashMap::new();
    for cause in core {
        match *cause {
            Cause::Wanted(place) => {
                for id in &problem.wanted[place].choices {
                    ways.insert(*id, None);
                    queue.push_back(*id);
                }
            }
            Cause::Needs(id, place) => needs.entry(id).or_default().push(place),
            _ => {}
        }
    }
    while let Some(id) = queue.pop_front() {
        let groups = problem.groups(id)?;
        for place in needs.get(&id).into_iter().flatten() {
            let group = &groups[*place];
            for choice in group.choices() {
                let package = problem.package(choice);
                let relation =
                    group.alternatives.iter().find(|relation| satisfies(package, relation));
                if let (Some(relation), false) = (relation, ways.contains_key(&choice)) {
                    ways.insert(choice, Some((id, *relation)));
                    queue.push_back(choice);
                }
            }
        }
    }
    Ok(ways)
}

/// `a → b → c 1.0`
fn describe_way(problem: &Problem<'_>, ways: &Ways<'_>, id: Id) -> String {
    let package = problem.package(id);
    let mut steps = Vec::new();
    let mut label = format!("`{} {}`", package.name, package.version);
    let mut at = id;
    while let Some(Some((parent, relation))) = ways.get(&at) {
        if relation.name != problem.package(at).name {
            label += &format!(" (as `{}`)", relation.name);
        }
        at = *parent;
        steps.push(std::mem::replace(&mut label, format!("`{}`", problem.package(at).name)));
    }
    steps.push(label);
    steps.reverse();
    let way = steps.join(" → ");
    if problem.is_installed(id) { format!("{way}, which is there already,") } else { way }
}

fn describe_missing(problem: &Problem<'_>, relation: &Relation<'_>) -> String {
    let versions = problem.choose_versions(relation.name);
    let shown: Vec<String> =
        versions.iter().map(|id| format!("`{}`", problem.package(*id).version)).collect();
    let why = match versions.first() {
        Some(id) if problem.is_installed(*id) => {
            format!("which is there already as {}", shown.join(", "))
        }
        Some(_) if relation.qualifier.is_some() => {
            "which is not for use across architectures".to_string()
        }
        Some(_) => format!("of which there is only {}", shown.join(", ")),
        None => "which no package is or provides".to_string(),
    };
    format!("`{relation}`, {why}")
}

pub fn describe_reason(
    universe: &Universe,
    request: &Request<'_>,
    solution: &[&Package],
    name: &str,
) -> Result<Vec<String>> {
    let mut steps: HashMap<&str, (Option<&str>, String)> = HashMap::new();
    let mut queue = VecDeque::new();
    for package in solution {
        let is_wanted = |wanted: &String| {
            *wanted == package.name
                || universe.versions_of(wanted).is_empty()
                    && package.provides.iter().any(|(provided, _)| provided == wanted)
        };
        let why = if request.wanted.iter().any(is_wanted) {
            "is asked for"
        } else if request.essential && package.essential {
            "is essential"
        } else {
            continue;
        };
        steps.insert(&package.name, (None, format!("`{}` {why}", package.name)));
        queue.push_back(*package);
    }
    while let Some(package) = queue.pop_front() {
        let mut fields =
            vec![(Kind::PreDepends, &package.pre_depends), (Kind::Depends, &package.depends)];
        if request.recommends {
            fields.push((Kind::Recommends, &package.recommends));
        }
        for (kind, relations) in fields {
            for relation in relations.parse()?.iter().flatten() {
                for found in solution.iter().filter(|found| satisfies(found, relation)) {
                    if steps.contains_key(found.name.as_str()) {
                        continue;
                    }
                    let mut line = format!("`{}` {} `{relation}`", package.name, kind.verb());
                    if found.name != relation.name {
                        line += &format!(", which `{}` provides", found.name);
                    }
                    steps.insert(&found.name, (Some(&package.name), line));
                    queue.push_back(found);
                }
            }
        }
    }
    let mut lines = Vec::new();
    let mut at = Some(name);
    let mut seen = HashSet::new();
    while let Some((from, line)) = at.filter(|name| seen.insert(*name)).and_then(|at| steps.get(at))
    {
        lines.push(line.clone());
        at = *from;
    }
    lines.reverse();
    Ok(lines)
}
