//! dm-verity hash trees: format version 1, SHA-256, blocks of 4096 bytes, no salt.
//!
//! Sources: the kernel's Documentation/admin-guide/device-mapper/verity.rst and
//! cryptsetup's on-disk format of the verity superblock (lib/verity/verity.c). The bytes
//! are those of `veritysetup format --salt=- --uuid=UUID`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use super::guid::Guid;
use super::region::find_data;
use crate::digest::Digest;

/// Bytes in a data block and in a hash block.
pub const BLOCK: usize = 4096;
/// Bytes in a digest; this many fit 128 times into a hash block.
pub const HASH: usize = 32;
const FANOUT: u64 = (BLOCK / HASH) as u64;
/// Blocks that a thread takes at a time: 1 MiB.
const CHUNK: usize = 256;

/// The digest of one data block.
pub type Leaf = [u8; HASH];

/// What goes into a verity partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// The superblock, padded to one block, then the levels, the topmost first.
    pub bytes: Vec<u8>,
    pub root_hash: Digest,
    /// The number of data blocks that the tree covers.
    pub data_blocks: u64,
}

/// What the superblock of a verity partition says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    pub uuid: Guid,
    pub data_blocks: u64,
}

/// Digests of `blocks` blocks of `file` from byte `offset`, by `threads` threads. Holes
/// are not read: every block in them has the same digest. Cacheable: the leaves of a
/// blob are the same wherever it lies. Moves the file's position.
pub fn hash_leaves(file: &File, offset: u64, blocks: u64, threads: usize) -> Result<Vec<Leaf>> {
    let size = blocks.checked_mul(BLOCK as u64).and_then(|size| size.checked_add(offset));
    let length = file.metadata().context("asking for the length of a file")?.len();
    ensure!(size.is_some_and(|end| end <= length), "{blocks} blocks at {offset} are not there");
    let zero_leaf: Leaf = Sha256::digest([0; BLOCK]).into();
    let mut leaves = vec![zero_leaf; blocks as usize];
    let work = Mutex::new(leaves.chunks_mut(CHUNK).enumerate());
    std::thread::scope(|scope| {
        let hash = || -> Result<()> {
            let mut buffer = vec![0; CHUNK * BLOCK];
            loop {
                let next = work.lock().expect("no panic while held").next();
                let Some((i, chunk)) = next else { return Ok(()) };
                let start = offset + (i * CHUNK * BLOCK) as u64;
                hash_chunk(file, start, chunk, &mut buffer)?;
            }
        };
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(hash)).collect();
        hash()?;
        others.into_iter().try_for_each(|other| other.join().expect("hashing does not panic"))
    })?;
    Ok(leaves)
}

/// Fill in the leaves of those blocks that are not wholly in a hole.
fn hash_chunk(file: &File, start: u64, leaves: &mut [Leaf], buffer: &mut [u8]) -> Result<()> {
    let end = start + (leaves.len() * BLOCK) as u64;
    let Some((data, _)) = find_data(file, start, end)? else { return Ok(()) };
    let skipped = ((data - start) as usize) / BLOCK;
    let buffer = &mut buffer[..(leaves.len() - skipped) * BLOCK];
    file.read_exact_at(buffer, start + (skipped * BLOCK) as u64).context("reading data blocks")?;
    for (leaf, block) in leaves[skipped..].iter_mut().zip(buffer.chunks_exact(BLOCK)) {
        *leaf = Sha256::digest(block).into();
    }
    Ok(())
}

/// The tree over the digests of all data blocks, in their order.
pub fn build_tree(leaves: &[Leaf], uuid: &Guid) -> Result<Tree> {
    ensure!(!leaves.is_empty(), "dm-verity cannot cover an empty partition");
    let data_blocks = leaves.len() as u64;
    let mut levels: Vec<Vec<u8>> = Vec::new();
    let mut hashes: Vec<Leaf> = leaves.to_vec();
    while hashes.len() > 1 {
        let mut level = hashes.concat();
        level.resize(level.len().next_multiple_of(BLOCK), 0);
        hashes = level.chunks_exact(BLOCK).map(|block| Sha256::digest(block).into()).collect();
        levels.push(level);
    }
    let mut bytes = encode_superblock(uuid, data_blocks);
    for level in levels.iter().rev() {
        bytes.extend_from_slice(level);
    }
    debug_assert_eq!(bytes.len() as u64, tree_size(data_blocks));
    Ok(Tree { bytes, root_hash: Digest::from_bytes(hashes[0]), data_blocks })
}

