//! `stanchion lock` on a copy of this project.

use std::collections::BTreeSet;
use std::fs;

use stanchion::debian::index::Package;
use stanchion::lock::Lock;

use crate::vanished::find_sandbox;
use crate::{Copy, Today, find_mirror, find_today};

#[test]
fn a_fresh_lock_is_not_rewritten_and_needs_no_network() {
    let project = Copy::with_empty_store();
    let describe = || {
        let metadata = fs::metadata(project.path("stanchion.lock")).unwrap();
        (metadata.modified().unwrap(), project.read_lock())
    };
    let before = describe();
    let said = project.succeed(&["lock", "--offline"]);
    assert!(said.contains("the lock holds what the profiles ask for"), "{said}");
    assert_eq!(describe(), before);
}

#[test]
fn what_no_profile_asks_for_any_more_leaves_the_lock_without_a_network() {
    let project = Copy::with_empty_store();
    let before = project.read_lock();
    project.edit("stanchion.lock", |text| {
        let digest = "0".repeat(64);
        let package = format!(
            "[[package]]\nname = \"zzz\"\nversion = \"1\"\narchitecture = \"all\"\nsuite = \"trixie\"\npath = \"pool/z.deb\"\nsize = 1\ninstalled_size = 1\nsha256 = \"{digest}\"\n\n"
        );
        let at = text.find("[[set]]").unwrap();
        let set = format!("\n[[set]]\nname = \"old\"\nrequest = \"{digest}\"\npackages = [\"zzz\"]\n");
        format!("{}{package}{}{set}", &text[..at], &text[at..])
    });
    let said = project.succeed(&["lock", "--offline"]);
    assert!(said.contains("zzz 1 removed"), "{said}");
    assert_eq!(project.read_lock(), before);
}

#[test]
fn an_update_without_news_leaves_the_same_file() {
    let Some(today) = find_today() else { return };
    let project = Copy::new();
    fs::write(project.path("stanchion.lock"), &today.text).unwrap();
    let said = project.succeed(&["lock", "--update"]);
    assert!(said.contains("the lock holds what the profiles ask for"), "{said}");
    assert_eq!(project.read_lock(), today.text);
}

#[test]
fn an_update_of_an_unknown_package_is_told_the_nearest() {
    let project = Copy::with_empty_store();
    let before = project.read_lock();
    let said = project.fail(&["lock", "--update", "systmed", "--offline"]);
    assert_eq!(
        said,
        "error: the lock has no package `systmed` to update\n  help: did you mean `systemd`?\n"
    );
    assert_eq!(project.read_lock(), before);
}

/// A locked package of which the lists have an older version, which nothing ties.
struct Pair {
    name: String,
    old: String,
    new: String,
}

fn find_pairs(today: &Today) -> Vec<Pair> {
    let universe = today.read_universe();
    let locked: Vec<&Package> =
        today.lock.packages.iter().flat_map(|locked| universe.find(&locked.name)).collect();
    let mut pairs = Vec::new();
    for newest in &today.lock.packages {
        let versions: Vec<&Package> = universe.find(&newest.name).collect();
        let [first, second, ..] = versions[..] else { continue };
        if first.version != newest.version {
            continue;
        }
        let admits_both = |package: &&Package| {
            let fields = [&package.pre_depends, &package.depends];
            let relations = fields.map(|field| field.parse().unwrap()).concat().concat();
            relations.iter().filter(|relation| relation.name == newest.name).all(|relation| {
                [first, second].iter().all(|one| relation.admits(Some(one.version.as_str())))
            })
        };
        // Else another package comes or goes with it, as with a kernel.
        let same_needs = first.depends == second.depends && first.pre_depends == second.pre_depends;
        if same_needs && locked.iter().all(admits_both) {
            pairs.push(Pair {
                name: newest.name.clone(),
                old: second.version.to_string(),
                new: first.version.to_string(),
            });
        }
    }
    pairs
}

