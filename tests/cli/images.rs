//! `stanchion inspect`, of images and of what is none.

use std::fs;

use crate::project::{Project, can_build, take_turn};

#[test]
fn what_is_no_image_is_told_from_one() {
    let project = Project::new(&[("text", "not an image\n"), ("empty", "")]);
    fs::write(project.root().join("zeros"), [0; 1 << 16]).unwrap();
    fs::write(project.root().join("short.qcow2"), b"QFI\xfb\0\0").unwrap();
    for (file, why) in [
        ("text", "why: reading the partition table"),
        ("empty", "why: reading the partition table: the disk is empty"),
        ("zeros", "why: reading the partition table: no GUID partition table"),
        ("nowhere.raw", "why: No such file"),
        (".", "why: Is a directory"),
    ] {
        let ran = project.run(&["inspect", file]);
        ran.expect(
            2,
            &["error: this is no image that can be read", &format!("at: {file}"), why, "help: "],
        );
        assert_eq!(ran.stdout, "");
        let ran = project.run(&["inspect", file, "--json"]);
        assert_eq!(ran.events().last().unwrap()["event"], "error");
    }
    let ran = project.run(&["inspect", "short.qcow2"]);
    ran.expect(2, &["the tools that unpack this image are not known here", "--project DIR"]);
}

#[test]
fn a_qcow2_image_shows_the_same_as_the_raw_one() {
    let _turn = take_turn();
    if !can_build() {
        return;
    }
    let project = Project::tiny("");
    project.copy_store();
    project.run(&["build", "tiny", "--offline"]).expect(0, &[]);
    let show = |file: &str| {
        let ran = project.run(&["inspect", file, "--json"]);
        ran.expect(0, &[]);
        ran.events().remove(0)
    };
    let (raw, mut qcow2) = (show("out/tiny.raw"), show("out/tiny.qcow2"));
    assert_eq!((&raw["format"], &qcow2["format"]), (&"raw".into(), &"qcow2".into()));
    assert_eq!(raw["slots"].as_array().unwrap().len(), 1);
    qcow2["format"] = "raw".into();
    assert_eq!(raw, qcow2);
    let ran = project.run(&["inspect", "out/tiny.qcow2"]);
    ran.expect(0, &[]);
    assert!(ran.stdout.contains("roothash="), "{}", ran.stdout);
    assert_eq!(fs::read_dir(project.store().join("tmp")).unwrap().count(), 0);

    // Cut short, and with a byte of the hashes' top changed.
    let raw =
        fs::File::options().write(true).read(true).open(project.out().join("tiny.raw")).unwrap();
    let whole = raw.metadata().unwrap().len();
    raw.set_len(whole / 4).unwrap();
    project
        .run(&["inspect", "out/tiny.raw"])
        .expect(2, &["no image that can be read", "does not lie on the disk"]);
    let qcow2 = fs::File::options().write(true).open(project.out().join("tiny.qcow2")).unwrap();
    qcow2.set_len(1 << 19).unwrap();
    project
        .run(&["inspect", "out/tiny.qcow2"])
        .expect(2, &["no image that can be read", "qemu-img"]);
    assert_eq!(fs::read_dir(project.store().join("tmp")).unwrap().count(), 0);
    project.run(&["build", "tiny", "--offline"]).expect(0, &["out/tiny.raw"]);

    let raw =
        fs::File::options().write(true).read(true).open(project.out().join("tiny.raw")).unwrap();
    let partitions = project.run(&["inspect", "out/tiny.raw", "--json"]).events().remove(0);
    let hashes = partitions["partitions"][2]["start"].as_u64().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&raw, b"x", hashes + 4096 + 7).unwrap();
    let ran = project.run(&["inspect", "out/tiny.raw"]);
    ran.expect(2, &["the image has ", "boots a root that is not here"]);
    assert!(ran.stdout.contains("problem: "), "{}", ran.stdout);
}

#[test]
fn a_qcow2_image_needs_a_project_with_a_lock() {
    let project = Project::new(&[]);
    fs::write(project.root().join("some.qcow2"), b"QFI\xfb\0\0\0\x03").unwrap();
    project.run(&["inspect", "some.qcow2"]).expect(
        2,
        &[
            "the tools that unpack this image are not known here",
            "stanchion.lock holds no tools",
            "give the raw image",
        ],
    );
}
