//! The program as a user starts it: in a project of its own, with a store of its own.

#[allow(dead_code, reason = "other tests copy whole projects")]
#[path = "copy.rs"]
mod copy;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use copy::copy_tree;
use stanchion::lock::{Lock, LockedSet, SetRequest};
use tempfile::TempDir;

/// A project, and a place for a store and for images beside it.
pub struct Project {
    folder: TempDir,
}

/// How a run of the program ended.
#[derive(Debug)]
pub struct Ran {
    /// `None`: it was killed by a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

/// The profile of the tests: Debian's base and kernel, and a layer to try things in.
pub const TINY: &str = "description = \"tiny\"\nlayers = [\"base\", \"kernel\", \"extra\"]\n\
    formats = [\"raw\", \"qcow2\"]\n\
    [disk]\nsize = \"1GiB\"\nslot = \"256MiB\"\nesp = \"128MiB\"\n";

impl Project {
    /// A project of these files, by path and text.
    pub fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("project-")
            .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .unwrap();
        let project = Project { folder };
        for path in ["project/profiles", "project/layers", "cache"] {
            fs::create_dir_all(project.folder.path().join(path)).unwrap();
        }
        files.iter().for_each(|(path, text)| project.write(path, text));
        project
    }

    /// The repository's layers under a profile `tiny`, whose layer `extra` has these lines
    /// after its description and no packages. The lock is the repository's.
    pub fn tiny(extra: &str) -> Self {
        let project = Project::new(&[("profiles/tiny.toml", TINY)]);
        copy_tree(&repository().join("layers"), &project.root().join("layers"));
        project.write_extra(extra);
        let mut lock = load_lock();
        add_set(&mut lock, "base+kernel+extra", Some("base+kernel"), &[], false);
        lock.save(&project.root().join("stanchion.lock")).unwrap();
        project
    }

    pub fn write_extra(&self, lines: &str) {
        let text = format!("description = \"extra\"\n{lines}\n");
        self.write("layers/extra/layer.toml", &text);
    }

    pub fn write(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub fn root(&self) -> PathBuf {
        self.folder.path().join("project")
    }

    /// `XDG_CACHE_HOME`.
    pub fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    pub fn store(&self) -> PathBuf {
        self.cache().join("stanchion")
    }

    /// The folder for images when no other is named.
    pub fn out(&self) -> PathBuf {
        self.root().join("out")
    }

    /// The program with these arguments, in the project's folder.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stanchion"));
        command
            .args(args)
            .current_dir(self.root())
            .env("XDG_CACHE_HOME", self.cache())
            .env("XDG_CONFIG_HOME", self.folder.path())
            .env("NO_PROXY", "127.0.0.1")
            .env_remove("STANCHION_MIRROR")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        run(self.command(args))
    }

    /// Give it the downloads that this machine's store has, and nothing else.
    pub fn link_downloads(&self) {
        let to = self.store().join("files");
        fs::create_dir_all(&to).unwrap();
        link_files(&shared_store().join("files"), &to);
    }

    /// Give it a store in which Debian's base, the kernel and the tools are built; the
    /// outcome is this test's alone.
    pub fn copy_store(&self) {
        let copied = Command::new("cp")
            .args(["-al", "--no-target-directory"])
            .args([shared_store(), &self.store()])
            .status();
        assert!(copied.unwrap().success(), "copying the store by hard links");
    }
}

impl Ran {
    /// It ended with `code`, standard error holds all of `parts`, and nothing is there that
    /// never should be.
    #[track_caller]
    pub fn expect(&self, code: i32, parts: &[&str]) -> &Self {
        let Ran { stdout, stderr, .. } = self;
        assert_eq!(self.code, Some(code), "stdout:\n{stdout}\nstderr:\n{stderr}");
        for part in parts {
            assert!(stderr.contains(part), "no `{part}` in:\n{stderr}");
        }
        for never in ["panicked", "RUST_BACKTRACE", "\x1b"] {
            assert!(!stderr.contains(never) && !stdout.contains(never), "{stdout}{stderr}");
        }
        self
    }

    #[track_caller]
    pub fn expect_not(&self, part: &str) -> &Self {
        assert!(!self.stderr.contains(part), "`{part}` in:\n{}", self.stderr);
        self
    }

    /// Standard output as JSON objects, one a line.
    #[track_caller]
    pub fn events(&self) -> Vec<serde_json::Value> {
        let parse = |line: &str| {
            let value: serde_json::Value = serde_json::from_str(line)
                .unwrap_or_else(|error| panic!("not JSON ({error}): {line}"));
            assert!(value.is_object(), "{line}");
            value
        };
        self.stdout.lines().map(parse).collect()
    }
}

