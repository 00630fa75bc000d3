//! Turn the upper side of an overlay into a layer tar as OCI has it (image-spec,
//! layer.md): whiteouts are files `.wh.NAME`, opaque folders hold `.wh..wh..opq`. The
//! same tree gives the same bytes; `mkfs.erofs --tar=f --aufs` reads them.
//!
//! What is normalised: the order (by the bytes of the path), times (whole seconds, none
//! newer than a given one), names of owners (none), hard links (the first path is the
//! file), extended attributes (capabilities, ACLs and `user.*`; none of the overlay's or
//! of the build host's security modules).

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};

use super::place::join;
use crate::debian::archive::show;
use crate::error::UserError;

const BUFFER: usize = 1 << 20;
/// Deeper trees are a mistake.
const MAX_DEPTH: usize = 256;
/// The largest values of a ustar header: 7 octal digits for ids, 11 for sizes.
const MAX_ID: u32 = 0o7_777_777;
const MAX_SIZE: u64 = 0o77_777_777_777;

/// Whether a path goes into the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    Keep,
    /// Leave it out; a folder with all that is in it.
    Drop,
}

/// What a layer holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Entries of the tar, whiteouts and folders too.
    pub entries: u64,
    /// Files with content of their own.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    pub whiteouts: u64,
    /// Sockets, which are left out.
    pub sockets: u64,
}

/// Writes the layer of `upper` to `to`, ending in two empty blocks. Times after `epoch`
/// (seconds since 1970) become `epoch`. `choose` gets every path, from `upper` on and
/// without a slash at its beginning; that of a removed file too.
///
/// Errors: device nodes and fifos; names that begin with `.wh.`; an overlay that was
/// mounted with `redirect_dir` or `metacopy`, whose upper side is not whole.
pub fn pack_layer(
    upper: &Path,
    epoch: u64,
    choose: impl Fn(&Path) -> Choice,
    to: impl Write,
) -> Result<Statistics> {
    let pack = || -> Result<Statistics> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = fs::open(upper, flags, Mode::empty())?;
        let found = scan(&root, choose)?;
        let mut packer = Packer {
            root,
            epoch,
            to: BufWriter::with_capacity(BUFFER, to),
            first_paths: HashMap::new(),
            buffer: vec![0; BUFFER],
            statistics: Statistics { sockets: found.sockets, ..Statistics::default() },
        };
        for (path, item) in &found.items {
            packer.write_item(path, item).with_context(|| show(path))?;
        }
        packer.to.write_all(&[0; 1024])?;
        packer.to.flush()?;
        Ok(packer.statistics)
    };
    pack().with_context(|| format!("packing {}", upper.display()))
}

/// What a path in the layer is.
enum Item {
    Folder {
        stat: Stat,
        xattrs: Xattrs,
    },
    File(Stat),
    Symlink(Stat),
    /// `.wh.NAME`, or the mark of an opaque folder.
    Whiteout,
}

type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Default)]
struct Found {
    items: BTreeMap<Vec<u8>, Item>,
    sockets: u64,
}

fn scan(root: &OwnedFd, choose: impl Fn(&Path) -> Choice) -> Result<Found> {
    let mut found = Found::default();
    let mut folders = vec![Vec::new()];
    while let Some(path) = folders.pop() {
        scan_folder(root, &path, &choose, &mut found, &mut folders)
            .with_context(|| format!("reading {}", show(&path)))?;
    }
    Ok(found)
}

fn scan_folder(
    root: &OwnedFd,
    path: &[u8],
    choose: impl Fn(&Path) -> Choice,
    found: &mut Found,
    folders: &mut Vec<Vec<u8>>,
) -> Result<()> {
    if path.iter().filter(|byte| **byte == b'/').count() > MAX_DEPTH {
        bail!("folders that are too deep");
    }
    let folder = open_inside(root, path, OFlags::DIRECTORY)?;
    let attributes = read_attributes(&folder)?;
    if attributes.opaque {
        found.items.insert(join(path, b".wh..wh..opq"), Item::Whiteout);
    }
    let item = Item::Folder { stat: fs::fstat(&folder)?, xattrs: attributes.kept };
    found.items.insert(path.to_vec(), item);
    for item in fs::Dir::read_from(&folder)? {
        let item = item?;
        let name = item.file_name().to_bytes();
        if matches!(name, b"." | b"..") {
            continue;
        }
        let path = join(path, name);
        if choose(Path::new(OsStr::from_bytes(&path))) == Choice::Drop {
            continue;
        }
        if name.starts_with(b".wh.") {
            bail!("{}: a name that a layer cannot hold", show(&path));
        }
        let stat = fs::statat(&folder, item.file_name(), AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => folders.push(path),
            FileType::RegularFile => drop(found.items.insert(path, Item::File(stat))),
            FileType::Symlink => drop(found.items.insert(path, Item::Symlink(stat))),
            FileType::CharacterDevice if stat.st_rdev == 0 => {
                let name = [b".wh.", name].concat();
                let folder = &path[..path.len() + 4 - name.len()];
                found.items.insert([folder, &name].concat(), Item::Whiteout);
            }
            FileType::Socket => found.sockets += 1,
            other => {
                let what = match other {
                    FileType::Fifo => "a fifo",
                    FileType::CharacterDevice | FileType::BlockDevice => "a device node",
                    _ => "something that is neither file, folder nor link",
                };
                return Err(UserError::new(format!("a layer cannot hold {what}"))
                    .in_file(format!("/{}", path.escape_ascii()))
                    .why("an image gets its device nodes and fifos when it boots")
                    .help("remove it at the end of the layer's commands")
                    .into());
            }
        }
    }
    Ok(())
}

