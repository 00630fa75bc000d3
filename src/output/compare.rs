//! What two images have in common and what not: packages, and files of the root with all
//! that a file has. Images may come from anywhere, as for [`super::inspect`].

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use super::inspect::{Report, clean, inspect_open};
use super::raw_image::{RawImage, explain_unreadable};
use crate::disk::erofs_read::{Erofs, Inode};
use crate::disk::region::Region;
use crate::progress::format_bytes;

const MAX_FILE: u64 = 1 << 30;
/// Folders in folders; no Linux path has more.
const MAX_DEPTH: usize = 2048;
const MAX_FILES: usize = 4_000_000;
/// Lines of files that a person gets; a program gets all.
const SHOWN: usize = 60;

/// From the old image to the new one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    pub old: Side,
    pub new: Side,
    pub packages: Vec<PackageChange>,
    /// In the order of their paths; a folder that came or went stands beside all in it.
    pub files: Vec<FileChange>,
}

/// One of the two images.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Side {
    /// Image and version, as its kernel has them.
    pub image: String,
    /// Bytes of all files of the root.
    pub bytes: u64,
    pub files: u64,
}

/// A package that has another version, came (no `old`) or went (no `new`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PackageChange {
    pub name: String,
    pub old: Option<String>,
    pub new: Option<String>,
}

/// A file that differs, came (no `old`) or went (no `new`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileChange {
    /// From the root, with a `/` before it.
    pub path: String,
    /// Bytes.
    pub old: Option<u64>,
    pub new: Option<u64>,
    /// What differs: `content`, `type`, `mode`, `owner`, `link`, `attributes`.
    pub what: Vec<&'static str>,
}

/// Compare two images that are open; the paths name them in errors.
///
/// # Errors
/// A [`UserError`](crate::error::UserError) for what is no image with a root.
pub fn compare(old: (&Path, &RawImage), new: (&Path, &RawImage)) -> Result<Comparison> {
    let reports = (inspect_open(old.0, old.1)?, inspect_open(new.0, new.1)?);
    let disks = (Region::whole(&old.1.file)?, Region::whole(&new.1.file)?);
    let open = |path: &Path, disk, report| {
        open_root(disk, report).map_err(|error| explain_unreadable(path, &error))
    };
    let roots = (open(old.0, &disks.0, &reports.0)?, open(new.0, &disks.1, &reports.1)?);
    let mut walk = Walk { old: &roots.0, new: &roots.1, sides: Default::default(), files: vec![] };
    walk.compare_folders("", Some(roots.0.root()?), Some(roots.1.root()?), 0)
        .context("comparing the roots")?;
    let [mut before, mut after] = walk.sides;
    before.image = name_image(&reports.0);
    after.image = name_image(&reports.1);
    Ok(Comparison {
        old: before,
        new: after,
        packages: compare_packages(&list_packages(&reports.0), &list_packages(&reports.1)),
        files: walk.files,
    })
}

/// The first slot's root.
fn open_root<'a>(disk: &Region<'a>, report: &Report) -> Result<Erofs<'a>> {
    let slot = report.slots.first().context("it has no root that a kernel could boot")?;
    Erofs::open(disk.part(slot.start, slot.covered)?)
}

fn name_image(report: &Report) -> String {
    let kernel = report.kernels.first();
    let of = |value: Option<&Option<String>>| value.cloned().flatten().unwrap_or_default();
    let words = [of(kernel.map(|k| &k.image)), of(kernel.map(|k| &k.version))];
    words.join(" ").trim().to_string()
}

fn list_packages(report: &Report) -> BTreeMap<String, String> {
    let packages = report.manifest.as_ref().and_then(|manifest| manifest["packages"].as_array());
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_string();
    let packages = packages.map(Vec::as_slice).unwrap_or_default().iter();
    packages.map(|package| (text(&package["name"]), text(&package["version"]))).collect()
}

fn compare_packages(
    old: &BTreeMap<String, String>,
    new: &BTreeMap<String, String>,
) -> Vec<PackageChange> {
    let mut names: Vec<&String> = old.keys().chain(new.keys()).collect();
    names.sort();
    names.dedup();
    let changes = names.into_iter().map(|name| PackageChange {
        name: name.clone(),
        old: old.get(name).cloned(),
        new: new.get(name).cloned(),
    });
    changes.filter(|change| change.old != change.new).collect()
}

/// Both roots at once, folder by folder.
struct Walk<'a> {
    old: &'a Erofs<'a>,
    new: &'a Erofs<'a>,
    sides: [Side; 2],
    files: Vec<FileChange>,
}

