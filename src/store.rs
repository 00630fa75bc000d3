//! The content-addressed cache under `$XDG_CACHE_HOME/stanchion`.
//!
//! ```text
//! files/<sha256>            what was downloaded, named by its digest
//! steps/<step>/<key>/       what a step made from the inputs behind `key`
//! state/                    small facts that outlive one command (newest dates seen)
//! tmp/<pid>-<n>-<what>/     work in progress; renamed into place when whole
//! ```
//!
//! An entry is whole when its name exists: it is written under `tmp/` and renamed. Several
//! commands may share one store; each holds `lock` shared, and garbage is collected only
//! by one that holds it alone. The time of an entry is that of its last use.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::SystemTime;

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, CWD, FlockOperation, Timespec, Timestamps, UTIME_NOW};
use rustix::io::Errno;

use crate::digest::Digest;
use crate::error::UserError;

#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    /// Held shared for as long as any clone lives.
    lock: Arc<File>,
}

/// What garbage collection removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freed {
    pub entries: u64,
    pub bytes: u64,
}

/// A directory of work in progress; removed when dropped unless it was committed.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    committed: bool,
    /// The directory, locked: a process id says nothing to those in another container.
    _held: File,
}

impl Store {
    /// `$XDG_CACHE_HOME/stanchion`, or `~/.cache/stanchion`.
    pub fn default_root() -> Result<PathBuf> {
        let absolute = |name: &str| {
            std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
        };
        absolute("XDG_CACHE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
            .map(|cache| cache.join("stanchion"))
            .ok_or_else(|| {
                UserError::new("there is no place for the store")
                    .why("neither XDG_CACHE_HOME nor HOME holds an absolute path")
                    .help("set XDG_CACHE_HOME to a directory with some gigabytes of room")
                    .into()
            })
    }

    /// Open the store, make its folders, and remove what dead commands left in `tmp/`.
    ///
    /// # Errors
    /// A [`UserError`] where no store can be made or written to.
    pub fn open(root: &Path) -> Result<Self> {
        let prepare = || -> std::io::Result<Self> {
            for folder in ["files", "steps", "state", "tmp"] {
                fs::create_dir_all(root.join(folder))?;
            }
            let root = root.canonicalize()?;
            let path = root.join("lock");
            let lock = File::options().create(true).truncate(false).write(true).open(&path)?;
            rustix::fs::flock(&lock, FlockOperation::LockShared)?;
            Ok(Store { root, lock: Arc::new(lock) })
        };
        let store = prepare().map_err(|error| {
            UserError::new("the store cannot be written to")
                .in_file(root)
                .why(error.to_string())
                .help("mend its permissions, or set XDG_CACHE_HOME to a directory with some gigabytes of room")
        })?;
        sweep_scratch(&store.root.join("tmp"), "");
        Ok(store)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the file with this content is, or would be.
    pub fn file_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("files").join(digest.to_string())
    }

    /// Whether the file with this content is here. One that has another size than it must
    /// have was damaged: it is removed, to be fetched again.
    pub fn has_file(&self, digest: &Digest, size: Option<u64>) -> bool {
        let path = self.file_path(digest);
        let Ok(metadata) = fs::metadata(&path) else { return false };
        if size.is_some_and(|size| size != metadata.len()) {
            let _ = remove_tree(&path);
            return false;
        }
        touch(&path);
        true
    }

    /// Take a finished file in; the caller has checked its digest. It is renamed, so it
    /// must be on the store's file system ([`Store::make_scratch`]).
    pub fn insert_file(&self, file: &Path, digest: &Digest) -> Result<PathBuf> {
        let to = self.file_path(digest);
        File::open(file)
            .and_then(|file| file.sync_all())
            .and_then(|()| fs::rename(file, &to))
            .with_context(|| format!("storing {}", to.display()))?;
        Ok(to)
    }

    /// Remove a file whose content is not what its name says.
    pub fn discard_file(&self, digest: &Digest) -> Result<()> {
        remove_tree(&self.file_path(digest))
    }

    /// A small fact by its name (letters, digits, `-`, `_`, `.`).
    pub fn state_path(&self, name: &str) -> PathBuf {
        self.root.join("state").join(name)
    }

    /// The directory that `step` made for `key`, when it is there.
    pub fn find_entry(&self, step: &str, key: &Digest) -> Option<PathBuf> {
        let path = self.entry_path(step, key);
        let found = path.is_dir();
        if found {
            touch(&path);
        }
        found.then_some(path)
    }

    /// Move a finished scratch directory into its place. Another command may have been
    /// first: its entry, equal by construction, stays.
    pub fn commit_entry(&self, step: &str, key: &Digest, mut scratch: Scratch) -> Result<PathBuf> {
        let to = self.entry_path(step, key);
        let parent = to.parent().expect("an entry lies in its step's folder");
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        match fs::rename(&scratch.path, &to) {
            Ok(()) => scratch.committed = true,
            Err(_) if to.is_dir() => {}
            Err(error) => {
                return Err(error).with_context(|| format!("storing {}", to.display()));
            }
        }
        Ok(to)
    }

    /// Take an entry that has lost parts out of the way, so that it is made anew.
    pub fn discard_entry(&self, step: &str, key: &Digest) -> Result<()> {
        // What a user may not remove from outside the sandbox waits for garbage collection.
        self.remove(&self.entry_path(step, key), &|path| {
            let _ = remove_tree(path);
            Ok(())
        })
    }

    /// A new empty directory on the store's file system.
    pub fn make_scratch(&self, what: &str) -> Result<Scratch> {
        make_scratch(&self.root.join("tmp"), "", what)
    }

    /// Whether no build has ever ended in it.
    pub fn is_fresh(&self) -> bool {
        !self.root.join("steps/initrd").is_dir()
    }

    /// Bytes that an ordinary user can still write on the store's file system.
    pub fn measure_room(&self) -> Result<u64> {
        measure_room(&self.root)
    }

    /// Remove what was not used for longest until at most `keep` bytes are left. `remove`
    /// removes a tree (of subordinate owners, too).
    ///
    /// # Errors
    /// A [`UserError`] while another command uses the store.
    pub fn collect_garbage(
        &self,
        keep: u64,
        remove: &dyn Fn(&Path) -> Result<()>,
    ) -> Result<Freed> {
        rustix::fs::flock(&*self.lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            UserError::new("the store is in use by another command")
                .in_file(&self.root)
                .help("run this again when it has ended")
        })?;
        let mut entries = Vec::new();
        list_entries(&self.root.join("files"), &mut entries)?;
        list_entries(&self.root.join("partial"), &mut entries)?;
        for step in read_folder(&self.root.join("steps"))? {
            list_entries(&step, &mut entries)?;
        }
        entries.sort_by_key(|entry| entry.used);
        let mut total: u64 = entries.iter().map(|entry| entry.bytes).sum();
        let mut freed = Freed::default();
        // Nobody else has the store open: what lies here was left by the dead.
        for leftover in read_folder(&self.root.join("tmp"))? {
            remove(&leftover)?;
        }
        for entry in entries {
            if total <= keep {
                break;
            }
            self.remove(&entry.path, remove)?;
            total -= entry.bytes;
            freed = Freed { entries: freed.entries + 1, bytes: freed.bytes + entry.bytes };
        }
        rustix::fs::flock(&*self.lock, FlockOperation::LockShared).context("locking the store")?;
        Ok(freed)
    }

