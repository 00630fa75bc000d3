use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;
use crate::debian::index::{MultiArch, parse_packages};
use crate::debian::relation::{Relation, Relations};
use crate::error::UserError;

/// One package a line: `name version; Field: value; ...`.
fn parse(lines: &str) -> Vec<Package> {
    let mut text = String::new();
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let mut parts = line.split(';').map(str::trim);
        let (name, version) = parts.next().unwrap().split_once(' ').unwrap();
        text += &format!("Package: {name}\nVersion: {version}\nFilename: ./{name}\nSize: 1\n");
        text += &format!("SHA256: {:064}\n", 0);
        let fields: Vec<&str> = parts.collect();
        if !fields.iter().any(|field| field.starts_with("Architecture:")) {
            text += "Architecture: amd64\n";
        }
        text += &(fields.join("\n") + "\n\n");
    }
    parse_packages(&text, "suite").unwrap()
}

#[derive(Default)]
struct Ask<'a> {
    installed: &'a str,
    wanted: &'a str,
    recommends: bool,
    essential: bool,
    keep: &'a [(&'a str, &'a str)],
}

impl Ask<'_> {
    /// `name=version` of what is added, or the error.
    fn solve(&self, universe: &str) -> Result<String> {
        let universe = Universe::new(parse(universe));
        let installed = parse(self.installed);
        let wanted: Vec<String> = self.wanted.split_whitespace().map(str::to_string).collect();
        let keep =
            self.keep.iter().map(|(name, version)| (name.to_string(), version.parse().unwrap()));
        let request = Request {
            installed: &installed.iter().collect::<Vec<_>>(),
            wanted: &wanted,
            recommends: self.recommends,
            essential: self.essential,
            keep: &keep.collect(),
        };
        let added = solve(&universe, &request)?;
        let show = |package: &&Package| format!("{}={}", package.name, package.version);
        Ok(added.iter().map(show).collect::<Vec<_>>().join(" "))
    }

    fn fail(&self, universe: &str) -> String {
        self.solve(universe).unwrap_err().downcast::<UserError>().unwrap().to_string()
    }
}

fn solve_for(wanted: &str, universe: &str) -> String {
    Ask { wanted, ..Ask::default() }.solve(universe).unwrap()
}

fn fail_for(wanted: &str, universe: &str) -> String {
    Ask { wanted, ..Ask::default() }.fail(universe)
}

#[test]
fn dependencies_are_followed_and_circles_are_no_trouble() {
    let universe = "a 1; Depends: b (>= 2); Pre-Depends: c
                    b 2; Depends: a
                    c 1
                    d 1";
    assert_eq!(solve_for("a", universe), "a=1 b=2 c=1");
    assert_eq!(solve_for("", universe), "");
}

#[test]
fn the_newest_version_of_all_suites_is_taken() {
    let universe = "a 1.9
                    a 1.10
                    a 1.2
                    b 2; Depends: a (<< 1.10)";
    assert_eq!(solve_for("a", universe), "a=1.10");
    // An older one where the newest will not do, which apt would not try.
    assert_eq!(solve_for("b", universe), "a=1.9 b=2");
}

#[test]
fn of_alternatives_the_one_that_is_there_wins_then_the_first() {
    let universe = "a 1; Depends: x | y
                    b 1; Depends: nothing | y
                    x 1
                    y 1";
    assert_eq!(solve_for("a", universe), "a=1 x=1");
    assert_eq!(solve_for("y a", universe), "a=1 y=1");
    assert_eq!(solve_for("b a", universe), "a=1 b=1 y=1");
    let ask = Ask { installed: "y 1", wanted: "a", ..Ask::default() };
    assert_eq!(ask.solve(universe).unwrap(), "a=1");
}

