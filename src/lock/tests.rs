use super::*;
use crate::debian::index;
use crate::debian::solve::Universe;

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
    let universe = universe("Package: aa\nVersion: 1");
    let requests = [request("x", None, &["aa"])];
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

fn insist(name: &str, parent: Option<&str>, wanted: &[&str]) -> [SetRequest; 1] {
    [request(name, parent, wanted)]
}

fn show_changes(lock: &Lock, older: &Lock) -> Vec<String> {
    lock.compare(older).iter().map(Change::to_string).collect()
}

/// Three versions of `a`, of which each needs the `b` of its own version.
const TIED: &str = "Package: a\nVersion: 1\nDepends: b (= 1)\n\nPackage: a\nVersion: 2\nDepends: b (= 2)\n\nPackage: a\nVersion: 3\nDepends: b (= 3)\n\nPackage: b\nVersion: 1\n\nPackage: b\nVersion: 2\n\nPackage: b\nVersion: 3\n\nPackage: c\nVersion: 1\n\nPackage: c\nVersion: 2";

#[test]
fn a_version_that_is_insisted_on_is_taken_and_what_needs_it_follows() {
    let universe = universe(TIED);
    let solve = |requests: &[SetRequest], previous: Option<&Lock>, update: &Update| {
        resolve(requests, &universe, vec![], previous, update).unwrap()
    };
    let middle = solve(&insist("x", None, &["a=2", "c"]), None, &Update::Nothing);
    assert_eq!(solve_names(&middle, "x"), ["a 2", "b 2", "c 2"]);
    // Of what another needs, too, and in sets that do not say so themselves.
    let requests = [
        request("x", None, &["a"]),
        request("x+y", Some("x"), &["c", "b=1"]),
        request("z", None, &["a"]),
    ];
    let lock = solve(&requests, None, &Update::Nothing);
    assert_eq!(solve_names(&lock, "x"), ["a 1", "b 1"]);
    assert_eq!(solve_names(&lock, "x+y"), ["c 2"]);
    assert_eq!(solve_names(&lock, "z"), ["a 1", "b 1"]);
    // Neither the lock nor an update is stronger.
    let again = insist("x", None, &["a=1", "c"]);
    let named = Update::Named(["a".to_string()].into());
    for update in [Update::Nothing, named, Update::Everything] {
        let lock = solve(&again, Some(&middle), &update);
        assert_eq!(solve_names(&lock, "x"), ["a 1", "b 1", "c 2"], "{update:?}");
    }
}

#[test]
fn a_version_that_is_not_to_be_had_is_told_with_those_that_are() {
    let universe = universe(TIED);
    let explain = |requests: &[SetRequest], previous: Option<&Lock>| {
        let error = resolve(requests, &universe, vec![], previous, &Update::Nothing).unwrap_err();
        assert_eq!(crate::error::exit_code(&error), 2, "{error:#}");
        error.to_string()
    };
    assert_eq!(
        explain(&insist("x", None, &["a=4"]), None),
        "a is not to be had in version 4\n  why: `x` insists on it\n  help: ask for one of 3, 2, 1, or for none"
    );
    let other = self::universe("Package: a\nVersion: 0.9");
    let old = insist("x", None, &["a=0.9"]);
    let previous = resolve(&old, &other, vec![], None, &Update::Nothing).unwrap();
    assert_eq!(
        explain(&old, Some(&previous)),
        "a is not to be had in version 0.9\n  why: `x` insists on it; the lock has it, but neither the mirror's lists nor the store\n  help: ask for one of 3, 2, 1, or for none"
    );
    assert_eq!(
        explain(&insist("x", None, &["ab=1"]), None),
        "ab is not to be had in version 1\n  why: `x` insists on it, and none of the suites has a package of that name\n  help: did you mean `a`?"
    );
    assert_eq!(
        explain(&[request("x", None, &["a=1"]), request("y", None, &["a=2"])], None),
        "`x` insists on a 1, `y` on a 2\n  why: one lock holds one version of a package\n  help: ask for the same version in both layers"
    );
    // The versions are there, but not together.
    let message = explain(&insist("x", None, &["a=1", "b=2"]), None);
    assert!(message.contains("solving `x`"), "{message}");
}

