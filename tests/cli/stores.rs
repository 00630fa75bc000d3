//! Stores that were emptied, damaged or shared.

use std::fs;

use stanchion::store::remove_tree;

use crate::hostile::{Package, make_deb, project_of};
use crate::project::{Project, can_build, list_files, run, take_turn};
use crate::server::{Server, write_good};

fn manifest(project: &Project) -> serde_json::Value {
    serde_json::from_slice(&fs::read(project.out().join("tiny.manifest.json")).unwrap()).unwrap()
}

/// Remove this part of every entry of a step.
fn damage(project: &Project, step: &str, part: &str) {
    for entry in fs::read_dir(project.store().join("steps").join(step)).unwrap() {
        remove_tree(&entry.unwrap().path().join(part)).unwrap();
    }
}

#[test]
fn parts_that_are_missing_in_the_store_are_made_anew() {
    let _turn = take_turn();
    if !can_build() {
        return;
    }
    let project = Project::tiny("commands = [\"echo extra > /etc/extra\"]");
    project.copy_store();
    let build = || project.run(&["build", "tiny", "--offline"]);
    build().expect(0, &[]);
    let before = list_files(&project.out());
    let layers = manifest(&project)["layers"].clone();
    let key = layers.as_array().unwrap().last().unwrap()["key"].as_str().unwrap().to_string();
    let extra = project.store().join("steps/layer").join(key);
    for part in ["tree", "blob.erofs", "leaves", "facts.json"] {
        remove_tree(&extra.join(part)).unwrap();
        let ran = build();
        ran.expect(0, &["extra files", "nothing had changed"]);
        assert!(
            !ran.stderr.contains("extra files                                     cached"),
            "{part}"
        );
    }
    // Cut short, as after a crash of the machine. Not in place: the bytes are shared.
    for (part, bytes) in [("blob.erofs", 4096), ("leaves", 7), ("facts.json", 10)] {
        let path = extra.join(part);
        let whole = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, &whole[..bytes]).unwrap();
        build().expect(0, &["extra files", "nothing had changed"]);
        assert_eq!(fs::read(&path).unwrap().len(), whole.len(), "{part}");
    }
    damage(&project, "initrd", "initrd.cpio.zst");
    damage(&project, "tools", "usr");
    build().expect(0, &["tools:build", "initrd", "nothing had changed"]);
    // Another build from the same parts gives the same bytes.
    fs::remove_dir_all(project.out()).unwrap();
    build().expect(0, &[]);
    let after = list_files(&project.out());
    for name in ["tiny.raw", "tiny.qcow2"] {
        assert_eq!(before[name], after[name], "{name}");
    }
    assert_eq!(fs::read_dir(project.store().join("tmp")).unwrap().count(), 0);
}

#[test]
fn a_download_of_a_wrong_size_is_fetched_again() {
    let package = Package::new("hello", make_deb(&[("./usr/share/hello", "hello")]));
    let project = project_of(&[&package]);
    let files = project.store().join("files");
    fs::create_dir_all(&files).unwrap();
    let stored = files.join(package.digest().to_string());
    for length in [0, 100] {
        fs::write(&stored, &package.bytes[..length]).unwrap();
        let ran = project.run(&["build", "tiny", "--offline"]);
        ran.expect(2, &["the store lacks 1 file", "hello 1.0"]);
    }
    fs::write(&stored, "short").unwrap();
    let bytes = package.bytes.clone();
    let server = Server::start(move |request, to| write_good(to, request, &bytes));
    project.run(&["build", "tiny", "--mirror", &server.url("debian")]).expect_not("fetching hello");
    assert_eq!(fs::read(&stored).unwrap(), package.bytes);
}

#[test]
fn an_emptied_store_serves_two_builds_at_once_and_both_give_the_same_bytes() {
    let _turn = take_turn();
    if !can_build() {
        return;
    }
    let project = Project::tiny("");
    project.copy_store();
    project.run(&["build", "tiny", "--offline", "--out", "first"]).expect(0, &[]);
    project.run(&["store", "gc", "--keep", "0"]).expect(0, &["removed "]);
    assert_eq!(fs::read_dir(project.store().join("files")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(project.store().join("steps/layer")).unwrap().count(), 0);
    let ran = project.run(&["build", "tiny", "--offline"]);
    ran.expect(2, &["the store lacks", "run once without `--offline`"]);

    project.link_downloads();
    let start = |out: &'static str| {
        let command = project.command(&["build", "tiny", "--offline", "--out", out]);
        std::thread::spawn(move || run(command))
    };
    let builds = ["second", "third"].map(start);
    // What a live command uses is not collected.
    std::thread::sleep(std::time::Duration::from_secs(1));
    let ran = project.run(&["store", "gc", "--keep", "0"]);
    ran.expect(2, &["the store is in use by another command", "run this again when it has ended"]);
    for build in builds {
        build.join().unwrap().expect(0, &[]);
    }
    let [first, second, third] =
        ["first", "second", "third"].map(|out| list_files(&project.root().join(out)));
    for name in ["tiny.raw", "tiny.qcow2"] {
        assert_eq!(first[name], second[name], "{name}");
        assert_eq!(first[name], third[name], "{name}");
    }
    assert_eq!(second.len(), 3);
    assert_eq!(fs::read_dir(project.store().join("tmp")).unwrap().count(), 0);
}

#[test]
fn a_store_that_cannot_be_made_is_told_with_its_place() {
    let project = Project::tiny("");
    let mut command = project.command(&["build", "tiny", "--offline"]);
    command.env("XDG_CACHE_HOME", "/proc/self/nowhere");
    run(command).expect(
        2,
        &[
            "error: the store cannot be written to",
            "at: /proc/self/nowhere/stanchion",
            "No such file or directory",
            "set XDG_CACHE_HOME",
        ],
    );
}
