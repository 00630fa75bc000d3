//! Build one layer's changes. This code runs inside the sandbox, over the trees of the
//! layers below; what it changes lands in the overlay's upper side.
//!
//! A layer makes up to two diffs, each cached by itself: **packages** (unpack, register,
//! configure), which is slow and seldom changes, and **files** (tree, artifacts, units,
//! commands), which is fast and changes at every edit.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::accounts::{self, Account};
use super::exclude::Excludes;
use super::extract::{self, DebFile, Purpose, Unpacked};
use super::place::{self, Walker};
use super::{diversions, dpkg, seal, stand_in};
use crate::command::Failed;
use crate::debian::{deb822, package};
use crate::digest::Digest;
use crate::error::UserError;
use crate::sandbox::{Inside, Program};

/// What both diffs need to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Common {
    pub layer: String,
    /// Seconds since 1970, for every file that is newer.
    pub epoch: u64,
    /// Globs of paths that packages do not bring (this layer's and those below).
    pub exclude: Vec<String>,
    /// Globs of paths that do not go into the image.
    pub remove: Vec<String>,
    /// Every account of this layer and those below.
    pub accounts: Vec<Account>,
    /// Where the layer tar goes.
    pub tar: PathBuf,
    /// Open a shell where a command failed.
    pub debug_shell: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct PackagesJob {
    pub common: Common,
    pub debs: Vec<Deb>,
    /// Files laid before packages are configured.
    pub skeleton: Vec<Placed>,
    pub stand_in: Option<StandIn>,
    pub threads: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Deb {
    pub name: String,
    pub path: PathBuf,
    /// kB, from the lock.
    pub installed_size: u64,
}

/// A package that exists only by name, for what the layer provides.
#[derive(Debug, Serialize, Deserialize)]
pub struct StandIn {
    pub name: String,
    pub provides: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct FilesJob {
    pub common: Common,
    pub files: Vec<Placed>,
    pub artifacts: Vec<Artifact>,
    pub enable: Vec<String>,
    pub disable: Vec<String>,
    pub mask: Vec<String>,
    pub commands: Vec<String>,
}

/// One file, link or directory of a layer's own.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Placed {
    /// Absolute in the image.
    pub target: PathBuf,
    pub kind: PlacedKind,
    /// Permission bits; no meaning for a link.
    pub mode: u32,
    pub owner: String,
    pub group: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum PlacedKind {
    /// Copied from this path of the host.
    File(PathBuf),
    Link(PathBuf),
    Directory {
        keep_existing: bool,
    },
}

/// A file from outside, already in the store.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Artifact {
    pub path: PathBuf,
    pub target: PathBuf,
    /// Unpack it as a tar archive, without this many leading folders.
    pub unpack: Option<usize>,
    /// Of the file itself; what is unpacked is root's, with the archive's modes.
    pub owner: String,
    pub group: String,
    pub mode: u32,
}

/// What became of a diff.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sealed {
    pub files: u64,
    pub bytes: u64,
    pub tar_digest: Digest,
}

/// dpkg asks this before it starts or stops a service: nothing runs in an image.
const POLICY: &str = "usr/sbin/policy-rc.d";

/// Keep the configuration files that a layer has put there; the build's crash safety is the
/// store's, not dpkg's.
const DPKG_FORCE: [&str; 2] = ["--force-confold", "--force-unsafe-io"];

/// Bytes that an artifact may unpack to. Its digest is pinned: this is no defence against
/// a stranger, only against a mistake.
const UNPACKED_LIMIT: u64 = 8 << 30;

pub fn build_packages(job: &PackagesJob, inside: &mut Inside) -> Result<Sealed> {
    let root = inside.root()?;
    install_packages(job, inside, &root)?;
    let own: Vec<&Path> = job.skeleton.iter().filter_map(own_file).collect();
    seal::seal(&job.common, &own, inside, "packages")
}

