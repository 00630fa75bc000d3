//! Writes the index: an erofs with the merged tree whose files' content lies in the blobs.
//!
//! Source: the on-disk format in the kernel's fs/erofs/erofs_fs.h. What it holds, in order:
//! superblock, device table, inodes (each with its attributes and, when short, its folder
//! entries or link target), then the blocks of larger folders.

use anyhow::{Context, Result, ensure};

use super::erofs_merge::Node;
use super::erofs_read::{
    Attribute, BLOCK, CHECKSUM, SLOT, SLOT_ADDRESS, SLOT_BLOCKS, SUPERBLOCK, compute_checksum,
};
use super::guid::Guid;

const INODE_UNIT: usize = 32;
const SUPERBLOCK_SIZE: usize = 128;
/// Folders up to this size stand behind their inodes; link targets always do.
const MAX_INLINE: usize = 2048;

const PLAIN: u16 = 0;
const INLINE: u16 = 2;
const CHUNKS: u16 = 4;
/// A chunk's entry names its device.
const INDEXED: u32 = 0x20;

/// A blob in the device table.
#[derive(Debug, Clone, Copy)]
pub struct Device {
    pub uuid: Guid,
    pub length: u64,
}

/// Where a node's inode and content are.
struct Place {
    inode: usize,
    is_long: bool,
    /// With their header; empty when there are none.
    attributes: Vec<u8>,
    content: Content,
}

enum Content {
    None,
    /// In blocks of this index, from this byte; the number is the length.
    Blocks(usize, usize),
    /// Behind the inode, with this length.
    Behind(usize),
    /// In a blob.
    Blob,
}

/// Encode the index. Inodes whose time is `epoch` are short ones. The addresses of the blobs are still to be
/// written ([`set_addresses`]).
pub fn encode_index(
    nodes: &[Node],
    devices: &[Device],
    epoch: u64,
    uuid: &Guid,
) -> Result<Vec<u8>> {
    let device_table = SUPERBLOCK + SUPERBLOCK_SIZE;
    let (places, length) = place_nodes(nodes, device_table + devices.len() * SLOT, epoch)?;
    let mut image = vec![0; length];
    for (i, (node, place)) in nodes.iter().zip(&places).enumerate() {
        if let Content::Blob = place.content {
            check_blob(node, devices)?;
        }
        write_node(&mut image, node, place).context("writing an inode")?;
        let start = match place.content {
            Content::Blocks(start, _) => start,
            Content::Behind(_) => place.inode + measure_inode(place) + place.attributes.len(),
            Content::None | Content::Blob => continue,
        };
        let content = match node.inode.is_folder() {
            true => encode_folder(i, nodes, &places),
            false => node.target.clone(),
        };
        image[start..start + content.len()].copy_from_slice(&content);
    }
    for (device, slot) in devices.iter().zip(image[device_table..].chunks_exact_mut(SLOT)) {
        let tag = device.uuid.to_string().replace('-', "");
        slot[..tag.len()].copy_from_slice(tag.as_bytes());
        let blocks = u32::try_from(device.length / BLOCK).context("a blob that is too large")?;
        slot[SLOT_BLOCKS..SLOT_BLOCKS + 4].copy_from_slice(&blocks.to_le_bytes());
    }

    let root = u16::try_from(places[0].inode / INODE_UNIT).context("too many blobs")?;
    let count = u16::try_from(devices.len()).context("too many blobs")?;
    let superblock = &mut image[SUPERBLOCK..SUPERBLOCK + SUPERBLOCK_SIZE];
    let mut put = |at: usize, bytes: &[u8]| superblock[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &0xe0f5_e1e2u32.to_le_bytes());
    put(8, &3u32.to_le_bytes()); // has a checksum and times of change
    put(12, &[12]); // blocks of 4096 bytes
    put(14, &root.to_le_bytes());
    put(16, &(nodes.len() as u64).to_le_bytes());
    put(24, &epoch.to_le_bytes());
    put(36, &((length as u64 / BLOCK) as u32).to_le_bytes());
    put(48, uuid.as_bytes());
    put(80, &0xcu32.to_le_bytes()); // needs chunked files and the device table
    put(86, &count.to_le_bytes());
    put(88, &((device_table / SLOT) as u16).to_le_bytes());
    renew_checksum(&mut image);
    Ok(image)
}

