//! A file that is on its way into the store: `partial/<sha256>` below the store's root.
//!
//! It stays when a command ends early, and the next one goes on from there. A lock
//! (`flock(2)`) keeps two commands, or two downloads of one, from writing the same file.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::digest::{Digest, Hasher};
use crate::error::UserError;
use crate::store::Store;

/// Where received bytes go.
pub(super) trait Sink: Send {
    /// Whether a broken transfer may go on where it broke.
    const RESUMES: bool;
    /// Bytes taken so far.
    fn len(&self) -> u64;
    fn clear(&mut self) -> Result<()>;
    fn append(&mut self, bytes: &[u8]) -> Result<()>;
    /// Whether the bytes have the digest that is wanted; what is wrong otherwise.
    fn check_digest(&self) -> Result<(), String>;
}

impl Sink for Vec<u8> {
    // What has no digest might be another file at the next try.
    const RESUMES: bool = false;

    fn len(&self) -> u64 {
        Vec::len(self) as u64
    }

    fn clear(&mut self) -> Result<()> {
        Vec::clear(self);
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.extend_from_slice(bytes);
        Ok(())
    }

    fn check_digest(&self) -> Result<(), String> {
        Ok(())
    }
}

/// A locked partial file, hashed as far as it goes.
pub(super) struct Partial {
    file: File,
    path: PathBuf,
    hasher: Hasher,
    expected: Digest,
}

impl Partial {
    /// Lock the partial file of `digest`; nothing when the store has the whole file, also
    /// when another command has just put it there. `wait` is called once before waiting
    /// for another command.
    pub(super) async fn open(
        store: &Store,
        digest: Digest,
        size: Option<u64>,
        wait: impl FnOnce(),
    ) -> Result<Option<Self>> {
        let folder = store.root().join("partial");
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let path = folder.join(digest.to_string());
        let mut wait = Some(wait);
        loop {
            if store.has_file(&digest, size) {
                return Ok(None);
            }
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(|error| explain_write(error, &path))?;
            match file.try_lock() {
                // It may have been moved into the store between the opening and the lock.
                Ok(()) if is_same(&file, &path) && !store.has_file(&digest, size) => {
                    return Ok(Some(Partial {
                        file,
                        path,
                        hasher: Hasher::new(),
                        expected: digest,
                    }));
                }
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    if let Some(wait) = wait.take() {
                        wait();
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(TryLockError::Error(error)) => {
                    return Err(error).with_context(|| format!("locking {}", path.display()));
                }
            }
        }
    }

    /// Hash what an earlier command has left. More than `size` bytes, or as many with
    /// another digest, are thrown away.
    pub(super) fn hash_rest(&mut self, size: Option<u64>) -> Result<()> {
        let reading = || format!("reading {}", self.path.display());
        let length = self.file.metadata().with_context(reading)?.len();
        if size.is_some_and(|size| length > size) {
            return self.clear();
        }
        let mut left = (&self.file).take(length);
        io::copy(&mut left, &mut self.hasher).with_context(reading)?;
        if size == Some(length) && self.check_digest().is_err() {
            self.clear()?;
        }
        Ok(())
    }

    /// Move the whole file into the store; its digest has been checked.
    pub(super) fn finish(self, store: &Store) -> Result<PathBuf> {
        store.insert_file(&self.path, &self.expected)
    }
}

impl Sink for Partial {
    const RESUMES: bool = true;

    fn len(&self) -> u64 {
        self.hasher.written()
    }

    fn clear(&mut self) -> Result<()> {
        // A file of no length need not be cut, and a device cannot be.
        let cut = match self.file.metadata() {
            Ok(metadata) if metadata.len() == 0 => Ok(()),
            Ok(_) => self.file.set_len(0),
            Err(error) => Err(error),
        };
        cut.and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .map_err(|error| explain_write(error, &self.path))?;
        self.hasher = Hasher::new();
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| explain_write(error, &self.path))?;
        self.hasher.update(bytes);
        Ok(())
    }

    fn check_digest(&self) -> Result<(), String> {
        let (found, expected) = (self.hasher.clone().finish(), self.expected);
        match found == expected {
            true => Ok(()),
            false => Err(format!("its SHA-256 is {found}, and should be {expected}")),
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // What has not begun to arrive is not worth a file.
        if self.file.metadata().is_ok_and(|metadata| metadata.len() == 0) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn is_same(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(theirs)) => (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()),
        _ => false,
    }
}

fn explain_write(error: io::Error, path: &Path) -> anyhow::Error {
    if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
        return UserError::new("the store's disk is full")
            .in_file(path)
            .why(error.to_string())
            .help("make room there, or set XDG_CACHE_HOME to a directory with room; what has arrived is kept")
            .into();
    }
    anyhow::Error::new(error).context(format!("writing {}", path.display()))
}
