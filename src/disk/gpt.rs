//! GUID partition tables: UEFI specification 2.10, chapter 5; partition types and
//! attributes of the Discoverable Partitions Specification.
//!
//! Sectors have 512 bytes. Positions and sizes in this module's interface are in bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use flate2::Crc;

use super::MIB;
use super::guid::Guid;
use super::region::Region;

pub const SECTOR: u64 = 512;

/// EFI system partition.
pub const TYPE_ESP: Guid = Guid::from_number(0xc12a7328_f81f_11d2_ba4b_00a0c93ec93b);
/// Root of an x86-64 system.
pub const TYPE_ROOT: Guid = Guid::from_number(0x4f68bce3_e8cd_4db1_96e7_fbcaf984b709);
/// dm-verity tree of the root of an x86-64 system.
pub const TYPE_ROOT_VERITY: Guid = Guid::from_number(0x2c7357ed_ebd2_46d9_aec1_23d437ec2bf5);
/// `/var`.
pub const TYPE_VAR: Guid = Guid::from_number(0x4d21b016_b534_45c2_a9fb_5c16e091fd2d);

/// Grow the file system to the partition's size when it is mounted.
pub const FLAG_GROW: u64 = 1 << 59;
/// Mount it read-only.
pub const FLAG_READ_ONLY: u64 = 1 << 60;
/// Do not mount or use it automatically.
pub const FLAG_NO_AUTO: u64 = 1 << 63;

const ENTRIES: usize = 128;
const ENTRY: usize = 128;
const HEADER: usize = 92;
/// The table of entries, in sectors.
const TABLE_SECTORS: u64 = (ENTRIES * ENTRY) as u64 / SECTOR;
/// What the backup at the end of the disk needs, and so cannot hold partitions.
pub const BACKUP_SIZE: u64 = (TABLE_SECTORS + 1) * SECTOR;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    pub type_guid: Guid,
    /// The partition's own GUID (`PARTUUID`).
    pub guid: Guid,
    /// At most 36 UTF-16 units (`PARTLABEL`).
    pub label: String,
    pub start: u64,
    pub size: u64,
    pub flags: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    pub disk_guid: Guid,
    pub partitions: Vec<Partition>,
}

/// Write protective MBR, table and backup table onto a disk of `disk_size` bytes; the
/// partitions' own bytes are left as they are.
pub fn write(table: &Table, file: &File, disk_size: u64) -> Result<()> {
    let (head, tail) = encode(table, disk_size)?;
    file.write_all_at(&head, 0)
        .and_then(|()| file.write_all_at(&tail, disk_size - tail.len() as u64))
        .context("writing the partition table")
}

/// The first 34 and the last 33 sectors of the disk.
fn encode(table: &Table, disk_size: u64) -> Result<(Vec<u8>, Vec<u8>)> {
    check_layout(table, disk_size)?;
    let sectors = disk_size / SECTOR;
    let entries = encode_entries(table)?;
    let mut head = encode_protective_mbr(sectors);
    head.extend(encode_header(table, sectors, 1, &entries));
    head.extend(&entries);
    let mut tail = entries.clone();
    tail.extend(encode_header(table, sectors, sectors - 1, &entries));
    Ok((head, tail))
}

fn check_layout(table: &Table, disk_size: u64) -> Result<()> {
    ensure!(disk_size.is_multiple_of(SECTOR), "a disk of {disk_size} bytes ends inside a sector");
    ensure!(disk_size >= MIB + BACKUP_SIZE, "a disk of {disk_size} bytes is too small for a GPT");
    ensure!(table.partitions.len() <= ENTRIES, "more than {ENTRIES} partitions");
    let mut end = MIB;
    let mut partitions: Vec<&Partition> = table.partitions.iter().collect();
    partitions.sort_by_key(|partition| partition.start);
    for partition in partitions {
        let Partition { label, start, size, .. } = partition;
        ensure!(
            start.is_multiple_of(MIB) && size.is_multiple_of(SECTOR) && *size > 0,
            "partition {label} ({size} bytes at {start}) is not aligned"
        );
        ensure!(*start >= end, "partition {label} overlaps what lies before it");
        let next = start.checked_add(*size).filter(|end| *end <= disk_size - BACKUP_SIZE);
        end = next.with_context(|| format!("partition {label} reaches beyond the disk"))?;
    }
    Ok(())
}

/// A DOS partition table that says the whole disk is in use (UEFI 5.2.3).
fn encode_protective_mbr(sectors: u64) -> Vec<u8> {
    let mut mbr = vec![0; SECTOR as usize];
    let covered = u32::try_from(sectors - 1).unwrap_or(u32::MAX);
    mbr[446..454].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff]);
    mbr[454..458].copy_from_slice(&1u32.to_le_bytes());
    mbr[458..462].copy_from_slice(&covered.to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    mbr
}

