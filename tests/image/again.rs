//! The same bytes, whoever builds, wherever and however.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use stanchion::command::Command;
use stanchion::digest::Digest;
use stanchion::pipeline::Manifest;
use stanchion::store::Store;
use stanchion::tools::set;

use crate::support::{self, Image, PROFILE, PROGRAM};

/// A folder in which everything is new but the downloads.
struct Elsewhere {
    folder: tempfile::TempDir,
}

impl Elsewhere {
    fn new(project: &str) -> Elsewhere {
        let folder = tempfile::tempdir_in(support::scratch()).unwrap();
        let make = |name: &str| fs::create_dir_all(folder.path().join(name)).unwrap();
        make("home");
        make("cache/stanchion/files");
        support::copy_project(&folder.path().join(project));
        for entry in fs::read_dir(Store::default_root().unwrap().join("files")).unwrap() {
            let entry = entry.unwrap();
            let to = folder.path().join("cache/stanchion/files").join(entry.file_name());
            if fs::hard_link(entry.path(), &to).is_err() {
                fs::copy(entry.path(), &to).unwrap();
            }
        }
        Elsewhere { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn describe_build(&self, project: &str, program: &Path) -> Command {
        Command::new(program)
            .args(["--quiet", "build", PROFILE, "--offline", "--locked", "--format", "raw"])
            .arg("--project")
            .arg(self.path(project))
            .arg("--out")
            .arg(self.path("out"))
            .directory(self.folder.path())
            .clear_env()
            .env("HOME", self.path("home"))
            .env("XDG_CACHE_HOME", self.path("cache"))
    }

    /// Build, and compare with the image that was built in the usual way.
    fn check(&self, build: Command, image: &Image) {
        let began = Instant::now();
        build.run().unwrap_or_else(|error| panic!("{error:?}"));
        println!("a build without a cache: {:.1} s", began.elapsed().as_secs_f64());
        let manifest = Manifest::load(&self.path("out"), PROFILE).unwrap();
        assert_eq!(manifest.layers, image.manifest.layers);
        assert_eq!(manifest.key, image.manifest.key);
        assert_eq!(manifest.root_hash, image.manifest.root_hash);
        let digest = |path: &Path| Digest::of_file(path).unwrap();
        assert_eq!(digest(&self.path("out/db.raw")), digest(&image.raw));
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        // An ordinary user's layers belong to subordinate ids.
        let sandbox = stanchion::sandbox::Sandbox::new(PROGRAM);
        let _ = sandbox.remove_tree(&self.path("cache"));
    }
}

/// One build at a time.
static TURN: Mutex<()> = Mutex::new(());

#[test]
fn another_folder_time_zone_language_umask_and_path_give_the_same_bytes() {
    let Some(image) = support::provide(&[set::CHECK, set::BUILD]) else { return };
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let elsewhere = Elsewhere::new("a project of another name");
    let build = elsewhere
        .describe_build("a project of another name", Path::new(PROGRAM))
        // No program of this machine is needed.
        .env("PATH", "/nonexistent")
        .env("TZ", "Pacific/Kiritimati")
        .env("LANG", "tr_TR.UTF-8")
        .env("LC_ALL", "tr_TR.UTF-8")
        .env("SOURCE_DATE_EPOCH", "1")
        .env("TMPDIR", "/nonexistent")
        .args(["--jobs", "1"]);
    // SAFETY: umask is async-signal-safe.
    let build = unsafe {
        build.before_exec(|| {
            rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
            Ok(())
        })
    };
    elsewhere.check(build, image);
}

#[test]
fn an_ordinary_user_gets_the_same_bytes_as_root() {
    let Some(image) = support::provide(&[set::CHECK, set::BUILD]) else { return };
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: the build as root: this is not root");
        return;
    }
    let Some(user) = find_user() else {
        eprintln!("skipped: no ordinary user has 65535 subordinate ids, or newuidmap is missing");
        return;
    };
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let elsewhere = Elsewhere::new("project");
    for name in ["", "home", "cache", "cache/stanchion", "cache/stanchion/files"] {
        chown(elsewhere.path(name), Some(user.uid), Some(user.gid)).unwrap();
    }
    // The folder of the build may be closed to others.
    let program = elsewhere.path("stanchion");
    fs::copy(PROGRAM, &program).unwrap();
    let become_user = |command: Command| {
        let User { uid, gid, .. } = user;
        // SAFETY: these system calls are async-signal-safe.
        unsafe {
            command.before_exec(move || {
                let done = libc::setgroups(0, std::ptr::null()) == 0
                    && libc::setgid(gid) == 0
                    && libc::setuid(uid) == 0;
                if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
            })
        }
    };
    if become_user(Command::new(&program).arg("--version")).run().is_err() {
        eprintln!("skipped: user {} cannot reach {}", user.name, program.display());
        return;
    }
    let build = elsewhere.describe_build("project", &program).env("PATH", "/nonexistent");
    elsewhere.check(become_user(build), image);
    let owner = fs::metadata(elsewhere.path("out/db.raw")).unwrap().uid();
    assert_eq!(owner, user.uid);
}

struct User {
    name: String,
    uid: u32,
    gid: u32,
}

/// The first user of `/etc/passwd` but root who may map enough ids.
fn find_user() -> Option<User> {
    if !["newuidmap", "newgidmap"].iter().all(|name| Path::new("/usr/bin").join(name).exists()) {
        return None;
    }
    let has_ids = |file: &str, name: &str, id: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        text.lines().any(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            fields.len() == 3
                && (fields[0] == name || fields[0] == id)
                && fields[2].parse().is_ok_and(|count: u32| count >= 65535)
        })
    };
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let (name, uid, gid) = (*fields.first()?, *fields.get(2)?, fields.get(3)?);
        let fits =
            uid != "0" && has_ids("/etc/subuid", name, uid) && has_ids("/etc/subgid", name, uid);
        fits.then_some(User {
            name: name.to_string(),
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
        })
    })
}
