//! Layers merged into one root, against the kernel, fsck and a plain model.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use stanchion::command::Command;
use stanchion::digest::Digest;
use stanchion::disk::erofs::{INDEX_AREA, Layout, make_blob, make_index};
use stanchion::disk::erofs_read::Erofs;
use stanchion::disk::guid::Guid;
use stanchion::disk::region::Region;
use stanchion::tools::Tools;

use super::tools::find_tools;
use super::{EPOCH, UUID, run};

/// One entry of a layer's tar.
struct Member<'a> {
    path: &'a str,
    kind: tar::EntryType,
    mode: u32,
    owner: (u64, u64),
    data: &'a [u8],
    link: &'a str,
    attributes: &'a [(&'a str, &'a [u8])],
}

const FILE: Member = Member {
    path: "",
    kind: tar::EntryType::Regular,
    mode: 0o644,
    owner: (0, 0),
    data: b"",
    link: "",
    attributes: &[],
};
const FOLDER: Member = Member { kind: tar::EntryType::Directory, mode: 0o755, ..FILE };

fn write_tar(path: &Path, members: &[Member]) {
    let mut builder = tar::Builder::new(File::create(path).unwrap());
    for member in members {
        let mut records: Vec<(String, &[u8])> = member
            .attributes
            .iter()
            .map(|(name, value)| (format!("SCHILY.xattr.{name}"), *value))
            .collect();
        records.push(("path".into(), member.path.as_bytes()));
        if !member.link.is_empty() {
            records.push(("linkpath".into(), member.link.as_bytes()));
        }
        let records = records.iter().map(|(name, value)| (name.as_str(), *value));
        builder.append_pax_extensions(records).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(member.kind);
        header.set_mode(member.mode);
        header.set_uid(member.owner.0);
        header.set_gid(member.owner.1);
        header.set_mtime(12345);
        header.set_size(member.data.len() as u64);
        header.set_path("x").unwrap();
        header.set_cksum();
        builder.append(&header, member.data).unwrap();
    }
    builder.finish().unwrap();
}

const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

pub struct Root {
    pub folder: tempfile::TempDir,
    pub blobs: Vec<PathBuf>,
    pub index: PathBuf,
    pub layout: Layout,
    pub big: Vec<u8>,
    pub long: String,
}

