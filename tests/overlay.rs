//! Layers packed from an overlay's upper sides merge into what the overlay showed.

#[path = "support/tools.rs"]
mod tools;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use rustix::fs::{CWD, FileType, Mode, XattrFlags};
use stanchion::command::Command;
use stanchion::digest::Digest;
use stanchion::disk::erofs::{make_blob, make_index};
use stanchion::disk::guid::Guid;
use stanchion::disk::region::Region;
use stanchion::rootfs::pack::{Choice, pack_layer};
use tools::find_tools;

const EPOCH: u64 = 1_700_000_000;
const UUID: Guid = Guid::from_number(0x01234567_89ab_cdef_8123_456789abcdef);
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Root outside of any user namespace, who may make device nodes.
fn is_root(folder: &Path) -> bool {
    let null = rustix::fs::makedev(1, 3);
    let path = folder.join("null");
    rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), null).is_ok()
}

/// Runs a script as root in a mount namespace of its own.
fn run_mounted(script: &str, folder: &Path) {
    Command::new("unshare")
        .args(["--mount", "sh", "-euc", script])
        .directory(folder)
        .run()
        .unwrap();
}

/// Each path below `root` with all that a layer keeps of it.
fn describe(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let content = match metadata.file_type() {
                kind if kind.is_dir() => {
                    folders.push(path.clone());
                    String::new()
                }
                kind if kind.is_symlink() => fs::read_link(&path).unwrap().display().to_string(),
                _ => Digest::of_file(&path).unwrap().to_string(),
            };
            let links = if metadata.is_dir() { 0 } else { metadata.nlink() };
            let mut value = [0; 64];
            let found_capability =
                rustix::fs::lgetxattr(&path, "security.capability", &mut value[..]);
            let capability = &value[..found_capability.unwrap_or_default()];
            let shown = format!(
                "{:o} {}:{} {links} {} {capability:?} {content}",
                metadata.mode(),
                metadata.uid(),
                metadata.gid(),
                metadata.mtime().clamp(0, EPOCH as i64),
            );
            found.insert(path.strip_prefix(root).unwrap().display().to_string(), shown);
        }
    }
    found
}

#[test]
fn layers_merge_into_what_the_overlay_showed() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let at = |name: &str| folder.path().join(name);
    if !is_root(folder.path()) {
        eprintln!("skipped: only root can mount an overlay and make its nodes");
        return;
    }
    let Some(tools) = find_tools(&["mkfs.erofs"]) else { return };
    for name in [
        "lower/keep",
        "lower/opaque/sub",
        "lower/gone",
        "upper",
        "work",
        "again",
        "work2",
        "merged",
        "mnt",
        "shown",
        "image",
    ] {
        fs::create_dir_all(at(name)).unwrap();
    }
    let deep = format!("lower/{}", ["d".repeat(90), "e".repeat(90), "f".repeat(90)].join("/"));
    fs::create_dir_all(at(&deep)).unwrap();
    for name in [
        "keep/a",
        "keep/b",
        "opaque/old",
        "opaque/sub/old",
        "gone/x",
        "changed",
        "linked",
        "removed",
    ] {
        let path = at("lower").join(name);
        fs::write(&path, name).unwrap();
        let time = UNIX_EPOCH + Duration::from_secs(1_600_000_000);
        File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
    }
    fs::write(at(&deep).join("file"), vec![7; 100_000]).unwrap();
    fs::hard_link(at("lower/linked"), at("lower/keep/linked")).unwrap();
    chown(at("lower/keep/b"), Some(70_000), Some(3_000_000)).unwrap();
    rustix::fs::setxattr(
        at("lower/keep/a"),
        "security.capability",
        &CAPABILITY,
        XattrFlags::empty(),
    )
    .unwrap();
    run_mounted(
        "mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
        cd merged
        rm removed; rm -r gone; rm -r opaque; mkdir opaque; echo new > opaque/new
        echo more >> changed; chmod 4711 changed; ln changed changed-again
        ln -s ../keep/a keep/link; mkdir -m 1777 fresh; echo x > fresh/x
        mv keep/b keep/c",
        folder.path(),
    );
    assert!(fs::symlink_metadata(at("upper/removed")).unwrap().rdev() == 0);
    // A third layer: what the second removed comes back, and what it made goes.
    run_mounted(
        "mount -t overlay overlay -o lowerdir=upper:lower,upperdir=again,workdir=work2 merged
        cd merged
        mkdir gone; echo back > gone/y; echo back > removed; rm -r fresh",
        folder.path(),
    );
    let blobs: Vec<_> = ["lower", "upper", "again"]
        .map(|name| {
            let (tar, blob) = (at(&format!("{name}.tar")), at(&format!("{name}.erofs")));
            pack_layer(&at(name), EPOCH, |_| Choice::Keep, File::create(&tar).unwrap()).unwrap();
            make_blob(&tools, &tar, &blob, EPOCH, &UUID).unwrap();
            blob
        })
        .into();
    let index = at("index.erofs");
    let layout = make_index(&blobs, &index, EPOCH, &UUID).unwrap();
    let whole =
        File::options().read(true).write(true).create_new(true).open(at("whole.erofs")).unwrap();
    whole.set_len(layout.total).unwrap();
    let place = Region::whole(&whole).unwrap();
    place.write_file_at(0, &File::open(&index).unwrap(), layout.index_area).unwrap();
    for (blob, (offset, length)) in blobs.iter().zip(&layout.blobs) {
        place.write_file_at(*offset, &File::open(blob).unwrap(), *length).unwrap();
    }
    run_mounted(
        "mount -t overlay overlay -o lowerdir=again:upper:lower merged
        cp -a merged/. shown/
        if mount -t erofs -o loop,ro whole.erofs mnt; then cp -a mnt/. image/; else touch no-erofs; fi",
        folder.path(),
    );
    if at("no-erofs").exists() {
        eprintln!("skipped: this machine cannot mount erofs images");
        return;
    }
    let image = describe(&at("image"));
    assert_eq!(describe(&at("shown")), image);
    assert!(image.contains_key("opaque/new") && !image.contains_key("opaque/old"));
    assert!(image.contains_key("gone/y") && !image.contains_key("gone/x"));
    assert!(image["keep/a"].contains(&format!("{CAPABILITY:?}")), "{}", image["keep/a"]);
}
