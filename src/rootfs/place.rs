//! Folders beneath a root, opened one component at a time and never through a symbolic
//! link: links are read and followed here, inside the root, as the kernel does with
//! `RESOLVE_IN_ROOT` (openat2(2)). Doing it by hand gives each folder's path without
//! links, which says when two archives mean the same file by different paths.

use std::collections::HashMap;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use rustix::fs::{self, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::debian::archive::show;

/// The kernel's own limit (path_resolution(7)).
const MAX_LINKS: u32 = 40;
/// Open folders that one thread keeps: few, because all threads share 1024 descriptors.
const MAX_OPEN: usize = 48;
/// As deep as the folders of an archive may be.
const MAX_DEPTH: usize = 128;
/// `O_PATH` cannot read or write what it names; it needs no permission either.
const FOLDER: OFlags =
    OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// An open folder of the root.
pub struct Folder {
    pub fd: OwnedFd,
    /// From the root, without links and slashes at its ends; empty for the root.
    pub path: Vec<u8>,
}

impl Folder {
    /// The path of `name` in this folder.
    pub fn join(&self, name: &[u8]) -> Vec<u8> {
        join(&self.path, name)
    }
}

/// `folder/name`, or `name` in the root.
pub fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() { name.to_vec() } else { [folder, b"/", name].concat() }
}

/// The folder and the last component of a path that is not empty.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

/// Open the root folder itself, following links to it.
pub fn open_root(root: &Path) -> Result<OwnedFd> {
    fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("opening {}", root.display()))
}

/// Makes a folder that is missing: the one it belongs in, and its name.
type MakeFolder<'a> = dyn Fn(&Folder, &[u8]) -> Result<()> + 'a;

/// Finds folders beneath one root and keeps the last ones open; one for each thread.
pub struct Walker<'a> {
    root: Rc<Folder>,
    open: HashMap<Vec<u8>, Rc<Folder>>,
    make: Box<MakeFolder<'a>>,
}

impl<'a> Walker<'a> {
    pub fn new(root: &OwnedFd, make: impl Fn(&Folder, &[u8]) -> Result<()> + 'a) -> Result<Self> {
        let fd = root.try_clone().context("duplicating a descriptor")?;
        let root = Rc::new(Folder { fd, path: Vec::new() });
        Ok(Walker { root, open: HashMap::new(), make: Box::new(make) })
    }

    /// The folder that `path` leads to, made with those above it when it is missing.
    /// `path` is normalised: no empty components, no dots.
    ///
    /// Errors: something on the way is no folder, or a loop of links.
    pub fn open(&mut self, path: &[u8]) -> Result<Rc<Folder>> {
        let mut links = 0;
        self.open_counting(path, &mut links)
    }

    fn open_counting(&mut self, path: &[u8], links: &mut u32) -> Result<Rc<Folder>> {
        if path.is_empty() {
            return Ok(self.root.clone());
        }
        if let Some(folder) = self.open.get(path) {
            return Ok(folder.clone());
        }
        let (above, name) = split(path);
        let above = self.open_counting(above, links)?;
        let folder = self.step(&above, name, links)?;
        if self.open.len() >= MAX_OPEN {
            self.open.clear();
        }
        self.open.insert(path.to_vec(), folder.clone());
        Ok(folder)
    }

    fn step(&mut self, above: &Folder, name: &[u8], links: &mut u32) -> Result<Rc<Folder>> {
        let path = above.join(name);
        for made in [false, true] {
            match fs::openat2(&above.fd, name, FOLDER, Mode::empty(), ResolveFlags::BENEATH) {
                Ok(fd) => return Ok(Rc::new(Folder { fd, path })),
                Err(Errno::NOENT) if !made => (self.make)(above, name)?,
                Err(Errno::NOTDIR | Errno::LOOP) => return self.follow(above, name, links),
                Err(error) => {
                    return Err(error).with_context(|| format!("opening {}", show(&path)));
                }
            }
        }
        bail!("{}: a folder that vanished", show(&path))
    }

    fn follow(&mut self, above: &Folder, name: &[u8], links: &mut u32) -> Result<Rc<Folder>> {
        let path = above.join(name);
        let target = match fs::readlinkat(&above.fd, name, Vec::new()) {
            Ok(target) => target.into_bytes(),
            Err(Errno::INVAL) => bail!("{}: a folder is wanted where a file is", show(&path)),
            Err(error) => return Err(error).with_context(|| format!("reading {}", show(&path))),
        };
        *links += 1;
        if *links > MAX_LINKS {
            bail!("{}: too many symbolic links", show(&path));
        }
        // Its own path has no links, so `..` is what it is in the kernel.
        let mut at = if target.starts_with(b"/") { Vec::new() } else { above.path.clone() };
        for part in target.split(|byte| *byte == b'/') {
            at = match part {
                b"" | b"." => continue,
                b".." => split_or_root(&at),
                _ if at.iter().filter(|byte| **byte == b'/').count() >= MAX_DEPTH => {
                    bail!("{}: a link into too many folders", show(&path))
                }
                _ => {
                    let folder = self.open_counting(&at, links)?;
                    self.step(&folder, part, links)?.path.clone()
                }
            };
        }
        self.open_counting(&at, links)
    }
}

fn split_or_root(path: &[u8]) -> Vec<u8> {
    if path.is_empty() { Vec::new() } else { split(path).0.to_vec() }
}

/// Open something beneath the root for reading, as a process in that root would; `None`
/// when there is nothing.
pub fn open_beneath(root: &OwnedFd, path: &str) -> Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    loop {
        match fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
            Ok(fd) => return Ok(Some(fd)),
            Err(Errno::NOENT) => return Ok(None),
            // A rename elsewhere in the file system made the kernel unsure (openat2(2)).
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error).with_context(|| format!("opening {path}")),
        }
    }
}

/// A whole file beneath the root, empty when there is none; at most `limit` bytes.
pub fn read_beneath(root: &OwnedFd, path: &str, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(fd) = open_beneath(root, path)? {
        std::fs::File::from(fd)
            .take(limit + 1)
            .read_to_end(&mut bytes)
            .with_context(|| format!("reading {path}"))?;
    }
    if bytes.len() as u64 > limit {
        bail!("{path} is larger than {limit} bytes");
    }
    Ok(bytes)
}
