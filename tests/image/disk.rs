//! Partitions, hashes, the ESP and its kernel, the formats and the manifest.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::Value;
use stanchion::command::Command;
use stanchion::digest::Digest;
use stanchion::disk::region::Region;
use stanchion::pipeline::InnerManifest;
use stanchion::tools::set;

use crate::support::{self, Image, PROGRAM};

const MIB: u64 = 1 << 20;
const MB: u64 = 1_000_000;

fn provide() -> Option<&'static Image> {
    support::provide(&[set::CHECK, set::BUILD])
}

fn command(image: &Image, program: &str) -> Command {
    image
        .tools
        .iter()
        .find_map(|tools| tools.command(program).ok())
        .unwrap_or_else(|| panic!("no tools root has {program}"))
}

fn read(command: Command) -> String {
    let output = command.run().unwrap_or_else(|error| panic!("{error:?}"));
    String::from_utf8(output.stdout).unwrap()
}

/// A partition as a sparse file of its own.
fn take_out(image: &Image, label: &str, folder: &Path) -> PathBuf {
    let disk = File::open(&image.raw).unwrap();
    let partition = support::find_partition(&disk, label);
    let path = folder.join(label);
    let file = File::create(&path).unwrap();
    file.set_len(partition.size).unwrap();
    let bytes = Region::new(&disk, partition.start, partition.size);
    // Piece by piece; what is all zeros stays a hole.
    for at in (0..partition.size).step_by(MIB as usize) {
        let piece = bytes.read_at(at, MIB.min(partition.size - at) as usize).unwrap();
        if piece.iter().any(|byte| *byte != 0) {
            Region::whole(&file).unwrap().write_at(at, &piece).unwrap();
        }
    }
    path
}

fn inspect(path: &Path) -> Value {
    let text = read(Command::new(PROGRAM).args(["--json", "inspect"]).arg(path));
    serde_json::from_str(&text).unwrap()
}

#[test]
fn the_disk_has_two_slots_of_which_one_is_empty_and_room_for_var() {
    let Some(image) = provide() else { return };
    let text = read(command(image, "sfdisk").arg("--json").arg(&image.raw));
    let table: Value = serde_json::from_str(&text).unwrap();
    let table = &table["partitiontable"];
    assert_eq!((&table["label"], &table["sectorsize"]), (&"gpt".into(), &512.into()));
    let rows: Vec<(&str, &str, Option<&str>, u64)> = table["partitions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| {
            let text = |key: &str| row[key].as_str();
            let size = row["size"].as_u64().unwrap() * 512 / MIB;
            (text("name").unwrap(), text("type").unwrap(), text("attrs"), size)
        })
        .collect();
    // Discoverable Partitions Specification; bit 60 is read-only, 63 no-auto.
    let (esp, root, verity) = (
        "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
        "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",
        "2C7357ED-EBD2-46D9-AEC1-23D437EC2BF5",
    );
    assert_eq!(
        rows,
        [
            ("esp", esp, None, 256),
            ("root-a", root, Some("GUID:60"), 2048),
            ("root-a-verity", verity, Some("GUID:60"), 17),
            ("_empty", root, Some("GUID:63"), 2048),
            ("_empty", verity, Some("GUID:63"), 17),
        ]
    );
    let guid = |row: usize| table["partitions"][row]["uuid"].as_str().unwrap().replace('-', "");
    let hash = image.manifest.root_hash.to_string().to_uppercase();
    assert_eq!(guid(1) + &guid(2), hash);
    let verified = command(image, "sfdisk").arg("--verify").arg(&image.raw).run().unwrap();
    let verified = String::from_utf8([verified.stdout, verified.stderr].concat()).unwrap();
    assert!(verified.contains("No errors detected"), "{verified}");
}

