//! Unpack packages into a root, several at a time, as `dpkg --unpack` would one after the
//! other (deb(5), dpkg's src/main/archives.c), without its maintainer scripts.
//!
//! Archives are hostile: nothing is written outside the root or through a link, device
//! nodes and fifos are refused, and what an archive unpacks to is bounded. The result
//! does not depend on the number of threads: see [`super::claims`] for the rules.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result, anyhow};
use rustix::io::Errno;

use super::claims::Claims;
pub use super::claims::Conflict;
use super::exclude::Excludes;
use super::installed::{Facts, Installed};
use super::place::open_root;
use super::unpacker::{Owners, Unpacker, set_folder};
use crate::debian::archive::{self, Entry, Kind, show};
use crate::debian::deb822;
use crate::debian::package::{self, ControlMembers};
use crate::error::UserError;

/// A package file.
#[derive(Debug, Clone)]
pub struct DebFile {
    /// The package's name.
    pub name: String,
    pub path: PathBuf,
    /// Bytes that it may unpack to ([`package::limit_data`]).
    pub limit: u64,
}

/// What a tree is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A root that dpkg goes on with: owners as in the archive, conffiles beside their
    /// places (`NAME.dpkg-new`), where `dpkg --configure` takes them from.
    Install,
    /// A tree whose files are only run or copied, made by any user: owners are the
    /// user's, device nodes and `security.*` attributes are left out, conffiles are in
    /// place.
    Tools,
}

/// How to unpack.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    pub purpose: Purpose,
    pub threads: usize,
    pub excludes: &'a Excludes,
}

/// A file that an administrator may edit (deb-conffiles(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conffile {
    /// Beginning with `/`.
    pub path: String,
    /// Of the packaged content, in hexadecimal; `None` when the archive has no such file.
    pub md5: Option<String>,
    /// It is not packaged any more and goes away.
    pub remove_on_upgrade: bool,
}

/// A package whose files are in the root, and what dpkg must know of it.
#[derive(Debug, Clone)]
pub struct Unpacked {
    /// The package's name, from its control file.
    pub name: String,
    pub control: ControlMembers,
    /// As in dpkg's `.list`: `/.`, `/usr`, `/usr/bin` ..., in the archive's order.
    /// Excluded files are in it, as in dpkg's; files that another package replaces are not.
    pub list: Vec<Vec<u8>>,
    pub conffiles: Vec<Conffile>,
    /// Lines for dpkg's `.md5sums`, when the package brings none.
    pub md5sums: Option<Vec<u8>>,
    /// Paths taken over from packages that were installed before, with their owners.
    pub taken: Vec<(Vec<u8>, String)>,
}

impl Unpacked {
    /// The text of the file `control`.
    pub fn control_text(&self) -> Result<&str> {
        let (_, bytes) = self.control.get("control").context("no control file")?;
        std::str::from_utf8(bytes).with_context(|| format!("{}: its control file", self.name))
    }
}

/// What [`unpack_all`] did.
#[derive(Debug)]
pub struct Unpacking {
    /// In the order of the package files.
    pub packages: Vec<Unpacked>,
    /// Sorted by path. A root with conflicts is not what dpkg would have made.
    pub conflicts: Vec<Conflict>,
}

/// Unpacks packages into `root`, an existing folder. Their order decides where they
/// disagree. `base-files` goes first and alone: it holds the links of a merged /usr, which
/// must be there before anything is put behind them.
///
/// Errors: an archive that is damaged or hostile, with the package's name; of several, the
/// first in order. The root is then of no use.
pub fn unpack_all(debs: &[DebFile], root: &Path, options: &Options<'_>) -> Result<Unpacking> {
    let root = open_root(root)?;
    let installed = match options.purpose {
        Purpose::Install => Installed::read(&root)?,
        Purpose::Tools => Installed::default(),
    };
    let job = Job { root: &root, debs, options, installed, claims: Claims::new(debs.len()) };
    let (first, mut rest): (Vec<usize>, Vec<usize>) =
        (0..debs.len()).partition(|index| debs[*index].name == "base-files");
    // The largest first, or one thread would be left with it at the end.
    let mut sizes = Vec::new();
    for deb in debs {
        let metadata = deb.path.metadata();
        sizes.push(metadata.with_context(|| format!("opening {}", deb.path.display()))?.len());
    }
    rest.sort_by_key(|index| std::cmp::Reverse(sizes[*index]));
    let mut done = job.run(&first)?;
    job.claims.settle();
    done.extend(job.run(&rest)?);
    done.sort_by_key(|(index, _, _)| *index);
    job.finish(done)
}

