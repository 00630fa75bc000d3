//! Puts the entries of one archive into the root.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use md5::{Digest as _, Md5};
use rustix::fs::{
    self, AtFlags, FileType, Gid, Mode, OFlags, RawMode, ResolveFlags, Timespec, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::Errno;

use super::claims::{Claim, Claims, Metadata};
use super::exclude::Excludes;
use super::installed::Installed;
use super::place::{Folder, Walker, join, split};
use crate::debian::archive::{Entry, Kind, show};
use crate::error::UserError;

const BUFFER: usize = 256 * 1024;

/// Who owns what is unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owners {
    /// Whom the archive names.
    Archive,
    Root,
    /// The user who unpacks, without privileges.
    Mine,
}

/// What [`Unpacker`] knows at the end.
#[derive(Default)]
pub struct Placed {
    pub list: Vec<Vec<u8>>,
    /// MD5 of files by their listed paths: of conffiles, or of all.
    pub sums: HashMap<Vec<u8>, String>,
    pub taken: Vec<(Vec<u8>, String)>,
    pub aliases: HashMap<Vec<u8>, Vec<u8>>,
    pub link_targets: Vec<Vec<u8>>,
}

pub struct Unpacker<'a> {
    root: &'a OwnedFd,
    claims: &'a Claims,
    installed: &'a Installed,
    excludes: &'a Excludes,
    owners: Owners,
    index: usize,
    name: &'a str,
    walker: Walker<'a>,
    aside: HashSet<Vec<u8>>,
    sum_all: bool,
    buffer: Vec<u8>,
    placed: Placed,
}

/// Where an entry goes.
struct Spot {
    folder: Rc<Folder>,
    /// The last component, with `.dpkg-new` for a conffile.
    name: Vec<u8>,
    /// Without links; the key of its claim.
    path: Vec<u8>,
}

impl<'a> Unpacker<'a> {
    /// `index` is the package's place in the order, `name` its name.
    pub fn new(
        root: &'a OwnedFd,
        claims: &'a Claims,
        installed: &'a Installed,
        excludes: &'a Excludes,
        owners: Owners,
        index: usize,
        name: &'a str,
    ) -> Result<Self> {
        let walker = Walker::new(root, |above, name| make_implied(claims, above, name))?;
        Ok(Unpacker {
            root,
            claims,
            installed,
            excludes,
            owners,
            index,
            name,
            walker,
            aside: HashSet::new(),
            sum_all: false,
            buffer: vec![0; BUFFER],
            placed: Placed::default(),
        })
    }

    /// Paths (beginning with `/`) whose files go beside their places, as `NAME.dpkg-new`.
    pub fn set_aside(&mut self, paths: impl Iterator<Item = Vec<u8>>) {
        self.aside.extend(paths);
    }

    /// Sum all files, not only those set aside.
    pub fn sum_all(&mut self) {
        self.sum_all = true;
    }

    pub fn into_placed(self) -> Placed {
        self.placed
    }

    /// Places one entry; `content` is a file's.
    pub fn place(&mut self, entry: &Entry, content: &mut dyn Read) -> Result<()> {
        let listed =
            if entry.path.is_empty() { b"/.".to_vec() } else { [b"/", &entry.path[..]].concat() };
        if let Kind::Special(what) = entry.kind {
            if self.owners == Owners::Mine {
                return Ok(());
            }
            return Err(UserError::new(format!("{} holds a {what}", self.name))
                .in_file(show(&entry.path))
                .why("an image gets its device nodes and fifos when it boots")
                .help("leave this package out, or exclude this path")
                .into());
        }
        self.placed.list.push(listed.clone());
        if entry.path.is_empty() || self.excludes.skips(&listed, &entry.kind) {
            return Ok(());
        }
        if self.installed.has_override(&listed) {
            bail!("dpkg-statoverride was used for this path, which is not supported here");
        }
        if entry.kind == Kind::Directory {
            return self.place_folder(entry);
        }
        let spot = self.find_spot(&entry.path, &listed)?;
        if spot.path != entry.path {
            self.placed.aliases.insert(spot.path.clone(), listed.clone());
        }
        if self.check_owners(&listed, &entry.kind)? {
            self.place_object(entry, &spot, &listed, content)
        } else {
            self.placed.list.pop();
            Ok(())
        }
    }