#[test]
fn veritysetup_verifies_the_root_with_the_hash_of_manifest_inspect_and_kernel() {
    let Some(image) = provide() else { return };
    let folder = tempfile::tempdir_in(support::scratch()).unwrap();
    let root = take_out(image, "root-a", folder.path());
    let hashes = take_out(image, "root-a-verity", folder.path());
    let verify = |hash: &str| {
        command(image, "veritysetup").arg("verify").arg(&root).arg(&hashes).arg(hash).run()
    };
    let hash = image.manifest.root_hash.to_string();
    verify(&hash).unwrap();
    let report = inspect(&image.raw);
    assert_eq!(report["problems"], Value::Array(Vec::new()));
    assert_eq!(report["slots"][0]["root_hash"], hash.as_str());
    assert_eq!(report["kernels"][0]["root_hash"], hash.as_str());
    assert_eq!(report["slots"][0]["covered"], image.manifest.root_bytes);

    let other = hash.replacen(&hash[..1], if hash.starts_with('0') { "1" } else { "0" }, 1);
    assert!(verify(&other).is_err());
    let file = File::options().read(true).write(true).open(&root).unwrap();
    let region = Region::whole(&file).unwrap();
    let byte = region.read_at(100 * MIB, 1).unwrap()[0];
    region.write_at(100 * MIB, &[byte ^ 0x80]).unwrap();
    assert!(verify(&hash).is_err());
}

#[test]
fn the_esp_holds_the_boot_loader_and_one_kernel_that_may_be_tried_three_times() {
    let Some(image) = provide() else { return };
    let folder = tempfile::tempdir_in(support::scratch()).unwrap();
    let esp = take_out(image, "esp", folder.path());
    let checked = command(image, "fsck.vfat").args(["-n", "-V"]).arg(&esp);
    read(checked);
    let listed = read(command(image, "mdir").args(["-b", "-/", "-i"]).arg(&esp).arg("::/"));
    let mut paths: Vec<&str> =
        listed.lines().filter(|line| !line.ends_with('/')).map(|line| &line[3..]).collect();
    paths.sort_unstable();
    let kernel = format!("EFI/Linux/stanchion_{}+3-0.efi", image.manifest.version);
    assert_eq!(paths, ["EFI/BOOT/BOOTX64.EFI", &kernel, "loader/loader.conf"]);

    let copy = |from: &str, to: &Path| {
        read(command(image, "mcopy").arg("-i").arg(&esp).arg(format!("::/{from}")).arg(to));
        fs::read(to).unwrap()
    };
    let config = copy("loader/loader.conf", &folder.path().join("conf"));
    let config = String::from_utf8(config).unwrap();
    assert!(config.lines().any(|line| line == "editor no"), "{config}");
    let loader = copy("EFI/BOOT/BOOTX64.EFI", &folder.path().join("loader"));
    let original = image.tools[1].root().join("usr/lib/systemd/boot/efi/systemd-bootx64.efi");
    assert!(loader == fs::read(original).unwrap());

    let path = folder.path().join("kernel.efi");
    let size = copy(&kernel, &path).len() as u64;
    assert!(size <= 50 * MB, "the kernel with its initrd has {size} bytes");
    check_sections(image, &path);
}

