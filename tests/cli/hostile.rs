//! Archives that mean harm, locked by their right digests: a build ends cleanly, names the
//! package, and has touched nothing outside.

use std::fs;
use std::io::Write;

use stanchion::digest::Digest;
use stanchion::lock::LockedPackage;
use stanchion::tools;

use crate::project::{Project, add_set, load_lock};
use crate::server::{Server, write_good};

/// A package of the test's own.
pub struct Package {
    pub name: String,
    pub bytes: Vec<u8>,
}

impl Package {
    pub fn new(name: &str, bytes: Vec<u8>) -> Self {
        Package { name: name.to_string(), bytes }
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.bytes)
    }
}

/// A project with one layer `a` of these packages, under a lock that holds nothing else.
pub fn project_of(packages: &[&Package]) -> Project {
    let names: Vec<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    let project = Project::new(&[
        ("profiles/tiny.toml", "description = \"t\"\nlayers = [\"a\"]\n"),
        ("layers/a/layer.toml", &format!("description = \"a\"\npackages = {names:?}\n")),
    ]);
    let mut lock = load_lock();
    lock.sets.clear();
    lock.packages = packages
        .iter()
        .map(|package| LockedPackage {
            name: package.name.clone(),
            version: "1.0".parse().unwrap(),
            architecture: "amd64".to_string(),
            suite: "trixie".to_string(),
            path: format!("pool/main/h/{0}/{0}_1.0_amd64.deb", package.name),
            size: package.bytes.len() as u64,
            installed_size: 16,
            sha256: package.digest(),
        })
        .collect();
    add_set(&mut lock, "a", None, &names, true);
    // The tools are empty: no build of these gets so far as to need one.
    for request in tools::list_requests() {
        add_set(&mut lock, &request.name, None, &[], false);
        lock.sets.last_mut().unwrap().request = request.digest();
    }
    lock.save(&project.root().join("stanchion.lock")).unwrap();
    project
}