    /// Follows diversions and the links of the folders on the way.
    fn find_spot(&mut self, path: &[u8], listed: &[u8]) -> Result<Spot> {
        let diverted = self.installed.find_diversion(listed, self.name);
        let path = diverted.and_then(|to| to.strip_prefix(b"/")).unwrap_or(path);
        let (above, name) = split(path);
        let folder = self.walker.open(above)?;
        let path = folder.join(name);
        let mut name = name.to_vec();
        if self.aside.contains(listed) {
            name.extend_from_slice(b".dpkg-new");
        }
        Ok(Spot { folder, name, path })
    }

    /// Whether the file goes in, as far as packages that were installed before have it.
    fn check_owners(&mut self, listed: &[u8], kind: &Kind) -> Result<bool> {
        let Some(me) = self.claims.facts(self.index) else { return Ok(true) };
        for owner in self.installed.owners(listed) {
            let apart = self.installed.is_diverted_by(listed, &owner.name)
                || self.installed.is_diverted_by(listed, self.name);
            if apart || owner.name == me.name {
                continue;
            }
            if me.replaces(owner) {
                self.placed.taken.push((listed.to_vec(), owner.name.clone()));
            } else if owner.replaces(me) {
                return Ok(false);
            } else if !matches!(kind, Kind::Symlink(_)) || !self.leads_to_folder(listed) {
                self.claims.conflict(listed, &owner.name, me);
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether a folder is at this path, which a symbolic link then leaves alone.
    fn leads_to_folder(&self, listed: &[u8]) -> bool {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::DIRECTORY | OFlags::CLOEXEC;
        fs::openat2(self.root, listed, flags, Mode::empty(), ResolveFlags::IN_ROOT).is_ok()
    }

    fn place_folder(&mut self, entry: &Entry) -> Result<()> {
        let (above, name) = split(&entry.path);
        let above = self.walker.open(above)?;
        let path = above.join(name);
        let mine = Claim::Made {
            by: self.index,
            metadata: Metadata {
                mode: entry.mode,
                uid: entry.uid,
                gid: entry.gid,
                mtime: entry.mtime,
                xattrs: self.choose_xattrs(entry)?,
            },
        };
        {
            let mut claims = self.claims.lock(&path);
            match claims.get(&path) {
                Some(Claim::Folder) => return Ok(()),
                Some(Claim::Made { by, .. }) => {
                    if *by > self.index {
                        claims.insert(path, mine);
                    }
                    return Ok(());
                }
                Some(Claim::Object { owner, settled }) => {
                    if *owner != self.index && !settled {
                        self.claims.contest(&path, *owner, self.index, true);
                        return Ok(());
                    }
                }
                None => match fs::mkdirat(&above.fd, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) => {
                        claims.insert(path, mine);
                        return Ok(());
                    }
                    Err(Errno::EXIST) => {}
                    Err(error) => return Err(error).context("making a folder"),
                },
            }
        }
        // Something was there: a folder, or a link that must lead to one.
        let folder = self.walker.open(&entry.path)?;
        if folder.path == path {
            self.claims.lock(&path).entry(path).or_insert(Claim::Folder);
        }
        Ok(())
    }

    /// Puts a file or link there, unless another package's file stays, or a folder does.
    fn place_object(
        &mut self,
        entry: &Entry,
        spot: &Spot,
        listed: &[u8],
        content: &mut dyn Read,
    ) -> Result<()> {
        let hard_link = match &entry.kind {
            Kind::HardLink(target) => Some(self.find_target(target)?),
            _ => None,
        };
        let file = {
            let mut claims = self.claims.lock(&spot.path);
            match claims.get(&spot.path) {
                None => {}
                Some(Claim::Object { owner, .. }) if *owner == self.index => {
                    bail!("the archive has this entry twice");
                }
                Some(Claim::Object { owner, .. }) => {
                    self.claims.contest(&spot.path, *owner, self.index, false);
                    if self.claims.judge(*owner, self.index).winner != self.index {
                        return Ok(());
                    }
                }
                Some(Claim::Made { by, .. }) if *by != self.index && *by != usize::MAX => {
                    self.claims.contest(&spot.path, *by, self.index, true);
                    return Ok(());
                }
                Some(Claim::Folder | Claim::Made { .. }) => {
                    if matches!(entry.kind, Kind::Symlink(_)) {
                        return Ok(());
                    }
                    bail!("a file where a folder is");
                }
            }
            let Some(file) = self.create(entry, spot, hard_link.as_ref())? else {
                return Ok(());
            };
            claims.insert(spot.path.clone(), Claim::Object { owner: self.index, settled: false });
            file
        };
        match (file, hard_link) {
            (Created::File(file), _) => self.fill(entry, file, listed, content)?,
            (Created::Symlink, _) => self.set_symlink(entry, spot)?,
            (Created::HardLink, Some(target)) => {
                if let Some(sum) = self.placed.sums.get(&target.listed).cloned() {
                    self.placed.sums.insert(listed.to_vec(), sum);
                }
                self.placed.link_targets.push(target.spot.path);
            }
            (Created::HardLink, None) => {}
        }
        Ok(())
    }

    /// Makes the name; `None` when a folder is there that a symbolic link leaves alone.
    fn create(
        &self,
        entry: &Entry,
        spot: &Spot,
        target: Option<&Target>,
    ) -> Result<Option<Created>> {
        let (folder, name) = (&spot.folder.fd, &spot.name[..]);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        for cleared in [false, true] {
            let created = match (&entry.kind, target) {
                (Kind::Symlink(to), _) => {
                    fs::symlinkat(&to[..], folder, name).map(|()| Created::Symlink)
                }
                (Kind::HardLink(_), Some(Target { spot: to, .. })) => {
                    fs::linkat(&to.folder.fd, &to.name[..], folder, name, AtFlags::empty())
                        .map(|()| Created::HardLink)
                }
                _ => fs::openat(folder, name, flags, Mode::from_raw_mode(0o600))
                    .map(|fd| Created::File(fd.into())),
            };
            match created {
                Ok(created) => return Ok(Some(created)),
                Err(Errno::EXIST) if !cleared => {
                    let there = fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
                    if FileType::from_raw_mode(there.st_mode) == FileType::Directory {
                        if matches!(entry.kind, Kind::Symlink(_)) {
                            return Ok(None);
                        }
                        bail!("a file where a folder is");
                    }
                    fs::unlinkat(folder, name, AtFlags::empty()).context("replacing a file")?;
                }
                Err(error) => return Err(error).context("making a file"),
            }
        }
        bail!("a file that comes back when it is removed")
    }

    fn fill(
        &mut self,
        entry: &Entry,
        mut file: File,
        listed: &[u8],
        content: &mut dyn Read,
    ) -> Result<()> {
        let mut sum = (self.sum_all || self.aside.contains(listed)).then(Md5::new);
        let mut left = entry.size;
        while left > 0 {
            let most = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let n = content.read(&mut self.buffer[..most])?;
            if n == 0 {
                bail!("the archive is cut short");
            }
            if let Some(sum) = &mut sum {
                sum.update(&self.buffer[..n]);
            }
            file.write_all(&self.buffer[..n]).context("writing a file")?;
            left -= n as u64;
        }
        if let Some(sum) = sum {
            let sum = sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            self.placed.sums.insert(listed.to_vec(), sum);
        }
        let metadata = Metadata {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: self.choose_xattrs(entry)?,
        };
        set_metadata(&file, &metadata, self.owners)
    }

    fn set_symlink(&self, entry: &Entry, spot: &Spot) -> Result<()> {
        let (folder, name) = (&spot.folder.fd, &spot.name[..]);
        if let Some((uid, gid)) = choose_owner(self.owners, entry.uid, entry.gid) {
            fs::chownat(folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .context("setting the owner of a symbolic link")?;
        }
        fs::utimensat(folder, name, &make_times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
            .context("setting the time of a symbolic link")
    }

    /// The file that a hard link is to share: one that this archive placed.
    fn find_target(&mut self, target: &[u8]) -> Result<Target> {
        let listed = [b"/", target].concat();
        if target.is_empty() {
            bail!("a hard link to the root");
        }
        let spot = self.find_spot(target, &listed)?;
        let claims = self.claims.lock(&spot.path);
        let mine = matches!(
            claims.get(&spot.path),
            Some(Claim::Object { owner, .. }) if *owner == self.index
        );
        drop(claims);
        let there = fs::statat(&spot.folder.fd, &spot.name[..], AtFlags::SYMLINK_NOFOLLOW);
        let regular = there
            .is_ok_and(|there| FileType::from_raw_mode(there.st_mode) == FileType::RegularFile);
        if !(mine && regular) {
            bail!("a hard link to {}, which is no file that this archive placed", show(target));
        }
        Ok(Target { spot, listed })
    }

    /// Attributes to set: file capabilities and what users may set.
    fn choose_xattrs(&self, entry: &Entry) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut chosen = Vec::new();
        for (name, value) in &entry.xattrs {
            let is_user = name.starts_with(b"user.") && !name.starts_with(b"user.overlay.");
            if !is_user && name != b"security.capability" {
                bail!("the extended attribute {} is not supported", name.escape_ascii());
            }
            if is_user || self.owners != Owners::Mine {
                chosen.push((name.clone(), value.clone()));
            }
        }
        Ok(chosen)
    }
}

enum Created {
    File(File),
    Symlink,
    HardLink,
}

struct Target {
    spot: Spot,
    listed: Vec<u8>,
}

/// A folder that no archive has named yet; one that does may come later. Without one, its
/// time is 1970, because that of its making would be another in every run.
fn make_implied(claims: &Claims, above: &Folder, name: &[u8]) -> Result<()> {
    let path = join(&above.path, name);
    let mut locked = claims.lock(&path);
    match fs::mkdirat(&above.fd, name, Mode::from_raw_mode(0o755)) {
        Ok(()) => {
            let metadata = Metadata { mode: 0o755, ..Metadata::default() };
            locked.insert(path, Claim::Made { by: usize::MAX, metadata });
            Ok(())
        }
        Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("making {}", show(&path))),
    }
}

/// Sets what the archive says of a folder, when nothing will be put into it any more.
/// `path` has no links.
pub fn set_folder(root: &OwnedFd, path: &[u8], metadata: &Metadata, owners: Owners) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let folder = fs::openat2(root, path, flags, Mode::empty(), resolve)?;
    set_metadata(&folder, metadata, owners)
}

fn set_metadata(fd: impl AsFd, metadata: &Metadata, owners: Owners) -> Result<()> {
    if let Some((uid, gid)) = choose_owner(owners, metadata.uid, metadata.gid) {
        fs::fchown(&fd, Some(uid), Some(gid)).context("setting the owner")?;
    }
    // After the owner, whose change takes setuid and capabilities away.
    fs::fchmod(&fd, Mode::from_raw_mode(metadata.mode as RawMode)).context("setting the mode")?;
    for (name, value) in &metadata.xattrs {
        fs::fsetxattr(&fd, &name[..], value, XattrFlags::empty())
            .with_context(|| format!("setting the attribute {}", name.escape_ascii()))?;
    }
    fs::futimens(&fd, &make_times(metadata.mtime)).context("setting the time")
}

fn choose_owner(owners: Owners, uid: u32, gid: u32) -> Option<(Uid, Gid)> {
    match owners {
        Owners::Archive => Some((Uid::from_raw(uid), Gid::from_raw(gid))),
        Owners::Root => Some((Uid::ROOT, Gid::ROOT)),
        Owners::Mine => None,
    }
}

fn make_times(mtime: u64) -> Timestamps {
    let time = Timespec { tv_sec: i64::try_from(mtime).unwrap_or(i64::MAX), tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}
