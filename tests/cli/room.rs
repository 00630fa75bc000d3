//! Disks that are full, or become so; folders that cannot be written to.

use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use crate::project::{
    Project, can_build, can_mount, in_mount_namespace, list_files, mount_small, take_turn,
};

#[test]
fn too_little_room_is_told_before_anything_is_fetched() {
    if !can_mount() {
        return;
    }
    in_mount_namespace(|| {
        let project = Project::tiny("");
        let _mounted = mount_small(&project.cache(), 64, false);
        let ran = project.run(&["build", "tiny", "--offline"]);
        ran.expect(
            2,
            &[
                "the disk will be full before the build ends: the store need 3.50 GB, ",
                " MB are free",
                "stanchion store gc",
                "XDG_CACHE_HOME",
            ],
        );
        assert!(ran.took < Duration::from_secs(3), "{:?}", ran.took);

        let project = Project::tiny("");
        let _mounted = mount_small(&project.out(), 64, false);
        let ran = project.run(&["build", "tiny", "--offline"]);
        ran.expect(2, &["the images need 1.30 GB, 67.1 MB are free", "--out to a larger disk"]);
        assert!(ran.took < Duration::from_secs(3), "{:?}", ran.took);
    });
}

#[test]
fn an_output_folder_that_cannot_be_written_to_is_told_at_once() {
    let project = Project::tiny("");
    project.write("file", "");
    for out in ["file", "file/below"] {
        project.run(&["build", "tiny", "--offline", "--out", out]).expect(
            2,
            &[
                "the output folder cannot be written to",
                &format!("at: {out}"),
                "name another with --out",
            ],
        );
    }
    if !can_mount() {
        return;
    }
    in_mount_namespace(|| {
        let _mounted = mount_small(&project.out(), 1, true);
        let ran = project.run(&["build", "tiny", "--offline"]);
        ran.expect(2, &["the output folder cannot be written to", "Read-only file system"]);
        let _mounted = mount_small(&project.cache(), 1, true);
        let ran = project.run(&["build", "tiny", "--offline", "--out", "elsewhere"]);
        ran.expect(2, &["Read-only file system"]);
    });
}

#[test]
fn a_store_that_becomes_full_ends_the_build_with_advice() {
    let _turn = take_turn();
    if !can_mount() || !can_build() {
        return;
    }
    in_mount_namespace(|| {
        let project = Project::tiny("");
        let _mounted = mount_small(&project.cache(), 1024, false);
        project.link_downloads();
        // A store that has been built with is believed to need little more.
        fs::create_dir_all(project.store().join("steps/initrd")).unwrap();
        fs::create_dir_all(project.out()).unwrap();
        fs::write(project.out().join("tiny.raw"), "the old image").unwrap();
        let before = list_files(&project.out());
        let build = project.command(&["build", "tiny", "--offline"]).spawn().unwrap();
        // The room is measured before the tools are unpacked.
        wait_until(|| project.store().join("steps/tools").exists());
        let free = stanchion::store::measure_room(&project.cache()).unwrap();
        resize(&project.cache(), 1024 - (free >> 20) + 40);
        check_full(build, &project.store().to_string_lossy());
        assert_eq!(list_files(&project.out()), before);
        assert_eq!(fs::read_dir(project.store().join("tmp")).unwrap().count(), 0);
    });
}

#[test]
fn an_output_folder_that_becomes_full_keeps_the_old_images() {
    let _turn = take_turn();
    if !can_mount() || !can_build() {
        return;
    }
    in_mount_namespace(|| {
        let project = Project::tiny("");
        project.copy_store();
        let _mounted = mount_small(&project.out(), 2048, false);
        project.run(&["build", "tiny", "--offline"]).expect(0, &[]);
        let before = list_files(&project.out());
        assert_eq!(before.len(), 3);
        // In the raw image, and in the one made from it.
        for room in [50, 250] {
            project.write_extra("commands = [\"sleep 1\"]");
            project.write("layers/extra/tree/etc/room", &room.to_string());
            let build = project.command(&["build", "tiny", "--offline"]).spawn().unwrap();
            // The room was measured when it comes to the layer, in which it sleeps.
            wait_until(|| fs::read_dir(project.store().join("tmp")).unwrap().count() > 0);
            let free = stanchion::store::measure_room(&project.out()).unwrap();
            resize(&project.out(), 2048 - (free >> 20) + room);
            check_full(build, "out");
            assert_eq!(list_files(&project.out()), before);
            resize(&project.out(), 2048);
        }
        project.run(&["build", "tiny", "--offline"]).expect(0, &["out/tiny.raw"]);
        assert_eq!(list_files(&project.out()).len(), 3);
    });
}

fn wait_until(is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(60), "the build never came so far");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Change how many MiB a file system in memory may hold.
fn resize(at: &Path, mebibytes: u64) {
    let options = std::ffi::CString::new(format!("size={mebibytes}m")).unwrap();
    rustix::mount::mount_remount(at, rustix::mount::MountFlags::empty(), options.as_c_str())
        .unwrap();
}

#[track_caller]
fn check_full(build: Child, place: &str) {
    let output = build.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    for part in ["the disk became full during the build", place, "No space left", "make room there"]
    {
        assert!(stderr.contains(part), "no `{part}` in:\n{stderr}");
    }
}