fn encode_entries(table: &Table) -> Result<Vec<u8>> {
    let mut entries = vec![0; ENTRIES * ENTRY];
    for (entry, partition) in entries.chunks_exact_mut(ENTRY).zip(&table.partitions) {
        let label: Vec<u16> = partition.label.encode_utf16().collect();
        ensure!(label.len() <= 36, "partition label {} is too long", partition.label);
        entry[..16].copy_from_slice(&partition.type_guid.to_disk());
        entry[16..32].copy_from_slice(&partition.guid.to_disk());
        let last = (partition.start + partition.size) / SECTOR - 1;
        entry[32..40].copy_from_slice(&(partition.start / SECTOR).to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
        entry[48..56].copy_from_slice(&partition.flags.to_le_bytes());
        for (unit, place) in label.iter().zip(entry[56..].chunks_exact_mut(2)) {
            place.copy_from_slice(&unit.to_le_bytes());
        }
    }
    Ok(entries)
}

/// The header for sector `here`: 1 for the table, the last one for its backup.
fn encode_header(table: &Table, sectors: u64, here: u64, entries: &[u8]) -> Vec<u8> {
    let last = sectors - 1;
    let (other, entries_at) = if here == 1 { (last, 2) } else { (1, last - TABLE_SECTORS) };
    let mut header = vec![0; SECTOR as usize];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
    header[12..16].copy_from_slice(&(HEADER as u32).to_le_bytes());
    header[24..32].copy_from_slice(&here.to_le_bytes());
    header[32..40].copy_from_slice(&other.to_le_bytes());
    header[40..48].copy_from_slice(&(2 + TABLE_SECTORS).to_le_bytes());
    header[48..56].copy_from_slice(&(last - TABLE_SECTORS - 1).to_le_bytes());
    header[56..72].copy_from_slice(&table.disk_guid.to_disk());
    header[72..80].copy_from_slice(&entries_at.to_le_bytes());
    header[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
    header[84..88].copy_from_slice(&(ENTRY as u32).to_le_bytes());
    header[88..92].copy_from_slice(&compute_crc(entries).to_le_bytes());
    let crc = compute_crc(&header[..HEADER]);
    header[16..20].copy_from_slice(&crc.to_le_bytes());
    header
}

/// CRC-32 as in UEFI, which is that of gzip.
fn compute_crc(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// Read the table of a disk, or its backup when the table is damaged. What is returned
/// has been checked: sums are right, and no partition overlaps another or leaves the disk.
pub fn read(disk: &Region) -> Result<Table> {
    let last = (disk.length() / SECTOR).checked_sub(1).context("the disk is empty")?;
    read_at(disk, 1).or_else(|error| read_at(disk, last).map_err(|_| error))
}

fn read_at(disk: &Region, here: u64) -> Result<Table> {
    let header = disk.read_at(here * SECTOR, SECTOR as usize)?;
    ensure!(&header[..8] == b"EFI PART", "no GUID partition table");
    let size = take_u32(&header, 12) as usize;
    ensure!((HEADER..=SECTOR as usize).contains(&size), "a GPT header of {size} bytes");
    let mut summed = header[..size].to_vec();
    summed[16..20].fill(0);
    ensure!(compute_crc(&summed) == take_u32(&header, 16), "the GPT header's checksum is wrong");
    ensure!(take_u64(&header, 24) == here, "the GPT header belongs elsewhere");

    let (count, entry_size) = (take_u32(&header, 80) as usize, take_u32(&header, 84) as usize);
    ensure!(count <= 1024, "a GPT with {count} entries");
    ensure!((ENTRY..=4096).contains(&entry_size), "GPT entries of {entry_size} bytes");
    let at = take_u64(&header, 72).checked_mul(SECTOR).context("a GPT beyond the disk")?;
    let entries = disk.read_at(at, count * entry_size)?;
    ensure!(compute_crc(&entries) == take_u32(&header, 88), "the GPT's checksum is wrong");

    let partitions = entries
        .chunks_exact(entry_size)
        .filter(|entry| entry[..16] != [0; 16])
        .map(|entry| decode_entry(entry, disk.length()))
        .collect::<Result<Vec<_>>>()?;
    let mut ranges: Vec<_> = partitions.iter().map(|p| (p.start, p.start + p.size)).collect();
    ranges.sort_unstable();
    if ranges.windows(2).any(|pair| pair[0].1 > pair[1].0) {
        bail!("partitions overlap");
    }
    Ok(Table { disk_guid: take_guid(&header, 56), partitions })
}

fn decode_entry(entry: &[u8], disk_size: u64) -> Result<Partition> {
    let (first, last) = (take_u64(entry, 32), take_u64(entry, 40));
    let end = last.checked_add(1).and_then(|end| end.checked_mul(SECTOR));
    let Some(end) = end.filter(|end| *end <= disk_size && first <= last) else {
        bail!("a partition from sector {first} to {last} does not lie on the disk");
    };
    let units: Vec<u16> = entry[56..128]
        .chunks_exact(2)
        .map(|unit| u16::from_le_bytes([unit[0], unit[1]]))
        .take_while(|unit| *unit != 0)
        .collect();
    Ok(Partition {
        type_guid: take_guid(entry, 0),
        guid: take_guid(entry, 16),
        label: String::from_utf16_lossy(&units),
        start: first * SECTOR,
        size: end - first * SECTOR,
        flags: take_u64(entry, 48),
    })
}

/// `bytes` is long enough: every caller has checked it.
fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut taken = [0; N];
    taken.copy_from_slice(&bytes[at..at + N]);
    taken
}

fn take_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(take(bytes, at))
}

fn take_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(take(bytes, at))
}