#[test]
fn virtual_packages_go_to_the_provider_that_apt_takes() {
    let universe = "a 1; Depends: mta
                    p 1; Priority: optional; Provides: mta
                    q 1; Priority: important; Provides: mta
                    r 1; Priority: optional; Provides: mta, single";
    assert_eq!(solve_for("a", universe), "a=1 q=1");
    assert_eq!(solve_for("a p", universe), "a=1 p=1");
    assert_eq!(solve_for("single", universe), "r=1");
    assert_eq!(solve_for("a", &format!("{universe}\nmta 1; Priority: extra")), "a=1 mta=1");
    let equal = "a 1; Depends: mta\nz 1; Suggests: q\np 1; Provides: mta\nq 1; Provides: mta";
    assert_eq!(solve_for("a", equal), "a=1 p=1");
    assert!(fail_for("mta", universe).contains("`p`, `q`, `r`"));
}

#[test]
fn versioned_provisions_satisfy_versioned_relations_and_others_do_not() {
    let universe = "a 1; Depends: api (>= 2)
                    p 1; Provides: api
                    q 1; Provides: api (= 1)
                    r 9; Provides: api (= 2.1)";
    assert_eq!(solve_for("a", universe), "a=1 r=9");
}

#[test]
fn conflicts_and_breaks_make_it_take_another_way() {
    let universe = "a 1; Depends: x | y, z
                    x 1; Depends: w
                    w 1; Conflicts: z
                    y 1
                    z 1; Depends: z2
                    z2 1
                    b 1; Depends: v
                    v 2; Breaks: z (<< 2)
                    v 1";
    assert_eq!(solve_for("a", universe), "a=1 y=1 z=1 z2=1");
    assert_eq!(solve_for("b z", universe), "b=1 v=1 z=1 z2=1");
    assert_eq!(solve_for("b", universe), "b=1 v=2");
}

#[test]
fn a_package_is_never_in_conflict_with_itself() {
    let universe = "a 1; Provides: mta, b (= 1); Conflicts: mta, a (<< 2), c; Breaks: b
                    c 1; Provides: mta";
    assert_eq!(solve_for("a", universe), "a=1");
    assert!(fail_for("a c", universe).contains("conflicts with"));
}

#[test]
fn what_is_installed_is_never_changed_nor_removed() {
    let universe = "a 1; Depends: lib
                    b 1; Depends: lib (>= 2)
                    c 1; Conflicts: lib
                    lib 2";
    let ask = |wanted| Ask { installed: "lib 1; Depends: gone", wanted, ..Ask::default() };
    assert_eq!(ask("a lib").solve(universe).unwrap(), "a=1");
    let error = ask("b").fail(universe);
    assert!(error.contains("`lib (>= 2)`, which is there already as `1`"), "{error}");
    let error = ask("c").fail(universe);
    assert!(error.contains("`lib 1`, which is there already"), "{error}");
    let ask = Ask { installed: "lib 1; Conflicts: a", wanted: "a", ..Ask::default() };
    assert!(ask.fail(universe).starts_with("cannot install `a`"));
}

#[test]
fn what_a_lock_keeps_is_preferred_while_it_will_do() {
    let universe = "a 1\na 2\na 3\nb 1; Depends: a (>= 3)\nc 1; Depends: a";
    let ask = |wanted, keep| Ask { wanted, keep, ..Ask::default() };
    assert_eq!(ask("c", &[("a", "2")]).solve(universe).unwrap(), "a=2 c=1");
    assert_eq!(ask("c", &[("a", "2.5")]).solve(universe).unwrap(), "a=3 c=1");
    assert_eq!(ask("c b", &[("a", "2")]).solve(universe).unwrap(), "a=3 b=1 c=1");
}