/// The root hash of the tree over a whole file, which ends with a block: the "Root hash" of
/// `veritysetup format --salt=- FILE TREE`. Holes and what lies over them cost nothing.
pub fn hash_file(file: &File, threads: usize) -> Result<Digest> {
    let length = file.metadata().context("asking for the length of a file")?.len();
    ensure!(length > 0 && length.is_multiple_of(BLOCK as u64), "a file of {length} bytes");
    let mut hashes = hash_leaves(file, 0, length / BLOCK as u64, threads)?;
    let mut empty: Leaf = Sha256::digest([0; BLOCK]).into();
    while hashes.len() > 1 {
        let below = empty;
        empty = Sha256::digest(below.repeat(FANOUT as usize)).into();
        hashes = hashes
            .chunks(FANOUT as usize)
            .map(|block| {
                if block.len() == FANOUT as usize && block.iter().all(|hash| *hash == below) {
                    return empty;
                }
                let mut block = block.concat();
                block.resize(BLOCK, 0);
                Sha256::digest(&block).into()
            })
            .collect();
    }
    Ok(Digest::from_bytes(hashes[0]))
}

/// Bytes of the tree over so many data blocks, superblock included.
pub fn tree_size(data_blocks: u64) -> u64 {
    let mut blocks = 1;
    let mut level = data_blocks;
    while level > 1 {
        level = level.div_ceil(FANOUT);
        blocks += level;
    }
    blocks * BLOCK as u64
}

/// The root hash that a verity partition's own first two blocks stand for: the digest of
/// the topmost hash block. `head` holds at least those two blocks. A tree over one data
/// block has no hash block, and then it cannot be told.
pub fn compute_root_hash(head: &[u8]) -> Result<Digest> {
    let superblock = read_superblock(head)?;
    ensure!(superblock.data_blocks > 1, "a tree over one block does not hold its root hash");
    let top = head.get(BLOCK..2 * BLOCK).context("the verity partition is too short")?;
    Ok(Digest::of(top))
}

fn encode_superblock(uuid: &Guid, data_blocks: u64) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    block[..8].copy_from_slice(b"verity\0\0");
    block[8..12].copy_from_slice(&1u32.to_le_bytes()); // superblock version
    block[12..16].copy_from_slice(&1u32.to_le_bytes()); // hash type: salt before data
    block[16..32].copy_from_slice(uuid.as_bytes());
    block[32..38].copy_from_slice(b"sha256");
    block[64..68].copy_from_slice(&(BLOCK as u32).to_le_bytes());
    block[68..72].copy_from_slice(&(BLOCK as u32).to_le_bytes());
    block[72..80].copy_from_slice(&data_blocks.to_le_bytes());
    block
}

