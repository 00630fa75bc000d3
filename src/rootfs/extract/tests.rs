use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use super::*;
use crate::debian::archive::tests::{edit_entry, pax, raw_entry};
use crate::debian::package::tests::make_deb;
use crate::digest::Digest;
use crate::error::exit_code;

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn folder(path: &str) -> Vec<u8> {
    raw_entry(path.as_bytes(), b'5', b"", b"")
}

fn file(path: &str, content: &str) -> Vec<u8> {
    raw_entry(path.as_bytes(), b'0', b"", content.as_bytes())
}

fn link(path: &str, target: &str) -> Vec<u8> {
    raw_entry(path.as_bytes(), b'2', target.as_bytes(), b"")
}

fn hard_link(path: &str, target: &str) -> Vec<u8> {
    raw_entry(path.as_bytes(), b'1', target.as_bytes(), b"")
}

struct Bench {
    dir: tempfile::TempDir,
    debs: Vec<DebFile>,
    purpose: Purpose,
    threads: usize,
    excludes: Excludes,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        let purpose = if is_root() { Purpose::Install } else { Purpose::Tools };
        Bench { dir, debs: Vec::new(), purpose, threads: 2, excludes: Excludes::default() }
    }

    fn add(&mut self, name: &str, extra: &str, members: &[(&str, &str)], data: &[Vec<u8>]) {
        let control = format!("Package: {name}\nVersion: 1.0\nArchitecture: all\n{extra}");
        let mut entries = vec![file("./control", &control)];
        entries.extend(members.iter().map(|(name, content)| file(name, content)));
        let path = self.dir.path().join(format!("{name}.deb"));
        fs::write(&path, make_deb(&entries, data, ".zst")).unwrap();
        self.debs.push(DebFile { name: name.to_string(), path, limit: 1 << 20 });
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn run(&self) -> Result<Unpacking> {
        let options =
            Options { purpose: self.purpose, threads: self.threads, excludes: &self.excludes };
        unpack_all(&self.debs, &self.root(), &options)
    }
}

/// One package with these entries is refused with a message that holds `why`.
fn refuse(data: &[Vec<u8>], why: &str) {
    refuse_by(Bench::new(), data, why);
}

fn refuse_by(mut bench: Bench, data: &[Vec<u8>], why: &str) {
    fs::write(bench.dir.path().join("secret"), "outside").unwrap();
    bench.add("evil", "", &[], data);
    let error = bench.run().unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("evil") && text.contains(why), "{text}");
    let left: Vec<_> =
        fs::read_dir(bench.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
    assert_eq!(fs::read_to_string(bench.dir.path().join("secret")).unwrap(), "outside");
}

/// Type, mode, owners, links, time and content of everything beneath a root.
pub(crate) fn describe_tree(root: &Path) -> BTreeMap<String, String> {
    let mut tree = BTreeMap::new();
    let mut inodes: BTreeMap<u64, String> = BTreeMap::new();
    let mut folders = vec![root.to_path_buf()];
    let mut paths = Vec::new();
    while let Some(path) = folders.pop() {
        for entry in fs::read_dir(&path).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            }
            paths.push(entry.path());
        }
    }
    paths.sort();
    for path in paths {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_string();
        let content = if metadata.is_symlink() {
            fs::read_link(&path).unwrap().display().to_string()
        } else if metadata.is_file() {
            let digest = Digest::of_file(&path).unwrap().short();
            let first = inodes.entry(metadata.ino()).or_insert_with(|| name.clone());
            format!("{digest} is {first}")
        } else {
            String::new()
        };
        let shown = format!(
            "{:o} {}:{} {} {content}",
            metadata.mode(),
            metadata.uid(),
            metadata.gid(),
            metadata.mtime(),
        );
        tree.insert(name, shown);
    }
    tree
}