/// Three layers with everything that a layer can have.
pub fn make_root(tools: &Tools) -> Root {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let big: Vec<u8> = (0..9_000_011u32).map(|i| (i / 11) as u8).collect();
    let long = "n".repeat(255);
    let long_path = format!("./usr/{long}");
    let manifest = br#"{"image": "db", "packages": [{"name": "dpkg", "version": "1.22"}]}"#;
    let symlink = Member { kind: tar::EntryType::Symlink, mode: 0o777, ..FILE };
    let hard_link = Member { kind: tar::EntryType::Link, ..FILE };
    write_tar(
        &path("0.tar"),
        &[
            Member { path: "./", ..FOLDER },
            Member { path: "./usr", ..FOLDER },
            Member { path: "./usr/one", data: b"x", ..FILE },
            Member { path: "./usr/zero", ..FILE },
            Member { path: "./usr/big", data: &big, ..FILE },
            Member {
                path: "./usr/ping",
                data: b"ping",
                mode: 0o755,
                attributes: &[("security.capability", CAPABILITY), ("user.long", &[b'v'; 300])],
                ..FILE
            },
            Member { path: "./usr/su", data: b"su", mode: 0o4755, owner: (0, 70_000), ..FILE },
            Member { path: "./usr/hard", link: "./usr/su", ..hard_link },
            Member { path: "./usr/sym", link: "../usr/one", ..symlink },
            Member { path: &long_path, data: b"long", ..FILE },
            Member { path: "./opaque", mode: 0o700, ..FOLDER },
            Member { path: "./opaque/old", data: b"old", ..FILE },
            Member { path: "./gone", data: b"gone", ..FILE },
            Member { path: "./dropped", ..FOLDER },
            Member { path: "./dropped/inner", data: b"inner", ..FILE },
            Member { path: "./private", mode: 0o2750, owner: (100, 101), ..FOLDER },
        ],
    );
    write_tar(
        &path("1.tar"),
        &[
            Member { path: "./", ..FOLDER },
            Member { path: "./.wh.gone", ..FILE },
            Member { path: "./.wh.dropped", ..FILE },
            Member { path: "./opaque", mode: 0o750, owner: (0, 43), ..FOLDER },
            Member { path: "./opaque/.wh..wh..opq", ..FILE },
            Member { path: "./opaque/new", data: b"new", ..FILE },
            Member { path: "./usr", ..FOLDER },
            Member { path: "./usr/one", data: b"changed", ..FILE },
        ],
    );
    write_tar(
        &path("2.tar"),
        &[
            Member { path: "./", ..FOLDER },
            Member { path: "./dropped", ..FOLDER },
            Member { path: "./dropped/back", data: b"back", ..FILE },
            Member { path: "./usr", ..FOLDER },
            Member { path: "./usr/share", ..FOLDER },
            Member { path: "./usr/share/stanchion", ..FOLDER },
            Member { path: "./usr/share/stanchion/manifest.json", data: manifest, ..FILE },
        ],
    );
    let mut blobs = Vec::new();
    for i in 0..3 {
        let blob = path(&format!("{i}.erofs"));
        let uuid = Guid::derive(&Digest::of(&[i]), "blob");
        make_blob(tools, &path(&format!("{i}.tar")), &blob, EPOCH, &uuid).unwrap();
        blobs.push(blob);
    }
    let index = path("index");
    let layout = make_index(&blobs, &index, EPOCH, &UUID).unwrap();
    Root { blobs, index, layout, big, long, folder }
}

pub fn join_root(root: &Root) -> PathBuf {
    let path = root.folder.path().join("root");
    join_pieces(&path, &root.index, &root.blobs, &root.layout);
    path
}

/// The bytes of a root partition as a file.
fn join_pieces(path: &Path, index: &Path, blobs: &[PathBuf], layout: &Layout) -> File {
    let _ = fs::remove_file(path);
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(layout.total).unwrap();
    let place = Region::whole(&file).unwrap();
    place.write_file_at(0, &File::open(index).unwrap(), layout.index_area).unwrap();
    for (blob, (offset, length)) in blobs.iter().zip(&layout.blobs) {
        place.write_file_at(*offset, &File::open(blob).unwrap(), *length).unwrap();
    }
    file
}

#[test]
fn layers_merge_into_one_root_that_fsck_and_our_reader_accept() {
    let Some(tools) = find_tools(&["mkfs.erofs", "fsck.erofs"]) else { return };
    let root = make_root(&tools);
    assert_eq!(root.layout.index_area, INDEX_AREA);
    let path = join_root(&root);
    run(&tools, "fsck.erofs", &[path.to_str().unwrap()]);

    let file = File::open(&path).unwrap();
    let erofs = Erofs::open(Region::whole(&file).unwrap()).unwrap();
    assert_eq!(erofs.root().unwrap().mode, 0o040_755);
    let read = |path: &str| {
        let inode = erofs.find(path).unwrap()?;
        Some(erofs.read(&inode, 1 << 30).unwrap())
    };
    assert_eq!(read("/usr/one").unwrap(), b"changed");
    assert_eq!(read("usr/zero").unwrap(), b"");
    assert_eq!(read("usr/su").unwrap(), b"su");
    assert_eq!(read("usr/hard").unwrap(), b"su");
    assert!(read("usr/big").unwrap() == root.big);
    assert_eq!(read(&format!("usr/{}", root.long)).unwrap(), b"long");
    assert_eq!(read("opaque/new").unwrap(), b"new");
    assert_eq!(read("dropped/back").unwrap(), b"back");
    for gone in ["gone", "opaque/old", "dropped/inner", ".wh.gone", "usr/one/x", "nothing"] {
        assert!(read(gone).is_none(), "{gone}");
    }
    let small = erofs.find("usr/big").unwrap().unwrap();
    assert!(erofs.read(&small, 1000).is_err());
}