/// Write the byte offsets of the blobs, counted from the index's beginning.
pub fn set_addresses(index: &mut [u8], offsets: impl Iterator<Item = u64>) -> Result<()> {
    let slots = index[SUPERBLOCK + SUPERBLOCK_SIZE..].chunks_exact_mut(SLOT);
    for (slot, offset) in slots.zip(offsets) {
        let address = u32::try_from(offset / BLOCK).context("more than erofs can address")?;
        slot[SLOT_ADDRESS..SLOT_ADDRESS + 4].copy_from_slice(&address.to_le_bytes());
    }
    renew_checksum(index);
    Ok(())
}

fn renew_checksum(index: &mut [u8]) {
    let checksum = compute_checksum(index);
    index[CHECKSUM..CHECKSUM + 4].copy_from_slice(&checksum.to_le_bytes());
}

/// Where everything goes, from byte `start` on, and the length of the whole.
fn place_nodes(nodes: &[Node], start: usize, epoch: u64) -> Result<(Vec<Place>, usize)> {
    let block = BLOCK as usize;
    let mut next = start;
    let mut places = Vec::with_capacity(nodes.len());
    for node in nodes {
        let attributes = encode_attributes(&node.attributes)?;
        let inode = &node.inode;
        let is_long = u16::try_from(inode.uid.max(inode.gid).max(node.links)).is_err()
            || u32::try_from(inode.size).is_err()
            || inode.time != epoch;
        let content = if inode.is_folder() {
            match measure_folder(node) {
                length if length <= MAX_INLINE => Content::Behind(length),
                length => Content::Blocks(0, length),
            }
        } else if inode.is_link() {
            Content::Behind(node.target.len())
        } else if inode.is_file() && inode.size > 0 {
            Content::Blob
        } else {
            Content::None
        };
        let mut place = Place { inode: next, is_long, attributes, content };
        let head = measure_inode(&place) + place.attributes.len();
        next = match place.content {
            Content::Behind(length) => {
                // It must not cross a block's end.
                if (place.inode + head) % block + length > block {
                    place.inode = place.inode.next_multiple_of(block);
                    ensure!(head % block + length <= block, "too many extended attributes");
                }
                place.inode + head + length
            }
            Content::Blob => (place.inode + head).next_multiple_of(8) + 8,
            Content::Blocks(..) | Content::None => place.inode + head,
        };
        next = next.next_multiple_of(INODE_UNIT);
        places.push(place);
    }
    for place in &mut places {
        if let Content::Blocks(start, length) = &mut place.content {
            *start = next.next_multiple_of(block);
            next = *start + *length;
        }
    }
    Ok((places, next.next_multiple_of(block)))
}

/// A file's content must lie in its blob.
fn check_blob(node: &Node, devices: &[Device]) -> Result<()> {
    let start = u64::from(node.inode.first_block()?) * BLOCK;
    let end = start.checked_add(node.inode.size);
    let device = devices.get(node.layer).context("a file of no known blob")?;
    ensure!(end.is_some_and(|end| end <= device.length), "a file reaches beyond its blob");
    // The largest chunk that the format knows.
    ensure!(node.inode.size <= BLOCK << 31, "a file of {} bytes", node.inode.size);
    Ok(())
}

fn measure_inode(place: &Place) -> usize {
    if place.is_long { 64 } else { 32 }
}

