//! A reader of FAT volumes (12, 16 and 32) that trusts nothing in them: every number is
//! checked before it is used, and every walk ends.
//!
//! Source: Microsoft's FAT32 File System Specification.

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

use super::fat_entry::ENTRY;
use super::region::Region;

/// No folder on an ESP holds more.
const MAX_FOLDER: u64 = 4 << 20;
/// The table of a volume of 64 GiB with clusters of 4096 bytes.
const MAX_TABLE: u64 = 64 << 20;
const END: u32 = 0x0fff_fff8;

/// An open volume.
#[derive(Debug)]
pub struct Volume<'a> {
    region: Region<'a>,
    /// The cluster that follows each cluster.
    table: Vec<u32>,
    cluster_size: u64,
    data: u64,
    root: Root,
    /// As the boot sector has it.
    label: [u8; 11],
}

/// The root folder: on FAT32 like any other, else an area of its own.
#[derive(Debug)]
enum Root {
    Cluster(u32),
    Area(Range<u64>),
}

/// A file or a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub is_folder: bool,
    /// Bytes; 0 for a folder.
    pub size: u64,
    first: u32,
}

impl<'a> Volume<'a> {
    pub fn open(region: Region<'a>) -> Result<Self> {
        let boot = region.read_at(0, 512).context("reading the boot sector")?;
        ensure!(boot[510..] == [0x55, 0xaa], "no FAT boot sector");
        let sector = u64::from(take_u16(&boot, 11));
        ensure!([512, 1024, 2048, 4096].contains(&sector), "FAT sectors of {sector} bytes");
        let per_cluster = u64::from(boot[13]);
        ensure!(per_cluster.is_power_of_two(), "FAT clusters of {per_cluster} sectors");
        let (reserved, tables) = (u64::from(take_u16(&boot, 14)), u64::from(boot[16]));
        let (entries, short_table) = (u64::from(take_u16(&boot, 17)), take_u16(&boot, 22));
        let is_fat32 = short_table == 0;
        ensure!(tables > 0 && is_fat32 == (entries == 0), "a damaged FAT boot sector");
        let table_sectors = if is_fat32 { take_u32(&boot, 36) } else { short_table.into() };
        let table_size = u64::from(table_sectors) * sector;
        ensure!(table_size <= MAX_TABLE, "a FAT of {table_size} bytes");
        let sectors = match take_u16(&boot, 19) {
            0 => take_u32(&boot, 32),
            few => few.into(),
        };

        let cluster_size = sector * per_cluster;
        let root_area = reserved * sector + tables * table_size;
        let data = root_area + (entries * ENTRY as u64).next_multiple_of(sector);
        let size = region.length().min(u64::from(sectors) * sector);
        let clusters = size.saturating_sub(data) / cluster_size;
        let bytes = region.read_at(reserved * sector, table_size as usize)?;
        let width = if is_fat32 { Width::Bits32 } else { Width::choose(clusters) };
        let label_at = if is_fat32 { 71 } else { 43 };
        let mut label = [b' '; 11];
        label.copy_from_slice(&boot[label_at..label_at + 11]);
        Ok(Volume {
            region,
            // The first two entries stand for no clusters.
            table: decode_table(&bytes, width, clusters as usize + 2),
            cluster_size,
            data,
            root: match is_fat32 {
                true => Root::Cluster(take_u32(&boot, 44)),
                false => Root::Area(root_area..root_area + entries * ENTRY as u64),
            },
            label,
        })
    }

    /// The volume's name: that of its root folder, else that of its boot sector.
    pub fn label(&self) -> Result<String> {
        let bytes = self.read_folder(None)?;
        let label = find_label(&bytes).unwrap_or(&self.label);
        Ok(String::from_utf8_lossy(label).trim_end().to_string())
    }

    /// The file or folder with this path (parts separated by `/`, case ignored).
    pub fn find(&self, path: &str) -> Result<Option<Entry>> {
        let mut folder = None;
        let mut found = None;
        for part in path.split('/') {
            let entries = self.list(folder.as_ref())?;
            found = entries.into_iter().find(|entry| entry.name.eq_ignore_ascii_case(part));
            match &found {
                Some(entry) => folder = Some(entry.clone()),
                None => return Ok(None),
            }
        }
        Ok(found)
    }

    /// What is in a folder; `None` is the root.
    pub fn list(&self, folder: Option<&Entry>) -> Result<Vec<Entry>> {
        self.read_folder(folder).map(|bytes| decode_folder(&bytes))
    }