#[test]
fn recommended_packages_come_if_asked_for_and_possible() {
    let universe = "a 1; Recommends: r, gone | s, clash
                    r 1; Recommends: gone
                    s 1
                    clash 1; Conflicts: a";
    assert_eq!(solve_for("a", universe), "a=1");
    let ask = Ask { wanted: "a", recommends: true, ..Ask::default() };
    assert_eq!(ask.solve(universe).unwrap(), "a=1 r=1 s=1");
    // The same by the search.
    let universe = format!("{universe}\nt 1; Depends: r (<< 1)\nr 0");
    let ask = Ask { wanted: "a t", recommends: true, ..Ask::default() };
    assert_eq!(ask.solve(&universe).unwrap(), "a=1 r=0 s=1 t=1");
}

#[test]
fn essential_packages_come_if_asked_for() {
    let universe = "e 1; Essential: yes; Depends: f\nf 1\na 1\np 1; Protected: yes";
    let ask = Ask { wanted: "a", essential: true, ..Ask::default() };
    assert_eq!(ask.solve(universe).unwrap(), "a=1 e=1 f=1");
}

#[test]
fn any_takes_only_what_allows_it_and_foreign_architectures_nothing() {
    let universe = "a 1; Depends: python:any
                    b 1; Depends: lib:any
                    c 1; Depends: lib:i386 | lib:amd64
                    d 1; Depends: interp:any
                    python 3; Multi-Arch: allowed; Provides: interp
                    lib 1; Multi-Arch: foreign
                    x 1; Architecture: i386";
    assert_eq!(solve_for("a", universe), "a=1 python=3");
    assert_eq!(solve_for("c", universe), "c=1 lib=1");
    assert_eq!(solve_for("d", universe), "d=1 python=3");
    assert!(fail_for("b", universe).contains("not for use across architectures"));
    assert!(fail_for("x", universe).contains("no package is called `x`"));
}

#[test]
fn a_failure_names_the_way_to_what_is_missing() {
    let universe = "web 1; Depends: app
                    app 2; Depends: lib (>= 3) | other, fine
                    fine 1
                    lib 2
                    lib 1";
    let error = fail_for("web fine", universe);
    assert_eq!(
        error,
        "cannot install `web`\n  why: `web` → `app 2` needs `lib (>= 3)`, of which there is only \
         `2`, `1`, or `other`, which no package is or provides\n  help: add the suite that has \
         what is missing, or do without what needs it"
    );
}

#[test]
fn a_failure_names_the_ways_to_a_conflict() {
    let universe = "a 1; Depends: x\nb 1; Depends: mta\nx 1; Conflicts: y\ny 1; Provides: mta";
    let error = fail_for("a b", universe);
    assert!(error.starts_with("cannot install `a`, `b` together"), "{error}");
    assert!(error.contains("`a` → `x 1` conflicts with `y`; `b` → `y 1` (as `mta`)"), "{error}");
    let error = fail_for("a b", "a 1; Depends: c (= 1)\nb 1; Depends: c (= 2)\nc 1\nc 2");
    assert!(error.contains("`a` → `c 1`") && error.contains("`b` → `c 2`"), "{error}");
}

#[test]
fn two_obstacles_to_one_package_are_both_remembered() {
    let universe = "c 1; Pre-Depends: e; Conflicts: a
                    d 1; Pre-Depends: a | c
                    a 1; Pre-Depends: c";
    assert!(fail_for("d", universe).contains("`c 1` needs `e`"));
}

#[test]
fn an_unknown_name_is_answered_with_the_nearest_known() {
    let error = fail_for("postgresql-71 nginx", "postgresql-17 1\nnginx 1");
    assert!(error.starts_with("no package is called `postgresql-71`"), "{error}");
    assert!(error.contains("did you mean `postgresql-17`"), "{error}");
    let error = fail_for("qqqqqqq zzzzzzz", "postgresql-17 1");
    assert!(error.starts_with("no packages are called `qqqqqqq`, `zzzzzzz`"), "{error}");
}

