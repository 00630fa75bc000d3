//! The disk's parts against the programs that others use to make or check them.

#[path = "disk/root.rs"]
mod root;
#[path = "support/tools.rs"]
mod tools;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use root::{Root, join_root, make_root};
use stanchion::digest::Digest;
use stanchion::disk::esp::{Content, EspFile, write_esp};
use stanchion::disk::gpt;
use stanchion::disk::guid::Guid;
use stanchion::disk::region::Region;
use stanchion::disk::uki;
use stanchion::disk::verity::{build_tree, hash_leaves};
use stanchion::disk::{MIB, Plan, assemble_disk};
use stanchion::output::inspect::inspect;
use stanchion::output::qcow2;
use stanchion::output::raw_image::Unpacker;
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
