//! Files that appear under their name whole, or not at all.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use ring::rand::{SecureRandom, SystemRandom};
use rustix::fs::RenameFlags;

use crate::error::UserError;

/// What becomes of a file that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    Replace,
    /// It stays, and writing fails.
    Keep,
}

/// Write a file beside its place, with this mode, and give it its name once it is on the
/// disk.
///
/// # Errors
/// A [`UserError`] when its folder is not there; an [`io::Error`] of the kind
/// `AlreadyExists` when one is there that stays.
pub fn write_beside(
    path: &Path,
    mode: u32,
    existing: Existing,
    fill: impl FnOnce(&File) -> Result<()>,
) -> Result<()> {
    let writing = || format!("writing {}", path.display());
    let new = name_beside(path)?;
    // Readable too: what fills it may look at what it wrote.
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(&new);
    let file = file.with_context(writing)?;
    let placed = fill(&file).and_then(|()| file.sync_all().with_context(writing)).and_then(|()| {
        match existing {
            Existing::Replace => fs::rename(&new, path),
            Existing::Keep => rename_without_replacing(&new, path),
        }
        .with_context(writing)
    });
    if placed.is_err() {
        // Only what this run has made: the name is random.
        let _ = fs::remove_file(&new);
        return placed;
    }
    sync_parent(path).with_context(writing)
}

/// A name in the same folder that nothing has, and that a listing hides.
pub fn name_beside(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().with_context(|| format!("{} has no name", path.display()))?;
    let parent = find_parent(path);
    if !parent.is_dir() {
        let what = format!("there is no directory {}", parent.display());
        return Err(UserError::new(what).help("make it first, or name another").into());
    }
    let mut bytes = [0; 8];
    let filled = SystemRandom::new().fill(&mut bytes);
    filled.map_err(|_| anyhow!("the kernel gives no random bytes"))?;
    let number = u64::from_le_bytes(bytes);
    Ok(path.with_file_name(format!(".{}.{number:016x}", name.to_string_lossy())))
}

/// Rename a file or a directory unless there is something of that name.
pub fn rename_without_replacing(from: &Path, to: &Path) -> io::Result<()> {
    let here = rustix::fs::CWD;
    match rustix::fs::renameat_with(here, from, here, to, RenameFlags::NOREPLACE) {
        // A file system that cannot: another run could only have made the name just now.
        Err(rustix::io::Errno::INVAL) if to.symlink_metadata().is_err() => fs::rename(from, to),
        done => done.map_err(io::Error::from),
    }
}

/// Have a new name in a folder outlive a loss of power.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(find_parent(path))?.sync_all()
}

/// Whether an error says that something of the name is there already.
pub fn is_occupied(error: &anyhow::Error) -> bool {
    let errors = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    errors.into_iter().any(|error| {
        matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty)
    })
}

fn find_parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    fn list(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_file_is_whole_or_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        let write = |text: &'static str, existing| {
            write_beside(&path, 0o600, existing, |mut file| Ok(file.write_all(text.as_bytes())?))
        };
        write("one", Existing::Keep).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        let error = write("two", Existing::Keep).unwrap_err();
        assert!(is_occupied(&error), "{error:#}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "one");
        write("three", Existing::Replace).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "three");
        write_beside(&path, 0o600, Existing::Replace, |_| anyhow::bail!("no")).unwrap_err();
        assert_eq!(fs::read_to_string(&path).unwrap(), "three");
        assert_eq!(list(folder.path()), ["secret"]);
    }

    #[test]
    fn a_folder_that_is_not_there_is_the_users_to_mend() {
        let error =
            write_beside(Path::new("/nowhere/x"), 0o600, Existing::Keep, |_| Ok(())).unwrap_err();
        assert!(error.is::<UserError>(), "{error:#}");
    }
}
