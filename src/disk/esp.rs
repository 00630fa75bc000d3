//! The EFI system partition: a FAT32 file system written straight into its place in the
//! disk image, every file in one piece, with the same bytes for the same files.
//!
//! Source: Microsoft's FAT32 File System Specification 1.03.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::MIB;
use super::fat_entry::{
    ARCHIVE, ENTRY, FOLDER, VOLUME_LABEL, convert_to_dos, count_entries, encode_entry,
    encode_long_name, is_short, shorten_name,
};
use super::region::Region;
use crate::error::UserError;

/// FAT32 has at least 65525 clusters; of 512 bytes each they and their tables need this.
pub const MIN_SIZE: u64 = 33 * MIB;
const MIN_CLUSTERS: u64 = 65525;
const SECTOR: u64 = 512;
const RESERVED: u64 = 32 * SECTOR;
const TABLES: u64 = 2;
const ROOT: u32 = 2;
const END: u32 = 0x0fff_ffff;

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
    fn length(&self) -> Result<u64> {
        match self {
            Content::Bytes(bytes) => Ok(bytes.len() as u64),
            Content::File(path) => path
                .metadata()
                .map(|metadata| metadata.len())
                .with_context(|| format!("looking at {}", path.display())),
        }
    }

    fn write(&self, place: &Region, offset: u64, length: u64) -> Result<()> {
        match self {
            Content::Bytes(bytes) => place.write_at(offset, bytes),
            Content::File(path) => File::open(path)
                .with_context(|| format!("opening {}", path.display()))
                .and_then(|file| place.write_file_at(offset, &file, length)),
        }
    }
}

/// Sizes that follow from that of the volume; all in bytes but `clusters`.
struct Geometry {
    cluster: u64,
    clusters: u64,
    table: u64,
    data: u64,
}

/// A folder or a file, and the clusters it takes, one after the other.
struct Node<'a> {
    /// Empty for the root folder.
    path: &'a str,
    /// None for a folder.
    file: Option<&'a Content>,
    size: u64,
    first: u32,
    clusters: u32,
}

/// Fill `place`, which must read as zeros, with a FAT32 file system labelled `ESP` that
/// holds `files`. All times are `epoch` (seconds since 1970, UTC). A place that is too
/// small is a [`UserError`].
pub fn write_esp(place: &Region, files: &[EspFile], epoch: u64, volume_id: u32) -> Result<()> {
    let size = place.length();
    if size < MIN_SIZE {
        return Err(too_small(size, MIN_SIZE).into());
    }
    let geometry = plan_geometry(size);
    let folders = list_folders(files)?;
    let nodes = place_nodes(files, &folders, geometry.cluster)?;

    let used: u64 = nodes.iter().map(|node| u64::from(node.clusters)).sum();
    if used > geometry.clusters {
        // The allocation tables grow with the data, by 8 bytes for each cluster.
        let missing = (used - geometry.clusters) * (geometry.cluster + 8);
        return Err(too_small(size, (size + missing + MIB / 2).next_multiple_of(MIB)).into());
    }

    let stamp = convert_to_dos(epoch);
    for node in &nodes {
        let offset = geometry.data + u64::from(node.first.saturating_sub(ROOT)) * geometry.cluster;
        match node.file {
            Some(content) => content.write(place, offset, node.size),
            None => place.write_at(offset, &encode_folder(node, &nodes, stamp)),
        }
        .with_context(|| format!("writing `{}` to the ESP", node.path))?;
    }
    let table = encode_table(&nodes);
    for i in 0..TABLES {
        place.write_at(RESERVED + i * geometry.table, &table)?;
    }
    let boot = encode_boot_sector(size, &geometry, volume_id);
    let info = encode_info_sector(geometry.clusters - used, ROOT + used as u32);
    // Both sectors have copies further on.
    for at in [0, 6] {
        place.write_at(at * SECTOR, &boot)?;
        place.write_at((at + 1) * SECTOR, &info)?;
    }
    Ok(())
}