#[test]
fn equal_versions_are_the_same_however_they_are_written() {
    let universe = universe("Package: a\nVersion: 1.0-0\n\nPackage: a\nVersion: 2");
    let requests = [request("x", None, &["a=1.0"]), request("y", None, &["a=0:1.0"])];
    let lock = resolve(&requests, &universe, vec![], None, &Update::Nothing).unwrap();
    assert_eq!(solve_names(&lock, "x"), ["a 1.0-0"]);
}

#[test]
fn an_update_takes_along_what_is_tied_to_it_and_nothing_else() {
    let universe = universe(TIED);
    let old = insist("x", None, &["a=1", "c=1"]);
    let old = resolve(&old, &universe, vec![], None, &Update::Nothing).unwrap();
    let requests = insist("x", None, &["a", "c"]);
    let update = |names: &[&str]| {
        let names = names.iter().map(|name| name.to_string()).collect();
        resolve(&requests, &universe, vec![], Some(&old), &Update::Named(names)).unwrap()
    };
    assert_eq!(show_changes(&update(&["b"]), &old), ["a 1 -> 3", "b 1 -> 3"]);
    assert_eq!(show_changes(&update(&["a"]), &old), ["a 1 -> 3", "b 1 -> 3"]);
    assert_eq!(show_changes(&update(&["c"]), &old), ["c 1 -> 2"]);
}

#[test]
fn an_update_to_a_version_that_cannot_be_installed_takes_an_older_one() {
    let universe = universe(
        "Package: a\nVersion: 1\n\nPackage: a\nVersion: 2\n\nPackage: a\nVersion: 3\nDepends: nowhere",
    );
    let requests = insist("x", None, &["a"]);
    let old = resolve(&insist("x", None, &["a=1"]), &universe, vec![], None, &Update::Nothing);
    let named = Update::Named(["a".to_string()].into());
    let lock = resolve(&requests, &universe, vec![], Some(&old.unwrap()), &named).unwrap();
    assert_eq!(solve_names(&lock, "x"), ["a 2"]);
}

#[test]
fn an_update_needs_a_lock_that_has_the_package() {
    let universe = universe(TIED);
    let requests = insist("x", None, &["a"]);
    let lock = resolve(&requests, &universe, vec![], None, &Update::Nothing).unwrap();
    let explain = |previous, name: &str| {
        let update = Update::Named([name.to_string()].into());
        let error = resolve(&requests, &universe, vec![], previous, &update).unwrap_err();
        assert_eq!(crate::error::exit_code(&error), 2, "{error:#}");
        error.to_string()
    };
    assert_eq!(
        explain(Some(&lock), "aa"),
        "the lock has no package `aa` to update\n  help: did you mean `a`?"
    );
    assert_eq!(
        explain(None, "a"),
        "there is no lock to update `a` in\n  help: run `stanchion lock`"
    );
}

fn suite(date: u64) -> Vec<LockedSuite> {
    vec![LockedSuite { name: "trixie".into(), date, sha256: Digest::of(&date.to_le_bytes()) }]
}

#[test]
fn a_lock_that_was_merged_badly_is_refused() {
    let universe = universe("Package: aa\nVersion: 1");
    let requests = insist("x", None, &["aa"]);
    let lock = resolve(&requests, &universe, vec![], None, &Update::Nothing).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    let refuse = |change: &dyn Fn(&mut Lock)| {
        let mut lock = lock.clone();
        change(&mut lock);
        lock.save(&path).unwrap();
        let error = Lock::load(&path).unwrap_err();
        assert_eq!(crate::error::exit_code(&error), 2, "{error:#}");
        error.to_string()
    };
    let said = refuse(&|lock| lock.packages.push(lock.packages[0].clone()));
    assert!(said.contains("package `aa` is locked twice"), "{said}");
    let said = refuse(&|lock| lock.sets.push(lock.sets[0].clone()));
    assert!(said.contains("set `x` is there twice"), "{said}");
    let said = refuse(&|lock| lock.packages.clear());
    assert!(said.contains("set `x` names the unlocked package `aa`"), "{said}");
    let said = refuse(&|lock| lock.packages[0].name = "../aa\n".into());
    assert!(said.contains("`../aa\\n` is no package's name"), "{said}");
    let said = refuse(&|lock| lock.version = 2);
    assert!(said.contains("it has format 2"), "{said}");
}