/// One entry of a tar archive, whatever its name says.
fn make_entry(name: &str, kind: tar::EntryType, link: &str, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(content.len() as u64);
    let old = header.as_old_mut();
    old.name[..name.len()].copy_from_slice(name.as_bytes());
    old.linkname[..link.len()].copy_from_slice(link.as_bytes());
    if kind.is_block_special() || kind.is_character_special() {
        header.set_device_major(1).unwrap();
        header.set_device_minor(1).unwrap();
    }
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn pack(data: &[Vec<u8>]) -> Vec<u8> {
    let control = make_entry(
        "./control",
        tar::EntryType::Regular,
        "",
        b"Package: hello\nVersion: 1.0\nArchitecture: amd64\nMaintainer: a <a@example.org>\nDescription: x\n",
    );
    let compress = |entries: &[Vec<u8>]| {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
        encoder.write_all(&entries.concat()).unwrap();
        encoder.write_all(&[0; 1024]).unwrap();
        encoder.finish().unwrap()
    };
    let mut deb = b"!<arch>\n".to_vec();
    for (name, content) in [
        ("debian-binary", b"2.0\n".to_vec()),
        ("control.tar.xz", compress(&[control])),
        ("data.tar.xz", compress(data)),
    ] {
        writeln!(deb, "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`", 0, 0, 0, 100_644, content.len())
            .unwrap();
        deb.extend_from_slice(&content);
        deb.resize(deb.len().next_multiple_of(2), b'\n');
    }
    deb
}

/// A package of these files, by name and content.
pub fn make_deb(files: &[(&str, &str)]) -> Vec<u8> {
    let file = |(name, text): &(&str, &str)| {
        make_entry(name, tar::EntryType::Regular, "", text.as_bytes())
    };
    pack(&files.iter().map(file).collect::<Vec<_>>())
}

/// Build with the archive served by a mirror.
fn build(deb: Vec<u8>) -> (Project, crate::project::Ran) {
    let package = Package::new("hello", deb);
    let project = project_of(&[&package]);
    let bytes = package.bytes;
    let server = Server::start(move |request, to| write_good(to, request, &bytes));
    let ran = project.run(&["build", "tiny", "--mirror", &server.url("debian")]);
    (project, ran)
}

#[track_caller]
fn check(what: &str, data: &[Vec<u8>], expected: &str) {
    let (project, ran) = build(pack(data));
    assert_eq!(ran.code, Some(2), "{what}: {}", ran.stderr);
    ran.expect(2, &["building profile `tiny`", "hello", expected]);
    let left = fs::read_dir(project.store().join("tmp")).unwrap().count();
    assert_eq!(left, 0, "{what}: work was left in the store");
    assert_eq!(fs::read_dir(project.out()).unwrap().count(), 0, "{what}: work was left in out/");
}

#[test]
fn a_path_that_leads_out_is_refused() {
    use tar::EntryType::{Directory, Link, Regular};
    for name in ["../evil", "./usr/../../evil", "./usr/.."] {
        check(
            name,
            &[make_entry(name, Regular, "", b"evil")],
            &format!("{name}: a path with `..`"),
        );
    }
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("secret");
    fs::write(&target, "secret").unwrap();
    let target = target.to_str().unwrap();
    check("a hard link out", &[make_entry("./usr/evil", Link, target, b"")], "an absolute path");
    check(
        "a hard link up",
        &[make_entry("./usr/evil", Link, "../../etc/passwd", b"")],
        "a path with `..`",
    );
    check("a folder up", &[make_entry("./../evil", Directory, "", b"")], "a path with `..`");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[test]
fn a_link_to_the_host_is_followed_inside_the_image_only() {
    use tar::EntryType::{Regular, Symlink};
    let outside = tempfile::tempdir().unwrap();
    let path = outside.path().to_str().unwrap();
    let (_, ran) = build(pack(&[
        make_entry("./evil", Symlink, path, b""),
        make_entry("./evil/file", Regular, "", b"evil"),
    ]));
    assert!(matches!(ran.code, Some(1 | 2)), "{ran:?}");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[test]
fn a_device_is_refused() {
    use tar::EntryType::{Block, Char, Fifo};
    for (kind, name) in [(Block, "block device"), (Char, "character device"), (Fifo, "fifo")] {
        let expected = format!("hello holds a {name}\n  at: ./dev/mem");
        check(name, &[make_entry("./dev/mem", kind, "", b"")], &expected);
    }
}

#[test]
fn a_bomb_is_not_unpacked_further_than_it_says() {
    let zeros = vec![0; 200 << 20];
    let (project, ran) =
        build(pack(&[make_entry("./usr/zeros", tar::EntryType::Regular, "", &zeros)]));
    ran.expect(2, &["hello", "bytes"]);
    assert_eq!(fs::read_dir(project.store().join("tmp")).unwrap().count(), 0);
    // A size that the archive only claims.
    let mut entry = make_entry("./usr/huge", tar::EntryType::Regular, "", b"");
    entry[124..136]
        .copy_from_slice(&[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    let sum: u32 =
        entry[..148].iter().chain(&[b' '; 8]).chain(&entry[156..512]).map(|b| u32::from(*b)).sum();
    entry[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    check("a claimed size", &[entry], "the archive is cut short");
}

#[test]
fn what_is_no_package_at_all_is_refused() {
    for bytes in [&b""[..], b"!<arch>\n", b"<html>", &[0xff; 4096]] {
        let (_, ran) = build(bytes.to_vec());
        ran.expect(2, &["hello"]);
    }
    let mut cut = make_deb(&[("./usr/share/hello", "hello")]);
    cut.truncate(cut.len() - 100);
    let (_, ran) = build(cut);
    ran.expect(2, &["hello"]);
}

#[test]
fn a_download_that_rotted_in_the_store_names_its_package() {
    let package = Package::new("hello", make_deb(&[("./usr/share/hello", "hello")]));
    let project = project_of(&[&package]);
    let files = project.store().join("files");
    fs::create_dir_all(&files).unwrap();
    let stored = files.join(package.digest().to_string());
    let mut rotten = package.bytes.clone();
    let middle = rotten.len() - 60;
    rotten[middle..].fill(0x55);
    fs::write(&stored, &rotten).unwrap();
    let build = || project.run(&["build", "tiny", "--offline"]);
    build().expect(2, &["files in the store are damaged", "hello 1.0", "they are fetched anew"]);
    build().expect(2, &["the store lacks 1 file"]);
}
