//! The folders beside `layer.toml`: `tree/`, `skeleton/`, `build/`, `boot/` and `initrd/`.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

use super::check::find_merged;
use super::layer::write_mode;
use super::source::{Source, quote};
use crate::error::{UserError, find_nearest};

/// What may stand in a layer's folder.
const ENTRIES: [&str; 6] = ["layer.toml", "tree", "skeleton", "build", "boot", "initrd"];
/// Where the agent can write: the rest of the root is read-only.
const BOOT_FOLDERS: [&str; 3] = ["etc", "run", "var"];
/// Where an image holds what the agent renders at boot.
const SHIPPED: &str = "/usr/share/stanchion/boot";

/// A file, symlink or directory that a layer lays over a root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TreeFile {
    /// Absolute path in the image; a template's without `.j2`.
    pub target: PathBuf,
    pub kind: TreeKind,
    /// Of the mode bits in the checkout only the owner's `x` counts: 0755 or 0644, so
    /// that a umask does not change an image. Directories 0755, symlinks 0777.
    #[serde(serialize_with = "write_mode")]
    pub mode: u32,
    pub owner: String,
    pub group: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TreeKind {
    File {
        /// Relative to the project's root.
        source: PathBuf,
        /// Whether the builder renders it.
        template: bool,
    },
    /// What the symlink says.
    Symlink(String),
    Directory {
        /// A directory that the root has already keeps its owner and mode, because
        /// `[owners]` does not name it.
        keep_existing: bool,
    },
}

/// A line of `[owners]`.
#[derive(Debug, Clone)]
pub(super) struct Ownership {
    pub owner: String,
    pub group: String,
    pub mode: Option<u32>,
    pub span: Range<usize>,
}

/// `[owners]` by path; each must be taken by a file.
#[derive(Default)]
pub(super) struct Owners {
    by_path: BTreeMap<PathBuf, (Ownership, bool)>,
}

impl Owners {
    pub fn insert(&mut self, path: PathBuf, ownership: Ownership) {
        self.by_path.insert(path, (ownership, false));
    }

    pub fn take(&mut self, path: &Path) -> Option<Ownership> {
        let (ownership, is_taken) = self.by_path.get_mut(path)?;
        *is_taken = true;
        Some(ownership.clone())
    }

    pub fn check_all_taken(&self, source: &Source, files: &[TreeFile]) -> Result<()> {
        let left = self.by_path.iter().find(|(_, (_, is_taken))| !is_taken);
        let Some((path, (ownership, _))) = left else { return Ok(()) };
        let path = path.to_string_lossy();
        let what = format!("`[owners]` names {}, which this layer does not have", quote(&path));
        let error = source
            .error(ownership.span.clone(), what)
            .why("neither `tree/` nor `boot/` holds it, and no artifact is put there");
        let known = files.iter().filter_map(|file| file.target.to_str());
        Err(match find_nearest(&path, known) {
            Some(nearest) => error.help(format!("did you mean `{nearest}`?")),
            None => error,
        }
        .into())
    }
}

#[derive(Default)]
pub(super) struct Trees {
    pub skeleton: Vec<TreeFile>,
    pub tree: Vec<TreeFile>,
    pub boot: Vec<TreeFile>,
    pub initrd: Vec<TreeFile>,
    pub build: Vec<TreeFile>,
}

/// Which sections of `layer.toml` with a folder of their own there are.
pub(super) struct Sections {
    pub initrd: bool,
    pub build: bool,
}

/// Something found in one of the folders.
struct Entry {
    /// Relative to the project's root.
    source: PathBuf,
    /// Relative to the folder, as it is named there.
    inner: String,
    found: Found,
}

enum Found {
    File { template: bool, executable: bool },
    Symlink(String),
    Directory,
}

/// Entries by target: the path below the folder, without `.j2`.
type Entries = BTreeMap<String, Entry>;