    fn read_folder(&self, folder: Option<&Entry>) -> Result<Vec<u8>> {
        let first = match (folder, &self.root) {
            (None, Root::Area(area)) => {
                return self.region.read_at(area.start, (area.end - area.start) as usize);
            }
            (None, Root::Cluster(first)) => *first,
            (Some(entry), _) if entry.is_folder => entry.first,
            (Some(entry), _) => bail!("{} is no folder", entry.name),
        };
        let clusters = self.follow(first, MAX_FOLDER.div_ceil(self.cluster_size))?;
        let mut bytes = Vec::new();
        for cluster in clusters {
            bytes.extend(self.read_cluster(cluster)?);
        }
        Ok(bytes)
    }

    /// Part of a file. Fails when the file is shorter.
    pub fn read(&self, file: &Entry, range: Range<u64>) -> Result<Vec<u8>> {
        ensure!(
            !file.is_folder && range.start <= range.end && range.end <= file.size,
            "{} has no bytes {range:?}",
            file.name
        );
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let (from, to) = (range.start / self.cluster_size, range.end.div_ceil(self.cluster_size));
        let clusters = self.follow(file.first, to)?;
        ensure!(clusters.len() as u64 == to, "{} is cut short", file.name);
        let mut bytes = Vec::new();
        for cluster in &clusters[from as usize..] {
            bytes.extend(self.read_cluster(*cluster)?);
        }
        let skipped = (range.start - from * self.cluster_size) as usize;
        let length = (range.end - range.start) as usize;
        bytes.drain(..skipped);
        bytes.truncate(length);
        Ok(bytes)
    }

    /// The chain of clusters from `first`, at most `most` of them. A chain longer than
    /// the volume has clusters runs in a circle.
    fn follow(&self, first: u32, most: u64) -> Result<Vec<u32>> {
        let mut chain = Vec::new();
        let mut next = first;
        while (chain.len() as u64) < most && next < END {
            ensure!(
                next >= 2 && (next as usize) < self.table.len() && chain.len() < self.table.len(),
                "the FAT is damaged at cluster {next}"
            );
            chain.push(next);
            next = self.table[next as usize];
        }
        Ok(chain)
    }

    fn read_cluster(&self, cluster: u32) -> Result<Vec<u8>> {
        let at = self.data + u64::from(cluster - 2) * self.cluster_size;
        self.region.read_at(at, self.cluster_size as usize)
    }
}

/// Bits of an entry of the table. FAT32 is told by the boot sector, the others by how many
/// clusters there are.
#[derive(Clone, Copy)]
enum Width {
    Bits12,
    Bits16,
    Bits32,
}

impl Width {
    fn choose(clusters: u64) -> Self {
        if clusters < 4085 { Width::Bits12 } else { Width::Bits16 }
    }
}

/// At most `most` entries; the marks of a chain's end are those of FAT32.
fn decode_table(bytes: &[u8], width: Width, most: usize) -> Vec<u32> {
    let widen = |entry: u32, end: u32| if entry >= end { END } else { entry };
    match width {
        Width::Bits12 => bytes
            .chunks_exact(3)
            .flat_map(|pair| {
                let both = u32::from(take_u16(pair, 0)) | u32::from(pair[2]) << 16;
                [widen(both & 0xfff, 0xff8), widen(both >> 12, 0xff8)]
            })
            .take(most)
            .collect(),
        Width::Bits16 => bytes
            .chunks_exact(2)
            .map(|entry| widen(u32::from(take_u16(entry, 0)), 0xfff8))
            .take(most)
            .collect(),
        Width::Bits32 => {
            bytes.chunks_exact(4).map(|entry| take_u32(entry, 0) & 0x0fff_ffff).take(most).collect()
        }
    }
}

fn find_label(folder: &[u8]) -> Option<&[u8; 11]> {
    folder
        .chunks_exact(ENTRY)
        .take_while(|raw| raw[0] != 0)
        .find(|raw| raw[0] != 0xe5 && raw[11] & 0x3f != 0x0f && raw[11] & 0x08 != 0)
        .and_then(|raw| raw.first_chunk())
}

fn decode_folder(bytes: &[u8]) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut long = LongName::default();
    for raw in bytes.chunks_exact(ENTRY) {
        let kind = raw[11];
        match raw[0] {
            0 => break,
            0xe5 => long = LongName::default(),
            _ if kind & 0x3f == 0x0f => long.add(raw),
            // The volume's label.
            _ if kind & 0x08 != 0 => long = LongName::default(),
            _ => {
                let name = std::mem::take(&mut long).finish(raw);
                if !matches!(name.as_str(), "." | "..") {
                    let is_folder = kind & 0x10 != 0;
                    entries.push(Entry {
                        name,
                        is_folder,
                        size: if is_folder { 0 } else { u64::from(take_u32(raw, 28)) },
                        first: u32::from(take_u16(raw, 20)) << 16 | u32::from(take_u16(raw, 26)),
                    });
                }
            }
        }
    }
    entries
}

/// The pieces of a long name; they stand before the short entry, the last one first.
#[derive(Default)]
struct LongName {
    units: Vec<u16>,
    expected: u8,
    sum: u8,
}

