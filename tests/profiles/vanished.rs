//! Locked packages that the mirror has no more.

use std::fs;
use std::path::{Path, PathBuf};

use stanchion::debian::mirror::{Mirror, Places};
use stanchion::digest::Digest;
use stanchion::fetch::Fetcher;
use stanchion::lock::LockedPackage;
use stanchion::sandbox::Sandbox;
use stanchion::store::Store;

use crate::{Copy, find_mirror, find_today};

/// A package that nothing else needs.
const LEAF: &str = "hostname";

/// Replace the leaf's paragraph in the lock by that of another .deb of the given version.
fn replace_leaf(project: &Copy, version: &str, deb: &[u8]) -> LockedPackage {
    let old = project.lock().find_package(LEAF).expect("the lock has the leaf").clone();
    let path = format!("pool/main/h/{LEAF}/{LEAF}_{version}_amd64.deb");
    project.edit("stanchion.lock", |text| {
        let digest = Digest::of(deb).to_string();
        let text = text.replace(&old.sha256.to_string(), &digest).replace(&old.path, &path);
        let (head, tail) = text.split_once(&format!("name = \"{LEAF}\"\n")).unwrap();
        let size = (format!("size = {}\n", old.size), format!("size = {}\n", deb.len()));
        let new = format!("version = \"{version}\"\n");
        let tail = tail.replacen(&format!("version = \"{}\"\n", old.version), &new, 1);
        format!("{head}name = \"{LEAF}\"\n{}", tail.replacen(&size.0, &size.1, 1))
    });
    assert_eq!(project.lock().find_package(LEAF).unwrap().version.to_string(), version);
    old
}

/// Give the project's store what the user's has, without a copy where that can be.
fn share_downloads(project: &Copy) {
    let ours = project.path("cache/stanchion/files");
    fs::create_dir_all(&ours).unwrap();
    let theirs = Store::default_root().unwrap().join("files");
    for entry in fs::read_dir(theirs).into_iter().flatten() {
        let path = entry.unwrap().path();
        let to = ours.join(path.file_name().unwrap());
        if fs::hard_link(&path, &to).is_err() {
            fs::copy(&path, &to).unwrap();
        }
    }
}

#[test]
fn a_vanished_package_is_replaced_with_a_warning_and_never_under_locked() {
    if find_mirror().is_none() {
        return;
    }
    let project = Copy::with_empty_store();
    share_downloads(&project);
    let Some(sandbox) = find_sandbox(&project) else { return };
    let old = replace_leaf(&project, "0.9", b"this is nowhere");
    // What replaces it is not there yet either.
    let _ = fs::remove_file(project.path("cache/stanchion/files").join(old.sha256.to_string()));
    let broken = project.read_lock();
    let out = project.path("out");
    let build = ["build", "db", "--format", "raw", "--out", out.to_str().unwrap()];

    let said = project.fail(&[&build[..], &["--locked"]].concat());
    assert!(said.contains("the mirror no longer has packages that the lock names"), "{said}");
    assert!(said.contains(&format!("why: {LEAF} 0.9\n")), "{said}");
    assert!(said.contains(&format!("`stanchion lock --update {LEAF}`")), "{said}");
    assert_eq!(project.read_lock(), broken);
    assert!(!out.join("db.raw").exists());

    let said = project.succeed(&build);
    let renewed = project.lock();
    let new = renewed.find_package(LEAF).unwrap();
    assert!(new.version >= old.version && new.sha256 != Digest::of(b"this is nowhere"));
    assert!(said.contains("warning: the mirror no longer has packages"), "{said}");
    assert!(said.contains(&format!("warning: {LEAF} 0.9 -> {}", new.version)), "{said}");
    assert!(out.join("db.raw").is_file() && out.join("db.manifest.json").is_file());
    let manifest = fs::read_to_string(out.join("db.manifest.json")).unwrap();
    assert!(manifest.contains(&new.sha256.to_string()), "the image has another {LEAF}");

    // The advice that was given helps, too.
    fs::write(project.path("stanchion.lock"), broken).unwrap();
    project.succeed(&["lock", "--update", LEAF]);
    assert_eq!(project.lock(), renewed);
    // Layers hold files of other owners.
    sandbox.remove_tree(&project.path("cache")).unwrap();
}

/// `None`, with a line that says so, where nothing can be built.
pub fn find_sandbox(project: &Copy) -> Option<Sandbox> {
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_stanchion"));
    let failed = sandbox.probe(&project.path(".")).into_iter().find(|check| !check.ok);
    if let Some(check) = failed {
        eprintln!("skipped: {}: {}", check.name, check.detail);
        return None;
    }
    Some(sandbox)
}