/// Read a superblock of the kind that [`build_tree`] makes; every other kind is an error.
pub fn read_superblock(bytes: &[u8]) -> Result<Superblock> {
    let Some(block) = bytes.get(..512) else { bail!("too short for a verity superblock") };
    ensure!(&block[..8] == b"verity\0\0", "no verity superblock");
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&block[16..32]);
    let mut count = [0; 8];
    count.copy_from_slice(&block[72..80]);
    let superblock =
        Superblock { uuid: Guid::from_bytes(uuid), data_blocks: u64::from_le_bytes(count) };
    let expected = encode_superblock(&superblock.uuid, superblock.data_blocks);
    ensure!(block == &expected[..512], "a verity superblock of an unusual kind");
    ensure!(superblock.data_blocks > 0, "a verity superblock over no blocks");
    Ok(superblock)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The root hash straight from the definition: a recursion over block numbers.
    fn hash_naively(leaves: &[Leaf]) -> Leaf {
        let mut height = 0;
        while 128usize.pow(height) < leaves.len() {
            height += 1;
        }
        fn node(leaves: &[Leaf], height: u32) -> Leaf {
            if height == 0 {
                return leaves[0];
            }
            let mut block = Vec::new();
            for child in leaves.chunks(128usize.pow(height - 1)) {
                block.extend(node(child, height - 1));
            }
            block.resize(BLOCK, 0);
            Sha256::digest(&block).into()
        }
        node(leaves, height)
    }

    fn make_leaves(count: usize) -> Vec<Leaf> {
        (0..count).map(|i| Sha256::digest(i.to_le_bytes()).into()).collect()
    }

    #[test]
    fn the_root_hash_is_right_where_levels_begin_and_end() {
        for count in [1, 2, 127, 128, 129, 128 * 128, 128 * 128 + 1] {
            let leaves = make_leaves(count);
            let tree = build_tree(&leaves, &Guid::default()).unwrap();
            assert_eq!(tree.root_hash.as_bytes(), &hash_naively(&leaves), "{count}");
            assert_eq!(tree.bytes.len() as u64, tree_size(count as u64), "{count}");
            if count > 1 {
                assert_eq!(compute_root_hash(&tree.bytes).unwrap(), tree.root_hash);
            }
        }
        assert!(build_tree(&[], &Guid::default()).is_err());
    }

    #[test]
    fn holes_short_files_and_threads_make_no_difference() {
        let blocks = 2 * CHUNK as u64 + 3;
        let file = tempfile::tempfile().unwrap();
        file.set_len((blocks + 1) * BLOCK as u64).unwrap();
        let mut bytes = vec![0; ((blocks + 1) as usize) * BLOCK];
        for (at, text) in [(5 * BLOCK + 7, "early"), ((CHUNK + 100) * BLOCK, "late")] {
            bytes[at..at + text.len()].copy_from_slice(text.as_bytes());
            file.write_all_at(text.as_bytes(), at as u64).unwrap();
        }
        let expected: Vec<Leaf> =
            bytes[BLOCK..].chunks(BLOCK).map(|block| Sha256::digest(block).into()).collect();
        for threads in [1, 2, 5] {
            assert_eq!(hash_leaves(&file, BLOCK as u64, blocks, threads).unwrap(), expected);
        }
        assert!(hash_leaves(&file, BLOCK as u64, blocks + 1, 2).is_err());
        assert!(hash_leaves(&file, 1, u64::MAX, 2).is_err());
        assert_eq!(hash_leaves(&file, 0, 0, 2).unwrap(), Vec::<Leaf>::new());
    }

    #[test]
    fn a_file_hashes_as_the_tree_over_its_leaves() {
        let file = tempfile::tempfile().unwrap();
        assert!(hash_file(&file, 1).is_err());
        for (blocks, data) in [(1, 0), (130, 3), (128 * 129, 5), (128 * 300 + 7, 128 * 300 + 6)] {
            file.set_len(0).unwrap();
            file.set_len(blocks * BLOCK as u64).unwrap();
            file.write_all_at(b"data", data * BLOCK as u64).unwrap();
            let leaves = hash_leaves(&file, 0, blocks, 2).unwrap();
            let tree = build_tree(&leaves, &Guid::default()).unwrap();
            assert_eq!(hash_file(&file, 2).unwrap(), tree.root_hash, "{blocks}");
        }
        file.set_len(4097).unwrap();
        assert!(hash_file(&file, 1).is_err());
    }

    proptest! {
        #[test]
        fn any_number_of_leaves_hashes_as_the_definition_says(count in 1usize..2000) {
            let leaves = make_leaves(count);
            let tree = build_tree(&leaves, &Guid::default()).unwrap();
            prop_assert_eq!(tree.root_hash.as_bytes(), &hash_naively(&leaves));
        }

        #[test]
        fn a_superblock_survives_and_a_damaged_one_is_refused(
            uuid: [u8; 16], blocks in 1u64.., at in 32usize..72, bit in 0u8..8,
        ) {
            let uuid = Guid::from_bytes(uuid);
            let mut bytes = encode_superblock(&uuid, blocks);
            let expected = Superblock { uuid, data_blocks: blocks };
            prop_assert_eq!(read_superblock(&bytes).unwrap(), expected);
            bytes[at] ^= 1 << bit;
            prop_assert!(read_superblock(&bytes).is_err());
        }
    }
}