#[test]
fn a_relation_that_is_none_is_an_error_only_where_it_matters() {
    let universe = "a 1\nb 1; Depends: a b";
    assert_eq!(solve_for("a", universe), "a=1");
    let error = Ask { wanted: "b", ..Ask::default() }.solve(universe).unwrap_err();
    assert!(format!("{error:#}").contains("`b` 1 of `suite`"), "{error:#}");
}

#[test]
fn a_very_deep_chain_does_not_overflow_the_stack() {
    let chain: String =
        (0..20_000).map(|i| format!("p{i} 1; Depends: p{}\n", i + 1)).collect::<String>()
            + "p20000 1";
    let added = Ask { wanted: "p19990", ..Ask::default() }.solve(&chain).unwrap();
    assert_eq!(added.split(' ').count(), 11);
    let universe = Universe::new(parse(&chain));
    let wanted = ["p15000".to_string()];
    let request = Request {
        installed: &[],
        wanted: &wanted,
        recommends: false,
        essential: false,
        keep: &HashMap::new(),
    };
    assert_eq!(solve(&universe, &request).unwrap().len(), 5001);
}

#[test]
fn the_reason_for_a_package_is_the_way_from_what_was_asked_for() {
    let universe = Universe::new(parse(
        "web 1; Depends: app\napp 1; Depends: mta | x\np 1; Provides: mta; Pre-Depends: libc\n\
         libc 1\nbash 1; Essential: yes",
    ));
    let wanted = ["web".to_string()];
    let request = Request {
        installed: &[],
        wanted: &wanted,
        recommends: false,
        essential: true,
        keep: &HashMap::new(),
    };
    let solution = solve(&universe, &request).unwrap();
    assert_eq!(
        explain(&universe, &request, &solution, "libc").unwrap(),
        [
            "`web` is asked for",
            "`web` needs `app`",
            "`app` needs `mta`, which `p` provides",
            "`p` needs `libc`"
        ]
    );
    assert_eq!(explain(&universe, &request, &solution, "bash").unwrap(), ["`bash` is essential"]);
    assert!(explain(&universe, &request, &solution, "gone").unwrap().is_empty());
}

/// Written anew, from the policy manual, so that it shares no mistake with the solver.
fn works(packages: &[&Package]) -> bool {
    let meets = |relation: &Relation, package: &Package| {
        let fits = match relation.qualifier {
            Some("any") => package.multi_arch == MultiArch::Allowed,
            _ => true,
        };
        let is_own =
            package.name == relation.name && relation.admits(Some(package.version.as_str()));
        let is_provided = package.provides.iter().any(|(name, version)| {
            name == relation.name && relation.admits(version.as_ref().map(|v| v.as_str()))
        });
        fits && (is_own || is_provided)
    };
    let holds = |relations: &Relations| {
        relations.parse().unwrap().iter().all(|alternatives| {
            alternatives.iter().any(|relation| packages.iter().any(|other| meets(relation, other)))
        })
    };
    let names: HashSet<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    let is_apart = |package: &Package, relations: &Relations| {
        relations.parse().unwrap().iter().flatten().all(|relation| {
            packages.iter().all(|other| other.name == package.name || !meets(relation, other))
        })
    };
    names.len() == packages.len()
        && packages.iter().all(|package| {
            holds(&package.depends)
                && holds(&package.pre_depends)
                && is_apart(package, &package.conflicts)
                && is_apart(package, &package.breaks)
        })
}

/// Whether a set of packages, one bit each, is in keeping with all the causes.
fn obeys(problem: &mut Problem<'_>, causes: &[search::Cause], set: u32) -> bool {
    let has = |id: universe::Id| set >> id & 1 == 1;
    causes.iter().all(|cause| match *cause {
        search::Cause::Wanted(place) => problem.wanted[place].choices.iter().any(|id| has(*id)),
        search::Cause::Needs(id, place) => {
            !has(id) || problem.groups(id).unwrap()[place].choices().any(has)
        }
        search::Cause::Excludes(id, place) => {
            !has(id) || !has(problem.exclusions(id).unwrap()[place].other)
        }
        search::Cause::OneVersion(a, b) => !has(a) || !has(b),
    })
}

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

