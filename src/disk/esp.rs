//! The EFI system partition: a FAT32 file system written straight into its place in the
//! disk image, with the same bytes for the same files.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use fatfs::{Date, DateTime, FatType, FileSystem, FormatVolumeOptions, FsOptions, Time};

use super::MIB;
use super::region::Region;
use crate::error::UserError;

/// FAT32 has at least 65525 clusters (Microsoft's FAT specification); of 512 bytes each
/// they and their tables need this much.
pub const MIN_SIZE: u64 = 33 * MIB;
const MIN_CLUSTERS: u64 = 65525;
/// Bytes of a directory entry; a long name takes one more for every 13 characters.
const ENTRY: u64 = 32;

/// A file for the ESP.
#[derive(Debug, Clone)]
pub struct EspFile {
    /// Its path, parts separated by `/`; folders are made as needed.
    pub path: String,
    pub content: Content,
}

#[derive(Debug, Clone)]
pub enum Content {
    Bytes(Vec<u8>),
    File(PathBuf),
}

impl Content {
    pub fn length(&self) -> Result<u64> {
        match self {
            Content::Bytes(bytes) => Ok(bytes.len() as u64),
            Content::File(path) => path
                .metadata()
                .map(|metadata| metadata.len())
                .with_context(|| format!("looking at {}", path.display())),
        }
    }

    fn open(&self) -> Result<Box<dyn Read + '_>> {
        Ok(match self {
            Content::Bytes(bytes) => Box::new(bytes.as_slice()),
            Content::File(path) => {
                Box::new(File::open(path).with_context(|| format!("opening {}", path.display()))?)
            }
        })
    }
}