/// Unpack, register and configure, over whatever is there.
pub(super) fn install_packages(job: &PackagesJob, inside: &mut Inside, root: &Path) -> Result<()> {
    inside.say("unpacking")?;
    let unpacked = unpack(job, root)?;
    dpkg::register(root, &unpacked)?;
    if let Some(stand_in) = &job.stand_in {
        stand_in::register(root, &stand_in.name, &stand_in.provides)?;
    }
    place_files(root, &job.skeleton)?;
    accounts::add(root, &job.common.accounts)?;

    write_policy(root)?;
    let configured = configure(job, inside, root, &unpacked);
    if configured.is_err() && job.common.debug_shell {
        inside.open_shell()?;
    }
    configured?;
    remove_file(&root.join(POLICY))
}

fn list_essential(unpacked: &[Unpacked]) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for package in unpacked {
        let control = deb822::parse_one(package.control_text()?)?;
        if control.get("Essential") == Some("yes") {
            names.push(package.name.clone());
        }
    }
    Ok(names)
}

fn unpack(job: &PackagesJob, root: &Path) -> Result<Vec<Unpacked>> {
    let debs: Vec<DebFile> = job
        .debs
        .iter()
        .map(|deb| DebFile {
            name: deb.name.clone(),
            path: deb.path.clone(),
            limit: package::limit_data(deb.installed_size),
        })
        .collect();
    let excludes =
        job.common.exclude.iter().fold(Excludes::default(), |all, glob| all.exclude(glob));
    let options =
        extract::Options { purpose: Purpose::Install, threads: job.threads, excludes: &excludes };
    let unpacking = extract::unpack_all(&debs, root, &options)?;
    if unpacking.conflicts.is_empty() {
        return Ok(unpacking.packages);
    }
    let list: Vec<String> = unpacking
        .conflicts
        .iter()
        .map(|conflict| {
            let path = String::from_utf8_lossy(&conflict.path);
            format!("/{}: {} and {}", path.trim_start_matches('/'), conflict.kept, conflict.dropped)
        })
        .collect();
    Err(UserError::new(format!("packages of layer `{}` hold the same files", job.common.layer))
        .why(list.join("\n"))
        .help("leave one of the packages out, or `exclude` the path")
        .into())
}

fn configure(
    job: &PackagesJob,
    inside: &mut Inside,
    root: &Path,
    unpacked: &[Unpacked],
) -> Result<()> {
    if unpacked.is_empty() {
        return Ok(());
    }
    let before = diversions::read(root)?;
    for (package, script) in list_preinsts(root, unpacked) {
        inside.say(&format!("preparing {package}"))?;
        let program = Program::new(script)
            .arg("install")
            .env("DPKG_MAINTSCRIPT_NAME", "preinst")
            .env("DPKG_MAINTSCRIPT_PACKAGE", &package)
            .env("DPKG_MAINTSCRIPT_ARCH", "amd64")
            .env("DPKG_ROOT", "")
            .env("DPKG_ADMINDIR", "/var/lib/dpkg");
        inside.watch_and_say(&program).map_err(|error| {
            explain_failure(job, error, &format!("the preinst of package `{package}`"))
        })?;
    }
    diversions::settle(root, &before, unpacked)?;
    inside.say("configuring")?;
    // Nothing declares that it needs an essential package, so these come first: their
    // configuration files (/etc/pam.d) are not in place before.
    let essential = list_essential(unpacked)?;
    if !essential.is_empty() {
        let program =
            Program::new("dpkg").args(["--configure", "--force-depends"]).args(DPKG_FORCE);
        inside.watch_and_say(&program.args(essential)).map_err(|error| {
            explain_failure(job, error, "`dpkg --configure` of essential packages")
        })?;
    }
    let program = Program::new("dpkg").args(["--configure", "--pending"]).args(DPKG_FORCE);
    inside
        .watch_and_say(&program)
        .map_err(|error| explain_failure(job, error, "`dpkg --configure`"))?;
    let audit = inside.run(&Program::new("dpkg").arg("--audit"))?;
    let audit = String::from_utf8_lossy(&audit.stdout);
    if !audit.trim().is_empty() {
        anyhow::bail!("dpkg finds packages that are not whole:\n{}", audit.trim());
    }
    Ok(())
}

