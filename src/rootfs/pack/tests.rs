use std::collections::BTreeSet;
use std::fs as sys;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use proptest::prelude::*;
use rustix::fs::{CWD, XattrFlags};

use super::*;
use crate::debian::archive::{Kind, read_entries};
use crate::rootfs::extract::tests::describe_tree;

const EPOCH: u64 = 1_700_000_000;

/// Root outside of any user namespace, who may make device nodes.
fn is_root() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let null = rustix::fs::makedev(1, 3);
    let path = dir.path().join("null");
    rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), null).is_ok()
}

fn pack(upper: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    pack_layer(upper, EPOCH, |_| Choice::Keep, &mut bytes).unwrap();
    bytes
}

/// `path kind mode mtime` of each entry, in order.
fn list(tar: &[u8]) -> Vec<String> {
    let mut lines = Vec::new();
    for entry in tar::Archive::new(tar).entries().unwrap() {
        let entry = entry.unwrap();
        let header = entry.header();
        lines.push(format!(
            "{} {:?} {:o} {} {}",
            String::from_utf8_lossy(&entry.path_bytes()),
            header.entry_type(),
            header.mode().unwrap(),
            header.mtime().unwrap(),
            entry
                .link_name_bytes()
                .map_or("".into(), |name| String::from_utf8_lossy(&name).into_owned()),
        ));
    }
    lines
}

