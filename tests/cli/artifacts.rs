//! Files in the place of artifacts: `--artifact NAME=FILE`.

use std::fs;

use stanchion::digest::Digest;
use stanchion::lock::Lock;

use crate::project::{Project, Ran, can_build, take_turn};

/// Lines of a layer with an artifact whose URL nobody serves.
fn declare(content: &[u8]) -> String {
    format!(
        "[[artifact]]\nname = \"data\"\nurl = \"http://127.0.0.1:9/data.tar.gz\"\nsha256 = \"{}\"\npath = \"/usr/share/data\"\n",
        Digest::of(content)
    )
}

fn read_lock(project: &Project) -> Lock {
    Lock::load(&project.root().join("stanchion.lock")).unwrap().unwrap()
}

/// The digests that the lock has for artifacts.
fn list_locked(project: &Project) -> Vec<Digest> {
    let lock = read_lock(project);
    let of_tiny = lock.artifacts.iter().filter(|one| one.layer == "extra");
    of_tiny.map(|one| one.sha256).collect()
}

#[test]
fn mistakes_in_what_is_given_are_told_before_anything_else() {
    let project = Project::tiny(&declare(b"declared"));
    project.write("data", "given");
    let check = |arguments: &[&str], parts: &[&str]| {
        for verb in [&["lock", "--offline"][..], &["build", "tiny", "--offline"]] {
            let ran: Ran = project.run(&[verb, arguments].concat());
            // Without namespaces, a build says that first.
            if verb[0] == "lock" || can_build() {
                ran.expect(2, parts);
            }
        }
    };
    check(
        &["--artifact", "daat=data"],
        &[
            "there is no artifact `daat`",
            "the artifacts of these profiles are: data",
            "did you mean `data`?",
        ],
    );
    check(
        &["--artifact", "data=nowhere"],
        &["the file for the artifact `data` cannot be read", "at: nowhere", "No such file"],
    );
    check(&["--artifact", "data=."], &["at: .", "it is not a file", "--artifact data=FILE"]);
    check(
        &["--artifact", "data=data", "--artifact", "data=data"],
        &["the artifact `data` is given twice"],
    );
    for wrong in ["data", "=data", "data="] {
        check(&["--artifact", wrong], &["write NAME=FILE, such as netbox=netbox-4.6.9.tar.gz"]);
    }
    let none = Project::tiny("");
    none.write("data", "given");
    none.run(&["lock", "--offline", "--artifact", "data=data"])
        .expect(2, &["there is no artifact `data`", "no layer of these profiles has an artifact"]);
}

#[test]
fn a_file_is_locked_until_the_layer_asks_for_another() {
    let project = Project::tiny(&declare(b"declared"));
    project.run(&["lock", "--offline"]).expect(0, &["artifact data "]);
    assert_eq!(list_locked(&project), [Digest::of(b"declared")]);

    project.write("data", "given");
    project.run(&["lock", "--offline", "--artifact", "data=data"]).expect(0, &["artifact data "]);
    assert_eq!(list_locked(&project), [Digest::of(b"given")]);
    project.run(&["lock", "--offline"]).expect(0, &["the lock holds what the profiles ask for"]);
    assert_eq!(list_locked(&project), [Digest::of(b"given")]);

    project.write_extra(&declare(b"newer"));
    project.run(&["lock", "--offline"]).expect(0, &[]);
    assert_eq!(list_locked(&project), [Digest::of(b"newer")]);
    project.write_extra("");
    project.run(&["lock", "--offline"]).expect(0, &[]);
    assert_eq!(list_locked(&project), []);
    // Nothing of the other profiles' is left, either.
    assert!(read_lock(&project).pythons.is_empty());
}

#[test]
fn a_build_takes_the_file_that_the_lock_names_and_no_other() {
    let _turn = take_turn();
    if !can_build() {
        return;
    }
    let project = Project::tiny(&declare(b"declared"));
    project.copy_store();
    for (name, text) in [("right", "declared"), ("wrong", "given")] {
        project.write(name, text);
    }
    let build = |more: &[&str]| {
        project.run(&[&["build", "tiny", "--format", "raw", "--offline"], more].concat())
    };
    build(&["--locked"]).expect(
        2,
        &["the lock does not hold what the profiles ask for", "these changed: artifact data"],
    );
    build(&[]).expect(
        2,
        &[
            "the artifact `data` of layer `",
            "`--offline` forbids downloads",
            "--artifact data=FILE",
        ],
    );
    let wrong = build(&["--artifact", "data=wrong"]);
    wrong.expect(
        2,
        &[
            "this is not the file that the lock names for the artifact `data`",
            "at: wrong",
            &Digest::of(b"given").to_string(),
            &Digest::of(b"declared").to_string(),
            "stanchion lock --artifact data=wrong",
        ],
    );
    build(&["--artifact", "data=right"]).expect(0, &[]);
    let read_manifest = || {
        let text = fs::read(project.out().join("tiny.manifest.json")).unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&text).unwrap();
        manifest["artifacts"][0]["sha256"].as_str().unwrap().to_string()
    };
    assert_eq!(read_manifest(), Digest::of(b"declared").to_string());

    // Once locked, the other file is the right one, and the store has it.
    project.run(&["lock", "--offline", "--artifact", "data=wrong"]).expect(0, &[]);
    build(&["--locked"]).expect(0, &[]);
    assert_eq!(read_manifest(), Digest::of(b"given").to_string());
    fs::remove_file(project.store().join("files").join(Digest::of(b"given").to_string())).unwrap();
    build(&["--locked"]).expect(
        2,
        &[
            "the store lacks the artifact `data`",
            "it was locked from a file",
            "--artifact data=FILE",
        ],
    );
}

#[test]
fn a_url_that_nobody_serves_names_the_way_out() {
    let _turn = take_turn();
    if !can_build() {
        return;
    }
    let project = Project::tiny(&declare(b"declared"));
    project.copy_store();
    project
        .run(&["build", "tiny"])
        .expect(2, &["the artifact `data` of layer `", "127.0.0.1:9", "--artifact data=FILE"]);
}