#[test]
fn the_same_tars_give_the_same_root() {
    let Some(tools) = find_tools(&["mkfs.erofs"]) else { return };
    let [a, b] = [(), ()].map(|()| Digest::of_file(&join_root(&make_root(&tools))).unwrap());
    assert_eq!(a, b);
}

/// A loop device with a mounted root; taken down when dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).run();
    }
}

#[test]
fn the_kernel_mounts_the_root_with_owners_modes_links_and_capabilities() {
    let Some(tools) = find_tools(&["mkfs.erofs"]) else { return };
    let root = make_root(&tools);
    let path = join_root(&root);
    let at = root.folder.path().join("mnt");
    fs::create_dir(&at).unwrap();
    let mount = Command::new("mount").args(["-t", "erofs", "-o", "ro,loop"]).arg(&path).arg(&at);
    if let Err(error) = mount.run() {
        println!("skipped: this machine does not mount erofs: {error}");
        return;
    }
    let mounted = Mounted(at.clone());
    let look = |path: &str| {
        let metadata = fs::symlink_metadata(at.join(path)).unwrap();
        (metadata.mode(), metadata.uid(), metadata.gid(), metadata.nlink())
    };
    assert_eq!((look("").0, look("").1, look("").2), (0o040_755, 0, 0));
    assert_eq!(look("usr/su"), (0o104_755, 0, 70_000, 2));
    assert_eq!(
        fs::metadata(at.join("usr/su")).unwrap().ino(),
        fs::metadata(at.join("usr/hard")).unwrap().ino()
    );
    assert_eq!(look("private"), (0o042_750, 100, 101, 2));
    assert_eq!(look("opaque"), (0o040_750, 0, 43, 2));
    assert_eq!(fs::read_link(at.join("usr/sym")).unwrap(), Path::new("../usr/one"));
    for path in ["usr/one", "usr/su", "private"] {
        assert_eq!(fs::metadata(at.join(path)).unwrap().mtime(), 12345, "{path}");
    }
    assert!(fs::read(at.join("usr/big")).unwrap() == root.big);
    assert_eq!(read_attribute(&at.join("usr/ping"), "security.capability"), CAPABILITY);
    assert_eq!(read_attribute(&at.join("usr/ping"), "user.long"), [b'v'; 300]);
    let mut listed: Vec<_> = fs::read_dir(&at)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    listed.sort();
    assert_eq!(listed, ["dropped", "opaque", "private", "usr"]);
    drop(mounted);
}

fn read_attribute(path: &Path, name: &str) -> Vec<u8> {
    let mut buffer = vec![0; 1024];
    let length = rustix::fs::lgetxattr(path, name, &mut buffer[..]).unwrap();
    buffer.truncate(length);
    buffer
}

/// What a layer can say about a path of the little tree in the test below.
#[derive(Debug, Clone, Copy)]
enum Change {
    File,
    Folder,
    EmptiedFolder,
    Removal,
}

/// Apply a layer to a tree (paths and files' content; `None` is a folder) by the rules of
/// the OCI image specification, "Representing Changes".
fn apply(tree: &mut BTreeMap<String, Option<u8>>, layer: u8, changes: &[(String, Change)]) {
    let remove_below = |tree: &mut BTreeMap<String, Option<u8>>, path: &str| {
        tree.retain(|known, _| !known.starts_with(&format!("{path}/")));
    };
    for (path, change) in changes {
        match change {
            Change::Removal => {
                remove_below(tree, path);
                tree.remove(path);
            }
            Change::File => {
                remove_below(tree, path);
                tree.insert(path.clone(), Some(layer));
            }
            Change::Folder | Change::EmptiedFolder => {
                if matches!(change, Change::EmptiedFolder) {
                    remove_below(tree, path);
                }
                tree.insert(path.clone(), None);
            }
        }
    }
}