#[test]
fn an_update_of_a_package_moves_that_package_alone() {
    let Some(today) = find_today() else { return };
    let pairs = find_pairs(today);
    let [first, second, ..] = &pairs[..] else {
        eprintln!("skipped: the lists have not two versions of two locked packages today");
        return;
    };
    let project = Copy::new();
    fs::write(project.path("stanchion.lock"), &today.text).unwrap();
    project.edit("profiles/db.toml", |text| text.replace("\"agent\"]", "\"agent\", \"held\"]"));
    let hold = |lines: String| {
        fs::create_dir_all(project.path("layers/held")).unwrap();
        let text = format!("description = \"held\"\n{lines}");
        fs::write(project.path("layers/held/layer.toml"), text).unwrap();
    };
    let wishes: Vec<String> =
        [first, second].iter().map(|pair| format!("\"{}={}\"", pair.name, pair.old)).collect();
    hold(format!("packages = [{}]", wishes.join(", ")));
    project.succeed(&["lock"]);
    let held = project.lock();
    let moved = |a: &Pair| format!("{} {} -> {}", a.name, a.new, a.old);
    assert_eq!(show_changes(&held, &today.lock), [moved(first), moved(second)].into());

    // What a lock has stays when nobody insists on it any more.
    hold("variables.x = 1".to_string());
    project.succeed(&["lock"]);
    assert_eq!(show_changes(&project.lock(), &held), BTreeSet::new());
    let said = project.succeed(&["lock", "--update", &second.name]);
    let expected = format!("{} {} -> {}", second.name, second.old, second.new);
    assert!(said.contains(&expected), "{said}");
    assert_eq!(show_changes(&project.lock(), &held), [expected].into());
    project.succeed(&["lock", "--update"]);
    assert_eq!(show_changes(&project.lock(), &today.lock), BTreeSet::new());
}

fn show_changes(lock: &Lock, older: &Lock) -> BTreeSet<String> {
    lock.compare(older).iter().map(|change| change.to_string()).collect()
}

#[test]
fn a_version_that_nobody_has_is_told_with_those_to_be_had() {
    let Some(today) = find_today() else { return };
    let project = Copy::new();
    project.edit("layers/base/layer.toml", |text| text.replace("\"kmod\"", "\"kmod=0.1\""));
    let before = project.read_lock();
    let said = project.fail(&["lock"]);
    let version = &today.lock.find_package("kmod").unwrap().version;
    assert!(said.contains("error: kmod is not to be had in version 0.1\n"), "{said}");
    assert!(said.contains(&format!("help: ask for one of {version}")), "{said}");
    assert_eq!(project.read_lock(), before);
}

#[test]
fn an_undefined_variable_ends_a_build_before_anything_is_fetched() {
    let project = Copy::with_empty_store();
    fs::write(project.path("layers/base/tree/etc/issue.j2"), "{{ nobody }}\n").unwrap();
    let out = project.path("out");
    let said = project.fail(&["build", "db", "--out", out.to_str().unwrap()]);
    assert!(said.starts_with("error: undefined variable `nobody`\n"), "{said}");
    assert!(said.contains("at: layers/base/tree/etc/issue.j2:1"), "{said}");
    assert_eq!(fs::read_dir(project.path("cache")).unwrap().count(), 0);
    assert!(!out.exists());
}

/// The lock that serves for one build is not kept: it lacks the versions of the others.
#[test]
fn a_profile_that_cannot_be_solved_does_not_keep_the_others_from_being_built() {
    if find_mirror().is_none() {
        return;
    }
    let project = Copy::new();
    if find_sandbox(&project).is_none() {
        return;
    }
    let before = project.read_lock();
    for (name, packages) in [("sound", "[\"hello\"]"), ("unsound", "[\"helol\"]")] {
        fs::create_dir(project.path(&format!("layers/{name}"))).unwrap();
        fs::write(
            project.path(&format!("layers/{name}/layer.toml")),
            format!("description = \"{name}\"\npackages = {packages}\n"),
        )
        .unwrap();
        fs::write(
            project.path(&format!("profiles/{name}.toml")),
            format!(
                "description = \"{name}\"\nlayers = [\"base\", \"kernel\", \"{name}\"]\nformats = [\"raw\"]\n"
            ),
        )
        .unwrap();
    }
    let out = project.path("out");
    let said = project.fail(&["build", "sound", "unsound", "--out", out.to_str().unwrap()]);
    assert!(said.contains("error: 1 of 2 profiles failed"), "{said}");
    assert!(said.contains("unsound: ") && said.contains("helol"), "{said}");
    assert!(said.contains("warning: the lock is not written"), "{said}");
    let manifest = fs::read_to_string(out.join("sound.manifest.json")).unwrap();
    assert!(manifest.contains("\"name\": \"hello\""), "{manifest}");
    assert_eq!(project.read_lock(), before);
}
