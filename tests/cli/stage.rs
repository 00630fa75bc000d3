//! Build stages: what they keep is in the layer, what they install is not.

use std::fs;
use std::path::{Path, PathBuf};

use crate::project::{Project, Ran, add_set, can_build, load_lock, take_turn};

/// In the store with the tools, and in no layer of `tiny`.
const PACKAGES: [&str; 5] = ["erofs-utils", "libdeflate0", "libfuse3-4", "liblz4-1", "libxxhash0"];

/// A project whose layer `extra` has a build stage with these packages.
fn project(commands: &[&str], keep: &[&str]) -> Project {
    let project = Project::tiny("");
    write_stage(&project, commands, keep);
    let mut lock = load_lock();
    add_set(&mut lock, "base+kernel+extra", Some("base+kernel"), &[], false);
    add_set(&mut lock, "build:base+kernel+extra", Some("base+kernel"), &PACKAGES, false);
    lock.save(&project.root().join("stanchion.lock")).unwrap();
    project.copy_store();
    project
}

fn write_stage(project: &Project, commands: &[&str], keep: &[&str]) {
    project.write_extra(&format!(
        "[build]\npackages = {PACKAGES:?}\ncommands = {commands:?}\nkeep = {keep:?}\n"
    ));
}

fn build(project: &Project) -> Ran {
    project.run(&["build", "tiny", "--format", "raw", "--offline"])
}

/// Whether the step of this name was taken from the store.
#[track_caller]
fn is_cached(ran: &Ran, step: &str) -> bool {
    ran.expect(0, &[]);
    let line = ran.stderr.lines().find(|line| line.starts_with(step));
    line.unwrap_or_else(|| panic!("no `{step}` in:\n{}", ran.stderr)).ends_with("cached")
}

/// The layers' trees in the store that have this path.
fn find_trees(project: &Project, path: &str) -> Vec<PathBuf> {
    let trees = fs::read_dir(project.store().join("steps/layer")).unwrap();
    let trees = trees.map(|entry| entry.unwrap().path().join("tree").join(path));
    trees.filter(|path| path.symlink_metadata().is_ok()).collect()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn a_stage_keeps_what_it_is_told_and_runs_again_only_for_what_went_into_it() {
    let _turn = take_turn();
    if !can_build() {
        return;
    }
    let commands = [
        "mkdir -p /opt/made /opt/lost",
        "mkfs.erofs --version > /opt/made/version 2>&1",
        "cp /usr/share/recipe /opt/made/recipe; chown 1000:1000 /opt/made/recipe",
        "touch /usr/share/made",
    ];
    let project = project(&commands, &["/opt/made", "/usr/share/made"]);
    project.write("layers/extra/build/usr/share/recipe", "flour\n");
    project.write("layers/extra/tree/etc/extra.conf", "one\n");
    assert!(!is_cached(&build(&project), "extra build"));
    let [version] = &find_trees(&project, "opt/made/version")[..] else { panic!("kept once") };
    assert!(read(version).contains("erofs-utils"), "{}", read(version));
    assert_eq!(find_trees(&project, "usr/share/made").len(), 1);
    for gone in ["usr/bin/mkfs.erofs", "opt/lost", "usr/share/recipe", "usr/share/doc/liblz4-1"] {
        assert!(find_trees(&project, gone).is_empty(), "{gone}");
    }
    let recipe = version.with_file_name("recipe");
    assert_eq!(read(&recipe), "flour\n");
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&fs::metadata(&recipe).unwrap()), 0);
    let text = read(&project.out().join("tiny.manifest.json"));
    let manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
    let packages = manifest["packages"].as_array().unwrap();
    assert!(packages.iter().all(|package| package["name"] != "erofs-utils"), "only in the stage");
    let layers = manifest["layers"].as_array().unwrap();
    let diffs: Vec<_> = layers.iter().rev().take(2).map(|layer| layer["diff"].clone()).collect();
    assert_eq!(diffs, ["files", "build"], "the stage's diff lies below the files");

    project.write("layers/extra/tree/etc/extra.conf", "two\n");
    let ran = build(&project);
    assert!(is_cached(&ran, "extra build") && !is_cached(&ran, "extra files"));
    project.write("layers/extra/build/usr/share/recipe", "sugar\n");
    assert!(!is_cached(&build(&project), "extra build"));
    write_stage(&project, &["mkdir /opt/made"], &["/opt/made"]);
    assert!(!is_cached(&build(&project), "extra build"));
}

#[test]
fn a_stage_that_fails_is_shown_with_its_command() {
    let _turn = take_turn();
    if !can_build() {
        return;
    }
    let project = project(&["echo boom; exit 3"], &["/opt/made"]);
    build(&project).expect(
        2,
        &[
            "a command failed in the build stage of layer `extra`: echo boom; exit 3",
            "ended with exit code 3",
            "boom",
        ],
    );
    // Nothing is kept of what lies below, nor of what was deleted, nor through a link.
    for (command, keep) in [
        ("true", "/opt/made"),
        ("true", "/usr/bin/dpkg"),
        ("rm /usr/bin/dpkg", "/usr/bin/dpkg"),
        ("ln -s /usr/share /opt/link; mkdir /usr/share/made", "/opt/link/made"),
    ] {
        write_stage(&project, &[command], &[keep]);
        build(&project).expect(
            2,
            &[&format!("the build stage of layer `extra` made no {keep}"), "`build.keep` names it"],
        );
    }
    // No network inside.
    write_stage(
        &project,
        &["test \"$(ls /sys/class/net 2>/dev/null)\" = ''; ! ip route | grep ."],
        &["/opt/made"],
    );
    build(&project).expect(2, &["made no /opt/made"]);
    assert_eq!(fs::read_dir(project.store().join("tmp")).unwrap().count(), 0);
}