fn relation() -> impl Strategy<Value = String> {
    let names = prop::sample::select(vec!["a", "b", "c", "d", "e", "f", "v", "w", "a:any", "none"]);
    let rest = prop::sample::select(vec!["", "", "", " (>= 2)", " (<< 2)", " (= 1)"]);
    (names, rest).prop_map(|(name, rest)| format!("{name}{rest}"))
}

fn line() -> impl Strategy<Value = String> {
    let list = || {
        let item = prop::collection::vec(relation(), 1..3).prop_map(|all| all.join(" | "));
        prop::collection::vec(item, 0..3).prop_map(|all| all.join(", "))
    };
    let excluded = || prop::option::weighted(0.3, relation()).prop_map(Option::unwrap_or_default);
    let provides = prop::sample::select(vec!["", "", "v", "w (= 2)", "v (= 1), w"]);
    let multi_arch = prop::sample::select(vec!["no", "allowed"]);
    let head = (prop::sample::select(NAMES.to_vec()), prop::sample::select(vec!["1", "2", "3"]));
    (head, list(), list(), excluded(), excluded(), provides, multi_arch).prop_map(
        |((name, version), depends, pre_depends, conflicts, breaks, provides, multi_arch)| {
            let mut line = format!("{name} {version}; Multi-Arch: {multi_arch}");
            for (field, value) in [
                ("Depends", depends),
                ("Pre-Depends", pre_depends),
                ("Conflicts", conflicts),
                ("Breaks", breaks),
                ("Provides", provides.to_string()),
            ] {
                if !value.is_empty() {
                    line += &format!("; {field}: {value}");
                }
            }
            line
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_solution_works_and_is_found_if_there_is_one(
        lines in prop::collection::vec(line(), 4..11),
        wanted in prop::sample::subsequence(NAMES.to_vec(), 1..3),
        recommends: bool,
    ) {
        let universe = Universe::new(parse(&lines.join("\n")));
        let wanted: Vec<String> = wanted
            .iter()
            .filter(|name| universe.find(name).next().is_some())
            .map(|name| name.to_string())
            .collect();
        let request = Request {
            installed: &[],
            wanted: &wanted,
            recommends,
            essential: false,
            keep: &HashMap::new(),
        };
        let packages = universe.packages();
        let has_all = |set: &[&Package]| wanted.iter().all(|name| set.iter().any(|p| p.name == *name));
        let sets = (0..1u32 << packages.len()).map(|bits| -> Vec<&Package> {
            (0..packages.len()).filter(|i| bits >> i & 1 == 1).map(|i| &packages[i]).collect()
        });
        let mut sets = sets.filter(|set| has_all(set) && works(set));
        match solve(&universe, &request) {
            Ok(solution) => {
                prop_assert!(works(&solution) && has_all(&solution), "{solution:#?}");
                for package in &solution {
                    let why = explain(&universe, &request, &solution, &package.name).unwrap();
                    prop_assert!(!why.is_empty(), "{} is of no use", package.name);
                }
            }
            Err(error) => {
                let found = sets.next();
                prop_assert!(error.is::<UserError>() && found.is_none(), "{error:#}\n{found:#?}");
                let text = error.to_string();
                let (what, why) = text.split_once("\n  why: ").unwrap();
                let names_one = wanted.iter().any(|name| what.contains(&format!("`{name}`")));
                prop_assert!(names_one && !why.starts_with('\n'), "{text}");
                let mut problem = Problem::new(&universe, &request).unwrap();
                let core = search::search(&mut problem).unwrap().unwrap_err();
                let set = (0..1u32 << packages.len()).find(|set| obeys(&mut problem, &core, *set));
                prop_assert_eq!(set, None, "{:?} explains nothing", core);
            }
        }
    }
}