/// Unpacks a tar archive that is no package ([`package::open_tar`]) into `root`, as files
/// of root; `name` is for messages. The first `strip` parts of every path are dropped, and
/// what has no more than those. Returns how many entries it had. What is there already
/// stays, unless an entry is a file or link of the same path.
pub fn unpack_tar(
    tar: tar::Archive<package::Stream<'_>>,
    name: &str,
    root: &Path,
    strip: usize,
    purpose: Purpose,
) -> Result<usize> {
    let root = open_root(root)?;
    let claims = Claims::new(1);
    let installed = Installed::default();
    let owners = match purpose {
        Purpose::Install => Owners::Root,
        Purpose::Tools => Owners::Mine,
    };
    let unpack = || -> Result<usize> {
        let excludes = Excludes::default();
        let mut unpacker = Unpacker::new(&root, &claims, &installed, &excludes, owners, 0, name)?;
        archive::read_entries(tar, |entry, content| match strip_entry(entry, strip) {
            Some(entry) => unpacker.place(&entry, content),
            None => Ok(()),
        })?;
        let count = unpacker.into_placed().list.len();
        set_folders(&root, &claims, owners)?;
        Ok(count)
    };
    unpack().map_err(package::lift_user_error).with_context(|| format!("unpacking {name}"))
}

/// An archive that cannot be unpacked is a bad one, unless this machine is what fails.
fn explain_failure(name: &str, error: anyhow::Error) -> anyhow::Error {
    if error.downcast_ref::<UserError>().is_some() || error.chain().any(is_machine_failing) {
        return error.context(format!("unpacking the package {name}"));
    }
    UserError::new(format!("the package {name} cannot be unpacked"))
        .why(format!("{error:#}"))
        .help(format!("`stanchion lock --update {name}` takes a newer version, if there is one"))
        .into()
}

fn is_machine_failing(cause: &(dyn std::error::Error + 'static)) -> bool {
    let errno = match cause.downcast_ref::<std::io::Error>() {
        Some(error) => Errno::from_io_error(error),
        None => cause.downcast_ref::<Errno>().copied(),
    };
    matches!(
        errno,
        Some(
            Errno::NOSPC
                | Errno::DQUOT
                | Errno::ROFS
                | Errno::IO
                | Errno::MFILE
                | Errno::NFILE
                | Errno::NOMEM
                | Errno::ACCESS
                | Errno::PERM
        )
    )
}

/// The entry without the first `strip` parts of its path and of what a hard link names.
fn strip_entry(entry: &Entry, strip: usize) -> Option<Entry> {
    let shorten = |path: &[u8]| {
        let rest: Vec<&[u8]> = path.split(|byte| *byte == b'/').skip(strip).collect();
        (!rest.is_empty()).then(|| rest.join(&b'/'))
    };
    let kind = match &entry.kind {
        Kind::HardLink(target) => Kind::HardLink(shorten(target)?),
        kind => kind.clone(),
    };
    Some(Entry { path: shorten(&entry.path)?, kind, ..entry.clone() })
}

/// What one package left: [`Unpacked`] before contests are settled.
type Done = (usize, Unpacked, Extra);

/// What is needed at the end and not later.
struct Extra {
    /// For paths that are another way to their file: without links, as listed.
    aliases: HashMap<Vec<u8>, Vec<u8>>,
    link_targets: Vec<Vec<u8>>,
}

struct Job<'a> {
    root: &'a OwnedFd,
    debs: &'a [DebFile],
    options: &'a Options<'a>,
    installed: Installed,
    claims: Claims,
}

