//! Where a node looks for its seed: systemd's credentials, then small FAT volumes.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result};

use super::files::read_bounded;
use super::places::Places;
use crate::disk::fat_read::Volume;
use crate::disk::region::Region;
use crate::seed::{FILE_NAME, MAX_BYTES};

/// Bytes that a seed may have.
const MAX_SEED: u64 = MAX_BYTES as u64;
/// Bytes that the table of a volume may have; one for seeds is small.
const MAX_VOLUME: u64 = 8 << 30;

/// A seed's bytes and where they were found, in words.
pub struct Found {
    pub bytes: Vec<u8>,
    pub place: String,
}

/// Look at every place, in order; what is broken is told and the next one is looked at.
pub fn find_seed(places: &Places) -> (Option<Found>, Vec<String>) {
    let mut broken = Vec::new();
    let looks: [(String, Look); 3] = [
        ("the credential stanchion.seed".to_string(), read_credential),
        ("the volume STANCHION".to_string(), |places| {
            read_volume(&places.volume("STANCHION"), &[FILE_NAME])
        }),
        ("the volume CIDATA".to_string(), |places| {
            let volume = find_cidata(places);
            read_volume(&volume, &[FILE_NAME, "user-data"])
        }),
    ];
    for (place, look) in looks {
        match look(places) {
            Ok(Some(bytes)) => return (Some(Found { bytes, place }), broken),
            Ok(None) => {}
            Err(error) => broken.push(format!("{place}: {error:#}")),
        }
    }
    (None, broken)
}

type Look = fn(&Places) -> Result<Option<Vec<u8>>>;

fn read_credential(places: &Places) -> Result<Option<Vec<u8>>> {
    match read_bounded(&places.credential(), MAX_SEED)? {
        None => read_bounded(&places.machine_credential(), MAX_SEED),
        found => Ok(found),
    }
}

/// Some tools write the label in small letters.
fn find_cidata(places: &Places) -> std::path::PathBuf {
    let small = places.volume("cidata");
    if small.exists() { small } else { places.volume("CIDATA") }
}

/// The first of `names` on a FAT volume, read without mounting it.
fn read_volume(device: &Path, names: &[&str]) -> Result<Option<Vec<u8>>> {
    let mut file = match File::open(device) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context("opening it"),
    };
    // The length of a block device is where it ends, not what its inode says.
    let length = file.seek(SeekFrom::End(0)).context("asking for its length")?.min(MAX_VOLUME);
    file.rewind()?;
    let volume = Volume::open(Region::new(&file, 0, length))?;
    for name in names {
        let Some(entry) = volume.find(name)?.filter(|entry| !entry.is_folder) else { continue };
        anyhow::ensure!(entry.size <= MAX_SEED, "{name} has more than {MAX_SEED} bytes");
        return volume.read(&entry, 0..entry.size).map(Some);
    }
    anyhow::bail!("it holds none of {}", names.join(", "))
}

/// The machine's memory in MiB.
pub fn read_memory(places: &Places) -> u64 {
    let mut text = String::new();
    let read = File::open(places.join("/proc/meminfo"))
        .and_then(|file| file.take(1 << 16).read_to_string(&mut text));
    let line = read.ok().and_then(|_| text.lines().find(|line| line.starts_with("MemTotal:")));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0) / 1024
}
