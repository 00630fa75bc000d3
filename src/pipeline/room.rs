//! Will it fit? Answered before anything is fetched.

use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

use super::source::Source;
use crate::config::profile::Profile;
use crate::error::UserError;
use crate::progress::format_bytes;
use crate::store;

/// For each profile, at the peak: packages (0.2 GB), trees and tars of its layers (1.5 GB),
/// blobs (0.6 GB). Measured on db with an empty store, rounded up by half.
const STORE_FIRST: u64 = 3_500_000_000;
/// A build over a store that has been built with needs little more than what changes.
const STORE_AGAIN: u64 = 500_000_000;
/// A build stage at its peak, with what it keeps: measured on netbox, rounded up by half.
const STAGE: u64 = 1_500_000_000;
/// Raw (what it allocates) and qcow2, beside the earlier ones.
const OUTPUTS: u64 = 1_300_000_000;

pub fn check(source: &Source, out: &Path, profiles: &[Profile]) -> Result<()> {
    let count = profiles.len() as u64;
    let fresh = source.store.is_fresh();
    let in_store =
        if fresh { STORE_FIRST + (count.saturating_sub(1)) * OUTPUTS } else { STORE_AGAIN };
    let has_stage = |profile: &Profile| profile.layers.iter().any(|layer| layer.build.is_some());
    let in_store = in_store + if profiles.iter().any(has_stage) { STAGE } else { 0 };
    let in_out = count * OUTPUTS;
    let device = |path: &Path| -> Result<u64> {
        let metadata = path.metadata().with_context(|| format!("looking at {}", path.display()))?;
        Ok(metadata.dev())
    };
    let store = source.store.root();
    if device(store)? == device(out)? {
        return require(out, in_store + in_out, "the store and the images");
    }
    require(store, in_store, "the store")?;
    require(out, in_out, "the images")
}

/// A disk that became full is the user's to mend, whichever program came upon it.
pub fn explain_full(error: anyhow::Error, store: &Path, out: &Path) -> anyhow::Error {
    if !error.chain().any(is_about_room) {
        return error;
    }
    let text = format!("{error:#}");
    let named = |path: &&Path| text.contains(&*path.to_string_lossy());
    // What was half done is removed by now, so that the room there says little.
    let least = || [store, out].into_iter().min_by_key(|path| store::measure_room(path).ok());
    let Some(path) = [store, out].into_iter().find(named).or_else(least) else { return error };
    UserError::new("the disk became full during the build")
        .in_file(path)
        .why(text)
        .help("make room there, or set XDG_CACHE_HOME or --out to a larger disk; what was finished is kept, and the next build goes on from there")
        .into()
}

fn is_about_room(cause: &(dyn std::error::Error + 'static)) -> bool {
    let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
    matches!(kind, Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
        // Of a program that we started.
        || cause.to_string().contains("No space left on device")
}

fn require(path: &Path, needed: u64, what: &str) -> Result<()> {
    let room = store::measure_room(path)?;
    if room >= needed {
        return Ok(());
    }
    Err(UserError::new(format!(
        "the disk will be full before the build ends: {what} need {}, {} are free",
        format_bytes(needed),
        format_bytes(room)
    ))
    .in_file(path)
    .help("free some room (`stanchion store gc --keep 5G`), or set XDG_CACHE_HOME or --out to a larger disk")
    .into())
}