/// Read the folders of `layers/<name>/` (`folder`, relative to the project's root).
pub(super) fn read_trees(
    source: &Source,
    root: &Path,
    folder: &Path,
    name: &str,
    owners: &mut Owners,
    has: Sections,
) -> Result<Trees> {
    let mut trees = Trees::default();
    let (mut tree, mut skeleton, mut boot) = (Entries::new(), Entries::new(), Entries::new());
    for (entry, metadata) in list(root, folder)? {
        let path = folder.join(&entry);
        if !ENTRIES.contains(&entry.as_str()) {
            let error = UserError::new(format!("a layer has no place for {}", quote(&entry)));
            let help = match find_nearest(&entry, ENTRIES) {
                Some(nearest) => format!("did you mean `{nearest}`?"),
                None => "files of the image go into `tree/`".to_string(),
            };
            return Err(error.in_file(path).help(help).into());
        }
        if entry == "layer.toml" {
            continue;
        }
        if !metadata.is_dir() {
            return Err(UserError::new(format!("`{entry}` is not a directory"))
                .in_file(path)
                .into());
        }
        match entry.as_str() {
            "tree" => tree = read_tree(root, &path)?,
            "skeleton" => skeleton = read_tree(root, &path)?,
            "boot" => boot = read_tree(root, &path)?,
            "initrd" if !has.initrd => return Err(explain_alone(source, &entry, path).into()),
            "build" if !has.build => return Err(explain_alone(source, &entry, path).into()),
            "build" => {
                let entries = read_tree(root, &path)?;
                trees.build = lay(source, entries, &mut Owners::default())?;
            }
            _ => {
                let entries = read_tree(root, &path)?;
                trees.initrd = lay(source, entries, &mut Owners::default())?;
            }
        }
    }
    check_boot(&boot)?;
    check_apart(&tree, &skeleton)?;
    check_apart(&tree, &boot)?;
    // No account of the layer needs to be there yet.
    trees.skeleton = lay(source, skeleton, &mut Owners::default())?;
    trees.tree = lay(source, tree, owners)?;
    check_shipped(&trees.tree, &folder.join("tree"))?;
    trees.boot = ship(lay(source, boot, owners)?, folder, name);
    Ok(trees)
}

fn explain_alone(source: &Source, folder: &str, path: PathBuf) -> UserError {
    UserError::new(format!("`{folder}/` without `[{folder}]`"))
        .in_file(path)
        .help(format!("write `[{folder}]` into {}", source.path().display()))
}

/// Refuse what no image would hold.
fn check_shipped(files: &[TreeFile], tree: &Path) -> Result<()> {
    for file in files {
        let inner = file.target.strip_prefix("/").unwrap_or(&file.target);
        let top = inner.components().next().map(|part| part.as_os_str().to_string_lossy());
        let help = match top.as_deref() {
            Some("var") => {
                "each machine begins with an empty /var: ship the file under /usr, and let a line \
                 of type `C` in /usr/lib/tmpfiles.d copy it"
            }
            Some("dev" | "proc" | "run" | "sys" | "tmp") => {
                "it is made at every boot: write a line in /usr/lib/tmpfiles.d"
            }
            _ => match inner.to_str() {
                Some("etc/hostname" | "etc/machine-id") => "each machine has its own",
                _ => continue,
            },
        };
        let what = format!("`{}` is never in an image", file.target.display());
        return Err(UserError::new(what).in_file(tree.join(inner)).help(help).into());
    }
    Ok(())
}

/// The entries of a directory by name, sorted.
fn list(root: &Path, folder: &Path) -> Result<Vec<(String, Metadata)>> {
    let mut listed = Vec::new();
    let reading = || format!("reading {}", folder.display());
    for entry in fs::read_dir(root.join(folder)).with_context(reading)? {
        let entry = entry.with_context(reading)?;
        let name = entry.file_name();
        let path = folder.join(&name);
        let Some(name) = name.to_str().filter(|name| !name.contains(char::is_control)) else {
            let error = UserError::new(format!("bad file name {}", quote(&name.to_string_lossy())));
            return Err(error.in_file(folder).help("file names are UTF-8 text on one line").into());
        };
        // Of the symlink itself, not of what it names.
        let metadata = entry.metadata().with_context(|| format!("reading {}", path.display()))?;
        listed.push((name.to_string(), metadata));
    }
    listed.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(listed)
}

/// Everything below one of the folders.
fn read_tree(root: &Path, top: &Path) -> Result<Entries> {
    let mut entries = Entries::new();
    let mut waiting = vec![String::new()];
    while let Some(folder) = waiting.pop() {
        for (name, metadata) in list(root, &top.join(&folder))? {
            let inner = if folder.is_empty() { name } else { format!("{folder}/{name}") };
            let entry = read_entry(root, top.join(&inner), inner.clone(), &metadata)?;
            if matches!(entry.found, Found::Directory) {
                waiting.push(inner);
            }
            let target = find_target(&entry)?;
            if let Some(merged) = find_merged(&target) {
                return Err(UserError::new(format!("`/{merged}` is a symlink in the image"))
                    .in_file(entry.source)
                    .help(format!("move it to `{}`", top.join("usr").join(merged).display()))
                    .into());
            }
            if let Some(other) = entries.get(&target) {
                return Err(explain_doubled(&target, &entry, other).into());
            }
            entries.insert(target, entry);
        }
    }
    Ok(entries)
}

