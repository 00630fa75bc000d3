//! Where a node looks for its seed: systemd's credentials, then small volumes.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::io::Errno;

use super::files::read_bounded;
use super::places::Places;
use crate::seed::{MAX_BYTES, volume};

/// Bytes that a seed may have.
const MAX_SEED: u64 = MAX_BYTES as u64;

/// A seed's bytes and where they were found, in words.
pub struct Found {
    pub bytes: Vec<u8>,
    pub place: String,
}

/// Look at every place: the seeds, in the order in which they count, and what is broken.
pub fn find_seeds(places: &Places) -> (Vec<Found>, Vec<String>) {
    let (mut found, mut broken) = (Vec::new(), Vec::new());
    let looks: [(String, Look); 3] = [
        ("the credential stanchion.seed".to_string(), read_credential),
        ("the volume STANCHION".to_string(), |places| {
            read_volume(&places.volume("STANCHION"), "STANCHION")
        }),
        ("the volume CIDATA".to_string(), |places| read_volume(&find_cidata(places), "CIDATA")),
    ];
    for (place, look) in looks {
        match look(places) {
            Ok(Some(bytes)) => found.push(Found { bytes, place }),
            Ok(None) => {}
            Err(error) => broken.push(format!("{place}: {error:#}")),
        }
    }
    (found, broken)
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

/// The seed on a volume, read without mounting it.
fn read_volume(device: &Path, label: &str) -> Result<Option<Vec<u8>>> {
    let file = match File::open(device) {
        Ok(file) => file,
        // A drive without a disk in it.
        Err(error) if error.raw_os_error() == Some(Errno::NOMEDIUM.raw_os_error()) => {
            return Ok(None);
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context("opening it"),
    };
    let names = volume::find_names(label).unwrap_or_default();
    let read = volume::Volume::open(&file)?.read_first(names)?;
    read.map(Some).with_context(|| format!("it holds none of {}", names.join(", ")))
}

/// The machine's memory in MiB.
pub fn read_memory(places: &Places) -> u64 {
    let mut text = String::new();
    let read = File::open(places.join("/proc/meminfo"))
        .and_then(|file| file.take(1 << 16).read_to_string(&mut text));
    let line = read.ok().and_then(|_| text.lines().find(|line| line.starts_with("MemTotal:")));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0) / 1024
}