fn write_node(image: &mut [u8], node: &Node, place: &Place) -> Result<()> {
    let inode = &node.inode;
    let end = place.inode + measure_inode(place);
    let (layout, address) = match place.content {
        Content::None => (PLAIN, inode.device),
        Content::Blocks(start, _) => (PLAIN, (start as u64 / BLOCK) as u32),
        Content::Behind(_) => (INLINE, 0),
        Content::Blob => {
            // One chunk for all of it, as large as the next power of two.
            let bits = inode.size.next_power_of_two().max(BLOCK).ilog2();
            let entry = (end + place.attributes.len()).next_multiple_of(8);
            let device = u16::try_from(node.layer + 1).context("too many blobs")?;
            image[entry + 2..entry + 4].copy_from_slice(&device.to_le_bytes());
            image[entry + 4..entry + 8].copy_from_slice(&inode.first_block()?.to_le_bytes());
            (CHUNKS, INDEXED | (bits - BLOCK.ilog2()))
        }
    };
    let size = match place.content {
        Content::Blocks(_, length) | Content::Behind(length) => length as u64,
        Content::Blob => inode.size,
        Content::None => 0,
    };
    let count = match place.attributes.len() {
        0 => 0,
        length => ((length - 12) / 4 + 1) as u16,
    };
    let raw = &mut image[place.inode..end];
    let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(layout << 1 | u16::from(place.is_long)).to_le_bytes());
    put(2, &count.to_le_bytes());
    put(4, &inode.mode.to_le_bytes());
    put(16, &address.to_le_bytes());
    put(20, &((place.inode / INODE_UNIT) as u32).to_le_bytes());
    if place.is_long {
        put(8, &size.to_le_bytes());
        put(24, &inode.uid.to_le_bytes());
        put(28, &inode.gid.to_le_bytes());
        // A short inode has the time of the superblock.
        put(32, &inode.time.to_le_bytes());
        put(44, &node.links.to_le_bytes());
    } else {
        put(6, &(node.links as u16).to_le_bytes());
        put(8, &(size as u32).to_le_bytes());
        put(24, &(inode.uid as u16).to_le_bytes());
        put(26, &(inode.gid as u16).to_le_bytes());
    }
    image[end..end + place.attributes.len()].copy_from_slice(&place.attributes);
    Ok(())
}

/// Bytes before the attributes, then each; nothing is shared between inodes.
fn encode_attributes(attributes: &[Attribute]) -> Result<Vec<u8>> {
    if attributes.is_empty() {
        return Ok(Vec::new());
    }
    let mut bytes = vec![0; 12];
    for Attribute { kind, name, value } in attributes {
        let name_length = u8::try_from(name.len()).context("an attribute's name is too long")?;
        let value_length = u16::try_from(value.len()).context("an attribute is too long")?;
        bytes.extend([name_length, *kind]);
        bytes.extend(value_length.to_le_bytes());
        bytes.extend(name);
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    ensure!(bytes.len() < 1 << 16, "extended attributes of {} bytes", bytes.len());
    Ok(bytes)
}

/// The names of a folder with `.` and `..`, in the order of their bytes, by blocks.
fn split_folder(node: &Node) -> Vec<Vec<(&[u8], Option<usize>)>> {
    let mut names: Vec<(&[u8], Option<usize>)> = vec![(b".", None), (b"..", None)];
    names.extend(node.children.iter().map(|(name, child)| (name.as_slice(), Some(*child))));
    names.sort();
    let mut blocks = vec![Vec::new()];
    let mut used = 0;
    for (name, child) in names {
        let needed = DIRENT + name.len();
        if used + needed > BLOCK as usize {
            blocks.push(Vec::new());
            used = 0;
        }
        used += needed;
        blocks.last_mut().expect("never empty").push((name, child));
    }
    blocks
}

const DIRENT: usize = 12;

fn measure_folder(node: &Node) -> usize {
    let blocks = split_folder(node);
    let last: usize = blocks[blocks.len() - 1].iter().map(|(name, _)| DIRENT + name.len()).sum();
    (blocks.len() - 1) * BLOCK as usize + last
}

fn encode_folder(this: usize, nodes: &[Node], places: &[Place]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for block in split_folder(&nodes[this]) {
        bytes.resize(bytes.len().next_multiple_of(BLOCK as usize), 0);
        let mut name_at = block.len() * DIRENT;
        for (name, child) in &block {
            let target = match child {
                Some(child) => *child,
                None if *name == b"." => this,
                None => nodes[this].parent,
            };
            bytes.extend(((places[target].inode / INODE_UNIT) as u64).to_le_bytes());
            bytes.extend((name_at as u16).to_le_bytes());
            bytes.extend([describe_type(nodes[target].inode.mode), 0]);
            name_at += name.len();
        }
        bytes.extend(block.iter().flat_map(|(name, _)| name.iter()));
    }
    bytes
}

/// The type in a folder's entry.
fn describe_type(mode: u16) -> u8 {
    match mode >> 12 {
        0o10 => 1,
        0o04 => 2,
        0o02 => 3,
        0o06 => 4,
        0o01 => 5,
        0o14 => 6,
        0o12 => 7,
        _ => 0,
    }
}
