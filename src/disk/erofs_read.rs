//! A reader of erofs images of the kind that we make: uncompressed, blocks of 4096 bytes,
//! layer blobs found through the device table. It trusts nothing in the image: every
//! number is checked before it is used, and every walk ends.
//!
//! Source: the on-disk format in the kernel's fs/erofs/erofs_fs.h.

use anyhow::{Context, Result, bail, ensure};

use super::guid::Guid;
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
    /// Block at which attributes lie that several inodes share.
    pub shared: u32,
    /// Time of every short inode, in seconds since 1970.
    pub time: u64,
    pub uuid: Guid,
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
    pub number: u64,
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// Time of the last change, in seconds since 1970.
    pub time: u64,
    /// The number of a device node, as the format stores it.
    pub device: u32,
    data: Data,
    /// Place and length of the extended attributes.
    attributes: (u64, u64),
}

/// An extended attribute. The kind stands for the prefix of its name (`user.` is 1,
/// `trusted.` 4, `security.` 6).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attribute {
    pub kind: u8,
    pub name: Vec<u8>,
    pub value: Vec<u8>,
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
        self.has_type(0o040_000)
    }

    pub fn is_file(&self) -> bool {
        self.has_type(0o100_000)
    }

    pub fn is_link(&self) -> bool {
        self.has_type(0o120_000)
    }

    /// What overlayfs takes for "not there": a character device 0:0.
    pub fn is_whiteout(&self) -> bool {
        self.has_type(0o020_000) && self.device == 0
    }

    fn has_type(&self, kind: u16) -> bool {
        self.mode & 0o170_000 == kind
    }

    /// The first of the consecutive blocks that hold the content.
    pub fn first_block(&self) -> Result<u32> {
        match self.data {
            Data::Plain(block) => Ok(block),
            _ => bail!("a file whose content is not in consecutive blocks"),
        }
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

    pub fn superblock(&self) -> &Superblock {
        &self.superblock
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
        let entries = self.list(folder)?;
        Ok(entries.into_iter().find(|(found, _)| found == name).map(|(_, number)| number))
    }

    /// Names in a folder and the numbers of their inodes, `.` and `..` left out.
    pub fn list(&self, folder: &Inode) -> Result<Vec<(Vec<u8>, u64)>> {
        ensure!(folder.is_folder(), "no folder");
        let bytes = self.read(folder, MAX_FOLDER)?;
        let mut found = Vec::new();
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
                let name = block.get(start..end).context("a damaged folder")?;
                // The last name of a block may be padded.
                let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
                ensure!((1..=255).contains(&name.len()) && !name.contains(&b'/'), "a bad name");
                if name != b"." && name != b".." {
                    found.push((name.to_vec(), take_u64(block, i * DIRENT)));
                }
            }
        }
        Ok(found)
    }

    /// The extended attributes of an inode, in the order in which they are stored.
    pub fn attributes(&self, inode: &Inode) -> Result<Vec<Attribute>> {
        let (at, length) = inode.attributes;
        if length == 0 {
            return Ok(Vec::new());
        }
        // A filter, the number of shared ones, their places; the others follow.
        let bytes = self.region.read_at(at, length as usize)?;
        let shared = bytes[4] as usize;
        let mut rest = bytes.get(12 + shared * 4..).context("damaged extended attributes")?;
        let mut found = Vec::new();
        for place in bytes[12..].chunks_exact(4).take(shared) {
            let at = u64::from(self.superblock.shared) * BLOCK + u64::from(take_u32(place, 0)) * 4;
            let length = measure_attribute(&self.region.read_at(at, 4)?);
            found.push(decode_attribute(&self.region.read_at(at, length)?)?.0);
        }
        while rest.len() >= 4 {
            let (attribute, after) = decode_attribute(rest)?;
            found.push(attribute);
            rest = after;
        }
        Ok(found)
    }

    pub fn read_inode(&self, number: u64) -> Result<Inode> {
        let at = number
            .checked_mul(32)
            .and_then(|at| at.checked_add(u64::from(self.superblock.inodes) * BLOCK))
            .context("an inode beyond the image")?;
        let mut raw = self.region.read_at(at, 32).context("reading an inode")?;
        let format = take_u16(&raw, 0);
        let is_long = format & 1 == 1;
        if is_long {
            raw = self.region.read_at(at, 64).context("reading an inode")?;
        }
        let (size, uid, gid, time) = match is_long {
            true => (take_u64(&raw, 8), take_u32(&raw, 24), take_u32(&raw, 28), take_u64(&raw, 32)),
            false => {
                let (uid, gid) = (take_u16(&raw, 24), take_u16(&raw, 26));
                let size = u64::from(take_u32(&raw, 8));
                (size, u32::from(uid), u32::from(gid), self.superblock.time)
            }
        };
        let attributes = match u64::from(take_u16(&raw, 2)) {
            0 => 0,
            count => 12 + (count - 1) * 4,
        };
        // Inside the image, or the read above had failed.
        let end = at + raw.len() as u64;
        let after = end + attributes;
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
        let mode = take_u16(&raw, 4);
        let attributes = (end, attributes);
        Ok(Inode { number, mode, uid, gid, size, time, device: address, data, attributes })
    }
}

/// Bytes of an attribute with these first four, without padding.
fn measure_attribute(head: &[u8]) -> usize {
    4 + head[0] as usize + take_u16(head, 2) as usize
}

