//! The shipped profiles and their lock: against apt, and against what the archive has.

#[path = "support/apt.rs"]
mod apt;
#[allow(dead_code, reason = "other tests leave parts out")]
#[path = "support/copy.rs"]
mod copy;
#[path = "profiles/locking.rs"]
mod locking;
#[path = "profiles/shipped.rs"]
mod shipped;
#[path = "profiles/vanished.rs"]
mod vanished;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use copy::copy_project;
use stanchion::command::Command;
use stanchion::debian::index::parse_packages;
use stanchion::debian::mirror::{Mirror, Places};
use stanchion::debian::solve::Universe;
use stanchion::digest::Digest;
use stanchion::fetch::{Fetcher, Patience};
use stanchion::lock::Lock;
use stanchion::progress::{Mode, Progress};
use stanchion::repository::{self, Suite};
use stanchion::store::Store;
use tempfile::TempDir;

/// Where this project's own profiles and layers are.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A copy of this project that may be spoilt.
struct Copy {
    directory: TempDir,
    /// A store of its own in place of the user's.
    cache: Option<PathBuf>,
}

/// How a command ended: its exit code, and what it wrote to standard error.
struct Ended {
    code: Option<i32>,
    text: String,
}

impl Copy {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        copy_project(directory.path());
        Copy { directory, cache: None }
    }

    /// With a store that holds nothing.
    fn with_empty_store() -> Self {
        let mut copy = Copy::new();
        let cache = copy.path("cache");
        fs::create_dir(&cache).unwrap();
        copy.cache = Some(cache);
        copy
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn read_lock(&self) -> String {
        fs::read_to_string(self.path("stanchion.lock")).unwrap()
    }

    fn lock(&self) -> Lock {
        Lock::load(&self.path("stanchion.lock")).unwrap().expect("a lock")
    }

    /// Change the text of a file; there must be something to change.
    fn edit(&self, name: &str, change: impl Fn(&str) -> String) {
        let before = fs::read_to_string(self.path(name)).unwrap();
        let after = change(&before);
        assert_ne!(before, after, "{name} has nothing to change");
        fs::write(self.path(name), after).unwrap();
    }

    fn run(&self, args: &[&str]) -> Ended {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stanchion"));
        command = command.args(args).arg("--project").arg(self.directory.path());
        if let Some(cache) = &self.cache {
            command = command.env("XDG_CACHE_HOME", cache);
        }
        let (status, output) = command.run_any().unwrap();
        Ended { code: status.code(), text: String::from_utf8(output.stderr).unwrap() }
    }

    fn succeed(&self, args: &[&str]) -> String {
        let ended = self.run(args);
        assert_eq!(ended.code, Some(0), "{args:?}: {}", ended.text);
        ended.text
    }

    /// The message of a mistake that is the user's.
    fn fail(&self, args: &[&str]) -> String {
        let ended = self.run(args);
        assert_eq!(ended.code, Some(2), "{args:?}: {}", ended.text);
        ended.text
    }
}

/// What the mirror has today, and the lock that is solved against it without another.
struct Today {
    mirror: Mirror,
    suites: Vec<Suite>,
    lock: Lock,
    text: String,
}

impl Today {
    /// All packages of the suites' lists.
    fn read_universe(&self) -> Universe {
        let suites = self.suites.iter();
        let packages =
            suites.flat_map(|suite| parse_packages(&suite.packages_text, &suite.name).unwrap());
        Universe::new(packages.collect())
    }
}

/// `None`, with a line that says so, where there is no mirror.
fn find_today() -> Option<&'static Today> {
    static TODAY: OnceLock<Option<Today>> = OnceLock::new();
    TODAY.get_or_init(look_at_today).as_ref()
}

fn look_at_today() -> Option<Today> {
    let mirror = find_mirror()?;
    let store = Store::open(&Store::default_root().unwrap()).unwrap();
    let fetcher = Fetcher::new(4, false).unwrap();
    // Once more when the mirror is renewed in between.
    for _ in 0..3 {
        let progress = Progress::new(Mode::Quiet);
        let suites =
            repository::refresh(&fetcher, &store, &mirror, &progress, &Default::default()).unwrap();
        let project = Copy::new();
        fs::remove_file(project.path("stanchion.lock")).unwrap();
        project.succeed(&["lock"]);
        let lock = project.lock();
        let ours: Vec<Digest> = suites.iter().map(|suite| suite.release_digest).collect();
        if lock.suites.iter().map(|suite| suite.sha256).eq(ours) {
            return Some(Today { mirror, suites, lock, text: project.read_lock() });
        }
    }
    panic!("the mirror was renewed three times in a row");
}

/// `None`, with a line that says so, where there is none that answers.
fn find_mirror() -> Option<Mirror> {
    let patience = Patience { stall: Duration::from_secs(10), tries: 1, ..Patience::default() };
    let fetcher = Fetcher::with_patience(1, false, patience).unwrap();
    let found = Mirror::find(&Places::of_this_machine(None)).and_then(|mirror| {
        repository::check_reachable(&fetcher, &mirror)?;
        Ok(mirror)
    });
    match found {
        Ok(mirror) => Some(mirror),
        Err(error) => {
            let error = format!("{error:#}");
            eprintln!("skipped: no mirror: {}", error.lines().next().unwrap_or_default());
            None
        }
    }
}