#[test]
fn newer_lists_that_change_nothing_leave_the_lock_as_it_is() {
    let universe = universe(TIED);
    let requests = insist("x", None, &["a"]);
    let first = resolve(&requests, &universe, suite(1), None, &Update::Nothing).unwrap();
    assert_eq!(first.epoch, 1);
    for update in [Update::Everything, Update::Named(["b".to_string()].into())] {
        let again = resolve(&requests, &universe, suite(2), Some(&first), &update).unwrap();
        assert_eq!(again, first, "{update:?}");
    }
}

#[test]
fn the_epoch_moves_with_a_full_update_only_and_the_lists_with_every_change() {
    let universe = universe(TIED);
    let old = insist("x", None, &["a=1"]);
    let old = resolve(&old, &universe, suite(1), None, &Update::Nothing).unwrap();
    let requests = insist("x", None, &["a"]);
    for (update, epoch) in [
        (Update::Nothing, 1),
        (Update::Named(["a".to_string()].into()), 1),
        (Update::Everything, 2),
    ] {
        let lock = resolve(&requests, &universe, suite(2), Some(&old), &update).unwrap();
        assert_eq!((lock.epoch, &lock.suites), (epoch, &suite(2)), "{update:?}");
    }
}

#[test]
fn sets_of_profiles_that_are_gone_go_with_their_packages() {
    let universe = universe(TIED);
    let requests = [
        request("x", None, &["b"]),
        request("x+y", Some("x"), &["c"]),
        request("x+z", Some("x"), &["a"]),
    ];
    let lock = resolve(&requests, &universe, vec![], None, &Update::Nothing).unwrap();
    let pruned = lock.prune(&requests[..2], &OutsideRequests::default());
    assert_eq!(show_changes(&pruned, &lock), ["a 3 removed"]);
    assert_eq!(pruned.sets.len(), 2);
    assert!(pruned.find_stale(&requests[..2]).is_empty());
    let anew = resolve(&requests[..2], &universe, vec![], Some(&lock), &Update::Nothing).unwrap();
    assert_eq!(pruned, anew);
    assert_eq!(lock.prune(&requests, &OutsideRequests::default()), lock);
}

#[test]
fn sets_agree_on_one_version_or_are_told_the_way_out() {
    // `p` needs an old `b`; `q` is content with any.
    let universe = universe(
        "Package: p\nVersion: 1\nDepends: b (= 1)\n\nPackage: q\nVersion: 1\nDepends: b\n\nPackage: b\nVersion: 1\n\nPackage: b\nVersion: 2",
    );
    let solve =
        |requests: &[SetRequest]| resolve(requests, &universe, vec![], None, &Update::Nothing);
    let lock = solve(&[request("x", None, &["p"]), request("y", None, &["q"])]).unwrap();
    assert_eq!(solve_names(&lock, "y"), ["b 1", "q 1"]);
    let error = solve(&[request("x", None, &["q"]), request("y", None, &["p"])]).unwrap_err();
    assert_eq!(crate::error::exit_code(&error), 2, "{error:#}");
    assert_eq!(
        error.to_string(),
        "`y` needs b 1, another set has 2\n  why: one lock holds one version of a package\n  help: insist on one in a layer: `packages = [\"b=1\"]`"
    );
    let lock = solve(&[request("x", None, &["q", "b=1"]), request("y", None, &["p"])]).unwrap();
    assert_eq!(solve_names(&lock, "x"), ["b 1", "q 1"]);
}
