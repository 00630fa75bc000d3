//! The solver against apt-get, on universes made up at random.

#[path = "support/apt.rs"]
mod apt;

use std::collections::{BTreeMap, HashMap};

use apt::Apt;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use stanchion::command::Command;
use stanchion::debian::index::{Package, parse_packages};
use stanchion::debian::solve::{Request, Universe, solve};

const PACKAGES: usize = 60;
const VIRTUAL: usize = 6;

/// What a made-up universe has beside names that all exist.
#[derive(Clone, Copy, PartialEq)]
enum Shape {
    /// Nothing: everything can be installed, and with everything.
    Plain,
    /// Versions and qualifiers that may not fit, names that nothing has, conflicts.
    Hard,
}

fn relation(shape: Shape) -> impl Strategy<Value = String> {
    let (real, rests) = match shape {
        Shape::Plain => (PACKAGES, vec![""]),
        Shape::Hard => (
            PACKAGES + 4,
            vec!["", "", "", "", "", " (>= 1.5)", " (<< 2)", " (= 2)", ":any", ":any (>= 1)"],
        ),
    };
    let name = prop_oneof![
        9 => (0..real).prop_map(|i| format!("p{i}")),
        2 => (0..VIRTUAL).prop_map(|i| format!("v{i}")),
    ];
    (name, prop::sample::select(rests)).prop_map(|(name, rest)| name + rest)
}

fn needs(shape: Shape) -> impl Strategy<Value = String> {
    let item = prop::collection::vec(relation(shape), 1..4);
    prop::collection::vec(item.prop_map(|alternatives| alternatives.join(" | ")), 0..4)
        .prop_map(|items| items.join(", "))
}

fn conflicts(shape: Shape) -> impl Strategy<Value = String> {
    prop::option::weighted(0.08, relation(shape))
        .prop_map(move |found| found.filter(|_| shape == Shape::Hard).unwrap_or_default())
}

fn paragraph(shape: Shape) -> impl Strategy<Value = String> {
    let versions = match shape {
        Shape::Plain => vec!["1"],
        Shape::Hard => vec!["1", "1:0.5", "1.5", "2~rc1", "2"],
    };
    let head = (
        prop::sample::select(versions),
        prop::sample::select(vec!["optional", "optional", "important", "required", "extra"]),
        prop::sample::select(vec!["", "", "", "Protected: yes\n"]),
        prop::sample::select(vec!["no", "same", "foreign", "allowed"]),
    );
    let provides =
        prop::option::weighted(0.25, (0..VIRTUAL, prop::sample::select(vec!["", " (= 2)"])));
    let relations = (needs(shape), needs(shape), needs(shape), conflicts(shape), conflicts(shape));
    (head, provides, relations).prop_map(|(head, provides, relations)| {
        let (version, priority, flag, multi_arch) = head;
        let provides = provides.map_or(String::new(), |(i, version)| format!("v{i}{version}"));
        let fields = [
            ("Depends", relations.0),
            ("Recommends", relations.1),
            ("Suggests", relations.2),
            ("Conflicts", relations.3),
            ("Breaks", relations.4),
            ("Provides", provides),
        ];
        let fields = fields.iter().filter(|(_, value)| !value.is_empty());
        let fields: String = fields.map(|(name, value)| format!("{name}: {value}\n")).collect();
        format!(
            "Version: {version}\nArchitecture: amd64\nPriority: {priority}\n{flag}\
             Multi-Arch: {multi_arch}\nMaintainer: nobody\nDescription: made up\n\
             Size: 1\nSHA256: {:064}\n{fields}\n",
            0
        )
    })
}

/// The lists of two suites; the second has other versions of some of the packages.
fn lists(shape: Shape) -> impl Strategy<Value = [String; 2]> {
    let one = || prop::collection::vec(paragraph(shape), PACKAGES);
    (one(), one()).prop_map(move |(first, second)| {
        let write =
            |(i, text): (usize, &String)| format!("Package: p{i}\nFilename: ./p{i}.deb\n{text}");
        let mut first: String = first.iter().enumerate().map(write).collect();
        for i in 0..VIRTUAL {
            let text = "Version: 1\nArchitecture: all\nDescription: made up\nSize: 1\n";
            first += &format!(
                "Package: w{i}\nFilename: ./w\nProvides: v{i}\n{text}SHA256: {:064}\n\n",
                0
            );
        }
        let has_second = |i: &usize| shape == Shape::Hard && i.is_multiple_of(3);
        let second = second.iter().enumerate().filter(|(i, _)| has_second(i)).map(write).collect();
        [first, second]
    })
}

