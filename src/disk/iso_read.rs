//! A reader of the root folder of ISO 9660 volumes, as hypervisors make them for cloud-init:
//! plain, with Rock Ridge, with Joliet. It trusts nothing in them: every number is checked
//! before it is used, and every walk ends.
//!
//! Sources: ECMA-119; System Use Sharing Protocol 1.12; Rock Ridge 1.12; the Joliet
//! specification of Microsoft.

use anyhow::{Context, Result, bail, ensure};

use super::region::Region;

const SECTOR: u64 = 2048;
/// The first of the volume's descriptors.
const FIRST: u64 = 16;
/// No writer makes more than four.
const MAX_DESCRIPTORS: u64 = 32;
/// Some hundreds of files; a drive with a seed has a handful.
const MAX_FOLDER: u64 = 64 << 10;
/// A name has few continuations: one or none, as a rule.
const MAX_CONTINUATIONS: usize = 8;
/// Bytes of a folder's record before its name.
const RECORD: usize = 33;

/// An open volume.
#[derive(Debug)]
pub struct Volume<'a> {
    region: Region<'a>,
    /// Of the primary descriptor.
    label: String,
    entries: Vec<Entry>,
}

/// Something in the root folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    name: Name,
    pub is_folder: bool,
    /// Bytes.
    pub size: u64,
    start: u64,
    /// Its bytes do not lie in one piece.
    in_pieces: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Name {
    /// As the file was called: by Rock Ridge or Joliet.
    Full(String),
    /// What ISO 9660 left of its name, such as `USER_DAT.;1`.
    Short(String),
}

impl<'a> Volume<'a> {
    pub fn open(region: Region<'a>) -> Result<Self> {
        let mut primary = None;
        let mut joliet = None;
        for number in 0..MAX_DESCRIPTORS {
            let at = (FIRST + number) * SECTOR;
            let descriptor = region.read_at(at, SECTOR as usize);
            let Ok(descriptor) = descriptor else { break };
            if descriptor[1..6] != *b"CD001" {
                break;
            }
            match descriptor[0] {
                1 if primary.is_none() => primary = Some(descriptor),
                2 if joliet.is_none() && is_joliet(&descriptor) => joliet = Some(descriptor),
                255 => break,
                _ => {}
            }
        }
        let primary = primary.context("no ISO 9660 volume descriptor")?;
        let block = take_u16(&primary, 128);
        ensure!(u64::from(block) == SECTOR, "ISO 9660 blocks of {block} bytes");
        let mut entries = list_root(&region, &primary, decode_primary)?;
        if let Some(joliet) = joliet {
            // The primary one is the volume; what is wrong with the other hides nothing.
            entries.extend(list_root(&region, &joliet, decode_joliet).unwrap_or_default());
        }
        let label = String::from_utf8_lossy(&primary[40..72]).trim_end().to_string();
        Ok(Volume { region, label, entries })
    }

    pub fn label(&self) -> &str {
        &self.label
    }

    /// The file or folder of this name in the root, case ignored; where the volume has short
    /// names only, what they leave of it.
    pub fn find(&self, name: &str) -> Option<&Entry> {
        let is_full = |entry: &&Entry| matches!(&entry.name, Name::Full(full) if full.eq_ignore_ascii_case(name));
        let is_short =
            |entry: &&Entry| matches!(&entry.name, Name::Short(short) if shortens(short, name));
        self.entries.iter().find(is_full).or_else(|| self.entries.iter().find(is_short))
    }

    /// The first `length` bytes of a file. Fails when it is shorter.
    pub fn read(&self, file: &Entry, length: u64) -> Result<Vec<u8>> {
        ensure!(!file.is_folder && !file.in_pieces, "it is no file in one piece");
        ensure!(length <= file.size, "it has {} bytes", file.size);
        self.region.read_at(file.start, length as usize)
    }
}

/// Level 1, 2 or 3 of UCS-2 by its escape sequence.
fn is_joliet(descriptor: &[u8]) -> bool {
    [b"%/@", b"%/C", b"%/E"].iter().any(|escape| descriptor[88..].starts_with(*escape))
}

/// Takes a record of the folder, and how many bytes of its system use area to skip.
type Decode = fn(&Region, &[u8], usize) -> Result<Name>;

fn list_root(region: &Region, descriptor: &[u8], decode: Decode) -> Result<Vec<Entry>> {
    let root = &descriptor[156..190];
    let (start, size) = find_extent(root);
    ensure!(size <= MAX_FOLDER, "a root folder of {size} bytes");
    let bytes = region.read_at(start, size as usize).context("reading the root folder")?;
    let mut entries = Vec::new();
    let mut skipped = 0;
    for sector in bytes.chunks(SECTOR as usize) {
        let mut rest = sector;
        // Records do not cross sectors; what is left of one is filled with zeroes.
        while let Some(&length) = rest.first().filter(|length| **length > 0) {
            let length = usize::from(length);
            ensure!(
                length > RECORD && length <= rest.len() && RECORD + usize::from(rest[32]) <= length,
                "a record of {length} bytes in the root folder"
            );
            let (record, next) = rest.split_at(length);
            rest = next;
            match &record[RECORD..RECORD + usize::from(record[32])] {
                // The folder itself; it also says how the others' system use areas begin.
                [0] => skipped = find_skipped(record),
                [1] => {}
                _ => entries.push(make_entry(region, record, skipped, decode)?),
            }
        }
    }
    Ok(entries)
}