/// Opens what is at `path` itself, never what a link leads to.
fn open_inside(root: &OwnedFd, path: &[u8], flags: OFlags) -> Result<OwnedFd> {
    let path = if path.is_empty() { b"." } else { path };
    let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    Ok(fs::openat2(root, path, flags, Mode::empty(), resolve)?)
}

#[derive(Default)]
struct Attributes {
    kept: Xattrs,
    opaque: bool,
    whiteout: bool,
}

/// The attributes that go into a layer, and what the overlay says by its own
/// (kernel, Documentation/filesystems/overlayfs.rst).
fn read_attributes(fd: impl AsFd) -> Result<Attributes> {
    let mut attributes = Attributes::default();
    let mut names = Vec::with_capacity(4096);
    fs::flistxattr(&fd, rustix::buffer::spare_capacity(&mut names))
        .or_else(|error| match error {
            rustix::io::Errno::OPNOTSUPP => Ok(0),
            error => Err(error),
        })
        .context("listing extended attributes")?;
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let read = || -> Result<Vec<u8>> {
            let mut value = Vec::with_capacity(64 * 1024);
            fs::fgetxattr(&fd, name, rustix::buffer::spare_capacity(&mut value))
                .with_context(|| format!("reading the attribute {}", name.escape_ascii()))?;
            value.shrink_to_fit();
            Ok(value)
        };
        let overlay = [&b"user.overlay."[..], b"trusted.overlay."]
            .iter()
            .find_map(|prefix| name.strip_prefix(*prefix));
        match (overlay, name) {
            (Some(b"opaque"), _) => attributes.opaque = read()? == b"y",
            (Some(b"whiteout"), _) => attributes.whiteout = true,
            (Some(b"redirect" | b"metacopy"), _) => {
                bail!("the overlay was mounted with redirect_dir or metacopy");
            }
            (Some(_), _) => {}
            (
                None,
                b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default",
            ) => {
                attributes.kept.insert(name.to_vec(), read()?);
            }
            (None, _) if name.starts_with(b"user.") => {
                attributes.kept.insert(name.to_vec(), read()?);
            }
            (None, _) => {}
        }
    }
    Ok(attributes)
}

struct Packer<W: Write> {
    root: OwnedFd,
    epoch: u64,
    to: BufWriter<W>,
    /// Device and inode of files with several names, and the first of them.
    first_paths: HashMap<(u64, u64), Vec<u8>>,
    buffer: Vec<u8>,
    statistics: Statistics,
}

/// An entry's header before it is known whether it fits into 512 bytes.
struct Entry<'a> {
    path: &'a [u8],
    kind: tar::EntryType,
    link: &'a [u8],
    size: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: u64,
    xattrs: &'a Xattrs,
}

impl<W: Write> Packer<W> {
    fn write_item(&mut self, path: &[u8], item: &Item) -> Result<()> {
        self.statistics.entries += 1;
        let none = Xattrs::new();
        match item {
            Item::Folder { stat, xattrs } => {
                let path = if path.is_empty() { b"./".to_vec() } else { [path, b"/"].concat() };
                self.write_header(&self.describe(&path, tar::EntryType::Directory, stat, xattrs))
            }
            Item::Symlink(stat) => {
                let (above, name) = super::place::split(path);
                let folder = open_inside(&self.root, above, OFlags::DIRECTORY)?;
                let target = fs::readlinkat(&folder, name, Vec::new())?.into_bytes();
                let entry = self.describe(path, tar::EntryType::Symlink, stat, &none);
                self.write_header(&Entry { link: &target, ..entry })
            }
            Item::File(stat) => self.write_file(path, stat),
            Item::Whiteout => self.write_whiteout(path),
        }
    }

    fn write_whiteout(&mut self, path: &[u8]) -> Result<()> {
        self.statistics.whiteouts += 1;
        self.write_header(&Entry {
            path,
            kind: tar::EntryType::Regular,
            link: b"",
            size: 0,
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: 0,
            xattrs: &Xattrs::new(),
        })
    }