    fn entry_path(&self, step: &str, key: &Digest) -> PathBuf {
        self.root.join("steps").join(step).join(key.to_string())
    }

    /// Remove an entry or a file: out of its place first, so that nothing half removed is
    /// ever found there.
    fn remove(&self, path: &Path, remove: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
        let scratch = self.make_scratch("removed")?;
        let removed = scratch.path.join("removed");
        match fs::rename(path, &removed) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).with_context(|| format!("removing {}", path.display())),
            Ok(()) => remove(&removed),
        }
    }
}

impl Scratch {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.committed {
            let _ = remove_tree(&self.path);
        }
    }
}

/// A new empty directory `<prefix><pid>-<n>-<what>` in `folder`.
pub fn make_scratch(folder: &Path, prefix: &str, what: &str) -> Result<Scratch> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    loop {
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("{prefix}{}-{n}-{what}", std::process::id()));
        match fs::create_dir(&path) {
            // A process of this id lives in another container, or has died.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            made => made.with_context(|| format!("making {}", path.display()))?,
        }
        let held = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        // Where there are no locks, the process id in the name has to do.
        let _ = rustix::fs::flock(&held, FlockOperation::NonBlockingLockExclusive);
        return Ok(Scratch { path, committed: false, _held: held });
    }
}

/// Remove the scratch directories with this prefix that dead processes left in `folder`.
pub fn sweep_scratch(folder: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| {
            let (pid, _) = name.strip_prefix(prefix)?.split_once('-')?;
            rustix::process::Pid::from_raw(pid.parse().ok()?)
        });
        if owner.is_some_and(|owner| !is_in_use(&entry.path(), owner)) {
            // Another command may sweep the same directory: whoever comes late is done.
            let _ = remove_tree(&entry.path());
        }
    }
}

fn is_in_use(scratch: &Path, owner: rustix::process::Pid) -> bool {
    // Any other answer than this one means that there is such a process.
    if rustix::process::test_kill_process(owner) != Err(Errno::SRCH) {
        return true;
    }
    let Ok(folder) = File::open(scratch) else { return false };
    rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK)
}

/// Bytes that an ordinary user can still write on the file system of `path`.
pub fn measure_room(path: &Path) -> Result<u64> {
    let found = rustix::fs::statvfs(path)
        .with_context(|| format!("measuring the room at {}", path.display()))?;
    Ok(found.f_bavail * found.f_frsize)
}

struct Entry {
    path: PathBuf,
    used: SystemTime,
    bytes: u64,
}

fn list_entries(folder: &Path, entries: &mut Vec<Entry>) -> Result<()> {
    for path in read_folder(folder)? {
        let used = fs::symlink_metadata(&path).and_then(|metadata| metadata.modified());
        let used = used.with_context(|| format!("reading {}", path.display()))?;
        entries.push(Entry { bytes: measure_tree(&path), path, used });
    }
    Ok(())
}

