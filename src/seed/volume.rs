//! The disk that carries a seed to a machine: one FAT volume, without partitions.

use std::fs::File;
use std::io::{Seek, SeekFrom};

use anyhow::{Context, Result};

use super::{FILE_NAME, MAX_BYTES};
use crate::digest::Digest;
use crate::disk::fat_read::Volume;
use crate::disk::fat16::{SIZE, write_volume};
use crate::disk::region::Region;

/// What the volume is called.
pub const LABEL: &str = "STANCHION";
/// What cloud-init's NoCloud calls its volume, and its file.
const CLOUD_LABEL: &str = "CIDATA";
const CLOUD_FILE: &str = "user-data";

/// Make an empty file a volume of 4 MiB with the seed's file in it. `now` is in seconds
/// since 1970, UTC.
pub fn write_seed(file: &File, seed: &[u8], now: u64) -> Result<()> {
    file.set_len(SIZE).context("making room for the seed's volume")?;
    let digest = Digest::of(seed);
    let id = digest.as_bytes().first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let place = Region::new(file, 0, SIZE);
    write_volume(&place, LABEL, FILE_NAME, seed, now, id).context("writing the seed's volume")
}

/// The seed's file on a volume: a disk, or a file that holds one. `None` when the volume is
/// none of those that carry seeds, or carries none. A file that is too long is cut one byte
/// after the limit, and so no valid seed.
///
/// On a volume labelled `STANCHION` it is `stanchion-seed.json`; on one labelled `CIDATA`
/// that, or else `user-data`.
pub fn read_seed(mut file: &File) -> Result<Option<Vec<u8>>> {
    // A disk has no length of its own.
    let length = file.seek(SeekFrom::End(0)).context("asking for a disk's size")?;
    let Ok(volume) = Volume::open(Region::new(file, 0, length)) else { return Ok(None) };
    let names: &[&str] = match volume.label()?.to_ascii_uppercase().as_str() {
        LABEL => &[FILE_NAME],
        CLOUD_LABEL => &[FILE_NAME, CLOUD_FILE],
        _ => return Ok(None),
    };
    for name in names {
        if let Some(entry) = volume.find(name)?.filter(|entry| !entry.is_folder) {
            let most = entry.size.min(MAX_BYTES as u64 + 1);
            return volume.read(&entry, 0..most).map(Some);
        }
    }
    Ok(None)
}