#[test]
fn entries_that_leave_the_root_are_refused() {
    refuse(&[file("../secret", "x")], "`..`");
    refuse(&[file("/tmp/secret", "x")], "absolute");
    refuse(&[hard_link("x", "../secret")], "`..`");
    refuse(&[hard_link("x", "etc/passwd")], "no file that this archive placed");
}

#[test]
fn a_link_is_never_written_through_to_the_outside() {
    for target in ["../", "/", "../../../../../../..", "/proc/self/cwd/.."] {
        let mut bench = Bench::new();
        bench.add("p", "", &[], &[link("out", target), file("out/secret", "x")]);
        let _ = bench.run();
        assert!(!bench.dir.path().join("secret").exists());
        assert!(!Path::new("/secret").exists());
    }
    // A link to a folder of the root is followed, inside the root.
    let mut bench = Bench::new();
    fs::create_dir_all(bench.root().join("usr/bin")).unwrap();
    symlink("/usr/../usr/bin", bench.root().join("bin")).unwrap();
    bench.add("p", "", &[], &[folder("bin/"), file("bin/x", "hello")]);
    bench.run().unwrap();
    assert_eq!(fs::read_to_string(bench.root().join("usr/bin/x")).unwrap(), "hello");
    assert!(bench.root().join("bin").is_symlink());
    // A file that replaces a link replaces the link, not what it leads to.
    let mut bench = Bench::new();
    fs::write(bench.dir.path().join("secret"), "outside").unwrap();
    symlink(bench.dir.path().join("secret"), bench.root().join("x")).unwrap();
    bench.add("p", "", &[], &[file("x", "inside")]);
    bench.run().unwrap();
    assert_eq!(fs::read_to_string(bench.dir.path().join("secret")).unwrap(), "outside");
    assert_eq!(fs::read_to_string(bench.root().join("x")).unwrap(), "inside");
    refuse(&[link("a", "b"), link("b", "a"), file("a/x", "")], "too many symbolic links");
    refuse(&[link("a", "../secret"), hard_link("x", "a")], "no file that this archive placed");
    refuse(&[file("a", ""), file("a/b", "")], "where a file is");
}

#[test]
fn device_nodes_and_fifos_are_refused_or_left_out_of_tools() {
    for (kind, why) in [(b'3', "character device"), (b'4', "block device"), (b'6', "fifo")] {
        let node = || raw_entry(b"dev/node", kind, b"", b"");
        refuse_by(Bench { purpose: Purpose::Install, ..Bench::new() }, &[node()], why);
        let mut bench = Bench::new();
        bench.purpose = Purpose::Tools;
        bench.add("p", "", &[], &[node(), file("x", "x")]);
        bench.run().unwrap();
        assert!(!bench.root().join("dev").exists() && bench.root().join("x").exists());
    }
}

#[test]
fn duplicates_bombs_and_odd_attributes_are_refused() {
    refuse(&[file("x", "1"), file("x", "2")], "twice");
    refuse(&[file("x", "1"), folder("x/")], "where a file is");
    refuse(&[folder("x/"), file("x", "1")], "a folder is");
    refuse(&[pax(&[("SCHILY.xattr.user.overlay.opaque", b"y")]), file("x", "")], "user.overlay");
    refuse(&[pax(&[("SCHILY.xattr.trusted.x", b"y")]), file("x", "")], "trusted.x");
    let mut bench = Bench::new();
    bench.add("evil", "", &[], &[raw_entry(b"x", b'0', b"", &vec![0; 2 << 20])]);
    let error = bench.run().unwrap_err();
    assert!(format!("{error:#}").contains("evil unpacks to more"), "{error:#}");
    assert_eq!(exit_code(&error), 2);
}