impl Job<'_> {
    fn owners(&self) -> Owners {
        match self.options.purpose {
            Purpose::Install => Owners::Archive,
            Purpose::Tools => Owners::Mine,
        }
    }

    fn run(&self, order: &[usize]) -> Result<Vec<Done>> {
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let done = Mutex::new(Vec::new());
        let errors = Mutex::new(Vec::new());
        let work = || {
            while !failed.load(Ordering::Relaxed) {
                let Some(index) = order.get(next.fetch_add(1, Ordering::Relaxed)) else { return };
                match self.unpack(*index) {
                    Ok((unpacked, extra)) => {
                        done.lock().expect("no panic while held").push((*index, unpacked, extra));
                    }
                    Err(error) => {
                        failed.store(true, Ordering::Relaxed);
                        errors.lock().expect("no panic while held").push((*index, error));
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..self.options.threads.clamp(1, 16).min(order.len()) {
                scope.spawn(work);
            }
        });
        let errors = errors.into_inner().map_err(|_| anyhow!("a thread panicked"))?;
        match errors.into_iter().min_by_key(|(index, _)| *index) {
            Some((_, error)) => Err(error),
            None => done.into_inner().map_err(|_| anyhow!("a thread panicked")),
        }
    }

    fn unpack(&self, index: usize) -> Result<(Unpacked, Extra)> {
        let deb = &self.debs[index];
        let unpack = || -> Result<(Unpacked, Extra)> {
            let file =
                File::open(&deb.path).with_context(|| format!("opening {}", deb.path.display()))?;
            let opened = package::open_package(file, &deb.name, deb.limit)?;
            self.unpack_opened(index, opened)
        };
        unpack().map_err(|error| explain_failure(&deb.name, package::lift_user_error(error)))
    }

    fn unpack_opened(
        &self,
        index: usize,
        mut opened: package::Package<'_>,
    ) -> Result<(Unpacked, Extra)> {
        let control = std::mem::take(&mut opened.control);
        let text = &control.get("control").context("no control file")?.1;
        let text = std::str::from_utf8(text).context("its control file is not UTF-8")?;
        let paragraph = deb822::parse_one(text).context("its control file")?;
        let facts = Facts::read(&paragraph).context("its control file")?;
        let name = facts.name.clone();
        self.claims.introduce(index, facts);
        let mut conffiles = read_conffiles(&control)?;

        let mut unpacker = Unpacker::new(
            self.root,
            &self.claims,
            &self.installed,
            self.options.excludes,
            self.owners(),
            index,
            &name,
        )?;
        if self.options.purpose == Purpose::Install {
            let packaged = conffiles.iter().filter(|conffile| !conffile.remove_on_upgrade);
            unpacker.set_aside(packaged.map(|conffile| conffile.path.as_bytes().to_vec()));
            if !control.contains_key("md5sums") {
                unpacker.sum_all();
            }
        }
        archive::read_entries(opened.into_data(), |entry, content| unpacker.place(entry, content))?;
        let placed = unpacker.into_placed();
        for conffile in &mut conffiles {
            conffile.md5 = placed.sums.get(conffile.path.as_bytes()).cloned();
        }
        let md5sums = (!control.contains_key("md5sums")).then(|| {
            let mut lines = Vec::new();
            for path in &placed.list {
                if let Some(sum) = placed.sums.get(path) {
                    lines.extend_from_slice(sum.as_bytes());
                    lines.extend_from_slice(b"  ");
                    lines.extend_from_slice(&path[1..]);
                    lines.push(b'\n');
                }
            }
            lines
        });
        let extra = Extra { aliases: placed.aliases, link_targets: placed.link_targets };
        let list = placed.list;
        Ok((Unpacked { name, control, list, conffiles, md5sums, taken: placed.taken }, extra))
    }

    /// Settles what several packages hold, and sets the metadata of folders.
    fn finish(&self, mut done: Vec<Done>) -> Result<Unpacking> {
        let links: Vec<(usize, Vec<u8>)> = done
            .iter_mut()
            .flat_map(|(index, _, extra)| {
                let targets = std::mem::take(&mut extra.link_targets);
                targets.into_iter().map(|target| (*index, target))
            })
            .collect();
        let (lost, conflicts) = self.claims.close(&links)?;
        for (loser, path) in lost {
            let (_, unpacked, extra) = &mut done[loser];
            let listed = extra.aliases.remove(&path);
            let listed = listed.unwrap_or_else(|| [b"/", &path[..]].concat());
            unpacked.list.retain(|path| *path != listed);
        }
        set_folders(self.root, &self.claims, self.owners())?;
        let packages = done.into_iter().map(|(_, unpacked, _)| unpacked).collect();
        Ok(Unpacking { packages, conflicts })
    }
}

fn set_folders(root: &OwnedFd, claims: &Claims, owners: Owners) -> Result<()> {
    for (path, metadata) in claims.take_folders() {
        set_folder(root, &path, &metadata, owners)
            .with_context(|| format!("setting the metadata of {}", show(&path)))?;
    }
    Ok(())
}

/// One path a line, with an optional flag before it (deb-conffiles(5)).
fn read_conffiles(control: &ControlMembers) -> Result<Vec<Conffile>> {
    let Some((_, bytes)) = control.get("conffiles") else { return Ok(Vec::new()) };
    let text = std::str::from_utf8(bytes).context("its conffiles are not UTF-8")?;
    let mut conffiles = Vec::new();
    for line in text.lines().map(str::trim_end).filter(|line| !line.is_empty()) {
        let (path, remove_on_upgrade) = match line.strip_prefix("remove-on-upgrade ") {
            Some(path) => (path, true),
            None => (line, false),
        };
        let normal = path.strip_prefix('/').map(|path| archive::normalise_path(path.as_bytes()));
        match normal {
            Some(Ok(normal)) if normal == path.as_bytes()[1..] => {}
            _ => return Err(anyhow!("a conffile with a wrong path: {}", line.escape_debug())),
        }
        conffiles.push(Conffile { path: path.to_string(), md5: None, remove_on_upgrade });
    }
    Ok(conffiles)
}

#[cfg(test)]
pub(crate) mod tests;