/// Choose changes for the paths a, a/a, ... c/c/c; below what is no folder nothing.
fn choose_changes(random: &mut u64) -> Vec<(String, Change)> {
    let mut draw = |sides: u64| {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040);
        (*random >> 33) % sides
    };
    let mut changes = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        for name in ["a", "b", "c"] {
            let path = format!("{folder}/{name}");
            let depth = path.matches('/').count();
            let change = match draw(8) {
                0 | 1 => Change::File,
                2 | 3 if depth < 4 => Change::Folder,
                4 if depth < 4 => Change::EmptiedFolder,
                5 | 6 => Change::Removal,
                _ => continue,
            };
            if matches!(change, Change::Folder | Change::EmptiedFolder) {
                folders.push(path.clone());
            }
            changes.push((path, change));
        }
    }
    // Folders before what is in them.
    changes.sort_by(|a, b| a.0.cmp(&b.0));
    changes
}

#[test]
fn any_layers_merge_as_if_applied_one_after_the_other() {
    let Some(tools) = find_tools(&["mkfs.erofs"]) else { return };
    let folder = tempfile::tempdir().unwrap();
    for seed in 0..40u64 {
        let mut random = seed;
        let mut expected = BTreeMap::new();
        let mut blobs = Vec::new();
        for layer in 0..4u8 {
            let changes = choose_changes(&mut random);
            apply(&mut expected, layer, &changes);
            let content = [layer];
            let paths: Vec<(String, Change)> = changes
                .into_iter()
                .map(|(path, change)| match change {
                    Change::Removal => {
                        let (parent, name) = path.rsplit_once('/').unwrap();
                        (format!(".{parent}/.wh.{name}"), change)
                    }
                    _ => (format!(".{path}"), change),
                })
                .collect();
            let markers: Vec<String> =
                paths.iter().map(|(path, _)| format!("{path}/.wh..wh..opq")).collect();
            let mut members = vec![Member { path: "./", ..FOLDER }];
            for ((path, change), marker) in paths.iter().zip(&markers) {
                members.push(match change {
                    Change::File => Member { path, data: &content, ..FILE },
                    Change::Removal => Member { path, ..FILE },
                    _ => Member { path, ..FOLDER },
                });
                if matches!(change, Change::EmptiedFolder) {
                    members.push(Member { path: marker, ..FILE });
                }
            }
            let (tar, blob) = (folder.path().join("tar"), folder.path().join(format!("{layer}")));
            write_tar(&tar, &members);
            make_blob(&tools, &tar, &blob, EPOCH, &UUID).unwrap();
            blobs.push(blob);
        }
        let index = folder.path().join("index");
        let layout = make_index(&blobs, &index, EPOCH, &UUID).unwrap();
        let file = join_pieces(&folder.path().join("root"), &index, &blobs, &layout);
        let erofs = Erofs::open(Region::whole(&file).unwrap()).unwrap();
        let mut found = BTreeMap::new();
        let mut folders = vec![(String::new(), erofs.root().unwrap())];
        while let Some((path, inode)) = folders.pop() {
            for (name, number) in erofs.list(&inode).unwrap() {
                let path = format!("{path}/{}", String::from_utf8(name).unwrap());
                let inode = erofs.read_inode(number).unwrap();
                if inode.is_folder() {
                    found.insert(path.clone(), None);
                    folders.push((path, inode));
                } else {
                    found.insert(path, Some(erofs.read(&inode, 1).unwrap()[0]));
                }
            }
        }
        assert_eq!(found, expected, "seed {seed}");
    }
}