fn read_entry(root: &Path, source: PathBuf, inner: String, metadata: &Metadata) -> Result<Entry> {
    let kind = metadata.file_type();
    let refuse = |what: &str| {
        let error = UserError::new(format!("{what} cannot be laid into an image"));
        Err(error.in_file(&source).help("let systemd-tmpfiles make it, or a unit").into())
    };
    let found = if kind.is_dir() {
        Found::Directory
    } else if kind.is_symlink() {
        let to = fs::read_link(root.join(&source))
            .with_context(|| format!("reading {}", source.display()))?;
        let Some(to) = to.to_str() else {
            return Err(UserError::new("the symlink's text is not UTF-8").in_file(source).into());
        };
        if inner.ends_with(".j2") {
            let error = UserError::new("a template cannot be a symlink").in_file(source);
            return Err(error.help("drop `.j2` from its name, or copy the template").into());
        }
        Found::Symlink(to.to_string())
    } else if kind.is_file() {
        let executable = metadata.permissions().mode() & 0o100 != 0;
        Found::File { template: inner.ends_with(".j2"), executable }
    } else if kind.is_socket() {
        return refuse("a socket");
    } else if kind.is_fifo() {
        return refuse("a named pipe");
    } else {
        return refuse("a device");
    };
    Ok(Entry { source, inner, found })
}

fn find_target(entry: &Entry) -> Result<String> {
    match entry.found {
        Found::File { template: true, .. } => {
            let target = entry.inner.strip_suffix(".j2").unwrap_or(&entry.inner);
            if target.is_empty() || target.ends_with('/') {
                let error = UserError::new("a template has no name but `.j2`");
                return Err(error.in_file(&entry.source).into());
            }
            Ok(target.to_string())
        }
        _ => Ok(entry.inner.clone()),
    }
}

fn explain_doubled(target: &str, entry: &Entry, other: &Entry) -> UserError {
    UserError::new(format!("{} is doubled", quote(&format!("/{target}"))))
        .in_file(&entry.source)
        .why(format!("{} becomes the same path of the image", other.source.display()))
        .help("keep one of them")
}

/// What `boot/` may hold: files where the agent can write.
fn check_boot(boot: &Entries) -> Result<()> {
    for (target, entry) in boot {
        let first = target.split('/').next().unwrap_or_default();
        if !BOOT_FOLDERS.contains(&first) {
            return Err(UserError::new(format!("{} is read-only", quote(&format!("/{first}"))))
                .in_file(&entry.source)
                .why("at boot the agent can write below /etc, /run and /var only")
                .help("move it to `tree/`, to be laid when the image is built")
                .into());
        }
    }
    Ok(())
}

/// Two folders of a layer share nothing but directories.
fn check_apart(tree: &Entries, other: &Entries) -> Result<()> {
    for (target, entry) in other {
        match tree.get(target) {
            Some(Entry { found: Found::Directory, .. })
                if matches!(entry.found, Found::Directory) => {}
            Some(first) => return Err(explain_doubled(target, entry, first).into()),
            None => {}
        }
    }
    Ok(())
}

/// Give each entry its owner and mode.
fn lay(source: &Source, entries: Entries, owners: &mut Owners) -> Result<Vec<TreeFile>> {
    let lay_one = |(target, entry): (String, Entry)| {
        let target = Path::new("/").join(target);
        let ownership = owners.take(&target);
        let (kind, mode) = match entry.found {
            Found::File { template, executable } => {
                let mode = if executable { 0o755 } else { 0o644 };
                (TreeKind::File { source: entry.source, template }, mode)
            }
            Found::Directory => (TreeKind::Directory { keep_existing: ownership.is_none() }, 0o755),
            Found::Symlink(to) => {
                if let Some(ownership) = ownership {
                    let error = source.error(ownership.span, "a symlink has no owner of its own");
                    return Err(error.help("name the file that it leads to").into());
                }
                (TreeKind::Symlink(to), 0o777)
            }
        };
        let (owner, group, stated) = match ownership {
            Some(ownership) => (ownership.owner, ownership.group, ownership.mode),
            None => ("root".to_string(), "root".to_string(), None),
        };
        Ok(TreeFile { target, kind, mode: stated.unwrap_or(mode), owner, group })
    };
    entries.into_iter().map(lay_one).collect()
}

/// Move the files of `boot/` to where the image holds them for the agent.
fn ship(files: Vec<TreeFile>, folder: &Path, name: &str) -> Vec<TreeFile> {
    let boot = folder.join("boot");
    let shipped = Path::new(SHIPPED).join(name);
    files
        .into_iter()
        .map(|mut file| {
            if let TreeKind::File { source, template } = &mut file.kind {
                *template = false;
                file.target = shipped.join(source.strip_prefix(&boot).unwrap_or(source));
            } else {
                file.target = shipped.join(file.target.strip_prefix("/").unwrap_or(&file.target));
            }
            file
        })
        .collect()
}
