//! The disk's parts against the programs that others use to make or check them.

#[path = "support/tools.rs"]
mod tools;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use stanchion::command::Command;
use stanchion::digest::Digest;
use stanchion::disk::erofs::{INDEX_AREA, Layout, make_blob, make_index};
use stanchion::disk::erofs_read::Erofs;
use stanchion::disk::esp::{Content, EspFile, write_esp};
use stanchion::disk::gpt;
use stanchion::disk::guid::Guid;
use stanchion::disk::region::Region;
use stanchion::disk::uki;
use stanchion::disk::verity::{build_tree, hash_leaves};
use stanchion::disk::{MIB, Plan, assemble_disk};
use stanchion::output::inspect::{Unpacker, inspect};
use stanchion::output::qcow2;
use stanchion::tools::Tools;
use tools::find_tools;

const EPOCH: u64 = 1_700_000_000;
const UUID: Guid = Guid::from_number(0x01234567_89ab_cdef_8123_456789abcdef);

fn run(tools: &Tools, program: &str, args: &[&str]) -> String {
    let output = tools.command(program).unwrap().args(args).run().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn verity_trees_are_those_of_veritysetup() {
    let Some(tools) = find_tools(&["veritysetup"]) else { return };
    let folder = tempfile::tempdir().unwrap();
    for blocks in [1u64, 2, 127, 128, 129, 128 * 128, 128 * 128 + 1] {
        let (data, hashes) = (folder.path().join("data"), folder.path().join("hashes"));
        let _ = fs::remove_file(&hashes);
        let file = File::create_new(folder.path().join("new")).unwrap();
        file.set_len(blocks * 4096).unwrap();
        // Some blocks differ, others are holes.
        for i in (0..blocks).filter(|i| i % 7 != 3) {
            file.write_all_at(&i.to_le_bytes(), i * 4096 + 8).unwrap();
        }
        fs::rename(folder.path().join("new"), &data).unwrap();
        let output = run(
            &tools,
            "veritysetup",
            &[
                "format",
                "--salt=-",
                &format!("--uuid={UUID}"),
                data.to_str().unwrap(),
                hashes.to_str().unwrap(),
            ],
        );
        let expected = output.lines().find_map(|line| line.strip_prefix("Root hash:")).unwrap();
        let leaves = hash_leaves(&File::open(&data).unwrap(), 0, blocks, 2).unwrap();
        let tree = build_tree(&leaves, &UUID).unwrap();
        assert_eq!(tree.root_hash.to_string(), expected.trim(), "{blocks} blocks");
        assert!(tree.bytes == fs::read(&hashes).unwrap(), "{blocks} blocks");
    }
}

#[test]
fn sfdisk_reads_the_partition_table_as_it_was_meant() {
    let Some(tools) = find_tools(&["sfdisk"]) else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(64 * MIB).unwrap();
    let make = |type_guid, number, label: &str, start, size, flags| gpt::Partition {
        type_guid,
        guid: Guid::from_number(number),
        label: label.into(),
        start: start * MIB,
        size: size * MIB,
        flags,
    };
    let partitions = vec![
        make(gpt::TYPE_ESP, 7, "esp", 1, 4, 0),
        make(gpt::TYPE_ROOT, 8, "root-a", 5, 8, gpt::FLAG_READ_ONLY),
        make(gpt::TYPE_ROOT_VERITY, 9, "_empty", 13, 1, gpt::FLAG_NO_AUTO | gpt::FLAG_GROW),
    ];
    gpt::write(&gpt::Table { disk_guid: UUID, partitions }, &file, 64 * MIB).unwrap();
    let path = path.to_str().unwrap();
    let verified = tools.command("sfdisk").unwrap().args(["--verify", path]).run().unwrap();
    let verified = [verified.stdout, verified.stderr].concat();
    let verified = String::from_utf8_lossy(&verified);
    assert!(verified.contains("No errors detected"), "{verified}");
    let json: serde_json::Value =
        serde_json::from_str(&run(&tools, "sfdisk", &["--json", path])).unwrap();
    let table = &json["partitiontable"];
    assert_eq!(table["label"], "gpt");
    assert_eq!(table["id"], UUID.to_string().to_uppercase());
    let rows = table["partitions"].as_array().unwrap();
    let root = &rows[1];
    assert_eq!(rows.len(), 3);
    assert_eq!(root["type"], gpt::TYPE_ROOT.to_string().to_uppercase());
    assert_eq!(root["uuid"], "00000000-0000-0000-0000-000000000008");
    assert_eq!(root["name"], "root-a");
    assert_eq!(root["attrs"], "GUID:60");
    assert_eq!((&root["start"], &root["size"]), (&(5 * 2048).into(), &(8 * 2048).into()));
    assert_eq!(rows[2]["attrs"], "GUID:59,63");
}

#[test]
fn fsck_and_mtools_agree_with_the_esp() {
    let Some(tools) = find_tools(&["fsck.vfat", "mdir", "mcopy"]) else { return };
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("esp");
    let big: Vec<u8> = (0..3_000_001u32).map(|i| (i / 7) as u8).collect();
    let from = folder.path().join("big");
    fs::write(&from, &big).unwrap();
    let files: Vec<EspFile> = [
        ("EFI/BOOT/BOOTX64.EFI", Content::Bytes(b"boot".into())),
        ("EFI/Linux/stanchion_1.0.0+3-0.efi", Content::File(from)),
        ("EFI/Linux/stanchion_1.0.1+3-0.efi", Content::Bytes(vec![])),
        ("loader/loader.conf", Content::Bytes(b"timeout 0\n".into())),
        ("loader/thirteen.char", Content::Bytes(b"13".into())),
        ("loader/entries/a name with spaces.conf", Content::Bytes(b"x".into())),
    ]
    .into_iter()
    .map(|(path, content)| EspFile { path: path.into(), content })
    .chain((0..200).map(|i| EspFile {
        path: format!("many/a-file-with-a-long-name-{i}"),
        content: Content::Bytes(vec![i as u8; i * 10]),
    }))
    .collect();
    for size in [33 * MIB, 100 * MIB, 256 * MIB, 600 * MIB] {
        let _ = fs::remove_file(&image);
        let file = File::options().read(true).write(true).create_new(true).open(&image).unwrap();
        file.set_len(size).unwrap();
        write_esp(&Region::whole(&file).unwrap(), &files, EPOCH, 0xcafe_f00d).unwrap();
        let image = image.to_str().unwrap();
        let report = run(&tools, "fsck.vfat", &["-n", "-V", image]);
        assert_eq!(report.lines().count(), 4, "{size}: {report}");
        let list = run(&tools, "mdir", &["-i", image, "::EFI/Linux"]);
        for part in ["Volume in drive : is ESP", "CAFE-F00D", "3000001", "2023-11-14  22:13"] {
            assert!(list.contains(part), "{part} is not in {list}");
        }
        assert!(list.contains("stanchion_1.0.0+3-0.efi"), "{list}");
        let copy = folder.path().join("copy");
        let source = "::efi/linux/STANCHION_1.0.0+3-0.EFI";
        run(&tools, "mcopy", &["-n", "-o", "-i", image, source, copy.to_str().unwrap()]);
        assert!(fs::read(&copy).unwrap() == big);
        let list = run(&tools, "mdir", &["-b", "-i", image, "::many"]);
        assert_eq!(list.lines().count(), 200);
    }
}

#[test]
fn fsck_and_mtools_agree_with_the_volume_of_a_seed() {
    let Some(tools) = find_tools(&["fsck.vfat", "mdir", "mcopy"]) else { return };
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("seed");
    let copy = folder.path().join("copy");
    for length in [0, 1, 512, 10_001, 65_536] {
        let _ = (fs::remove_file(&image), fs::remove_file(&copy));
        let file = File::options().read(true).write(true).create_new(true).open(&image).unwrap();
        let seed: Vec<u8> = (0..length).map(|i| (i / 7) as u8).collect();
        stanchion::seed::volume::write_seed(&file, &seed, EPOCH).unwrap();
        let image = image.to_str().unwrap();
        let report = run(&tools, "fsck.vfat", &["-n", "-V", image]);
        assert_eq!(report.lines().count(), 4, "{length}: {report}");
        let list = run(&tools, "mdir", &["-i", image, "::"]);
        for part in ["Volume in drive : is STANCHION", "stanchion-seed.json", "2023-11-14  22:13"] {
            assert!(list.contains(part), "{part} is not in {list}");
        }
        let source = "::stanchion-seed.json";
        run(&tools, "mcopy", &["-n", "-o", "-i", image, source, copy.to_str().unwrap()]);
        assert!(fs::read(&copy).unwrap() == seed);
    }
}

#[test]
fn seeds_are_read_from_volumes_that_other_programs_made() {
    let Some(tools) = find_tools(&["mkfs.vfat", "mcopy"]) else { return };
    let folder = tempfile::tempdir().unwrap();
    let from = folder.path().join("from");
    let seed: Vec<u8> = (0..20_000u32).map(|i| (i / 7) as u8).collect();
    fs::write(&from, &seed).unwrap();
    // What mkfs.vfat makes FAT12, FAT16 and FAT32.
    for (kibibytes, label, name) in [
        (1440, "CIDATA", "user-data"),
        (2048, "cidata", "user-data"),
        (20 << 10, "STANCHION", "stanchion-seed.json"),
        (600 << 10, "CIDATA", "stanchion-seed.json"),
    ] {
        let image = folder.path().join("image");
        let _ = fs::remove_file(&image);
        let path = image.to_str().unwrap();
        run(&tools, "mkfs.vfat", &["-C", "-n", label, path, &kibibytes.to_string()]);
        let target = format!("::{name}");
        run(&tools, "mcopy", &["-i", path, from.to_str().unwrap(), &target]);
        let read = stanchion::seed::volume::read_seed(&File::open(&image).unwrap()).unwrap();
        assert!(read.as_ref() == Some(&seed), "{kibibytes} KiB, {label}, {name}");
    }
}

#[test]
fn a_unified_kernel_image_has_the_sections_that_ukify_gives_it() {
    let Some(tools) = find_tools(&["ukify", "python3.13"]) else { return };
    let stub = tools.root().join("usr/lib/systemd/boot/efi/linuxx64.efi.stub");
    let Ok(stub_bytes) = fs::read(&stub) else {
        println!("skipped: there is no {}", stub.display());
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    // A stub is a PE image, and so will do for a kernel.
    let kernel = tools.root().join("usr/lib/systemd/boot/efi/systemd-bootx64.efi");
    let linux = fs::read(&kernel).unwrap();
    let initrd = vec![0x42; 100_001];
    let os_release = b"ID=debian\nIMAGE_ID=db\n";
    let cmdline = "roothash=00 console=ttyS0";
    fs::write(path("initrd"), &initrd).unwrap();
    fs::write(path("os-release"), os_release).unwrap();
    tools
        .command("python3.13")
        .unwrap()
        .env("PYTHONHOME", tools.root().join("usr"))
        .env("PYTHONPATH", tools.root().join("usr/lib/python3/dist-packages"))
        .arg(tools.root().join("usr/bin/ukify"))
        .arg("build")
        .args([format!("--linux={}", kernel.display()), format!("--stub={}", stub.display())])
        .args([format!("--initrd={}", path("initrd").display())])
        .args([format!("--os-release=@{}", path("os-release").display())])
        .args([format!("--cmdline={cmdline}"), "--uname=6.12.1".into()])
        .arg(format!("--output={}", path("theirs").display()))
        .run()
        .unwrap();
    let theirs = fs::read(path("theirs")).unwrap();
    let parts = uki::Parts { os_release, cmdline, uname: "6.12.1", linux: &linux, initrd: &initrd };
    let ours = uki::assemble(&stub_bytes, &parts).unwrap();
    let read = |image: &[u8]| uki::read_sections(image, image.len() as u64).unwrap();
    let (our_sections, their_sections) = (read(&ours), read(&theirs));
    assert!(our_sections.keys().eq(their_sections.keys()));
    // The one difference: ukify merges the kernel's .sbat into the stub's.
    let mut blanked = [ours.clone(), theirs.clone()];
    for (image, sections) in blanked.iter_mut().zip([&our_sections, &their_sections]) {
        let sbat = sections[".sbat"].start as usize;
        image[sbat..sbat + 512].fill(0);
        let header = image.windows(8).position(|name| name == b".sbat\0\0\0").unwrap();
        image[header + 8..header + 12].fill(0);
    }
    let pairs = blanked[0].iter().zip(&blanked[1]).enumerate();
    let differing: Vec<_> = pairs.filter(|(_, (a, b))| a != b).collect();
    assert!(ours.len() == theirs.len() && differing.is_empty(), "{differing:x?}");
}

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

struct Root {
    folder: tempfile::TempDir,
    blobs: Vec<PathBuf>,
    index: PathBuf,
    layout: Layout,
    big: Vec<u8>,
    long: String,
}

/// Three layers with everything that a layer can have.
fn make_root(tools: &Tools) -> Root {
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

fn join_root(root: &Root) -> PathBuf {
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

/// A whole disk, made as the builder makes it.
fn make_disk(tools: &Tools, root: &Root) -> (PathBuf, Digest) {
    let path = join_root(root);
    let file = File::open(&path).unwrap();
    let leaves = hash_leaves(&file, 0, root.layout.total / 4096, 2).unwrap();
    let tree = build_tree(&leaves, &UUID).unwrap();
    let cmdline = format!("roothash={} console=ttyS0", tree.root_hash);
    let stub = tools.root().join("usr/lib/systemd/boot/efi/linuxx64.efi.stub");
    let parts = uki::Parts {
        os_release: b"ID=debian\nIMAGE_ID=db\nIMAGE_VERSION=1.2.3\n",
        cmdline: &cmdline,
        uname: "6.12.1",
        linux: b"kernel",
        initrd: b"initrd",
    };
    let image = uki::assemble(&fs::read(stub).unwrap(), &parts).unwrap();
    let esp_files = [EspFile {
        path: "EFI/Linux/stanchion_1.2.3+3-0.efi".into(),
        content: Content::Bytes(image),
    }];
    let plan = Plan {
        disk_size: 256 * MIB,
        esp_size: 64 * MIB,
        slot_size: 64 * MIB,
        index: &root.index,
        blobs: &root.blobs,
        layout: &root.layout,
        tree: &tree,
        esp_files: &esp_files,
        epoch: EPOCH,
    };
    let out = root.folder.path().join("db.raw");
    let made = assemble_disk(&plan, &out).unwrap();
    assert_eq!(made.free, (256 - 64 - 128 - 2 - 1) * MIB - gpt::BACKUP_SIZE);
    (out, made.root_hash)
}

#[test]
fn a_finished_disk_is_read_back_as_raw_and_as_qcow2() {
    let Some(tools) = find_tools(&["mkfs.erofs", "qemu-img"]) else { return };
    if !tools.root().join("usr/lib/systemd/boot/efi/linuxx64.efi.stub").is_file() {
        println!("skipped: the tools have no UEFI stub");
        return;
    }
    let root = make_root(&tools);
    let (raw, root_hash) = make_disk(&tools, &root);
    let report = inspect(&raw, None).unwrap();
    assert_eq!(report.problems, [""; 0]);
    assert_eq!(report.slots.len(), 1);
    assert_eq!(report.slots[0].root_hash, root_hash);
    assert_eq!(report.slots[0].kernels, ["EFI/Linux/stanchion_1.2.3+3-0.efi"]);
    assert_eq!(report.kernels[0].image.as_deref(), Some("db"));
    assert_eq!(report.kernels[0].version.as_deref(), Some("1.2.3"));
    assert_eq!(report.manifest.as_ref().unwrap()["packages"][0]["name"], "dpkg");
    let shown = report.to_string();
    assert!(shown.contains("db 1.2.3") && shown.contains("dpkg 1.22"), "{shown}");

    let packed = root.folder.path().join("db.qcow2");
    qcow2::convert(&tools, &raw, &packed).unwrap();
    let digest = Digest::of_file(&packed).unwrap();
    qcow2::convert(&tools, &raw, &packed).unwrap();
    assert_eq!(Digest::of_file(&packed).unwrap(), digest);
    let unpacker = Unpacker { tools: &tools, folder: root.folder.path() };
    assert!(inspect(&packed, None).is_err());
    let mut again = serde_json::to_value(inspect(&packed, Some(unpacker)).unwrap()).unwrap();
    assert_eq!(again["format"], "qcow2");
    again["format"] = "raw".into();
    assert_eq!(again, serde_json::to_value(&report).unwrap());

    // A flipped bit in the topmost hash block shows as a root that no kernel boots.
    let hashes = report.partitions.iter().find(|p| p.label == "root-a-verity").unwrap();
    let file = File::options().write(true).open(&raw).unwrap();
    file.write_all_at(b"x", hashes.start + 4096 + 5).unwrap();
    let problems = inspect(&raw, None).unwrap().problems.join("\n");
    for part in ["root-a should have", "root-a-verity should have", "boots a root that is not"] {
        assert!(problems.contains(part), "{part} is not in {problems}");
    }
}