    fn write_file(&mut self, path: &[u8], stat: &Stat) -> Result<()> {
        if stat.st_nlink > 1 {
            let first = self.first_paths.entry((stat.st_dev, stat.st_ino));
            if let std::collections::hash_map::Entry::Occupied(first) = &first {
                let first = first.get().clone();
                let none = Xattrs::new();
                let entry = self.describe(path, tar::EntryType::Link, stat, &none);
                return self.write_header(&Entry { link: &first, ..entry });
            }
            first.or_insert_with(|| path.to_vec());
        }
        let mut file = File::from(open_inside(&self.root, path, OFlags::empty())?);
        let attributes = read_attributes(&file)?;
        let size = u64::try_from(stat.st_size).context("a negative size")?;
        if attributes.whiteout && size == 0 {
            let (above, name) = super::place::split(path);
            return self.write_whiteout(&join(above, &[b".wh.", name].concat()));
        }
        let entry = self.describe(path, tar::EntryType::Regular, stat, &attributes.kept);
        self.write_header(&Entry { size, ..entry })?;
        self.statistics.files += 1;
        self.statistics.bytes += size;
        let mut left = size;
        while left > 0 {
            let most = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let n = file.read(&mut self.buffer[..most])?;
            if n == 0 {
                bail!("the file shrank while it was read");
            }
            self.to.write_all(&self.buffer[..n])?;
            left -= n as u64;
        }
        self.write_padding(size)
    }

    fn write_padding(&mut self, size: u64) -> Result<()> {
        let padding = size.next_multiple_of(512) - size;
        Ok(self.to.write_all(&[0; 512][..padding as usize])?)
    }

    fn describe<'a>(
        &self,
        path: &'a [u8],
        kind: tar::EntryType,
        stat: &Stat,
        xattrs: &'a Xattrs,
    ) -> Entry<'a> {
        Entry {
            path,
            kind,
            link: b"",
            size: 0,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: u64::try_from(stat.st_mtime).unwrap_or(0).min(self.epoch),
            xattrs,
        }
    }

    /// A ustar header, and before it a pax header with what does not fit into it
    /// (POSIX.1-2017, pax, "ustar Interchange Format").
    fn write_header(&mut self, entry: &Entry<'_>) -> Result<()> {
        let mut pax: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let mut header = tar::Header::new_ustar();
        {
            let ustar = header.as_ustar_mut().context("a ustar header")?;
            match split_name(entry.path) {
                Some((prefix, name)) => {
                    ustar.prefix[..prefix.len()].copy_from_slice(prefix);
                    ustar.name[..name.len()].copy_from_slice(name);
                }
                None => {
                    ustar.name.copy_from_slice(&entry.path[..100]);
                    pax.insert(b"path".to_vec(), entry.path.to_vec());
                }
            }
            let fits = entry.link.len().min(100);
            ustar.linkname[..fits].copy_from_slice(&entry.link[..fits]);
            if entry.link.len() > 100 {
                pax.insert(b"linkpath".to_vec(), entry.link.to_vec());
            }
        }
        header.set_entry_type(entry.kind);
        header.set_mode(entry.mode);
        header.set_mtime(entry.mtime.min(MAX_SIZE));
        header.set_size(entry.size.min(MAX_SIZE));
        if entry.size > MAX_SIZE {
            pax.insert(b"size".to_vec(), entry.size.to_string().into_bytes());
        }
        header.set_uid(entry.uid.min(MAX_ID).into());
        header.set_gid(entry.gid.min(MAX_ID).into());
        for (key, id) in [("uid", entry.uid), ("gid", entry.gid)] {
            if id > MAX_ID {
                pax.insert(key.into(), id.to_string().into_bytes());
            }
        }
        header.set_device_major(0)?;
        header.set_device_minor(0)?;
        for (name, value) in entry.xattrs {
            pax.insert([b"SCHILY.xattr.", &name[..]].concat(), value.clone());
        }
        header.set_cksum();
        if !pax.is_empty() {
            self.write_pax(&pax)?;
        }
        Ok(self.to.write_all(header.as_bytes())?)
    }

    fn write_pax(&mut self, records: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<()> {
        let mut body = Vec::new();
        for (key, value) in records {
            // The length counts its own digits.
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            body.extend_from_slice(format!("{length} ").as_bytes());
            body.extend_from_slice(key);
            body.push(b'=');
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        let mut header = tar::Header::new_ustar();
        let name = b"././@PaxHeader";
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.set_entry_type(tar::EntryType::XHeader);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(body.len() as u64);
        header.set_cksum();
        self.to.write_all(header.as_bytes())?;
        self.to.write_all(&body)?;
        self.write_padding(body.len() as u64)
    }
}

/// Prefix (up to 155 bytes) and name (up to 100) whose path, joined by `/`, is `path`.
fn split_name(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.len() <= 100 {
        return Some((b"", path));
    }
    let slash = (path.len() - 101..path.len() - 1).find(|at| path[*at] == b'/')?;
    (slash <= 155 && slash > 0).then(|| (&path[..slash], &path[slash + 1..]))
}

#[cfg(test)]
mod tests;
