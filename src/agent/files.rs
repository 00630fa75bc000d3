//! Writing files whole or not at all, with their owners.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Whom a file belongs to and who may read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    pub mode: u32,
    /// User and group; `None` leaves them to whoever writes.
    pub owner: Option<(u32, u32)>,
}

impl Access {
    /// For root alone.
    pub const PRIVATE: Access = Access { mode: 0o600, owner: None };
}

/// Write a file beside its place, with its owner and mode, and rename it. With `durable`
/// it is on the disk before this returns.
pub fn write_file(path: &Path, bytes: &[u8], access: Access, durable: bool) -> Result<()> {
    let write = || -> Result<()> {
        let folder = path.parent().context("it has no folder")?;
        fs::create_dir_all(folder)?;
        let beside = name_beside(path);
        // Left by a crash, perhaps with another mode.
        remove_file(&beside)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        if let Some((user, group)) = access.owner {
            fchown(&file, Some(user), Some(group))?;
        }
        file.write_all(bytes)?;
        file.set_permissions(fs::Permissions::from_mode(access.mode))?;
        if durable {
            file.sync_all()?;
        }
        fs::rename(&beside, path)?;
        if durable {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    };
    write().with_context(|| format!("writing {}", path.display()))
}

/// At most `limit` bytes of a file; `None` when there is none.
pub fn read_bounded(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let read = || -> Result<Option<Vec<u8>>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit {
            bail!("it has more than {limit} bytes");
        }
        Ok(Some(bytes))
    };
    read().with_context(|| format!("reading {}", path.display()))
}

/// Make a file that is not there yet, for root alone; what is left there by a crash goes first.
pub fn make_private_file(path: &Path) -> Result<File> {
    let make = || -> Result<File> {
        make_private_folder(path.parent().context("it has no folder")?)?;
        remove_file(path)?;
        Ok(OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?)
    };
    make().with_context(|| format!("making {}", path.display()))
}

/// Make a folder for an account in one that it may change itself: through no link, and none
/// that was there.
pub fn make_folder_for(path: &Path, owner: (u32, u32)) -> Result<()> {
    let make = || -> Result<()> {
        fs::DirBuilder::new().mode(0o700).create(path)?;
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::DIRECTORY;
        let folder = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)?;
        fchown(&folder, Some(owner.0), Some(owner.1))?;
        Ok(())
    };
    make().with_context(|| format!("making {}", path.display()))
}

/// Make a folder for root alone, and those above it.
pub fn make_private_folder(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("making {}", path.display()))
}

/// Remove a file that need not be there.
pub fn remove_file(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn name_beside(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".stanchion-new");
    path.with_file_name(name)
}

/// User and group ids of an account, from a passwd file.
pub fn find_account(passwd: &str, name: &str) -> Option<(u32, u32)> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then_some(())?;
        Some((fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_with_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b.conf");
        let access = Access { mode: 0o640, owner: None };
        write_file(&path, b"one", access, false).unwrap();
        write_file(&path, b"two", access, true).unwrap();
        assert_eq!(read_bounded(&path, 3).unwrap().unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        assert!(read_bounded(&path, 2).is_err());
        assert_eq!(read_bounded(&folder.path().join("none"), 2).unwrap(), None);
    }

    #[test]
    fn what_is_made_for_an_account_follows_no_link() {
        let folder = tempfile::tempdir().unwrap();
        let (target, link) = (folder.path().join("target"), folder.path().join("link"));
        fs::create_dir(&target).unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let own = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        assert!(make_folder_for(&link, own).is_err());
        assert!(make_folder_for(&target, own).is_err());
        make_folder_for(&folder.path().join("new"), own).unwrap();
        let file = folder.path().join("private/file");
        make_private_file(&file).unwrap().write_all(b"old").unwrap();
        make_private_file(&file).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"");
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(folder.path().join("elsewhere"), &file).unwrap();
        make_private_file(&file).unwrap();
        assert!(!folder.path().join("elsewhere").exists());
    }

    #[test]
    fn accounts_are_found_by_their_whole_name() {
        let passwd = "root:x:0:0::/root:/bin/sh\netcd:x:901:902::/var/lib/etcd:/bin/false\n";
        assert_eq!(find_account(passwd, "etcd"), Some((901, 902)));
        assert_eq!(find_account(passwd, "etc"), None);
    }
}