/// Fill `place` with a FAT32 file system labelled `ESP` that holds `files`. All times are
/// `epoch` (seconds since 1970, UTC). A place that is too small is a [`UserError`].
pub fn write_esp(place: Region, files: &[EspFile], epoch: u64, volume_id: u32) -> Result<()> {
    let size = place.length();
    if size < MIN_SIZE {
        return Err(too_small(size, MIN_SIZE).into());
    }
    let mut files: Vec<&EspFile> = files.iter().collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let folders = list_folders(&files)?;

    let cluster = choose_cluster_size(size);
    let mut place = place;
    let format = FormatVolumeOptions::new()
        .fat_type(FatType::Fat32)
        .bytes_per_cluster(cluster as u32)
        .volume_id(volume_id)
        .volume_label(*b"ESP        ");
    fatfs::format_volume(&mut place, format).context("making the ESP's file system")?;
    // The library wants a clock that lives for ever: a few bytes for each image made.
    let clock = Box::leak(Box::new(FixedClock(convert_to_dos(epoch))));
    let options = FsOptions::new().update_accessed_date(false).time_provider(clock);
    let volume = FileSystem::new(place, options).context("opening the ESP's file system")?;

    let needed = measure_need(&files, &folders, cluster)?;
    let free = u64::from(volume.stats().context("asking for room on the ESP")?.free_clusters());
    if needed > free * cluster {
        // The allocation tables grow with the data, by 8 bytes for each cluster.
        let missing = (needed - free * cluster) * (cluster + 8) / cluster;
        return Err(too_small(size, (size + missing + MIB / 2).next_multiple_of(MIB)).into());
    }
    {
        let root = volume.root_dir();
        for folder in &folders {
            root.create_dir(folder).with_context(|| format!("making {folder} on the ESP"))?;
        }
        for EspFile { path, content } in files {
            let write = || -> Result<()> {
                let mut file = root.create_file(path)?;
                let mut buffer = vec![0; 1 << 20];
                let mut content = content.open()?;
                loop {
                    match content.read(&mut buffer) {
                        Ok(0) => break,
                        Ok(n) => file.write_all(&buffer[..n])?,
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Ok(file.flush()?)
            };
            write().with_context(|| format!("writing {path} to the ESP"))?;
        }
    }
    volume.unmount().context("closing the ESP's file system")
}

fn too_small(given: u64, needed: u64) -> UserError {
    UserError::new(format!("the ESP of {} MiB is too small", given / MIB))
        .why(format!("its files and tables need {} MiB", needed.div_ceil(MIB)))
        .help(format!("make the ESP at least {} MiB large", needed.div_ceil(MIB)))
}

/// All folders that the files lie in, a parent before its children. FAT does not tell
/// names apart by case, so two that differ only in it are an error.
fn list_folders(files: &[&EspFile]) -> Result<Vec<String>> {
    let mut folders: Vec<String> = Vec::new();
    let mut seen = BTreeSet::new();
    for file in files {
        let path = &file.path;
        ensure!(
            path.split('/').all(|part| !matches!(part, "" | "." | "..")),
            "`{path}` is no path on an ESP"
        );
        ensure!(seen.insert(path.to_lowercase()), "`{path}` is twice on the ESP");
        for (at, _) in path.match_indices('/') {
            let folder = &path[..at];
            if seen.insert(format!("{}/", folder.to_lowercase())) {
                folders.push(folder.to_string());
            }
        }
    }
    Ok(folders)
}

/// The largest cluster up to 4096 bytes that still leaves enough of them for FAT32.
fn choose_cluster_size(size: u64) -> u64 {
    [4096, 2048, 1024]
        .into_iter()
        .find(|cluster| size / (cluster + 8) > MIN_CLUSTERS + 64)
        .unwrap_or(512)
}

/// Bytes in the clusters that files and folders take.
fn measure_need(files: &[&EspFile], folders: &[String], cluster: u64) -> Result<u64> {
    let mut need = 0;
    for file in files {
        need += file.content.length()?.next_multiple_of(cluster);
    }
    // Each folder, the root included, grows by the names in it; "." and ".." are two more.
    for folder in folders.iter().map(String::as_str).chain([""]) {
        let names = files.iter().map(|file| &file.path).chain(folders);
        let entries: u64 = names
            .filter_map(|path| {
                let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
                (parent == folder).then(|| 1 + (name.encode_utf16().count() as u64).div_ceil(13))
            })
            .sum();
        need += ((entries + 3) * ENTRY).next_multiple_of(cluster);
    }
    Ok(need)
}

#[derive(Debug)]
struct FixedClock(DateTime);

impl fatfs::TimeProvider for FixedClock {
    fn get_current_date(&self) -> Date {
        self.0.date
    }

    fn get_current_date_time(&self) -> DateTime {
        self.0
    }
}

/// FAT knows the years 1980 to 2107; what lies outside becomes the nearest moment inside.
fn convert_to_dos(epoch: u64) -> DateTime {
    const FIRST: u64 = 315_532_800; // 1980-01-01
    const LAST: u64 = 4_354_819_199; // 2107-12-31 23:59:59
    let epoch = epoch.clamp(FIRST, LAST);
    let (mut days, seconds) = ((epoch - FIRST) / 86_400, epoch % 86_400);
    let leap = |year: u16| year.is_multiple_of(4) && year != 2100;
    let mut year = 1980;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    DateTime {
        date: Date { year, month, day: days as u16 + 1 },
        time: Time {
            hour: (seconds / 3600) as u16,
            min: (seconds / 60 % 60) as u16,
            sec: (seconds % 60) as u16,
            millis: 0,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::fat_read::Volume;

    fn make_file(path: &str, size: usize) -> EspFile {
        EspFile { path: path.into(), content: Content::Bytes(vec![path.len() as u8; size]) }
    }

    fn write(size: u64, files: &[EspFile]) -> Result<File> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        write_esp(Region::whole(&file).unwrap(), files, 1_700_000_000, 0x1234_5678)?;
        Ok(file)
    }

    #[test]
    fn files_come_back_by_their_paths() {
        let files = [
            make_file("EFI/BOOT/BOOTX64.EFI", 100_000),
            make_file("EFI/Linux/stanchion_1.0.0+3-0.efi", 3_000_001),
            make_file("loader/loader.conf", 20),
            make_file("empty", 0),
        ];
        for size in [MIN_SIZE, 100 * MIB, 512 * MIB] {
            let disk = write(size, &files).unwrap();
            let volume = Volume::open(Region::whole(&disk).unwrap()).unwrap();
            for file in &files {
                let Content::Bytes(expected) = &file.content else { unreachable!() };
                let entry = volume.find(&file.path).unwrap().unwrap();
                assert_eq!(&volume.read(&entry, 0..entry.size).unwrap(), expected);
            }
            assert!(volume.find("EFI/missing").unwrap().is_none());
        }
    }

    #[test]
    fn the_same_files_in_any_order_give_the_same_bytes() {
        let files = [make_file("a/b", 5000), make_file("a/long name.conf", 1), make_file("c", 7)];
        let mut turned = files.clone();
        turned.reverse();
        let read = |file: File| Region::whole(&file).unwrap().read_at(0, 8 << 20).unwrap();
        assert!(read(write(MIN_SIZE, &files).unwrap()) == read(write(MIN_SIZE, &turned).unwrap()));
    }

    #[test]
    fn an_esp_that_is_too_small_says_what_would_be_enough() {
        for (size, cluster) in [(34 * MIB, 512), (150 * MIB, 2048)] {
            let files = [make_file("big.efi", size as usize), make_file("EFI/x", 1)];
            let error = write(size, &files).unwrap_err();
            let text = error.downcast::<UserError>().unwrap().to_string();
            let enough = text.split("at least ").nth(1).unwrap().split(' ').next().unwrap();
            let enough: u64 = enough.parse().unwrap();
            assert!(enough * MIB < size + size / 16, "cluster {cluster}: {text}");
            write(enough * MIB, &files).unwrap();
        }
        assert!(write(MIN_SIZE - MIB, &[]).unwrap_err().is::<UserError>());
    }

    #[test]
    fn a_path_that_is_twice_there_or_none_is_refused() {
        assert!(write(MIN_SIZE, &[make_file("a/B", 1), make_file("A/b", 1)]).is_err());
        for path in ["", "/a", "a//b", "a/../b", "a/"] {
            assert!(write(MIN_SIZE, &[make_file(path, 1)]).is_err(), "{path}");
        }
    }

    #[test]
    fn times_are_those_of_the_epoch() {
        let show = |epoch| {
            let DateTime { date, time } = convert_to_dos(epoch);
            let Date { year, month, day } = date;
            format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02}", time.hour, time.min, time.sec)
        };
        assert_eq!(show(0), "1980-01-01 00:00:00");
        assert_eq!(show(1_700_000_000), "2023-11-14 22:13:20");
        assert_eq!(show(1_709_210_096), "2024-02-29 12:34:56");
        assert_eq!(show(1_735_689_599), "2024-12-31 23:59:59");
        assert_eq!(show(4_107_542_400), "2100-03-01 00:00:00");
        assert_eq!(show(u64::MAX), "2107-12-31 23:59:59");
    }
}