fn make_entry(region: &Region, record: &[u8], skipped: usize, decode: Decode) -> Result<Entry> {
    let (start, size) = find_extent(record);
    let flags = record[25];
    Ok(Entry {
        name: decode(region, record, skipped)?,
        is_folder: flags & 0x02 != 0,
        size,
        start,
        // Interleaved, or going on in the next record.
        in_pieces: flags & 0x80 != 0 || record[26] != 0 || record[27] != 0,
    })
}

/// Where the bytes of a record's file begin, behind its extended attributes, and how many
/// they are.
fn find_extent(record: &[u8]) -> (u64, u64) {
    let block = u64::from(take_u32(record, 2)) + u64::from(record[1]);
    (block * SECTOR, u64::from(take_u32(record, 10)))
}

fn decode_joliet(_: &Region, record: &[u8], _: usize) -> Result<Name> {
    let units: Vec<u16> = record[RECORD..RECORD + usize::from(record[32])]
        .chunks_exact(2)
        .map(|unit| u16::from_be_bytes([unit[0], unit[1]]))
        .collect();
    let name = String::from_utf16_lossy(&units);
    Ok(Name::Full(strip_version(&name).to_string()))
}

fn decode_primary(region: &Region, record: &[u8], skipped: usize) -> Result<Name> {
    let mut full: Option<Vec<u8>> = None;
    let mut area = take_system_use(record).get(skipped..).unwrap_or_default().to_vec();
    for _ in 0..=MAX_CONTINUATIONS {
        let next = collect_names(&area, &mut full);
        let Some((block, offset, length)) = next else {
            return Ok(match full {
                Some(name) => Name::Full(String::from_utf8_lossy(&name).into_owned()),
                None => {
                    let name = &record[RECORD..RECORD + usize::from(record[32])];
                    Name::Short(String::from_utf8_lossy(name).into_owned())
                }
            });
        };
        ensure!(offset + length <= SECTOR, "a continuation across blocks");
        area = region.read_at(block * SECTOR + offset, length as usize)?;
    }
    bail!("a name with more than {MAX_CONTINUATIONS} continuations")
}

/// Behind the name and the byte that makes its length even.
fn take_system_use(record: &[u8]) -> &[u8] {
    let end = RECORD + usize::from(record[32]);
    record.get(end + usize::from(record[32] % 2 == 0)..).unwrap_or_default()
}

/// Bytes to skip at the start of every other record's area (`SP` of the folder's own).
fn find_skipped(record: &[u8]) -> usize {
    match take_system_use(record) {
        [b'S', b'P', 7, _, 0xbe, 0xef, skipped, ..] => usize::from(*skipped),
        _ => 0,
    }
}

/// Add the pieces of the name (`NM`) in an area, and tell where it goes on (`CE`), as block,
/// offset and length.
fn collect_names(mut area: &[u8], full: &mut Option<Vec<u8>>) -> Option<(u64, u64, u64)> {
    let mut next = None;
    while let [first, second, length, _, ..] = area {
        let length = usize::from(*length);
        let Some((field, rest)) = area.split_at_checked(length).filter(|_| length >= 4) else {
            break;
        };
        match (&[*first, *second], field.len()) {
            (b"ST", _) => break,
            // Flags 2 and 4 stand for `.` and `..`.
            (b"NM", 5..) if field[4] & 0x06 == 0 => {
                full.get_or_insert_default().extend_from_slice(&field[5..]);
            }
            (b"CE", 28..) => {
                let number = |at| u64::from(take_u32(field, at));
                next = Some((number(4), number(12), number(20)));
            }
            _ => {}
        }
        area = rest;
    }
    next
}

fn strip_version(name: &str) -> &str {
    name.split_once(';').map_or(name, |(name, _)| name)
}

/// Whether a short name is what writers make of a full one: capitals, `_` for what is not
/// allowed, perhaps cut to eight characters and three.
fn shortens(short: &str, full: &str) -> bool {
    let clean = |part: &str| -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
        part.chars().map(plain).collect()
    };
    let split = |name: &str| match name.rsplit_once('.') {
        Some((stem, extension)) => (clean(stem), clean(extension)),
        None => (clean(name), String::new()),
    };
    let (short, full) = (split(strip_version(short)), split(full));
    let cut = |part: &str, most: usize| part.chars().take(most).collect::<String>();
    short == full || short == (cut(&full.0, 8), cut(&full.1, 3))
}

/// `bytes` is long enough: every caller has checked it.
fn take_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn take_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from(take_u16(bytes, at)) | u32::from(take_u16(bytes, at + 2)) << 16
}

#[cfg(test)]
#[path = "iso_read/tests.rs"]
mod tests;