/// Scripts that dpkg would have run before it unpacked, with their packages.
fn list_preinsts(root: &Path, unpacked: &[Unpacked]) -> Vec<(String, String)> {
    unpacked
        .iter()
        .filter(|package| package.control.contains_key("preinst"))
        .filter_map(|package| {
            // `Multi-Arch: same` packages have the architecture in their names.
            ["", ":amd64"].iter().find_map(|suffix| {
                let script = format!("/var/lib/dpkg/info/{}{suffix}.preinst", package.name);
                root.join(&script[1..]).exists().then(|| (package.name.clone(), script))
            })
        })
        .collect()
}

fn write_policy(root: &Path) -> Result<()> {
    let path = root.join(POLICY);
    fs::write(&path, "#!/bin/sh\nexit 101\n")
        .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
        .context("forbidding services to start")
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn explain_failure(job: &PackagesJob, error: anyhow::Error, what: &str) -> anyhow::Error {
    describe_failure(&job.common, error, &format!("{what} failed in layer `{}`", job.common.layer))
}

pub(super) fn describe_failure(common: &Common, error: anyhow::Error, what: &str) -> anyhow::Error {
    match error.downcast_ref::<Failed>() {
        Some(failed) if !common.debug_shell => UserError::new(what)
            .why(failed.to_string())
            .help("`stanchion build --debug-shell PROFILE` opens a shell in that state")
            .into(),
        Some(failed) => UserError::new(what).why(failed.to_string()).into(),
        None => error.context(what.to_string()),
    }
}

pub fn build_files(job: &FilesJob, inside: &mut Inside) -> Result<Sealed> {
    let root = inside.root()?;
    let layer = &job.common.layer;
    for artifact in &job.artifacts {
        inside.say("unpacking artifacts")?;
        place_artifact(&root, artifact)
            .with_context(|| format!("placing {} of layer `{layer}`", artifact.target.display()))?;
    }
    place_files(&root, &job.files)?;

    // Masks win: a unit that is both enabled by its package and masked here stays off.
    for (verb, units) in [("enable", &job.enable), ("disable", &job.disable), ("mask", &job.mask)] {
        if units.is_empty() {
            continue;
        }
        inside.say(verb)?;
        let program =
            Program::new("systemctl").args(["--quiet", "--no-reload", verb]).args(units.clone());
        let ran = inside.run(&program);
        if ran.is_err() && job.common.debug_shell {
            inside.open_shell()?;
        }
        ran.map_err(|error| {
            describe_failure(
                &job.common,
                error,
                &format!("`systemctl {verb}` failed in layer `{layer}`"),
            )
        })?;
    }
    for command in &job.commands {
        inside.say(command)?;
        let program = Program::new("/bin/sh").args(["-e", "-c", command]);
        let ran = inside.watch_and_say(&program);
        if ran.is_err() && job.common.debug_shell {
            inside.open_shell()?;
        }
        ran.map_err(|error| {
            describe_failure(
                &job.common,
                error,
                &format!("a command failed in layer `{layer}`: {command}"),
            )
        })?;
    }
    let artifacts = job.artifacts.iter().map(|artifact| artifact.target.as_path());
    let own: Vec<&Path> = job.files.iter().filter_map(own_file).chain(artifacts).collect();
    seal::seal(&job.common, &own, inside, "files")
}

/// The target of what is more than a folder on the way to a file.
fn own_file(file: &Placed) -> Option<&Path> {
    let on_the_way = matches!(file.kind, PlacedKind::Directory { keep_existing: true });
    (!on_the_way).then_some(file.target.as_path())
}

/// Lay files down; they are the image's own, and replace what packages brought.
pub(super) fn place_files(root: &Path, files: &[Placed]) -> Result<()> {
    let fd = place::open_root(root)?;
    let mut walker = Walker::new(&fd, dpkg::make_folder)?;
    for file in files {
        place_file(root, &mut walker, file)
            .with_context(|| format!("placing {}", file.target.display()))?;
    }
    Ok(())
}

fn place_file(root: &Path, walker: &mut Walker<'_>, file: &Placed) -> Result<()> {
    let folder = file.target.parent().unwrap_or(Path::new("/"));
    let folder = folder.strip_prefix("/").context("a target begins with `/`")?;
    let folder = walker.open(folder.as_os_str().as_bytes())?;
    let name = file.target.file_name().context("a file has a name")?;
    // The walker's path has no links, so it cannot lead out of the root.
    let path = root.join(OsStr::from_bytes(&folder.path)).join(name);
    let there = fs::symlink_metadata(&path).ok();
    let (uid, gid) = accounts::find_ids(root, &file.owner, &file.group)?;
    let is_folder = there.as_ref().is_some_and(fs::Metadata::is_dir);
    let wants_folder = matches!(file.kind, PlacedKind::Directory { .. });
    if there.is_some() && is_folder != wants_folder {
        let (in_image, in_layer) =
            if is_folder { ("a folder", "a file") } else { ("a file", "a folder") };
        return Err(UserError::new(format!(
            "{} is {in_image} in the image and {in_layer} in the layer",
            file.target.display()
        ))
        .help("give it another path, or remove the image's in a layer below")
        .into());
    }
    match &file.kind {
        PlacedKind::Directory { keep_existing } => {
            match there.as_ref().is_some_and(fs::Metadata::is_dir) {
                true if *keep_existing => return Ok(()),
                true => {}
                false => fs::create_dir(&path)?,
            }
        }
        PlacedKind::File(from) => {
            if there.is_some() {
                fs::remove_file(&path)?;
            }
            fs::copy(from, &path).with_context(|| format!("copying {}", from.display()))?;
        }
        PlacedKind::Link(to) => {
            if there.is_some() {
                fs::remove_file(&path)?;
            }
            symlink(to, &path)?;
            return Ok(());
        }
    }
    let metadata = fs::metadata(&path)?;
    if (metadata.uid(), metadata.gid()) != (uid, gid) {
        chown(&path, Some(uid), Some(gid))?;
    }
    // After the owner: a change of owner drops setuid and setgid.
    Ok(fs::set_permissions(&path, fs::Permissions::from_mode(file.mode))?)
}

pub(super) fn place_artifact(root: &Path, artifact: &Artifact) -> Result<()> {
    let kind = match artifact.unpack {
        Some(_) => PlacedKind::Directory { keep_existing: true },
        None => PlacedKind::File(artifact.path.clone()),
    };
    let mode = if artifact.unpack.is_some() { 0o755 } else { artifact.mode };
    let placed = Placed {
        target: artifact.target.clone(),
        kind,
        mode,
        owner: artifact.owner.clone(),
        group: artifact.group.clone(),
    };
    place_files(root, &[placed])?;
    let Some(strip) = artifact.unpack else { return Ok(()) };
    let fd = place::open_root(root)?;
    let folder = artifact.target.strip_prefix("/").unwrap_or(&artifact.target);
    let folder = Walker::new(&fd, dpkg::make_folder)?.open(folder.as_os_str().as_bytes())?;
    let file = File::open(&artifact.path).context("opening the artifact")?;
    let name = artifact.target.display().to_string();
    let tar = package::open_tar(Box::new(file), &name, UNPACKED_LIMIT)?;
    let into = root.join(OsStr::from_bytes(&folder.path));
    extract::unpack_tar(tar, &name, &into, strip, Purpose::Install).map(drop)
}