fn too_small(given: u64, needed: u64) -> UserError {
    UserError::new(format!("the ESP of {} MiB is too small", given / MIB))
        .why(format!("its files and tables need {} MiB", needed.div_ceil(MIB)))
        .help(format!("make the ESP at least {} MiB large", needed.div_ceil(MIB)))
}

/// The largest clusters up to 4096 bytes that are still enough for FAT32.
fn plan_geometry(size: u64) -> Geometry {
    let plan = |cluster: u64| {
        let table = ((size / cluster + 2) * 4).next_multiple_of(SECTOR);
        let data = RESERVED + TABLES * table;
        Geometry { cluster, clusters: (size - data) / cluster, table, data }
    };
    [4096, 2048, 1024]
        .into_iter()
        .map(plan)
        .find(|geometry| geometry.clusters > MIN_CLUSTERS)
        .unwrap_or_else(|| plan(SECTOR))
}

/// All folders that the files lie in, by path, with the paths of what is in them. FAT
/// does not tell names apart by case, so two that differ only in it are an error.
fn list_folders(files: &[EspFile]) -> Result<BTreeMap<&str, BTreeSet<&str>>> {
    let mut folders = BTreeMap::from([("", BTreeSet::new())]);
    let mut spellings: BTreeMap<String, &str> = BTreeMap::new();
    for EspFile { path, .. } in files {
        ensure!(
            path.split('/').all(|part| {
                !matches!(part, "" | "." | "..")
                    && part.encode_utf16().count() <= 255
                    && !part.contains(|c: char| c.is_control() || "\\:*?\"<>|".contains(c))
                    && !part.ends_with(['.', ' '])
            }),
            "`{path}` is no path on an ESP"
        );
        let is_new = spellings.insert(path.to_lowercase(), path).is_none();
        ensure!(is_new, "`{path}` is twice on the ESP");
        let mut child = path.as_str();
        loop {
            let parent = take_parent(child);
            folders.entry(parent).or_default().insert(child);
            if parent.is_empty() {
                break;
            }
            let spelling = spellings.entry(parent.to_lowercase()).or_insert(parent);
            ensure!(*spelling == parent, "`{spelling}` and `{parent}` are one name on the ESP");
            child = parent;
        }
    }
    for file in files {
        ensure!(!folders.contains_key(file.path.as_str()), "`{}` is a folder, too", file.path);
    }
    Ok(folders)
}

/// The root folder, the other folders and the files, each in the order of their paths.
fn place_nodes<'a>(
    files: &'a [EspFile],
    folders: &BTreeMap<&'a str, BTreeSet<&'a str>>,
    cluster: u64,
) -> Result<Vec<Node<'a>>> {
    let mut nodes: Vec<Node> = Vec::new();
    for (path, children) in folders {
        // "." and "..", or the volume's label.
        let entries: usize = children.iter().map(|child| count_entries(take_name(child))).sum();
        let size = ((entries + 2) * ENTRY) as u64;
        nodes.push(Node { path, file: None, size, first: 0, clusters: 0 });
    }
    let mut files: Vec<&EspFile> = files.iter().collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    for EspFile { path, content } in files {
        let size = content.length()?;
        ensure!(size <= u64::from(u32::MAX), "`{path}` is too large for FAT");
        nodes.push(Node { path, file: Some(content), size, first: 0, clusters: 0 });
    }
    let mut next = ROOT;
    for node in &mut nodes {
        node.clusters = node.size.div_ceil(cluster) as u32;
        if node.clusters > 0 {
            node.first = next;
        }
        next = next.checked_add(node.clusters).context("more than FAT can hold")?;
    }
    Ok(nodes)
}

