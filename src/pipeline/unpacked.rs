//! Sets of packages that are unpacked and never configured: tools, and the initrd's.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::locking;
use super::source::Source;
use crate::debian::package;
use crate::digest::Key;
use crate::lock::{Lock, LockedPackage};
use crate::rootfs::exclude::Excludes;
use crate::rootfs::extract::{self, DebFile, Options, Purpose};
use crate::tools::Tools;

/// Raised when the same packages would be unpacked differently.
pub const VERSION: u32 = 1;

/// The tools root of a set, made when the store does not have it.
pub fn provide_tools(source: &Source, lock: &Lock, set: &str) -> Result<Tools> {
    let mut key = Key::new("tools", VERSION);
    add_packages(&mut key, &lock.list_set(set)?);
    let digest = key.digest();
    if let Some(entry) = source.store.find_entry("tools", &digest) {
        if entry.join("usr").is_dir() {
            return Ok(Tools::new(entry));
        }
        source.store.discard_entry("tools", &digest)?;
    }
    let debs = locking::fetch_set(source, lock, set)?;
    let step = source.progress.begin(set.to_string());
    let scratch = source.store.make_scratch("tools")?;
    unpack(source, lock, set, &debs, scratch.path())?;
    let entry = source.store.commit_entry("tools", &digest, scratch)?;
    step.finish(format!("{} packages", debs.len()));
    Ok(Tools::new(entry))
}

/// Unpack the packages of a set into `root`, owned by whoever builds.
pub fn unpack(
    source: &Source,
    lock: &Lock,
    set: &str,
    debs: &[(String, PathBuf)],
    root: &Path,
) -> Result<()> {
    let packages = lock.list_set(set)?;
    let debs: Vec<DebFile> = debs
        .iter()
        .zip(&packages)
        .map(|((name, path), locked)| DebFile {
            name: name.clone(),
            path: path.clone(),
            limit: package::limit_data(locked.installed_size),
        })
        .collect();
    let excludes = Excludes::default();
    let options = Options { purpose: Purpose::Tools, threads: source.threads, excludes: &excludes };
    extract::unpack_all(&debs, root, &options)
        .map_err(|error| source.explain_rot(&packages, error))
        .with_context(|| format!("unpacking {set}"))
        .map(drop)
}

/// Packages by digest, in order, as inputs of a step.
pub fn add_packages(key: &mut Key, packages: &[&LockedPackage]) {
    for package in packages {
        key.add(format!("package {}", package.name), package.sha256.as_bytes());
    }
}