fn take_guid(bytes: &[u8], at: usize) -> Guid {
    Guid::from_disk(take(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK: u64 = 64 * MIB;

    fn make_table(sizes: &[u64], label: &str) -> Table {
        let mut start = MIB;
        let mut partitions = Vec::new();
        for (i, size) in sizes.iter().enumerate() {
            let guid = Guid::from_number(i as u128 + 1);
            partitions.push(Partition {
                type_guid: TYPE_ROOT,
                guid,
                label: label.to_string(),
                start,
                size: size * MIB,
                flags: FLAG_READ_ONLY | i as u64,
            });
            start += size * MIB;
        }
        Table { disk_guid: Guid::from_number(42), partitions }
    }

    fn write_disk(table: &Table) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(DISK).unwrap();
        write(table, &file, DISK).unwrap();
        file
    }

    #[test]
    fn a_damaged_table_is_read_from_its_backup() {
        let table = make_table(&[1, 2], "root-a");
        let file = write_disk(&table);
        file.write_all_at(b"x", SECTOR + 30).unwrap();
        assert_eq!(read(&Region::whole(&file).unwrap()).unwrap(), table);
        file.write_all_at(b"x", DISK - BACKUP_SIZE).unwrap();
        let error = read(&Region::whole(&file).unwrap()).unwrap_err().to_string();
        assert!(error.contains("checksum"), "{error}");
    }

    #[test]
    fn partitions_that_overlap_or_leave_the_disk_are_not_written() {
        let file = tempfile::tempfile().unwrap();
        let mut table = make_table(&[2, 2], "a");
        table.partitions[1].start = 2 * MIB;
        assert!(write(&table, &file, DISK).is_err());
        assert!(write(&make_table(&[63], "a"), &file, DISK).is_err());
        assert!(write(&make_table(&[1], &"a".repeat(37)), &file, DISK).is_err());
        assert!(write(&make_table(&[62], "a"), &file, DISK).is_ok());
        assert!(write(&make_table(&[], "a"), &file, 0).is_err());
    }

    #[test]
    fn partitions_that_overlap_on_a_disk_are_refused() {
        // Two entries in one place, with every checksum right.
        let mut table = make_table(&[1, 1], "a");
        let entries = {
            table.partitions[1].start = table.partitions[0].start;
            encode_entries(&table).unwrap()
        };
        let file = tempfile::tempfile().unwrap();
        file.set_len(DISK).unwrap();
        file.write_all_at(&encode_header(&table, DISK / SECTOR, 1, &entries), SECTOR).unwrap();
        file.write_all_at(&entries, 2 * SECTOR).unwrap();
        let error = read(&Region::whole(&file).unwrap()).unwrap_err().to_string();
        assert!(error.contains("overlap"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_was_written_is_read(
            sizes in prop::collection::vec(1u64..4, 0..12), label in "[a-zé😀-]{0,18}",
        ) {
            let table = make_table(&sizes, &label);
            let file = write_disk(&table);
            prop_assert_eq!(read(&Region::whole(&file).unwrap()).unwrap(), table);
        }

        #[test]
        fn a_hostile_header_never_panics(
            at in 0usize..HEADER, value: [u8; 8], fix_sum: bool,
        ) {
            let table = make_table(&[1, 2], "root-a");
            let file = write_disk(&table);
            let mut header = [0; SECTOR as usize];
            file.read_exact_at(&mut header, SECTOR).unwrap();
            header[at..at + 8].copy_from_slice(&value);
            if fix_sum {
                header[16..20].fill(0);
                let size = (take_u32(&header, 12) as usize).clamp(HEADER, SECTOR as usize);
                let crc = compute_crc(&header[..size]);
                header[16..20].copy_from_slice(&crc.to_le_bytes());
            }
            file.write_all_at(&header, SECTOR).unwrap();
            let _ = read(&Region::whole(&file).unwrap());
        }

        #[test]
        fn hostile_entries_never_panic_nor_leave_the_disk(at in 0usize..2 * ENTRY - 8, value: [u8; 8]) {
            let table = make_table(&[1, 2], "root-a");
            let mut entries = encode_entries(&table).unwrap();
            entries[at..at + 8].copy_from_slice(&value);
            let file = write_disk(&table);
            file.write_all_at(&encode_header(&table, DISK / SECTOR, 1, &entries), SECTOR).unwrap();
            file.write_all_at(&entries, 2 * SECTOR).unwrap();
            if let Ok(read) = read_at(&Region::whole(&file).unwrap(), 1) {
                prop_assert!(read.partitions.iter().all(|p| p.start + p.size <= DISK));
            }
        }
    }
}
