//! `stanchion inspect` and `stanchion diff`, of images and of what is none.

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

#[test]
fn two_images_differ_in_what_was_changed_between_them() {
    let _turn = take_turn();
    if !can_build() {
        return;
    }
    let project = Project::tiny("");
    project.copy_store();
    project.write("layers/extra/tree/usr/share/extra/kept", "same");
    project.write("layers/extra/tree/usr/share/extra/gone", "12345");
    project.write("layers/extra/tree/usr/share/extra/text", "before");
    project.run(&["build", "tiny", "--offline", "--out", "old"]).expect(0, &[]);
    fs::remove_file(project.root().join("layers/extra/tree/usr/share/extra/gone")).unwrap();
    project.write("layers/extra/tree/usr/share/extra/text", "after!");
    project.write("layers/extra/tree/usr/share/extra/new/file", "1234567");
    project.write_extra("[owners]\n\"/usr/share/extra/kept\" = { mode = \"0600\" }");
    project.run(&["build", "tiny", "--offline", "--out", "new"]).expect(0, &[]);

    let ran = project.run(&["diff", "old/tiny.raw", "new/tiny.qcow2", "--json"]);
    ran.expect(0, &[]);
    let found = ran.events().pop().unwrap();
    assert_eq!(found["packages"], serde_json::json!([]));
    let change = |path: &str, old: Option<u64>, new: Option<u64>, what: &[&str]| {
        let path = format!("/usr/share/{path}");
        serde_json::json!({ "path": path, "old": old, "new": new, "what": what })
    };
    let files = found["files"].as_array().unwrap();
    let files: Vec<_> = files.iter().filter(|file| file.to_string().contains("extra/")).collect();
    assert_eq!(
        files,
        [
            &change("extra/gone", Some(5), None, &[]),
            &change("extra/kept", Some(4), Some(4), &["mode"]),
            &change("extra/new", None, Some(0), &[]),
            &change("extra/new/file", None, Some(7), &[]),
            &change("extra/text", Some(6), Some(6), &["content"]),
        ]
    );
    let ran = project.run(&["diff", "old/tiny.raw", "new/tiny.raw"]);
    ran.expect(0, &[]);
    for line in ["- /usr/share/extra/gone  5 B", "~ /usr/share/extra/kept  4 B  mode"] {
        assert!(ran.stdout.contains(line), "{}", ran.stdout);
    }
    let ran = project.run(&["diff", "new/tiny.raw", "new/tiny.raw"]);
    assert!(ran.expect(0, &[]).stdout.contains("the roots are the same"), "{}", ran.stdout);
    project.run(&["diff", "new/tiny.raw", "stanchion.lock"]).expect(2, &["at: stanchion.lock"]);
    assert_eq!(fs::read_dir(project.store().join("tmp")).unwrap().count(), 0);
}