pub fn run(mut command: Command) -> Ran {
    let began = Instant::now();
    let output = command.output().unwrap();
    Ran {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
        took: began.elapsed(),
    }
}

/// One heavy test at a time: they would only make each other slow.
pub fn take_turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether heavy tests can run here; a line says why not.
pub fn can_build() -> bool {
    static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
    match FOUND.get_or_init(prepare_shared_store) {
        Ok(()) => true,
        Err(why) => {
            eprintln!("skipped: {why}");
            false
        }
    }
}

/// Whether mounts can be made here, in a namespace of the test's own; a line says why not.
pub fn can_mount() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: only root can mount a small file system to fill");
    }
    root
}

/// Enter a mount namespace with this thread.
fn enter_mount_namespace() {
    use rustix::mount::{MountPropagationFlags, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    // SAFETY: no memory or descriptor table is unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE).unwrap();
}

/// A mount of the test's own; its folder can be removed when it is dropped.
pub struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Mount an empty file system in memory with room for so many MiB.
#[must_use]
pub fn mount_small(at: &Path, mebibytes: u64, read_only: bool) -> Mounted {
    use rustix::mount::{MountFlags, mount};
    fs::create_dir_all(at).unwrap();
    let flags = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    let options = std::ffi::CString::new(format!("size={mebibytes}m")).unwrap();
    mount("tmpfs", at, "tmpfs", flags, options.as_c_str()).unwrap();
    Mounted(at.to_path_buf())
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The repository's lock.
pub fn load_lock() -> Lock {
    Lock::load(&repository().join("stanchion.lock")).unwrap().unwrap()
}

/// Add what a layer without wishes would ask for, with these packages.
pub fn add_set(
    lock: &mut Lock,
    name: &str,
    parent: Option<&str>,
    packages: &[&str],
    essential: bool,
) {
    let request = SetRequest {
        name: name.to_string(),
        parent: parent.map(str::to_string),
        wanted: packages.iter().map(|name| name.to_string()).collect(),
        provides: Vec::new(),
        recommends: false,
        essential,
    };
    lock.sets.push(LockedSet {
        name: name.to_string(),
        request: request.digest(),
        packages: packages.iter().map(|name| name.to_string()).collect(),
    });
}

/// Kept from one run to the next: what is in it depends on nothing but its inputs.
fn shared_store() -> &'static Path {
    Path::new(concat!(env!("CARGO_TARGET_TMPDIR"), "/cache/stanchion"))
}

/// Build `tiny` once, from the downloads of this user's store or from the mirror.
fn prepare_shared_store() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("only root can share built layers among stores by hard links".to_string());
    }
    let files = shared_store().join("files");
    fs::create_dir_all(&files).unwrap();
    // Another test program may be at it.
    let turn = fs::File::create(shared_store().with_extension("turn")).unwrap();
    turn.lock().unwrap();
    if let Ok(own) = stanchion::store::Store::default_root() {
        link_files(&own.join("files"), &files);
    }
    let project = Project::tiny("");
    let run_shared = |args: &[&str]| {
        let mut command = project.command(args);
        command.env("XDG_CACHE_HOME", shared_store().parent().unwrap());
        run(command)
    };
    // What other versions of the layers have left.
    run_shared(&["store", "gc", "--keep", "4G"]).expect(0, &[]);
    let ran = run_shared(&["build", "tiny"]);
    match ran.code {
        Some(0) => Ok(()),
        Some(2) => Err(format!("no build is possible here: {}", ran.stderr.replace('\n', " "))),
        _ => panic!("the first build failed:\n{}", ran.stderr),
    }
}

fn link_files(from: &Path, to: &Path) {
    let Ok(entries) = fs::read_dir(from) else { return };
    for entry in entries.flatten() {
        let to = to.join(entry.file_name());
        if !to.exists() && fs::hard_link(entry.path(), &to).is_err() {
            fs::copy(entry.path(), &to).unwrap();
        }
    }
}

/// The files of a folder with their content's digests, for comparing.
pub fn list_files(folder: &Path) -> BTreeMap<String, stanchion::digest::Digest> {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let digest = match path.is_dir() {
                true => stanchion::digest::Digest::of(b"folder"),
                false => stanchion::digest::Digest::of_file(&path).unwrap(),
            };
            (path.file_name().unwrap().to_string_lossy().into_owned(), digest)
        })
        .collect()
}

/// Run in a mount namespace of its own; processes that it starts are in it, too.
pub fn in_mount_namespace(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let done = scope.spawn(|| {
            enter_mount_namespace();
            test();
        });
        if let Err(panic) = done.join() {
            std::panic::resume_unwind(panic);
        }
    });
}