#[test]
fn metadata_is_kept_of_files_links_and_folders() {
    let odd = |header: &mut tar::Header| {
        header.set_mode(0o2750);
        header.set_uid(if is_root() { 12 } else { 0 });
        header.set_gid(if is_root() { 34 } else { 0 });
        header.set_mtime(1_000_000_000);
    };
    let mut bench = Bench::new();
    bench.add(
        "p",
        "",
        &[],
        &[
            edit_entry(b"d/", b'5', b"", b"", odd),
            edit_entry(b"d/x", b'0', b"", b"x", |header| {
                odd(header);
                header.set_mode(0o4755);
            }),
            edit_entry(b"d/l", b'2', b"nowhere", b"", odd),
            hard_link("d/h", "d/x"),
            file("implied/deep/y", "y"),
        ],
    );
    bench.run().unwrap();
    let read = |name: &str| fs::symlink_metadata(bench.root().join(name)).unwrap();
    for name in ["d", "d/x", "d/l", "d/h"] {
        assert_eq!((read(name).mtime(), read(name).mtime_nsec()), (1_000_000_000, 0), "{name}");
        if is_root() {
            assert_eq!((read(name).uid(), read(name).gid()), (12, 34), "{name}");
        }
    }
    assert_eq!(read("d").mode() & 0o7777, 0o2750);
    assert_eq!(read("d/x").mode() & 0o7777, 0o4755);
    assert_eq!(read("d/x").ino(), read("d/h").ino());
    assert_eq!(read("implied/deep").mode() & 0o7777, 0o755);
}

#[test]
fn file_capabilities_survive() {
    if !is_root() {
        println!("skipped: setting file capabilities needs root");
        return;
    }
    // cap_net_raw+ep (linux/capability.h, version 2, little endian).
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut bench = Bench::new();
    let records =
        [("SCHILY.xattr.security.capability", &capability[..]), ("SCHILY.xattr.user.a", b"b")];
    bench.add("p", "", &[], &[pax(&records), file("ping", "x")]);
    bench.run().unwrap();
    let mut value = [0; 64];
    let path = bench.root().join("ping");
    let n = rustix::fs::lgetxattr(&path, "security.capability", &mut value[..]).unwrap();
    assert_eq!(value[..n], capability);
    assert_eq!(rustix::fs::lgetxattr(&path, "user.a", &mut value[..]).unwrap(), 1);
}

#[test]
fn a_folder_that_was_there_keeps_what_it_has() {
    let mut bench = Bench::new();
    fs::create_dir(bench.root().join("d")).unwrap();
    fs::set_permissions(bench.root().join("d"), fs::Permissions::from_mode(0o700)).unwrap();
    bench.add("p", "", &[], &[folder("d/"), file("d/x", "x")]);
    bench.run().unwrap();
    assert_eq!(fs::metadata(bench.root().join("d")).unwrap().mode() & 0o7777, 0o700);
    // A link over a folder leaves the folder.
    let mut bench = Bench::new();
    fs::create_dir(bench.root().join("d")).unwrap();
    bench.add("p", "", &[], &[link("d", "e")]);
    assert!(bench.run().unwrap().conflicts.is_empty());
    assert!(bench.root().join("d").is_dir());
}