fn read_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .with_context(|| format!("listing {}", folder.display())),
    }
}

/// Bytes that a tree takes on the disk; what cannot be read counts nothing.
fn measure_tree(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(metadata) = fs::symlink_metadata(path) else { return 0 };
    let below: u64 = match metadata.is_dir() {
        true => fs::read_dir(path)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| measure_tree(&entry.path()))
            .sum(),
        false => 0,
    };
    metadata.blocks() * 512 + below
}

/// Note a use. A store that cannot be written to still serves.
fn touch(path: &Path) {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    let _ = rustix::fs::utimensat(CWD, path, &times, AtFlags::empty());
}

/// Remove a file or a directory with all that is in it; nothing there is fine.
pub fn remove_tree(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Write a whole file so that a crash leaves the old content or the new.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.tmp", std::process::id()));
    let beside = PathBuf::from(beside);
    let write = || -> io::Result<()> {
        fs::write(&beside, bytes)?;
        File::open(&beside)?.sync_all()?;
        fs::rename(&beside, path)
    };
    write()
        .inspect_err(|_| drop(fs::remove_file(&beside)))
        .with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let key = Digest::of(b"key");
        let scratch = store.make_scratch("test").unwrap();
        fs::write(scratch.path().join("a"), "1").unwrap();
        assert!(store.find_entry("step", &key).is_none());
        let entry = store.commit_entry("step", &key, scratch).unwrap();
        assert_eq!(fs::read_to_string(entry.join("a")).unwrap(), "1");
        assert_eq!(store.find_entry("step", &key), Some(entry));
    }

    #[test]
    fn garbage_is_what_was_not_used_for_longest() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let keys = ["a", "b", "c"].map(|name| Digest::of(name.as_bytes()));
        for key in &keys {
            let scratch = store.make_scratch("test").unwrap();
            fs::write(scratch.path().join("bytes"), vec![1; 100_000]).unwrap();
            store.commit_entry("step", key, scratch).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        store.find_entry("step", &keys[0]).unwrap();
        let freed = store.collect_garbage(250_000, &|path| remove_tree(path)).unwrap();
        assert_eq!(freed.entries, 1);
        assert!(store.find_entry("step", &keys[1]).is_none());
        assert!(store.find_entry("step", &keys[0]).is_some());
    }

    #[test]
    fn garbage_is_not_collected_under_a_running_command() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let other = Store::open(dir.path()).unwrap();
        let error = store.collect_garbage(0, &|path| remove_tree(path)).unwrap_err();
        assert!(error.to_string().contains("in use"), "{error}");
        drop(other);
        store.collect_garbage(0, &|path| remove_tree(path)).unwrap();
    }

    #[test]
    fn what_a_dead_command_left_is_swept_and_what_a_live_one_has_stays() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let dead = dir.path().join("tmp/999999999-0-x");
        fs::create_dir(&dead).unwrap();
        let live = store.make_scratch("y").unwrap();
        Store::open(dir.path()).unwrap();
        assert!(!dead.exists());
        assert!(live.path().exists());
    }

    #[test]
    fn work_of_a_process_that_only_its_lock_shows_to_live_is_not_swept() {
        let dir = tempfile::tempdir().unwrap();
        // As from another container: the process id means nothing here.
        let foreign = dir.path().join("999999999-0-x");
        fs::create_dir(&foreign).unwrap();
        let held = File::open(&foreign).unwrap();
        rustix::fs::flock(&held, FlockOperation::LockExclusive).unwrap();
        sweep_scratch(dir.path(), "");
        assert!(foreign.exists());
        drop(held);
        sweep_scratch(dir.path(), ".other-");
        assert!(foreign.exists());
        sweep_scratch(dir.path(), "");
        assert!(!foreign.exists());
    }

    #[test]
    fn a_file_of_another_size_than_it_must_have_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digest = Digest::of(b"whole");
        fs::write(store.file_path(&digest), "whole").unwrap();
        assert!(store.has_file(&digest, None) && store.has_file(&digest, Some(5)));
        fs::write(store.file_path(&digest), "who").unwrap();
        assert!(!store.has_file(&digest, Some(5)));
        assert!(!store.has_file(&digest, None));
    }

    #[test]
    fn garbage_collection_clears_work_that_was_left() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let kept = dir.path().join("tmp/1-0-x");
        fs::create_dir_all(kept.join("below")).unwrap();
        store.collect_garbage(u64::MAX, &|path| remove_tree(path)).unwrap();
        assert!(!kept.exists());
    }

    #[test]
    fn a_discarded_entry_can_be_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let key = Digest::of(b"key");
        for _ in 0..2 {
            let scratch = store.make_scratch("test").unwrap();
            fs::write(scratch.path().join("a"), "1").unwrap();
            store.commit_entry("step", &key, scratch).unwrap();
            store.discard_entry("step", &key).unwrap();
            assert!(store.find_entry("step", &key).is_none());
        }
        store.discard_entry("step", &key).unwrap();
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    }
}
