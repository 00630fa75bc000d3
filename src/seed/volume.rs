//! The disk that carries a seed to a machine: one FAT volume, without partitions.

use std::fs::File;
use std::io::{Seek, SeekFrom};

use anyhow::{Context, Result, bail};

use super::{FILE_NAME, MAX_BYTES};
use crate::digest::Digest;
use crate::disk::fat16::{SIZE, write_volume};
use crate::disk::region::Region;
use crate::disk::{fat_read, iso_read};

/// What the volume is called.
pub const LABEL: &str = "STANCHION";
/// What cloud-init's NoCloud calls its volume, and its file.
const CLOUD_LABEL: &str = "CIDATA";
const CLOUD_FILE: &str = "user-data";
/// Bytes of a volume that are looked at; one for seeds is small.
const MAX_VOLUME: u64 = 8 << 30;

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
pub fn read_seed(file: &File) -> Result<Option<Vec<u8>>> {
    let Ok(volume) = Volume::open(file) else { return Ok(None) };
    match find_names(&volume.label()?) {
        Some(names) => volume.read_first(names),
        None => Ok(None),
    }
}

/// The names that a seed's file may have on a volume with this label, as they count.
pub fn find_names(label: &str) -> Option<&'static [&'static str]> {
    match label.to_ascii_uppercase().as_str() {
        LABEL => Some(&[FILE_NAME]),
        CLOUD_LABEL => Some(&[FILE_NAME, CLOUD_FILE]),
        _ => None,
    }
}

/// A small volume that somebody else made: FAT, or ISO 9660 as hypervisors write it.
pub enum Volume<'a> {
    Fat(fat_read::Volume<'a>),
    Iso(iso_read::Volume<'a>),
}

impl<'a> Volume<'a> {
    /// Open the volume on a disk, or in a file that holds one.
    pub fn open(mut file: &'a File) -> Result<Self> {
        // A disk has no length of its own.
        let length = file.seek(SeekFrom::End(0)).context("asking for a disk's size")?;
        let region = || Region::new(file, 0, length.min(MAX_VOLUME));
        // The descriptors of ISO 9660 lie where a FAT has its table, and none looks like one.
        match iso_read::Volume::open(region()) {
            Ok(volume) => Ok(Volume::Iso(volume)),
            Err(no_iso) => match fat_read::Volume::open(region()) {
                Ok(volume) => Ok(Volume::Fat(volume)),
                Err(no_fat) => bail!("neither FAT ({no_fat:#}) nor ISO 9660 ({no_iso:#})"),
            },
        }
    }

    pub fn label(&self) -> Result<String> {
        match self {
            Volume::Fat(volume) => volume.label(),
            Volume::Iso(volume) => Ok(volume.label().to_string()),
        }
    }

    /// The first of these files in the root that there is, cut one byte after what a seed
    /// may have.
    pub fn read_first(&self, names: &[&str]) -> Result<Option<Vec<u8>>> {
        let most = MAX_BYTES as u64 + 1;
        for name in names {
            let read = match self {
                Volume::Fat(volume) => volume
                    .find(name)?
                    .filter(|entry| !entry.is_folder)
                    .map(|entry| volume.read(&entry, 0..entry.size.min(most))),
                Volume::Iso(volume) => volume
                    .find(name)
                    .filter(|entry| !entry.is_folder)
                    .map(|entry| volume.read(entry, entry.size.min(most))),
            };
            if let Some(read) = read {
                return read.with_context(|| format!("reading {name}")).map(Some);
            }
        }
        Ok(None)
    }
}