fn read(lists: &[String; 2]) -> Universe {
    let read = |list: &String| parse_packages(list, "made-up").unwrap();
    Universe::new(lists.iter().flat_map(read).collect())
}

/// The machine's own apt-get; `None`, with a line that says so, where there is none.
fn open_apt(lists: &[&str], status: &str) -> Option<Apt> {
    if Command::new("apt-get").arg("--version").run().is_err() {
        eprintln!("skipped: this machine has no apt-get to compare with");
        return None;
    }
    Some(Apt::new(|| Command::new("apt-get"), lists, status))
}

fn draw<S: Strategy>(runner: &mut TestRunner, strategy: S) -> S::Value {
    strategy.new_tree(runner).unwrap().current()
}

fn draw_wanted(runner: &mut TestRunner) -> Vec<String> {
    let names = draw(runner, prop::collection::btree_set(0..PACKAGES, 1..4));
    names.iter().map(|i| format!("p{i}")).collect()
}

fn request<'a>(
    wanted: &'a [String],
    installed: &'a [&'a Package],
    recommends: bool,
    keep: &'a HashMap<String, stanchion::debian::version::Version>,
) -> Request<'a> {
    Request { installed, wanted, recommends, essential: false, keep }
}

fn show(packages: &[&Package]) -> BTreeMap<String, String> {
    packages.iter().map(|p| (p.name.clone(), p.version.to_string())).collect()
}

#[test]
fn where_nothing_conflicts_apt_installs_the_same() {
    let mut runner = TestRunner::deterministic();
    let keep = HashMap::new();
    for _ in 0..6 {
        let lists = draw(&mut runner, lists(Shape::Plain));
        let universe = read(&lists);
        let lists = [lists[0].as_str()];
        let Some(apt) = open_apt(&lists, "") else { return };
        for recommends in [false, true, false, true, false, true] {
            let wanted = draw_wanted(&mut runner);
            let ours = solve(&universe, &request(&wanted, &[], recommends, &keep)).unwrap();
            assert_eq!(Ok(show(&ours)), apt.solve(&wanted, recommends), "{wanted:?}");
        }

        let base = draw_wanted(&mut runner);
        let base = solve(&universe, &request(&base, &[], false, &keep)).unwrap();
        let apt = open_apt(&lists, &write_status(lists[0], &base)).unwrap();
        for _ in 0..4 {
            let wanted = draw_wanted(&mut runner);
            let ours = solve(&universe, &request(&wanted, &base, false, &keep)).unwrap();
            assert_eq!(Ok(show(&ours)), apt.solve(&wanted, false), "{wanted:?}");
        }
    }
}

/// A dpkg status file from those paragraphs of a list that are installed.
fn write_status(list: &str, installed: &[&Package]) -> String {
    let is_installed = |text: &&str| {
        let name = text.lines().next().and_then(|line| line.strip_prefix("Package: "));
        installed.iter().any(|package| Some(package.name.as_str()) == name)
    };
    let paragraphs = list.split("\n\n").filter(is_installed);
    paragraphs.map(|text| format!("{text}\nStatus: install ok installed\n\n")).collect()
}

#[test]
fn what_apt_can_install_is_found_and_what_is_found_apt_accepts() {
    let mut runner = TestRunner::deterministic();
    let keep = HashMap::new();
    let (mut same, mut solved, mut failed) = (0, 0, 0);
    for _ in 0..8 {
        let lists = draw(&mut runner, lists(Shape::Hard));
        let universe = read(&lists);
        let Some(apt) = open_apt(&[&lists[0], &lists[1]], "") else { return };
        for _ in 0..10 {
            let wanted = draw_wanted(&mut runner);
            let theirs = apt.solve(&wanted, false);
            let ours = match solve(&universe, &request(&wanted, &[], false, &keep)) {
                Ok(ours) => show(&ours),
                Err(error) => {
                    assert!(theirs.is_err(), "{wanted:?}: {error}\n{theirs:?}");
                    failed += 1;
                    continue;
                }
            };
            let pinned: Vec<String> =
                ours.iter().map(|(name, version)| format!("{name}={version}")).collect();
            assert_eq!(apt.solve(&pinned, false), Ok(ours.clone()), "{wanted:?}");
            solved += 1;
            same += usize::from(theirs == Ok(ours));
        }
    }
    eprintln!("{solved} solved, {same} of them as apt does, {failed} without a solution");
    assert!(solved >= 20 && failed >= 5, "the universes are too easy or too hard");
}
