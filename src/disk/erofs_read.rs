//! A reader of erofs images of the kind that we make: uncompressed, blocks of 4096 bytes,
//! layer blobs found through the device table. It trusts nothing in the image: every
//! number is checked before it is used, and every walk ends.
//!
//! Source: the on-disk format in the kernel's fs/erofs/erofs_fs.h.

use anyhow::{Context, Result, bail, ensure};

use super::region::Region;

pub const BLOCK: u64 = 4096;
/// The superblock's place in the first block.
pub const SUPERBLOCK: usize = 1024;
/// One slot of the device table: bytes; `blocks` and `address` within it.
pub const SLOT: usize = 128;
pub const SLOT_BLOCKS: usize = 64;
pub const SLOT_ADDRESS: usize = 68;
/// The checksum's place in the first block.
pub const CHECKSUM: usize = SUPERBLOCK + 4;

const MAGIC: u32 = 0xe0f5_e1e2;
const HAS_CHECKSUM: u32 = 1;
const CHUNKED_FILES: u32 = 4;
const DEVICE_TABLE: u32 = 8;
/// Far more layers than an image has.
const MAX_DEVICES: usize = 1024;
/// No folder in a Debian system is nearly as large.
const MAX_FOLDER: u64 = 64 << 20;
const HOLE: u32 = u32::MAX;
const DIRENT: usize = 12;

/// What the superblock says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    pub root: u64,
    /// Block at which inode numbers start to count.
    pub inodes: u32,
    /// Number of devices besides this one.
    pub devices: u16,
    /// Byte at which the table of devices begins.
    pub device_table: u64,
}

/// An open file system.
#[derive(Debug)]
pub struct Erofs<'a> {
    region: Region<'a>,
    superblock: Superblock,
    /// Block addresses of the blobs; that of device n is the one at n - 1.
    blobs: Vec<u32>,
}

/// A file, a folder or something else.
#[derive(Debug, Clone)]
pub struct Inode {
    pub mode: u16,
    pub size: u64,
    data: Data,
}

#[derive(Debug, Clone)]
enum Data {
    /// All in consecutive blocks from this block.
    Plain(u32),
    /// The last, partial block is at this byte; the others as above.
    Inline { blocks: u32, tail: u64 },
    /// In chunks of `1 << bits` bytes whose addresses are in a table at byte `table`.
    Chunks { bits: u32, indexed: bool, table: u64 },
}

impl Inode {
    pub fn is_folder(&self) -> bool {
        self.mode & 0o170_000 == 0o040_000
    }

    pub fn is_file(&self) -> bool {
        self.mode & 0o170_000 == 0o100_000
    }
}

impl<'a> Erofs<'a> {
    pub fn open(region: Region<'a>) -> Result<Self> {
        let block = region.read_at(0, BLOCK as usize).context("reading the superblock")?;
        let superblock = read_superblock(&block)?;
        let count = superblock.devices as usize;
        ensure!(count <= MAX_DEVICES, "an erofs over {count} devices");
        let table = region.read_at(superblock.device_table, count * SLOT)?;
        let blobs = table.chunks_exact(SLOT).map(|slot| take_u32(slot, SLOT_ADDRESS)).collect();
        Ok(Erofs { region, superblock, blobs })
    }

    pub fn root(&self) -> Result<Inode> {
        self.read_inode(self.superblock.root)
    }