fn check_sections(image: &Image, kernel: &Path) {
    let root = image.tools[0].root();
    let text = read(
        command(image, "python3.13")
            .env("PYTHONHOME", root.join("usr"))
            .env("PYTHONPATH", root.join("usr/lib/python3/dist-packages"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .arg(root.join("usr/bin/ukify"))
            .arg("inspect")
            .arg(kernel)
            .arg("--json=short"),
    );
    let sections: BTreeMap<String, Value> = serde_json::from_str(&text).unwrap();
    let line = |name: &str| sections[name]["text"].as_str().unwrap().trim_end().to_string();
    let hash = image.manifest.root_hash;
    let cmdline = line(".cmdline");
    assert!(cmdline.starts_with(&format!("roothash={hash} ")), "{cmdline}");
    assert!(!cmdline.contains("SYSTEMD_SULOGIN_FORCE") && !cmdline.contains("debug"), "{cmdline}");
    let release = line(".osrel");
    assert!(release.contains(&format!("IMAGE_VERSION={}\n", image.manifest.version)), "{release}");
    assert!(line(".uname").starts_with("6.12."), "{}", line(".uname"));
    for name in [".linux", ".initrd"] {
        assert!(sections[name]["size"].as_u64().unwrap() > 5 * MB, "{name}");
    }
}

#[test]
fn fsck_accepts_the_index_over_the_layers() {
    let Some(image) = provide() else { return };
    let folder = tempfile::tempdir_in(support::scratch()).unwrap();
    let root = take_out(image, "root-a", folder.path());
    read(command(image, "fsck.erofs").arg(&root));
}

#[test]
fn the_image_is_small() {
    let Some(image) = provide() else { return };
    let root = image.manifest.root_bytes;
    assert!(root <= 600 * MB, "the root has {root} bytes");
    let qcow2 = fs::metadata(image.raw.with_extension("qcow2")).unwrap().len();
    assert!(qcow2 <= 220 * MB, "the qcow2 has {qcow2} bytes");
    println!("root {} MB, qcow2 {} MB", root / MB, qcow2 / MB);
}

#[test]
fn the_qcow2_is_sound_and_holds_the_raw_disk() {
    let Some(image) = provide() else { return };
    let qcow2 = image.raw.with_extension("qcow2");
    let checked = read(command(image, "qemu-img").args(["check", "-f", "qcow2"]).arg(&qcow2));
    assert!(checked.contains("No errors were found"), "{checked}");
    let compare = ["compare", "-f", "raw", "-F", "qcow2"];
    let same = read(command(image, "qemu-img").args(compare).arg(&image.raw).arg(&qcow2));
    assert!(same.contains("Images are identical"), "{same}");
}

#[test]
fn the_manifest_names_every_layer_package_and_output_by_its_digest() {
    let Some(image) = provide() else { return };
    let manifest = &image.manifest;
    let layers: Vec<String> =
        manifest.layers.iter().map(|layer| format!("{} {}", layer.name, layer.diff)).collect();
    assert_eq!(
        layers,
        [
            "base packages",
            "base files",
            "kernel packages",
            "observability packages",
            "observability files",
            "etcd packages",
            "etcd files",
            "postgres packages",
            "postgres files",
            "backup packages",
            "backup files",
            "agent files",
        ]
    );
    check_blobs(image);
    let store = stanchion::store::Store::default_root().unwrap();
    for package in &manifest.packages {
        let deb = store.join("files").join(package.sha256.to_string());
        assert_eq!(Digest::of_file(&deb).unwrap(), package.sha256, "{}", package.name);
    }
    for wanted in ["etcd-server", "libc6", "linux-image-amd64", "patroni", "postgresql-17"] {
        assert!(manifest.packages.iter().any(|package| package.name == wanted), "no {wanted}");
    }
    let formats: Vec<String> =
        manifest.outputs.iter().map(|output| output.format.to_string()).collect();
    assert_eq!(formats, ["raw", "qcow2"]);
    for output in &manifest.outputs {
        let path = image.raw.with_file_name(&output.file);
        let digest = Digest::of_file(&path).unwrap();
        assert_eq!(output.sha256, Some(digest), "{}", path.display());
        assert_eq!(fs::metadata(&path).unwrap().len(), output.bytes);
    }
    assert!(manifest.version.ends_with(&manifest.key.to_string()[..8]));
    for step in ["base packages", "postgres packages", "initrd", "db disk", "db outputs"] {
        assert!(manifest.steps.iter().any(|time| time.step == step), "no time of {step}");
    }

    let report = inspect(&image.raw);
    let inner: InnerManifest = serde_json::from_value(report["manifest"].clone()).unwrap();
    assert_eq!((&inner.profile, &inner.version), (&manifest.profile, &manifest.version));
    assert_eq!((&inner.layers, &inner.packages), (&manifest.layers, &manifest.packages));
}

/// The layers lie behind the index one after the other, and are what the manifest says.
fn check_blobs(image: &Image) {
    let disk = File::open(&image.raw).unwrap();
    let root = support::open_partition(&disk, "root-a");
    let mut at = stanchion::disk::erofs::INDEX_AREA;
    for layer in &image.manifest.layers {
        let blob = root.read_at(at, layer.bytes as usize).unwrap();
        assert_eq!(Digest::of(&blob), layer.blob, "{} {}", layer.name, layer.diff);
        at += layer.bytes;
    }
    assert!(at < image.manifest.root_bytes);
}