impl LongName {
    fn add(&mut self, raw: &[u8]) {
        let number = raw[0] & 0x1f;
        if raw[0] & 0x40 != 0 {
            *self = LongName { units: Vec::new(), expected: number, sum: raw[13] };
        }
        if number == 0 || number != self.expected || raw[13] != self.sum {
            *self = LongName::default();
            return;
        }
        self.expected -= 1;
        let piece: Vec<u16> = [&raw[1..11], &raw[14..26], &raw[28..32]]
            .concat()
            .chunks_exact(2)
            .map(|unit| take_u16(unit, 0))
            .take_while(|unit| *unit != 0)
            .collect();
        self.units.splice(0..0, piece);
    }

    /// The name of the short entry `raw`: the long one when it is whole and belongs to it.
    fn finish(self, raw: &[u8]) -> String {
        let sum = raw[..11].iter().fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
        if !self.units.is_empty() && self.expected == 0 && self.sum == sum {
            return String::from_utf16_lossy(&self.units);
        }
        let part = |bytes: &[u8], lower: bool| {
            let text = String::from_utf8_lossy(bytes).trim_end().to_string();
            if lower { text.to_lowercase() } else { text }
        };
        // Windows NT keeps the case of both parts in byte 12.
        let stem = part(&raw[..8], raw[12] & 0x08 != 0);
        let extension = part(&raw[8..11], raw[12] & 0x10 != 0);
        if extension.is_empty() { stem } else { format!("{stem}.{extension}") }
    }
}

/// `bytes` is long enough: every caller has checked it.
fn take_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn take_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from(take_u16(bytes, at)) | u32::from(take_u16(bytes, at + 2)) << 16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::esp::{Content, EspFile, MIN_SIZE, write_esp};
    use crate::disk::fat16;
    use proptest::prelude::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    fn make_volume() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MIN_SIZE).unwrap();
        let files = ["EFI/Linux/a long name of a kernel.efi", "EFI/B.EFI", "c"]
            .map(|path| EspFile { path: path.into(), content: Content::Bytes(vec![7; 3000]) });
        write_esp(&Region::whole(&file).unwrap(), &files, 0, 1).unwrap();
        file
    }

    /// Everything that a reader can do with a volume.
    fn walk(volume: &Volume, folder: Option<&Entry>, depth: u32) -> Result<()> {
        for entry in volume.list(folder)? {
            if entry.is_folder && depth < 3 {
                let _ = walk(volume, Some(&entry), depth + 1);
            } else if !entry.is_folder {
                let _ = volume.read(&entry, 0..entry.size.min(1 << 20));
            }
        }
        Ok(())
    }

    #[test]
    fn a_chain_that_runs_in_a_circle_ends() {
        let file = make_volume();
        let mut volume = Volume::open(Region::whole(&file).unwrap()).unwrap();
        let mut entry = volume.find("c").unwrap().unwrap();
        entry.size = u64::from(u32::MAX);
        volume.table[entry.first as usize] = entry.first;
        assert!(volume.read(&entry, 0..entry.size).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn a_damaged_small_volume_never_panics(
            boot in prop::collection::vec((0u64..64, any::<u8>()), 0..4),
            rest in prop::collection::vec((512u64..70_000, any::<u8>()), 0..40),
        ) {
            let file = tempfile::tempfile().unwrap();
            file.set_len(fat16::SIZE).unwrap();
            let place = Region::whole(&file).unwrap();
            fat16::write_volume(&place, "S", "a long name", &[7; 30_000], 0, 1).unwrap();
            for (at, value) in boot.into_iter().chain(rest) {
                file.write_all_at(&[value], at).unwrap();
            }
            if let Ok(volume) = Volume::open(Region::whole(&file).unwrap()) {
                let _ = volume.label();
                let _ = walk(&volume, None, 0);
            }
        }

        #[test]
        fn a_damaged_volume_never_panics(
            boot in prop::collection::vec((0u64..64, any::<u8>()), 0..4),
            data in prop::collection::vec((0u64..4096, any::<u8>()), 0..20),
            table in prop::collection::vec((0u64..128, any::<u8>()), 0..8),
        ) {
            let file = make_volume();
            let volume = Volume::open(Region::whole(&file).unwrap()).unwrap();
            let (data_at, table_at) = (volume.data, 512 * u64::from(take_u16(&volume.region.read_at(0, 512).unwrap(), 14)));
            for (base, changes) in [(0, boot), (data_at, data), (table_at, table)] {
                for (at, value) in changes {
                    file.write_all_at(&[value], base + at).unwrap();
                }
            }
            if let Ok(volume) = Volume::open(Region::whole(&file).unwrap()) {
                let _ = walk(&volume, None, 0);
                let _ = volume.find("EFI/Linux/a long name of a kernel.efi");
            }
        }
    }
}
