//! What ships: every profile's packages are those that apt chooses, and the lock is whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use stanchion::command::Command;
use stanchion::config::layer::PackageWish;
use stanchion::config::{Profile, Project};
use stanchion::lock::{Lock, name_stand_in};
use stanchion::pipeline::{FetchOptions, Source, provide_tools};
use stanchion::progress::{Mode, Progress};
use stanchion::tools;

use crate::apt::Apt;
use crate::{Today, find_mirror, find_today, root};

/// The names of the sets of the profile's layers.
fn name_sets(profile: &Profile) -> Vec<String> {
    let names: Vec<&str> = profile.layers.iter().map(|layer| layer.name.as_str()).collect();
    (1..=names.len()).map(|length| names[..length].join("+")).collect()
}

fn list_versions(lock: &Lock, set: &str) -> BTreeMap<String, String> {
    let packages = lock.list_set(set).unwrap().into_iter();
    packages.map(|package| (package.name.clone(), package.version.to_string())).collect()
}

/// A dpkg status file in which the layers' `provides` are installed.
fn write_status(profile: &Profile) -> String {
    let with = profile.layers.iter().zip(name_sets(profile));
    with.filter(|(layer, _)| !layer.provides.is_empty())
        .map(|(layer, set)| {
            format!(
                "Package: {}\nStatus: install ok installed\nArchitecture: all\nVersion: 1\n\
                 Maintainer: nobody\nProvides: {}\nDescription: stands in\n\n",
                name_stand_in(&set),
                layer.provides.join(", ")
            )
        })
        .collect()
}

/// Packages that are essential in their newest version.
fn list_essential(today: &Today) -> Vec<String> {
    let universe = today.read_universe();
    let names: BTreeSet<&String> =
        universe.packages().iter().filter(|p| p.essential).map(|p| &p.name).collect();
    let is_essential = |name: &&&String| universe.find(name).next().is_some_and(|p| p.essential);
    names.iter().filter(is_essential).map(|name| name.to_string()).collect()
}

#[test]
fn every_profile_has_the_packages_that_apt_would_install() {
    let Some(today) = find_today() else { return };
    let source = Source::open(&FetchOptions::default(), &Progress::new(Mode::Quiet)).unwrap();
    let tools = provide_tools(&source, &today.lock, tools::set::CHECK).unwrap();
    let start = move || -> Command { tools.command("apt-get").unwrap() };
    let lists: Vec<&str> = today.suites.iter().map(|suite| suite.packages_text.as_str()).collect();
    let essential = list_essential(today);
    assert!(essential.iter().any(|name| name == "dpkg"));

    let project = Project::find(root()).unwrap();
    let names = project.list_profiles().unwrap();
    assert!(!names.is_empty());
    let plain = Apt::new(start.clone(), &lists, "");
    let mut initrds = BTreeSet::new();
    for name in names {
        let profile = project.load_profile(&name).unwrap();
        let recommends: BTreeSet<bool> = profile.layers.iter().map(|l| l.recommends).collect();
        assert_eq!(recommends.len(), 1, "apt takes recommended packages for all or for none");
        let wanted = profile.layers.iter().flat_map(|layer| &layer.packages);
        let wanted: Vec<String> =
            essential.iter().cloned().chain(wanted.map(PackageWish::to_string)).collect();
        let apt = Apt::new(start.clone(), &lists, &write_status(&profile));
        let theirs = apt.solve(&wanted, recommends.contains(&true)).unwrap();
        let sets = name_sets(&profile);
        let ours: BTreeMap<String, String> =
            sets.iter().flat_map(|set| list_versions(&today.lock, set)).collect();
        assert!(ours.len() >= 100, "{name}: {}", ours.len());
        compare(&name, &ours, &theirs);

        for layer in profile.layers.iter().filter(|layer| layer.initrd.is_some()) {
            let wanted = &layer.initrd.as_ref().unwrap().packages;
            if initrds.insert(layer.name.clone()) {
                let wanted: Vec<String> = wanted.iter().map(PackageWish::to_string).collect();
                let set = format!("initrd:{}", layer.name);
                let theirs = plain.solve(&wanted, false).unwrap();
                compare(&set, &list_versions(&today.lock, &set), &theirs);
            }
        }
    }
    assert!(!initrds.is_empty());
}

fn compare(what: &str, ours: &BTreeMap<String, String>, theirs: &BTreeMap<String, String>) {
    let only = |a: &BTreeMap<String, String>, b: &BTreeMap<String, String>| -> Vec<String> {
        let only = a.iter().filter(|(name, version)| b.get(*name) != Some(*version));
        only.map(|(name, version)| format!("{name} {version}")).collect()
    };
    let (ours, theirs) = (only(ours, theirs), only(theirs, ours));
    assert!(
        ours.is_empty() && theirs.is_empty(),
        "{what}: only ours: {ours:?}; only apt's: {theirs:?}"
    );
}

#[test]
fn the_lock_names_no_host() {
    let path = root().join("stanchion.lock");
    let text = fs::read_to_string(&path).unwrap();
    assert!(!text.contains("://"));
    if let Some(mirror) = find_mirror() {
        for url in [&mirror.main, &mirror.security] {
            let host = url.split("://").nth(1).unwrap().split(['/', ':']).next().unwrap();
            assert!(host.is_empty() || !text.contains(host), "the lock names a mirror");
        }
    }
    let lock = Lock::load(&path).unwrap().unwrap();
    assert!(lock.packages.len() > 200);
    for package in &lock.packages {
        // A path of the archive: no host in front, none within.
        assert!(package.path.starts_with("pool/"), "{}", package.path);
        assert!(package.path.ends_with(".deb"), "{}", package.path);
        assert!(lock.suites.iter().any(|suite| suite.name == package.suite), "{}", package.name);
    }
    for suite in &lock.suites {
        assert!(suite.name.starts_with("trixie"), "{}", suite.name);
    }
}