fn set_time(path: &Path, mtime: i64) {
    let time = rustix::fs::Timespec { tv_sec: mtime, tv_nsec: 5 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn make_whiteout(path: &Path) {
    rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::setxattr(path, name, value, XattrFlags::empty()).unwrap();
}

#[test]
fn order_times_links_and_sockets_are_normalised() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["b/z", "a", "a-b", "b.c"] {
        sys::create_dir_all(at(name)).unwrap();
    }
    for (name, mtime) in [("b/z/file", 5), ("a/new", EPOCH as i64 + 9), ("a-b/x", -3)] {
        sys::write(at(name), name).unwrap();
        sys::set_permissions(at(name), sys::Permissions::from_mode(0o4750)).unwrap();
        set_time(&at(name), mtime);
    }
    sys::hard_link(at("b/z/file"), at("a/again")).unwrap();
    symlink("../nowhere", at("a/link")).unwrap();
    sys::set_permissions(dir.path(), sys::Permissions::from_mode(0o711)).unwrap();
    let _socket = UnixListener::bind(at("socket")).unwrap();
    set_time(&at("a/link"), 7);
    for name in ["a", "a-b", "b", "b/z", "b.c", ""] {
        set_time(&at(name), 11);
    }
    let mut tar = Vec::new();
    let statistics = pack_layer(dir.path(), EPOCH, |_| Choice::Keep, &mut tar).unwrap();
    assert_eq!(
        list(&tar),
        [
            "./ Directory 711 11 ",
            "a/ Directory 755 11 ",
            "a-b/ Directory 755 11 ",
            "a-b/x Regular 4750 0 ",
            "a/again Regular 4750 5 ",
            "a/link Symlink 777 7 ../nowhere",
            "a/new Regular 4750 1700000000 ",
            "b/ Directory 755 11 ",
            "b.c/ Directory 755 11 ",
            "b/z/ Directory 755 11 ",
            "b/z/file Link 4750 5 a/again",
        ]
    );
    assert_eq!(
        statistics,
        Statistics { entries: 11, files: 3, bytes: 18, whiteouts: 0, sockets: 1 }
    );
    assert_eq!(tar.len() % 512, 0);
    assert_eq!(tar, pack(dir.path()));
}

#[test]
fn what_is_dropped_takes_all_beneath_it_along() {
    let dir = tempfile::tempdir().unwrap();
    sys::create_dir_all(dir.path().join("run/deep")).unwrap();
    sys::write(dir.path().join("run/deep/x"), "x").unwrap();
    sys::write(dir.path().join("keep"), "x").unwrap();
    let mut tar = Vec::new();
    let choose = |path: &Path| if path == Path::new("run") { Choice::Drop } else { Choice::Keep };
    pack_layer(dir.path(), EPOCH, choose, &mut tar).unwrap();
    let names: Vec<_> =
        list(&tar).iter().map(|line| line.split(' ').next().unwrap().to_string()).collect();
    assert_eq!(names, ["./", "keep"]);
}

#[test]
fn long_names_and_large_ids_get_a_pax_header_and_short_ones_none() {
    let dir = tempfile::tempdir().unwrap();
    let long = ["x".repeat(99), "y".repeat(99), "z".repeat(99)].join("/");
    sys::create_dir_all(dir.path().join(&long)).unwrap();
    let split = format!("{}/{}", "p".repeat(120), "n".repeat(90));
    sys::create_dir_all(dir.path().join("p".repeat(120))).unwrap();
    sys::write(dir.path().join(&split), "").unwrap();
    symlink("t".repeat(300), dir.path().join("link")).unwrap();
    sys::write(dir.path().join("owned"), "x").unwrap();
    if is_root() {
        std::os::unix::fs::chown(dir.path().join("owned"), Some(3_000_000), Some(70_000)).unwrap();
    }
    let tar = pack(dir.path());
    let mut entries = Vec::new();
    read_entries(tar::Archive::new(&tar[..]), |entry, _| {
        entries.push(entry.clone());
        Ok(())
    })
    .unwrap();
    let find = |path: &str| entries.iter().find(|entry| entry.path == path.as_bytes()).unwrap();
    assert_eq!(find(&long).kind, Kind::Directory);
    assert_eq!(find(&split).kind, Kind::File);
    assert_eq!(find("link").kind, Kind::Symlink("t".repeat(300).into_bytes()));
    if is_root() {
        assert_eq!((find("owned").uid, find("owned").gid), (3_000_000, 70_000));
    }
    let raw: Vec<_> = tar::Archive::new(&tar[..])
        .entries()
        .unwrap()
        .raw(true)
        .map(|entry| entry.unwrap().header().entry_type())
        .collect();
    let pax = raw.iter().filter(|kind| kind.is_pax_local_extensions()).count();
    // The long folder with and without its last part; the link; the owner.
    assert_eq!(pax, if is_root() { 4 } else { 3 }, "{raw:?}");
}

#[test]
fn whiteouts_opaque_folders_and_attributes_become_what_oci_says() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    sys::create_dir(at("opaque")).unwrap();
    sys::create_dir(at("impure")).unwrap();
    sys::write(at("opaque/new"), "x").unwrap();
    sys::write(at("nested"), "").unwrap();
    set_xattr(&at("opaque"), "user.overlay.opaque", b"y");
    set_xattr(&at("impure"), "user.overlay.impure", b"y");
    set_xattr(&at("nested"), "user.overlay.whiteout", b"");
    set_xattr(&at("opaque/new"), "user.note", b"a=b\nc");
    let mut removed = vec![".wh.nested"];
    if is_root() {
        make_whiteout(&at("gone"));
        make_whiteout(&at("opaque/gone"));
        sys::create_dir(at("trusted")).unwrap();
        set_xattr(&at("trusted"), "trusted.overlay.opaque", b"y");
        removed.extend([".wh.gone", "opaque/.wh.gone", "trusted/.wh..wh..opq"]);
    } else {
        println!("skipped in part: making whiteouts needs root");
    }
    removed.push("opaque/.wh..wh..opq");
    let tar = pack(dir.path());
    let mut found = BTreeSet::new();
    read_entries(tar::Archive::new(&tar[..]), |entry, _| {
        let path = String::from_utf8(entry.path.clone())?;
        if path.contains(".wh.") {
            assert_eq!((entry.size, &entry.kind), (0, &Kind::File));
            found.insert(path);
        } else if path == "opaque/new" {
            assert_eq!(entry.xattrs, [(b"user.note".to_vec(), b"a=b\nc".to_vec())]);
        } else {
            assert_eq!(entry.xattrs, [], "{path}");
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(found, removed.into_iter().map(String::from).collect());
}

#[test]
fn what_a_layer_cannot_hold_is_refused_by_its_path() {
    let refuse = |make: &dyn Fn(&Path), why: &str| {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path());
        let error = pack_layer(dir.path(), EPOCH, |_| Choice::Keep, &mut Vec::new()).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains(why), "{text}");
    };
    refuse(&|dir| sys::write(dir.join(".wh.x"), "").unwrap(), ".wh.x: a name");
    refuse(
        &|dir| {
            rustix::fs::mknodat(CWD, dir.join("pipe"), FileType::Fifo, Mode::empty(), 0).unwrap();
        },
        "/pipe",
    );
    refuse(&|dir| set_xattr(dir, "user.overlay.redirect", b"/x"), "redirect_dir");
    if is_root() {
        refuse(
            &|dir| {
                let null = rustix::fs::makedev(1, 3);
                rustix::fs::mknodat(
                    CWD,
                    dir.join("null"),
                    FileType::CharacterDevice,
                    Mode::empty(),
                    null,
                )
                .unwrap();
            },
            "device node",
        );
    }
}

/// What goes into a generated tree.
#[derive(Debug, Clone)]
enum Node {
    File(Vec<u8>, u32),
    Folder(u32),
    Link(String),
    HardLink(prop::sample::Index),
}

fn any_node() -> impl Strategy<Value = (String, Node)> {
    let node = prop_oneof![
        (prop::collection::vec(any::<u8>(), 0..1500), 0u32..0o10000)
            .prop_map(|(c, m)| Node::File(c, m | 0o400)),
        (0u32..0o10000).prop_map(|mode| Node::Folder(mode | 0o700)),
        "[a-z./]{1,150}".prop_map(Node::Link),
        any::<prop::sample::Index>().prop_map(Node::HardLink),
    ];
    ("([a-cé -]{1,40}/){0,4}[a-cé.-]{2,120}", node)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_packed_tree_reads_back_the_same(nodes in prop::collection::vec(any_node(), 0..20)) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        sys::create_dir(&root).unwrap();
        let mut files: Vec<PathBuf> = Vec::new();
        let mut modes = Vec::new();
        for (name, node) in &nodes {
            let path = root.join(name);
            if name.contains("..") || sys::create_dir_all(path.parent().unwrap()).is_err() || path.symlink_metadata().is_ok() {
                continue;
            }
            match node {
                Node::File(content, mode) => {
                    sys::write(&path, content).unwrap();
                    modes.push((path.clone(), *mode));
                    files.push(path);
                }
                Node::Folder(mode) => {
                    sys::create_dir(&path).unwrap();
                    modes.push((path, *mode));
                }
                Node::Link(target) => symlink(target, &path).unwrap(),
                Node::HardLink(_) if files.is_empty() => {}
                Node::HardLink(which) => sys::hard_link(which.get(&files), &path).unwrap(),
            }
        }
        for (path, mode) in modes {
            sys::set_permissions(path, sys::Permissions::from_mode(mode)).unwrap();
        }
        let mut tar = Vec::new();
        pack_layer(&root, u64::MAX, |_| Choice::Keep, &mut tar).unwrap();
        let back = dir.path().join("back");
        sys::create_dir(&back).unwrap();
        let archive = crate::debian::package::open_tar(std::io::Cursor::new(tar.clone()), "x", u64::MAX).unwrap();
        crate::rootfs::extract::unpack_tar(archive, "x", &back, 0, crate::rootfs::extract::Purpose::Tools).unwrap();
        prop_assert_eq!(describe_tree(&root), describe_tree(&back));
        // The names as another reader sees them.
        let mut names = Vec::new();
        for entry in tar::Archive::new(&tar[..]).entries().unwrap() {
            names.push(entry.unwrap().path_bytes().strip_suffix(b"/").map_or_else(Vec::new, <[u8]>::to_vec));
        }
        prop_assert_eq!(names.len(), describe_tree(&root).len() + 1);
    }
}