impl Walk<'_> {
    fn compare_folders(
        &mut self,
        path: &str,
        old: Option<Inode>,
        new: Option<Inode>,
        depth: usize,
    ) -> Result<()> {
        ensure!(depth < MAX_DEPTH, "{path} lies in more than {MAX_DEPTH} folders");
        let list = |erofs: &Erofs, folder: &Option<Inode>| match folder {
            Some(folder) if folder.is_folder() => {
                let mut entries = erofs.list(folder)?;
                entries.retain(|(name, _)| name != b"." && name != b"..");
                entries.sort();
                Ok(entries)
            }
            _ => anyhow::Ok(Vec::new()),
        };
        let (left, right) = (list(self.old, &old)?, list(self.new, &new)?);
        let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
        loop {
            let order = match (left.peek(), right.peek()) {
                (None, None) => return Ok(()),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some((a, _)), Some((b, _))) => a.cmp(b),
            };
            let before = if order.is_le() { left.next() } else { None };
            let after = if order.is_ge() { right.next() } else { None };
            let name = before.as_ref().or(after.as_ref()).map(|(name, _)| name.clone());
            let name = String::from_utf8_lossy(&name.unwrap_or_default()).into_owned();
            let path = format!("{path}/{name}");
            let before = before.map(|(_, number)| self.old.read_inode(number)).transpose()?;
            let after = after.map(|(_, number)| self.new.read_inode(number)).transpose()?;
            self.compare_files(&path, before.as_ref(), after.as_ref())
                .with_context(|| format!("comparing {path}"))?;
            let is_folder = |inode: &Option<Inode>| inode.as_ref().is_some_and(Inode::is_folder);
            if is_folder(&before) || is_folder(&after) {
                self.compare_folders(&path, before, after, depth + 1)?;
            }
        }
    }

    fn compare_files(
        &mut self,
        path: &str,
        old: Option<&Inode>,
        new: Option<&Inode>,
    ) -> Result<()> {
        for (side, inode) in self.sides.iter_mut().zip([old, new]) {
            if let Some(inode) = inode.filter(|inode| !inode.is_folder()) {
                side.bytes += measure(inode);
                side.files += 1;
                if side.files as usize > MAX_FILES {
                    bail!("there are more than {MAX_FILES} files");
                }
            }
        }
        let what = match (old, new) {
            (Some(old), Some(new)) => self.list_differences(old, new)?,
            _ => Vec::new(),
        };
        if old.is_none() || new.is_none() || !what.is_empty() {
            self.files.push(FileChange {
                path: path.to_string(),
                old: old.map(measure),
                new: new.map(measure),
                what,
            });
        }
        Ok(())
    }

    fn list_differences(&self, old: &Inode, new: &Inode) -> Result<Vec<&'static str>> {
        let mut what = Vec::new();
        let kind = |inode: &Inode| inode.mode & 0o170_000;
        if kind(old) != kind(new) || old.device != new.device {
            what.push("type");
        } else if old.is_file() || old.is_link() {
            let same = old.size == new.size
                && self.old.read(old, MAX_FILE)? == self.new.read(new, MAX_FILE)?;
            if !same {
                what.push(if old.is_link() { "link" } else { "content" });
            }
        }
        if old.mode & 0o7777 != new.mode & 0o7777 {
            what.push("mode");
        }
        if (old.uid, old.gid) != (new.uid, new.gid) {
            what.push("owner");
        }
        let attributes = |erofs: &Erofs, inode| -> Result<_> {
            let mut list = erofs.attributes(inode)?;
            list.sort();
            Ok(list)
        };
        if attributes(self.old, old)? != attributes(self.new, new)? {
            what.push("attributes");
        }
        Ok(what)
    }
}

/// Bytes of content; a folder's own do not count.
fn measure(inode: &Inode) -> u64 {
    if inode.is_file() || inode.is_link() { inode.size } else { 0 }
}

impl Comparison {
    pub fn is_same(&self) -> bool {
        self.packages.is_empty() && self.files.is_empty()
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (mark, side) in [("-", &self.old), ("+", &self.new)] {
            let Side { image, bytes, files } = side;
            writeln!(f, "{mark} {}: {files} files, {}", clean(image), format_bytes(*bytes))?;
        }
        if self.is_same() {
            return writeln!(f, "\nthe roots are the same");
        }
        if !self.packages.is_empty() {
            writeln!(f, "\n{} packages differ", self.packages.len())?;
        }
        for PackageChange { name, old, new } in &self.packages {
            match (old, new) {
                (Some(old), Some(new)) => {
                    writeln!(f, "  ~ {} {} -> {}", clean(name), clean(old), clean(new))?;
                }
                (Some(old), None) => writeln!(f, "  - {} {}", clean(name), clean(old))?,
                (None, new) => {
                    writeln!(f, "  + {} {}", clean(name), clean(new.as_deref().unwrap_or("")))?;
                }
            }
        }
        if !self.files.is_empty() {
            writeln!(f, "\n{} files differ", self.files.len())?;
        }
        // Those that changed the size most come first where not all are shown.
        let mut order: Vec<&FileChange> = self.files.iter().collect();
        if order.len() > SHOWN {
            order.sort_by_key(|change| std::cmp::Reverse(change.weigh()));
        }
        for change in order.iter().take(SHOWN) {
            writeln!(f, "  {change}")?;
        }
        if order.len() > SHOWN {
            writeln!(f, "  and {} more, which --json shows", order.len() - SHOWN)?;
        }
        Ok(())
    }
}

impl FileChange {
    /// How far its size went up or down.
    fn weigh(&self) -> u64 {
        self.old.unwrap_or(0).abs_diff(self.new.unwrap_or(0))
    }
}

impl fmt::Display for FileChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = clean(&self.path);
        match (self.old, self.new) {
            (Some(old), Some(new)) if old == new => {
                write!(f, "~ {path}  {}  {}", format_bytes(new), self.what.join(", "))
            }
            (Some(old), Some(new)) => {
                let (old, new) = (format_bytes(old), format_bytes(new));
                write!(f, "~ {path}  {old} -> {new}  {}", self.what.join(", "))
            }
            (Some(old), None) => write!(f, "- {path}  {}", format_bytes(old)),
            (None, new) => write!(f, "+ {path}  {}", format_bytes(new.unwrap_or(0))),
        }
    }
}