#[test]
fn threads_and_their_order_do_not_change_the_result() {
    let make = |threads: usize, sizes: [usize; 6]| {
        let mut bench = Bench::new();
        bench.threads = threads;
        let names = ["one", "two", "three", "four", "five", "six"];
        bench.add(
            "base-files",
            "",
            &[],
            &[folder("usr/"), folder("usr/lib/"), link("lib", "usr/lib")],
        );
        for (i, name) in names.iter().enumerate() {
            let mode = 0o700 + i as u32;
            let mut data = Vec::new();
            for n in 0..40 {
                let path = format!("usr/share/d{n}/");
                data.push(edit_entry(path.as_bytes(), b'5', b"", b"", |header| {
                    header.set_mode(mode);
                    header.set_mtime(1000 + i as u64);
                }));
                data.push(file(&format!("usr/share/d{n}/{name}"), name));
            }
            // The same file by two paths.
            data.push(file(if i % 2 == 0 { "lib/shared" } else { "usr/lib/shared" }, name));
            data.push(raw_entry(
                format!("big-{name}").as_bytes(),
                b'0',
                b"",
                &vec![b'x'; sizes[i]],
            ));
            let replaces =
                if i == 3 { "Replaces: one, two, three, five (<< 2), six\n" } else { "" };
            bench.add(name, replaces, &[], &data);
        }
        let unpacking = bench.run().unwrap();
        let mut tree = describe_tree(&bench.root());
        tree.retain(|name, _| !name.starts_with("big-") && name != "usr");
        let lists: Vec<_> = unpacking.packages.into_iter().map(|package| package.list).collect();
        (tree, lists, unpacking.conflicts)
    };
    let one = make(1, [1; 6]);
    let mode = one.0["usr/share/d7"].clone();
    assert!(mode.starts_with("40700 ") && mode.contains(" 1000 "), "{mode}");
    for sizes in [[1, 9, 99, 999, 9999, 99999], [99999, 9999, 999, 99, 9, 1], [50; 6]] {
        let many = make(6, sizes);
        assert_eq!(one.0, many.0);
        assert_eq!(one.2, many.2);
    }
}

#[test]
fn a_file_of_two_packages_is_a_conflict_unless_one_replaces_the_other() {
    let unpack = |extra_a: &str, extra_b: &str, b: Vec<u8>| {
        let mut bench = Bench::new();
        bench.add("a", extra_a, &[], &[file("x", "from a")]);
        bench.add("b", extra_b, &[], &[b]);
        let unpacking = bench.run().unwrap();
        let content = fs::read_to_string(bench.root().join("x")).unwrap_or_default();
        let lists = [0, 1].map(|i| unpacking.packages[i].list.contains(&b"/x".to_vec()));
        (content, lists, unpacking.conflicts.len())
    };
    let b = || file("x", "from b");
    assert_eq!(unpack("", "", b()), ("from a".into(), [true, true], 1));
    assert_eq!(unpack("", "Replaces: a\n", b()), ("from b".into(), [false, true], 0));
    assert_eq!(unpack("Replaces: b (<< 2)\n", "", b()), ("from a".into(), [true, false], 0));
    assert_eq!(unpack("", "Replaces: a (<< 1)\n", b()), ("from a".into(), [true, true], 1));
    assert_eq!(unpack("Replaces: b\n", "Replaces: a\n", b()), ("from b".into(), [false, true], 0));
}

#[test]
fn a_link_in_one_package_and_a_folder_in_another_is_a_conflict() {
    for names in [["a", "b"], ["b", "a"]] {
        let mut bench = Bench::new();
        bench.add(names[0], "", &[], &[link("x", "y")]);
        bench.add(names[1], "", &[], &[folder("x/")]);
        let conflicts = bench.run().unwrap().conflicts;
        assert_eq!(conflicts.len(), 1, "{conflicts:?}");
        assert_eq!(conflicts[0].path, b"/x");
    }
}

#[test]
fn excluded_files_are_listed_but_not_there() {
    let mut bench = Bench::new();
    bench.excludes =
        Excludes::default().exclude("/usr/share/doc/*").include("/usr/share/doc/*/copyright");
    bench.add(
        "p",
        "",
        &[],
        &[
            folder("./usr/share/doc/p/"),
            file("./usr/share/doc/p/README", "x"),
            file("./usr/share/doc/p/copyright", "x"),
        ],
    );
    let list = bench.run().unwrap().packages.remove(0).list;
    assert_eq!(list.len(), 3);
    assert!(!bench.root().join("usr/share/doc/p/README").exists());
    assert!(bench.root().join("usr/share/doc/p/copyright").exists());
}