    /// The file at `path` (parts separated by `/`). Symbolic links are not followed.
    pub fn find(&self, path: &str) -> Result<Option<Inode>> {
        let mut inode = self.root()?;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            if !inode.is_folder() {
                return Ok(None);
            }
            match self.find_in(&inode, part.as_bytes())? {
                Some(number) => inode = self.read_inode(number)?,
                None => return Ok(None),
            }
        }
        Ok(Some(inode))
    }

    /// The whole content; more than `most` bytes are an error.
    pub fn read(&self, inode: &Inode, most: u64) -> Result<Vec<u8>> {
        ensure!(inode.size <= most, "a file of {} bytes, more than {most}", inode.size);
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < inode.size {
            let at = bytes.len() as u64;
            match &inode.data {
                Data::Plain(block) => {
                    bytes = self.region.read_at(u64::from(*block) * BLOCK, inode.size as usize)?;
                }
                Data::Inline { blocks, tail } => {
                    let length = inode.size % BLOCK;
                    let before = (inode.size - length) as usize;
                    if before > 0 {
                        bytes = self.region.read_at(u64::from(*blocks) * BLOCK, before)?;
                    }
                    bytes.extend(self.region.read_at(*tail, length as usize)?);
                }
                Data::Chunks { bits, indexed, table } => {
                    let length = (inode.size - at).min(1 << bits) as usize;
                    match self.find_chunk(at >> bits, *indexed, *table)? {
                        Some(block) => bytes.extend(self.region.read_at(block * BLOCK, length)?),
                        None => bytes.resize(bytes.len() + length, 0),
                    }
                }
            }
        }
        Ok(bytes)
    }

    /// The block at which a chunk begins, counted from the image's beginning.
    fn find_chunk(&self, number: u64, indexed: bool, table: u64) -> Result<Option<u64>> {
        let size = if indexed { 8 } else { 4 };
        let entry = self.region.read_at(table.saturating_add(number * size), size as usize)?;
        let (device, block) = match indexed {
            true => (take_u16(&entry, 2), take_u32(&entry, 4)),
            false => (0, take_u32(&entry, 0)),
        };
        let base = match device {
            _ if block == HOLE => return Ok(None),
            0 => 0,
            device => *self.blobs.get(device as usize - 1).context("a chunk of no known blob")?,
        };
        Ok(Some(u64::from(base) + u64::from(block)))
    }

    fn find_in(&self, folder: &Inode, name: &[u8]) -> Result<Option<u64>> {
        let bytes = self.read(folder, MAX_FOLDER)?;
        for block in bytes.chunks(BLOCK as usize) {
            ensure!(block.len() >= DIRENT, "a damaged folder");
            // Entries of fixed size, then the names; the first name's place tells how many.
            let entries = take_u16(block, 8) as usize / DIRENT;
            ensure!(entries > 0 && entries * DIRENT <= block.len(), "a damaged folder");
            for i in 0..entries {
                let start = take_u16(block, i * DIRENT + 8) as usize;
                let end = match i + 1 < entries {
                    true => take_u16(block, (i + 1) * DIRENT + 8) as usize,
                    false => block.len(),
                };
                let found = block.get(start..end).context("a damaged folder")?;
                // The last name of a block may be padded.
                let found = found.split(|byte| *byte == 0).next().unwrap_or_default();
                if found == name {
                    return Ok(Some(take_u64(block, i * DIRENT)));
                }
            }
        }
        Ok(None)
    }

    fn read_inode(&self, number: u64) -> Result<Inode> {
        let at = number
            .checked_mul(32)
            .and_then(|at| at.checked_add(u64::from(self.superblock.inodes) * BLOCK))
            .context("an inode beyond the image")?;
        let raw = self.region.read_at(at, 32).context("reading an inode")?;
        let format = take_u16(&raw, 0);
        let is_long = format & 1 == 1;
        let size = match is_long {
            true => take_u64(&raw, 8),
            false => u64::from(take_u32(&raw, 8)),
        };
        let attributes = match u64::from(take_u16(&raw, 2)) {
            0 => 0,
            count => 12 + (count - 1) * 4,
        };
        // Inside the image, or the read above had failed.
        let after = at + if is_long { 64 } else { 32 } + attributes;
        let address = take_u32(&raw, 16);
        let data = match format >> 1 & 7 {
            0 => Data::Plain(address),
            2 => Data::Inline { blocks: address, tail: after },
            4 => {
                let indexed = address & 0x20 != 0;
                let align = if indexed { 8 } else { 4 };
                let bits = 12 + (address & 0x1f);
                Data::Chunks { bits, indexed, table: after.next_multiple_of(align) }
            }
            layout => bail!("erofs data layout {layout} is not one that this program writes"),
        };
        Ok(Inode { mode: take_u16(&raw, 4), size, data })
    }
}

/// Check and read the superblock in the first block of an image.
pub fn read_superblock(block: &[u8]) -> Result<Superblock> {
    ensure!(block.len() as u64 >= BLOCK, "too short for an erofs");
    let block = &block[..BLOCK as usize];
    let raw = &block[SUPERBLOCK..];
    ensure!(take_u32(raw, 0) == MAGIC, "no erofs");
    ensure!(raw[12] == 12 && raw[90] == 0, "an erofs with blocks of an unusual size");
    let features = take_u32(raw, 80);
    ensure!(
        features & !(CHUNKED_FILES | DEVICE_TABLE) == 0,
        "an erofs with features {features:#x} that this program does not use"
    );
    ensure!(take_u32(raw, 8) & HAS_CHECKSUM != 0, "an erofs without a checksum");
    ensure!(take_u32(block, CHECKSUM) == compute_checksum(block), "the erofs checksum is wrong");
    Ok(Superblock {
        root: u64::from(take_u16(raw, 14)),
        inodes: take_u32(raw, 40),
        devices: take_u16(raw, 86),
        device_table: u64::from(take_u16(raw, 88)) * SLOT as u64,
    })
}

/// CRC-32C over the first block from the superblock on, the checksum taken as zero, without
/// the usual final inversion (erofs_superblock_csum_verify in the kernel).
pub fn compute_checksum(block: &[u8]) -> u32 {
    let mut summed = block[SUPERBLOCK..BLOCK as usize].to_vec();
    summed[CHECKSUM - SUPERBLOCK..][..4].fill(0);
    summed.iter().fold(u32::MAX, |mut crc, byte| {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
        crc
    })
}

/// `bytes` is long enough: every caller has checked it.
fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut taken = [0; N];
    taken.copy_from_slice(&bytes[at..at + N]);
    taken
}

pub fn take_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(take(bytes, at))
}

pub fn take_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(take(bytes, at))
}

fn take_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(take(bytes, at))
}
