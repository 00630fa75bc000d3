use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

use super::*;
use crate::command::Command;
use crate::rootfs::exclude::Excludes;
use crate::rootfs::extract::tests::describe_tree;
use crate::rootfs::extract::{DebFile, Options, Purpose, Unpacking, unpack_all};

/// A package made by dpkg-deb: control fields, control members, and a tree made by `fill`.
fn build_deb(
    dir: &Path,
    name: &str,
    fields: &str,
    members: &[(&str, &str)],
    compression: &str,
    fill: impl FnOnce(&Path),
) -> PathBuf {
    let tree = dir.join(format!("tree-{name}"));
    fs::create_dir_all(tree.join("DEBIAN")).unwrap();
    let fields = if fields.contains("Architecture:") {
        fields.to_string()
    } else {
        format!("Architecture: all\n{fields}")
    };
    let control = format!(
        "Package: {name}\nVersion: 1.0-1\nMaintainer: A <a@example.org>\n{fields}Description: {name}\n A test.\n .\n With two paragraphs.\n"
    );
    fs::write(tree.join("DEBIAN/control"), control).unwrap();
    for (member, content) in members {
        let path = tree.join("DEBIAN").join(member);
        fs::write(&path, content).unwrap();
        let mode = if content.starts_with("#!") { 0o755 } else { 0o644 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    fill(&tree);
    let deb = dir.join(format!("{name}.deb"));
    Command::new("dpkg-deb")
        .args(["--root-owner-group", "-Z", compression, "--build"])
        .arg(&tree)
        .arg(&deb)
        .env("SOURCE_DATE_EPOCH", "1700000000")
        .run()
        .unwrap();
    deb
}

fn write(tree: &Path, path: &str, content: &str) {
    let path = tree.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// Runs dpkg with scripts outside a chroot, because these roots have no shell.
fn run_dpkg(root: &Path, args: &[&str]) -> String {
    let output = Command::new("dpkg")
        .args(["--force-script-chrootless", "--no-pager", "--force-bad-path"])
        .arg(format!("--root={}", root.display()))
        .args(args)
        .env("LC_ALL", "C.UTF-8")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .run();
    let output = output.unwrap_or_else(|error| panic!("dpkg {args:?}: {error:#}"));
    String::from_utf8(output.stdout).unwrap()
}

fn make_database(root: &Path) {
    for folder in ["info", "updates", "triggers"] {
        fs::create_dir_all(root.join("var/lib/dpkg").join(folder)).unwrap();
    }
    for file in ["status", "available", "diversions", "statoverride"] {
        fs::write(root.join("var/lib/dpkg").join(file), "").unwrap();
    }
    fs::write(root.join("var/lib/dpkg/info/format"), "1\n").unwrap();
}

fn has_oracle() -> bool {
    let root = rustix::process::geteuid().is_root();
    let dpkg = Command::new("dpkg-deb").arg("--version").run().is_ok();
    if !(root && dpkg) {
        println!("skipped: comparing with dpkg needs root and dpkg");
    }
    root && dpkg
}

const LOG: &str = "#!/bin/sh\necho \"$DPKG_MAINTSCRIPT_PACKAGE $DPKG_MAINTSCRIPT_NAME $*\" >> \"$DPKG_ROOT/log\"\n";

/// What the first layer has: packages that are interested in triggers, one that has a
/// file taken over, one that diverts.
fn make_first(dir: &Path) -> Vec<PathBuf> {
    let interests =
        "interest-noawait /usr/lib/plugins\ninterest /usr/lib/awaited\ninterest refresh\n";
    vec![
        build_deb(dir, "cache", "", &[("triggers", interests), ("postinst", LOG)], "xz", |tree| {
            write(tree, "usr/lib/plugins/first", "1");
            write(tree, "etc/cache.conf", "old owner\n");
        }),
        build_deb(dir, "old", "", &[], "xz", |tree| {
            write(tree, "usr/bin/moved", "old\n");
            write(tree, "usr/bin/kept", "old\n");
            write(tree, "usr/bin/diverted", "old\n");
        }),
        build_deb(dir, "strong", "Replaces: weak (<< 2)\n", &[], "xz", |tree| {
            write(tree, "usr/bin/strong", "strong\n");
        }),
    ]
}

/// What the second layer adds.
fn make_second(dir: &Path) -> Vec<PathBuf> {
    let activate = "activate-noawait refresh\n# a comment\n\ninterest /usr/share/new\ninterest-noawait own-trigger\n";
    vec![
        build_deb(
            dir,
            "conf",
            "Section: misc\nMulti-Arch: foreign\n",
            &[
                ("conffiles", "/etc/conf/a\n/etc/conf/b\n"),
                ("postinst", LOG),
                ("prerm", LOG),
                ("md5sums", ""),
            ],
            "gzip",
            |tree| {
                write(tree, "etc/conf/a", "a\n");
                write(tree, "etc/conf/b", "b\n");
                fs::set_permissions(tree.join("etc/conf/b"), fs::Permissions::from_mode(0o640))
                    .unwrap();
            },
        ),
        build_deb(
            dir,
            "libsame",
            "Architecture: amd64\nMulti-Arch: same\n",
            &[
                ("triggers", activate),
                ("shlibs", "libsame 1 libsame\n"),
                ("symbols", "libsame.so.1 libsame #MINVER#\n"),
                ("postinst", LOG),
                ("postrm", LOG),
            ],
            "none",
            |tree| {
                write(tree, "usr/lib/x86_64-linux-gnu/libsame.so.1.0", "elf");
                symlink("libsame.so.1.0", tree.join("usr/lib/x86_64-linux-gnu/libsame.so.1"))
                    .unwrap();
                write(tree, "usr/lib/plugins/same", "p");
            },
        ),
        build_deb(
            dir,
            "linked",
            "Depends: conf\n",
            &[("postinst", LOG), ("templates", "Template: a/b\nType: note\n"), ("config", LOG)],
            "zstd",
            |tree| {
                write(tree, "usr/bin/one", "one\n");
                fs::hard_link(tree.join("usr/bin/one"), tree.join("usr/bin/two")).unwrap();
                fs::set_permissions(tree.join("usr/bin/one"), fs::Permissions::from_mode(0o4755))
                    .unwrap();
                write(tree, "usr/lib/awaited/x", "x");
                write(tree, "usr/share/doc/linked/README", "read\n");
                write(tree, "usr/share/doc/linked/copyright", "copy\n");
                fs::create_dir_all(tree.join(format!("usr/share/{}", "long-name/".repeat(12))))
                    .unwrap();
            },
        ),
        build_deb(dir, "taker", "Replaces: old, conf\n", &[("postinst", LOG)], "xz", |tree| {
            write(tree, "usr/bin/moved", "new\n");
            write(tree, "etc/conf/c", "not a conffile\n");
            write(tree, "usr/share/new/x", "x");
        }),
        build_deb(dir, "weak", "", &[("md5sums", "")], "xz", |tree| {
            write(tree, "usr/bin/strong", "weak\n");
            write(tree, "usr/bin/weak", "weak\n");
            write(tree, "usr/bin/diverted", "weak\n");
        }),
    ]
}

fn unpack(root: &Path, debs: &[PathBuf], excludes: &Excludes) -> Unpacking {
    let debs: Vec<DebFile> = debs
        .iter()
        .map(|path| DebFile {
            name: path.file_stem().unwrap().to_str().unwrap().to_string(),
            path: path.clone(),
            limit: 1 << 24,
        })
        .collect();
    let options = Options { purpose: Purpose::Install, threads: 2, excludes };
    unpack_all(&debs, root, &options).unwrap()
}

/// The database and the tree, without what says when something ran.
fn describe_root(root: &Path) -> (BTreeMap<String, String>, BTreeMap<String, String>) {
    let mut tree = describe_tree(root);
    tree.retain(|name, _| !name.starts_with("var/lib/dpkg") && name != "log");
    for shown in tree.values_mut().filter(|shown| shown.starts_with('4')) {
        shown.truncate(9);
    }
    let base = root.join("var/lib/dpkg");
    let mut database = BTreeMap::new();
    for folder in ["", "info", "triggers"] {
        for entry in fs::read_dir(base.join(folder)).unwrap() {
            let entry = entry.unwrap();
            let name = entry.path().strip_prefix(&base).unwrap().to_str().unwrap().to_string();
            let skipped =
                ["lock", "-old", "Lock", "lock-frontend"].iter().any(|end| name.ends_with(end));
            if entry.file_type().unwrap().is_dir() || skipped {
                continue;
            }
            let mode = entry.metadata().unwrap().permissions().mode();
            let text = String::from_utf8(fs::read(entry.path()).unwrap()).unwrap();
            database.insert(name, format!("{mode:o}\n{text}"));
        }
    }
    (database, tree)
}

fn compare(ours: &BTreeMap<String, String>, theirs: &BTreeMap<String, String>) {
    for name in ours.keys().chain(theirs.keys()) {
        assert_eq!(ours.get(name), theirs.get(name), "{name}");
    }
}

#[test]
fn a_layer_ends_as_stock_dpkg_would_have_left_it() {
    if !has_oracle() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (make_first(dir.path()), make_second(dir.path()));
    let stock = dir.path().join("stock");
    fs::create_dir(&stock).unwrap();
    make_database(&stock);
    let paths =
        |debs: &[PathBuf]| debs.iter().map(|deb| deb.display().to_string()).collect::<Vec<_>>();
    let with = |verb: &'static str, debs: &[String]| {
        let mut args = vec![
            verb,
            "--path-exclude=/usr/share/doc/*",
            "--path-include=/usr/share/doc/*/copyright",
        ];
        args.extend(debs.iter().map(String::as_str));
        args.into_iter().map(String::from).collect::<Vec<String>>()
    };
    run_dpkg(
        &stock,
        &with("--install", &paths(&first)).iter().map(String::as_str).collect::<Vec<_>>(),
    );
    fs::write(
        stock.join("var/lib/dpkg/diversions"),
        "/usr/bin/diverted\n/usr/bin/diverted.weak\nold\n",
    )
    .unwrap();
    fs::remove_file(stock.join("log")).unwrap();
    let ours = dir.path().join("ours");
    Command::new("cp").args(["-a"]).arg(&stock).arg(&ours).run().unwrap();

    run_dpkg(
        &stock,
        &with("--unpack", &paths(&second)).iter().map(String::as_str).collect::<Vec<_>>(),
    );
    let excludes =
        Excludes::default().exclude("/usr/share/doc/*").include("/usr/share/doc/*/copyright");
    let unpacking = unpack(&ours, &second, &excludes);
    assert_eq!(unpacking.conflicts, []);
    register(&ours, &unpacking.packages).unwrap();

    // Before dpkg goes on, all is equal but the triggers it has not taken in yet.
    let (our_database, our_tree) = describe_root(&ours);
    let (stock_database, stock_tree) = describe_root(&stock);
    compare(&our_tree, &stock_tree);
    for (name, text) in stock_database.iter().filter(|(name, _)| name.starts_with("info/")) {
        assert_eq!(our_database.get(name), Some(text), "{name}");
    }

    for root in [&stock, &ours] {
        run_dpkg(root, &["--configure", "-a"]);
        assert_eq!(run_dpkg(root, &["--audit"]), "");
    }
    let (our_database, our_tree) = describe_root(&ours);
    let (stock_database, stock_tree) = describe_root(&stock);
    compare(&our_database, &stock_database);
    compare(&our_tree, &stock_tree);
    assert_eq!(run_dpkg(&ours, &["--verify"]), run_dpkg(&stock, &["--verify"]));
    let read_log = |root: &Path| {
        let mut lines: Vec<String> =
            fs::read_to_string(root.join("log")).unwrap().lines().map(String::from).collect();
        for line in &mut lines {
            // The order of a package's triggers is that of activation.
            let mut words: Vec<&str> = line.split(' ').collect();
            words[3..].sort();
            *line = words.join(" ");
        }
        lines.sort();
        lines
    };
    // Stock dpkg may run a trigger early and once more; here each runs once, at the end.
    let (triggered, log): (Vec<_>, Vec<_>) =
        read_log(&ours).into_iter().partition(|line| line.contains("postinst triggered"));
    assert_eq!(triggered, ["cache postinst triggered /usr/lib/awaited /usr/lib/plugins refresh"]);
    let mut stock_log = read_log(&stock);
    stock_log.retain(|line| !line.contains("postinst triggered"));
    assert_eq!(log, stock_log);
    let status = &our_database["status"];
    assert!(status.contains(" /etc/conf/a 60b725f10c9c85c70d97880dfe8191b3\n"), "{status}");
    assert!(!status.contains("newconffile") && !status.contains("unpacked"), "{status}");
}

#[test]
fn a_root_made_from_nothing_is_clean_after_configure() {
    if !has_oracle() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let debs: Vec<PathBuf> =
        make_first(dir.path()).into_iter().chain(make_second(dir.path())).collect();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let unpacking = unpack(&root, &debs, &Excludes::default());
    // Nothing diverts it here.
    assert_eq!(unpacking.conflicts.len(), 1);
    assert_eq!(unpacking.conflicts[0].path, b"/usr/bin/diverted");
    register(&root, &unpacking.packages).unwrap();
    run_dpkg(&root, &["--configure", "-a"]);
    assert_eq!(run_dpkg(&root, &["--audit"]), "");
    let log = fs::read_to_string(root.join("log")).unwrap();
    assert!(!log.contains("triggered"), "{log}");
    // The loser of the conflict has sums of its own file.
    let verified = run_dpkg(&root, &["--verify"]);
    assert!(verified.lines().all(|line| line.ends_with("/usr/bin/diverted")), "{verified}");
    let error = register(&root, &unpacking.packages).unwrap_err();
    assert!(format!("{error:#}").contains("installed already"), "{error:#}");
}

#[test]
fn a_file_that_an_installed_package_keeps_is_a_conflict() {
    if !has_oracle() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let old = build_deb(dir.path(), "old", "", &[], "xz", |tree| write(tree, "usr/bin/x", "old"));
    let new = build_deb(dir.path(), "new", "", &[], "xz", |tree| write(tree, "usr/bin/x", "new"));
    register(&root, &unpack(&root, &[old], &Excludes::default()).packages).unwrap();
    let conflicts = unpack(&root, &[new], &Excludes::default()).conflicts;
    assert_eq!(conflicts.len(), 1);
    assert_eq!((&conflicts[0].kept[..], &conflicts[0].dropped[..]), ("old", "new"));
    assert_eq!(fs::read_to_string(root.join("usr/bin/x")).unwrap(), "old");
}

/// An unpacked package with these members and nothing else.
fn make_unpacked(control: &str, members: &[(&str, &str)]) -> Unpacked {
    let mut all = BTreeMap::from([("control".to_string(), (0o644, control.as_bytes().to_vec()))]);
    for (name, content) in members {
        all.insert(name.to_string(), (0o755, content.as_bytes().to_vec()));
    }
    Unpacked {
        name: "p".into(),
        control: all,
        list: vec![b"/.".to_vec()],
        conffiles: Vec::new(),
        md5sums: None,
        taken: Vec::new(),
    }
}

#[test]
fn hostile_names_do_not_leave_the_database() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let good = "Package: p\nVersion: 1\nArchitecture: all\n";
    for (control, members) in [
        ("Package: ../../../p\nVersion: 1\nArchitecture: all\n", &[][..]),
        ("Package: p\nVersion: 1\nArchitecture: ../x\nMulti-Arch: same\n", &[]),
        (good, &[("triggers", "interest ../../x\n")]),
        (good, &[("triggers", "interest File\n")]),
        (good, &[("triggers", "interest /a//b\n")]),
        (good, &[("triggers", "interest\n")]),
        (good, &[("triggers", "delete x\n")]),
        ("no control file", &[]),
    ] {
        let error = register(&root, &[make_unpacked(control, members)]).unwrap_err();
        assert!(format!("{error:#}").contains("the package p"), "{error:#}");
    }
    assert_eq!(fs::read_to_string(root.join("var/lib/dpkg/status")).unwrap_or_default(), "");
}

#[test]
fn a_package_cannot_bring_fields_of_the_database() {
    let dir = tempfile::tempdir().unwrap();
    let control = "Package: p\nStatus: install ok installed\nConffiles:\n /etc/x 00\nVersion: 1\nArchitecture: all\nDepends:\n a,\n b\nDescription: d\n e\n";
    register(dir.path(), &[make_unpacked(control, &[])]).unwrap();
    let status = fs::read_to_string(dir.path().join("var/lib/dpkg/status")).unwrap();
    assert_eq!(
        status,
        "Package: p\nStatus: install ok unpacked\nVersion: 1\nArchitecture: all\nDepends: a,\n b\nDescription: d\n e\n\n"
    );
}