fn encode_table(nodes: &[Node]) -> Vec<u8> {
    let mut table = vec![0x0fff_fff8, END];
    for node in nodes.iter().filter(|node| node.clusters > 0) {
        table.extend(node.first + 1..node.first + node.clusters);
        table.push(END);
    }
    table.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

fn encode_folder(folder: &Node, nodes: &[Node], stamp: (u16, u16)) -> Vec<u8> {
    let mut bytes = Vec::new();
    if folder.path.is_empty() {
        bytes.extend(encode_entry(b"ESP        ", VOLUME_LABEL, 0, 0, stamp));
    } else {
        bytes.extend(encode_entry(b".          ", FOLDER, folder.first, 0, stamp));
        // The root folder is cluster 0 here.
        let parent = take_parent(folder.path);
        let above = nodes.iter().find(|node| node.path == parent && !parent.is_empty());
        let above = above.map_or(0, |node| node.first);
        bytes.extend(encode_entry(b"..         ", FOLDER, above, 0, stamp));
    }
    let mut taken = BTreeSet::new();
    let is_child = |node: &&Node| !node.path.is_empty() && take_parent(node.path) == folder.path;
    for node in nodes.iter().filter(is_child) {
        let name = take_name(node.path);
        let short = shorten_name(name, &mut taken);
        if !is_short(name) {
            bytes.extend(encode_long_name(name, &short));
        }
        let (kind, size) = if node.file.is_some() { (ARCHIVE, node.size) } else { (FOLDER, 0) };
        bytes.extend(encode_entry(&short, kind, node.first, size as u32, stamp));
    }
    bytes
}

fn take_parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

fn take_name(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}

fn encode_boot_sector(size: u64, geometry: &Geometry, volume_id: u32) -> Vec<u8> {
    let mut boot = vec![0; SECTOR as usize];
    let mut put = |at: usize, bytes: &[u8]| boot[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0xeb, 0x58, 0x90]);
    put(3, b"MSWIN4.1");
    put(11, &(SECTOR as u16).to_le_bytes());
    put(13, &[(geometry.cluster / SECTOR) as u8]);
    put(14, &((RESERVED / SECTOR) as u16).to_le_bytes());
    put(16, &[TABLES as u8]);
    put(21, &[0xf8]); // a fixed disk
    put(24, &63u16.to_le_bytes()); // sectors per track, heads: for BIOSes only
    put(26, &255u16.to_le_bytes());
    put(32, &((size / SECTOR) as u32).to_le_bytes());
    put(36, &((geometry.table / SECTOR) as u32).to_le_bytes());
    put(44, &ROOT.to_le_bytes());
    put(48, &1u16.to_le_bytes()); // the information sector
    put(50, &6u16.to_le_bytes()); // the copy of this sector
    put(64, &[0x80, 0, 0x29]);
    put(67, &volume_id.to_le_bytes());
    put(71, b"ESP        FAT32   ");
    put(510, &[0x55, 0xaa]);
    boot
}

fn encode_info_sector(free: u64, next: u32) -> Vec<u8> {
    let mut info = vec![0; SECTOR as usize];
    for (at, value) in
        [(0, 0x4161_5252), (484, 0x6141_7272), (488, free as u32), (492, next), (508, 0xaa55_0000)]
    {
        info[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
    }
    info
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
        write_esp(&Region::whole(&file).unwrap(), files, 1_700_000_000, 0x1234_5678)?;
        Ok(file)
    }

    #[test]
    fn files_come_back_by_their_paths() {
        let files = [
            make_file("EFI/BOOT/BOOTX64.EFI", 100_000),
            make_file("EFI/Linux/stanchion_1.0.0+3-0.efi", 3_000_001),
            make_file("loader/loader.conf", 20),
            make_file("empty", 0),
            make_file("thirteen.char", 1),
            make_file(&"l".repeat(255), 1),
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
        assert!(write(MIN_SIZE, &[make_file("a/b", 1), make_file("A/c", 1)]).is_err());
        assert!(write(MIN_SIZE, &[make_file("a", 1), make_file("a/c", 1)]).is_err());
        for path in ["", "/a", "a//b", "a/../b", "a/", "a?", "a."] {
            assert!(write(MIN_SIZE, &[make_file(path, 1)]).is_err(), "{path}");
        }
    }
}
