//! A small FAT16 volume with one file, with the same bytes for the same file.
//!
//! Source: Microsoft's FAT32 File System Specification 1.03.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

use super::MIB;
use super::fat_entry::{
    ARCHIVE, ENTRY, VOLUME_LABEL, convert_to_dos, encode_entry, encode_long_name, is_short,
    shorten_name,
};
use super::region::Region;

/// Bytes of the volume. With clusters of one sector it has more than the 4084 that a FAT12
/// may have, and far fewer than FAT16's most.
pub const SIZE: u64 = 4 * MIB;
const SECTOR: u64 = 512;
const SECTORS: u64 = SIZE / SECTOR;
const TABLES: u64 = 2;
const TABLE: u64 = (SECTORS * 2).div_ceil(SECTOR);
const ROOT_ENTRIES: u64 = 512;
const ROOT: u64 = SECTOR + TABLES * TABLE * SECTOR;
const DATA: u64 = ROOT + ROOT_ENTRIES * ENTRY as u64;
const END: u16 = 0xffff;
const FIRST: u16 = 2;

/// Fill `place`, which must read as zeros and have [`SIZE`] bytes, with a volume that holds
/// one file in its root. The label has at most 11 capitals, digits and blanks; all times are
/// `epoch` (seconds since 1970, UTC).
pub fn write_volume(
    place: &Region,
    label: &str,
    name: &str,
    content: &[u8],
    epoch: u64,
    volume_id: u32,
) -> Result<()> {
    let is_label = |b: u8| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b' ';
    ensure!(label.len() <= 11 && label.bytes().all(is_label), "`{label}` is no label");
    ensure!(place.length() == SIZE, "a volume of {} bytes", place.length());
    ensure!(content.len() as u64 <= SIZE - DATA, "{} bytes do not fit", content.len());
    let mut padded = [b' '; 11];
    padded[..label.len()].copy_from_slice(label.as_bytes());

    let clusters = (content.len() as u64).div_ceil(SECTOR) as u16;
    let mut table = vec![0xfff8, END];
    if clusters > 0 {
        table.extend(FIRST + 1..FIRST + clusters);
        table.push(END);
    }
    let table: Vec<u8> = table.iter().flat_map(|entry: &u16| entry.to_le_bytes()).collect();

    let stamp = convert_to_dos(epoch);
    let mut root = encode_entry(&padded, VOLUME_LABEL, 0, 0, stamp).to_vec();
    let short = shorten_name(name, &mut BTreeSet::new());
    if !is_short(name) {
        root.extend(encode_long_name(name, &short));
    }
    let first = if clusters > 0 { FIRST } else { 0 };
    root.extend(encode_entry(&short, ARCHIVE, first.into(), content.len() as u32, stamp));

    place.write_at(0, &encode_boot_sector(&padded, volume_id))?;
    for i in 0..TABLES {
        place.write_at(SECTOR + i * TABLE * SECTOR, &table)?;
    }
    place.write_at(ROOT, &root)?;
    place.write_at(DATA, content)
}

fn encode_boot_sector(label: &[u8; 11], volume_id: u32) -> Vec<u8> {
    let mut boot = vec![0; SECTOR as usize];
    let mut put = |at: usize, bytes: &[u8]| boot[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0xeb, 0x3c, 0x90]);
    put(3, b"MSWIN4.1");
    put(11, &(SECTOR as u16).to_le_bytes());
    put(13, &[1]); // sectors per cluster
    put(14, &1u16.to_le_bytes()); // sectors before the tables
    put(16, &[TABLES as u8]);
    put(17, &(ROOT_ENTRIES as u16).to_le_bytes());
    put(19, &(SECTORS as u16).to_le_bytes());
    put(21, &[0xf8]); // a fixed disk
    put(22, &(TABLE as u16).to_le_bytes());
    put(24, &63u16.to_le_bytes()); // sectors per track, heads: for BIOSes only
    put(26, &255u16.to_le_bytes());
    put(36, &[0x80, 0, 0x29]);
    put(39, &volume_id.to_le_bytes());
    put(43, label);
    put(54, b"FAT16   ");
    put(510, &[0x55, 0xaa]);
    boot
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::fat_read::Volume;

    #[test]
    fn the_file_comes_back() {
        for (name, length) in [("stanchion-seed.json", 10_000), ("A.TXT", 0), ("b.txt", 512)] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(SIZE).unwrap();
            let content: Vec<u8> = (0..length).map(|i| (i / 3) as u8).collect();
            let place = Region::whole(&file).unwrap();
            write_volume(&place, "STANCHION", name, &content, 1_700_000_000, 7).unwrap();
            let volume = Volume::open(Region::whole(&file).unwrap()).unwrap();
            assert_eq!(volume.label().unwrap(), "STANCHION");
            assert_eq!(volume.list(None).unwrap().len(), 1);
            let entry = volume.find(name).unwrap().unwrap();
            assert_eq!(volume.read(&entry, 0..entry.size).unwrap(), content);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        let place = Region::whole(&file).unwrap();
        assert!(write_volume(&place, "TOO LONG A LABEL", "a", b"", 0, 0).is_err());
        assert!(write_volume(&place, "stanchion", "a", b"", 0, 0).is_err());
        assert!(write_volume(&place, "S", "a", &vec![0; SIZE as usize], 0, 0).is_err());
    }
}