#[test]
fn conffiles_wait_beside_their_places_and_tools_have_them_in_place() {
    let mut bench = Bench::new();
    let conffiles = [("conffiles", "/etc/p\n"), ("md5sums", "")];
    bench.add("p", "", &conffiles, &[folder("etc/"), file("etc/p", "hello\n")]);
    if is_root() {
        let package = bench.run().unwrap().packages.remove(0);
        assert_eq!(package.conffiles[0].md5.as_deref(), Some("b1946ac92492d2347c6235b4d2611184"));
        assert!(
            bench.root().join("etc/p.dpkg-new").exists() && !bench.root().join("etc/p").exists()
        );
    }
    bench.purpose = Purpose::Tools;
    bench.run().unwrap();
    assert!(bench.root().join("etc/p").exists());
}

#[test]
fn an_artifact_belongs_to_root_and_stays_inside() {
    let dir = tempfile::tempdir().unwrap();
    let unpack = |entries: &[Vec<u8>]| {
        let bytes = [&entries.concat()[..], &[0; 1024]].concat();
        let bytes = crate::debian::package::tests::compress(&bytes, ".gz");
        let tar = package::open_tar(std::io::Cursor::new(bytes), "a.tar.gz", 1 << 20).unwrap();
        let purpose = if is_root() { Purpose::Install } else { Purpose::Tools };
        unpack_tar(tar, "a.tar.gz", dir.path(), 0, purpose)
    };
    let theirs = edit_entry(b"bin/etcd", b'0', b"", b"x", |header| header.set_uid(1001));
    assert_eq!(unpack(&[folder("bin/"), theirs]).unwrap(), 2);
    assert_eq!(
        fs::metadata(dir.path().join("bin/etcd")).unwrap().uid(),
        rustix::process::geteuid().as_raw()
    );
    let error = format!("{:#}", unpack(&[file("../x", "")]).unwrap_err());
    assert!(error.contains("a.tar.gz"), "{error}");
}

#[test]
fn real_packages_unpack_as_dpkg_deb_unpacks_them() {
    let Some(debs) = std::env::var_os("STANCHION_TEST_DEBS") else {
        println!("skipped: STANCHION_TEST_DEBS names no folder of packages");
        return;
    };
    let mut bench = Bench::new();
    bench.purpose = Purpose::Tools;
    for entry in fs::read_dir(debs).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "deb") {
            continue;
        }
        let name =
            path.file_name().unwrap().to_str().unwrap().split('_').next().unwrap().to_string();
        bench.debs.push(DebFile { name, path, limit: 4 << 30 });
    }
    bench.debs.sort_by(|a, b| a.name.cmp(&b.name));
    let began = std::time::Instant::now();
    let unpacking = bench.run().unwrap();
    println!(
        "{} packages in {:?}, conflicts: {:?}",
        bench.debs.len(),
        began.elapsed(),
        unpacking.conflicts
    );
    let oracle = bench.dir.path().join("oracle");
    fs::create_dir(&oracle).unwrap();
    let mut order: Vec<&DebFile> = bench.debs.iter().collect();
    order.sort_by_key(|deb| deb.name != "base-files");
    for deb in order {
        crate::command::Command::new("sh")
            .args(["-c", "dpkg-deb --fsys-tarfile \"$1\" | tar -C \"$2\" -xp --keep-directory-symlink --no-overwrite-dir --no-same-owner -f -", "-"])
            .arg(&deb.path)
            .arg(&oracle)
            .run()
            .unwrap();
    }
    let strip = |root: &Path| {
        let mut tree = describe_tree(root);
        // tar sets the times of folders anew for every package.
        for shown in tree.values_mut().filter(|shown| shown.starts_with('4')) {
            shown.truncate(6);
        }
        tree
    };
    let (ours, theirs) = (strip(&bench.root()), strip(&oracle));
    let differing: Vec<_> = theirs
        .iter()
        .filter(|(k, v)| ours.get(*k) != Some(v))
        .take(20)
        .map(|(k, v)| (k, v, ours.get(k)))
        .collect();
    assert!(differing.is_empty(), "{differing:#?}");
    assert_eq!(ours.len(), theirs.len());
}