/// A mirror with today's lists and without packages, as `--mirror` takes it.
fn make_torn_mirror(root: &Path) -> String {
    let today = find_today().unwrap();
    let fetcher = Fetcher::new(1, false).unwrap();
    let store = Store::open(&Store::default_root().unwrap()).unwrap();
    let torn = Mirror::find(&Places {
        flag: Some(format!("file://{}/debian", root.display())),
        ..Places::default()
    })
    .unwrap();
    for suite in &today.suites {
        let folder = format!("dists/{}", suite.name);
        let index = format!("{folder}/main/binary-amd64/Packages.xz");
        let to = |path: &str| {
            let url = torn.locate(suite.pool_base, path);
            let path = PathBuf::from(url.strip_prefix("file://").unwrap());
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            path
        };
        let release = format!("{folder}/InRelease");
        let bytes = fetcher.fetch_bytes(&today.mirror.locate(suite.pool_base, &release), 4 << 20);
        fs::write(to(&release), bytes.unwrap()).unwrap();
        let (digest, _) = suite.release.find_file("main/binary-amd64/Packages.xz").unwrap();
        fs::copy(store.file_path(&digest), to(&index)).unwrap();
    }
    torn.main
}

#[test]
fn a_mirror_that_lists_what_it_does_not_have_is_told_and_the_lock_stays() {
    let Some(today) = find_today() else { return };
    let project = Copy::with_empty_store();
    if find_sandbox(&project).is_none() {
        return;
    }
    share_downloads(&project);
    fs::write(project.path("stanchion.lock"), &today.text).unwrap();
    let leaf = today.lock.find_package(LEAF).unwrap();
    let _ = fs::remove_file(project.path("cache/stanchion/files").join(leaf.sha256.to_string()));
    let mirror = make_torn_mirror(&project.path("mirror"));
    let out = project.path("out");
    let build = ["build", "db", "--mirror", &mirror, "--out", out.to_str().unwrap()];
    let said = project.fail(&build);
    assert!(said.contains("error: the mirror lists packages that it does not have\n"), "{said}");
    assert!(said.contains(&format!("{LEAF} {}", leaf.version)), "{said}");
    assert!(!said.contains("warning: "), "{said}");
    assert_eq!(project.read_lock(), today.text);
}

/// A .deb (deb(5)) of the leaf with nothing in it.
fn make_deb(version: &str) -> Vec<u8> {
    let control = format!(
        "Package: {LEAF}\nVersion: {version}\nArchitecture: amd64\nMaintainer: nobody\n\
         Essential: yes\nDescription: made by a test\n"
    );
    let mut members = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(control.len() as u64);
    header.set_mode(0o644);
    members.append_data(&mut header, Path::new("control"), control.as_bytes()).unwrap();
    let control = members.into_inner().unwrap();
    let data = tar::Builder::new(Vec::new()).into_inner().unwrap();
    let mut deb = b"!<arch>\n".to_vec();
    for (name, bytes) in
        [("debian-binary", &b"2.0\n"[..]), ("control.tar", &control), ("data.tar", &data)]
    {
        let size = bytes.len();
        deb.extend(
            format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`\n", 0, 0, 0, 100644).bytes(),
        );
        deb.extend(bytes);
        deb.resize(deb.len().next_multiple_of(2), b'\n');
    }
    deb
}

#[test]
fn a_version_that_is_insisted_on_stays_while_the_store_has_it() {
    if find_mirror().is_none() {
        return;
    }
    let project = Copy::with_empty_store();
    let deb = make_deb("0.9");
    let old = replace_leaf(&project, "0.9", &deb);
    let file = project.path("cache/stanchion/files").join(Digest::of(&deb).to_string());
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, &deb).unwrap();
    project.edit("layers/base/layer.toml", |text| {
        text.replacen("\"kmod\"", &format!("\"{LEAF}=0.9\",\n  \"kmod\""), 1)
    });
    project.succeed(&["lock"]);
    let locked = project.lock();
    let kept = locked.find_package(LEAF).unwrap();
    assert_eq!((kept.version.to_string(), kept.sha256), ("0.9".to_string(), Digest::of(&deb)));

    fs::remove_file(&file).unwrap();
    let said = project.fail(&["lock", "--update", LEAF]);
    assert!(said.contains(&format!("error: {LEAF} is not to be had in version 0.9\n")), "{said}");
    assert!(
        said.contains("the lock has it, but neither the mirror's lists nor the store"),
        "{said}"
    );
    assert!(said.contains(&old.version.to_string()), "{said}");
}