/// The attribute at the beginning of `bytes`, which are at least four, and what follows.
fn decode_attribute(bytes: &[u8]) -> Result<(Attribute, &[u8])> {
    let (name_length, kind) = (bytes[0] as usize, bytes[1]);
    ensure!(kind & 0x80 == 0, "an extended attribute with a long prefix");
    let length = measure_attribute(bytes);
    let content = bytes.get(4..length).context("damaged extended attributes")?;
    let (name, value) = content.split_at(name_length);
    let attribute = Attribute { kind, name: name.to_vec(), value: value.to_vec() };
    Ok((attribute, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
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
        shared: take_u32(raw, 44),
        time: take_u64(raw, 24),
        uuid: Guid::from_bytes(take(raw, 48)),
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

fn take_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(take(bytes, at))
}

fn take_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(take(bytes, at))
}

fn take_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(take(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::erofs_merge::{Node, merge_layers};
    use crate::disk::erofs_write::{Device, encode_index, set_addresses};
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    const LONG_FOLDER: usize = 300;

    fn make_node(mode: u16, size: u64, parent: usize) -> Node {
        let attributes =
            vec![Attribute { kind: 6, name: b"capability".into(), value: vec![7; 20] }];
        let (data, device) = (Data::Plain(1), 0);
        let inode = Inode {
            number: 0,
            mode,
            uid: 70_000,
            gid: 3,
            size,
            time: 7,
            device,
            data,
            attributes: (0, 0),
        };
        let (target, children) = (Vec::new(), BTreeMap::new());
        Node { layer: 0, inode, attributes, target, children, parent, links: 1 }
    }

    /// A folder with a short and a long folder, a link and a file of 5000 bytes, and the
    /// blob with the file's content behind the index.
    fn make_image() -> Vec<u8> {
        let mut nodes = vec![make_node(0o040_755, 0, 0)];
        let mut add = |parent: usize, name: &str, mode, size| {
            nodes.push(make_node(mode, size, parent));
            let child = nodes.len() - 1;
            nodes[parent].children.insert(name.into(), child);
            child
        };
        let long = add(0, "long", 0o040_755, 0);
        for i in 0..LONG_FOLDER {
            add(long, &format!("a file with a long name {i}"), 0o100_644, 0);
        }
        let short = add(0, "short", 0o040_700, 0);
        add(short, "!first", 0o100_600, 0);
        add(short, "file", 0o100_644, 5000);
        let link = add(short, "link", 0o120_777, 0);
        nodes[link].target = b"../long".into();
        let device = Device { uuid: Guid::from_number(5), length: 3 * BLOCK };
        let mut image = encode_index(&nodes, &[device], 1, &Guid::from_number(6)).unwrap();
        let offset = image.len() as u64;
        set_addresses(&mut image, [offset].into_iter()).unwrap();
        image.extend([0; BLOCK as usize]);
        image.extend([9; 2 * BLOCK as usize]);
        image
    }

    fn store(image: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(image, 0).unwrap();
        file
    }

    #[test]
    fn what_was_written_is_read() {
        let file = store(&make_image());
        let erofs = Erofs::open(Region::whole(&file).unwrap()).unwrap();
        let find = |path: &str| erofs.find(path).unwrap().unwrap();
        let long = erofs.list(&find("long")).unwrap();
        assert_eq!(long.len(), LONG_FOLDER);
        assert!(long.is_sorted_by_key(|(name, _)| name));
        assert_eq!(erofs.list(&find("short")).unwrap().len(), 3);
        assert_eq!(erofs.read(&find("short/file"), 5000).unwrap(), [9; 5000]);
        assert_eq!(erofs.read(&find("short/link"), 100).unwrap(), b"../long");
        let inode = find("short/!first");
        assert_eq!((inode.mode, inode.uid, inode.gid, inode.size), (0o100_600, 70_000, 3, 0));
        assert_eq!(erofs.attributes(&inode).unwrap()[0].value, [7; 20]);
        assert!(erofs.find("short/file/x").unwrap().is_none());
    }

    #[test]
    fn a_wrong_checksum_is_refused() {
        let mut image = make_image();
        image[SUPERBLOCK + 30] ^= 1;
        assert!(Erofs::open(Region::whole(&store(&image)).unwrap()).is_err());
    }

    /// Everything that a reader can do, as far as it goes.
    fn walk(erofs: &Erofs, folder: &Inode, depth: u32) {
        for (_, number) in erofs.list(folder).unwrap_or_default() {
            let Ok(inode) = erofs.read_inode(number) else { continue };
            let _ = erofs.attributes(&inode);
            if inode.is_folder() && depth < 2 {
                walk(erofs, &inode, depth + 1);
            } else {
                let _ = erofs.read(&inode, 1 << 20);
            }
        }
    }

    proptest! {
        #[test]
        fn a_damaged_image_never_panics_and_every_walk_ends(
            super_changes in prop::collection::vec((8usize..128, any::<u8>()), 0..3),
            changes in prop::collection::vec((1152usize..4096, any::<u8>()), 0..40),
            cut in 0usize..60_000,
        ) {
            let mut image = make_image();
            for (at, value) in super_changes {
                image[SUPERBLOCK + at] = value;
            }
            for (at, value) in changes {
                image[at] = value;
            }
            // With a right checksum: who makes a hostile image can count, too.
            let checksum = compute_checksum(&image);
            image[CHECKSUM..CHECKSUM + 4].copy_from_slice(&checksum.to_le_bytes());
            if cut >= BLOCK as usize {
                image.truncate(cut);
            }
            let file = store(&image);
            if let Ok(erofs) = Erofs::open(Region::whole(&file).unwrap()) {
                if let Ok(root) = erofs.root() {
                    walk(&erofs, &root, 0);
                }
                let _ = erofs.find("short/link");
                if let Ok(nodes) = merge_layers(&[erofs]) {
                    let device = Device { uuid: Guid::default(), length: 1 << 40 };
                    let _ = encode_index(&nodes, &[device], 1, &Guid::default());
                }
            }
        }
    }
}
