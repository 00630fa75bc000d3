//! The root file system: one uncompressed erofs per layer (a blob), and a small erofs with
//! the merged tree (the index) that points into the blobs behind it.
//!
//! ```text
//! | index, padded to its area | blob 1 | blob 2 | ... |
//! ```
//!
//! The kernel takes an image with a device table but without `device=` options as flat:
//! a blob's data is at its address in the table (Linux 6.4 and later, erofs_map_dev).
//! The index's area has a fixed size, so that blobs keep their places when it grows.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::MIB;
use super::erofs_read::{
    BLOCK, CHECKSUM, SLOT, SLOT_ADDRESS, SLOT_BLOCKS, compute_checksum, read_superblock, take_u16,
    take_u32,
};
use super::guid::Guid;
use crate::command::Command;
use crate::tools::Tools;

/// The index's area unless the index is larger; then the next power of two.
pub const INDEX_AREA: u64 = 16 * MIB;

/// Where index and blobs lie in the root partition, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The index, padded with zeros, takes the bytes from 0 to here.
    pub index_area: u64,
    /// Offset and length of each blob, in the order of the layers; multiples of 4096.
    pub blobs: Vec<(u64, u64)>,
    pub total: u64,
}

/// Make a layer's blob from its tar. The tar is an OCI layer: `.wh.NAME` removes, and
/// `.wh..wh..opq` empties what lower layers have; `SCHILY.xattr.` records are extended
/// attributes; it holds every parent folder of what it holds, because the topmost layer
/// that has a folder gives its owner and mode. All times become `epoch`.
pub fn make_blob(tools: &Tools, tar: &Path, out: &Path, epoch: u64, uuid: &Guid) -> Result<()> {
    make_command(tools, out, epoch, uuid)?
        .args(["--tar=f", "--aufs", "-Enoinline_data"])
        .arg(out)
        .arg(tar)
        .run()
        .map(drop)
        .with_context(|| format!("making an erofs of {}", tar.display()))
}

/// Merge the blobs, later layers over earlier ones, into an index at `out`, a sparse file
/// as long as its area. With the blobs behind it, as the layout says, it is the root.
pub fn make_index(
    tools: &Tools,
    blobs: &[PathBuf],
    out: &Path,
    epoch: u64,
    uuid: &Guid,
) -> Result<Layout> {
    make_command(tools, out, epoch, uuid)?
        .arg("--ovlfs-strip=1")
        .arg(out)
        .args(blobs)
        .run()
        .context("merging the layers' blobs")?;
    let mut index = fs::read(out).with_context(|| format!("reading {}", out.display()))?;
    let lengths = blobs
        .iter()
        .map(|blob| blob.metadata().map(|metadata| metadata.len()))
        .collect::<std::io::Result<Vec<u64>>>()
        .context("looking at the layers' blobs")?;
    let layout = plan_layout(index.len() as u64, &lengths)?;
    place_blobs(&mut index, &layout)?;
    secure_root(&mut index)?;
    let write = || -> std::io::Result<()> {
        let file = File::options().write(true).open(out)?;
        file.write_all_at(&index, 0)?;
        file.set_len(layout.index_area)
    };
    write().with_context(|| format!("writing {}", out.display()))?;
    Ok(layout)
}

fn make_command(tools: &Tools, out: &Path, epoch: u64, uuid: &Guid) -> Result<Command> {
    // The program keeps file data in $TMPDIR for a while; /tmp may be small. It also reads
    // SOURCE_DATE_EPOCH, and nothing around us may change the result.
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty());
    Ok(tools
        .command("mkfs.erofs")?
        .clear_env()
        .env("LC_ALL", "C.UTF-8")
        .env("TMPDIR", folder.unwrap_or(Path::new(".")))
        .args(["--quiet".to_string(), format!("-T{epoch}"), format!("-U{uuid}")]))
}

fn plan_layout(index: u64, blobs: &[u64]) -> Result<Layout> {
    let index_area = index.next_power_of_two().max(INDEX_AREA);
    let mut total = index_area;
    let mut places = Vec::new();
    for length in blobs {
        ensure!(
            *length > 0 && length.is_multiple_of(BLOCK),
            "a blob of {length} bytes ends inside a block"
        );
        places.push((total, *length));
        total += length;
    }
    Ok(Layout { index_area, blobs: places, total })
}

/// Write the blobs' addresses into the index's device table, then its checksum.
fn place_blobs(index: &mut [u8], layout: &Layout) -> Result<()> {
    let superblock = read_superblock(index).context("reading the index")?;
    let table = superblock.device_table as usize;
    ensure!(
        usize::from(superblock.devices) == layout.blobs.len()
            && table + layout.blobs.len() * SLOT <= index.len(),
        "the index knows {} blobs of {}",
        superblock.devices,
        layout.blobs.len()
    );
    let slots = index[table..].chunks_exact_mut(SLOT);
    for (slot, (offset, length)) in slots.zip(&layout.blobs) {
        let used = u64::from(take_u32(slot, SLOT_BLOCKS)) * BLOCK;
        ensure!(used <= *length, "a blob of {length} bytes ends before its {used} bytes of data");
        let address = u32::try_from(offset / BLOCK).context("more than erofs can address")?;
        slot[SLOT_ADDRESS..SLOT_ADDRESS + 4].copy_from_slice(&address.to_le_bytes());
    }
    renew_checksum(index);
    Ok(())
}

/// The program gives a merged tree's root folder the mode 0777 (erofs_rebuild_make_root of
/// erofs-utils 1.8): everybody could write to `/`. Make it 0755; its owner is root.
fn secure_root(index: &mut [u8]) -> Result<()> {
    let superblock = read_superblock(index)?;
    let inode = u64::from(superblock.inodes) * BLOCK + superblock.root * 32;
    let mode = inode as usize + 4;
    ensure!(mode + 2 <= index.len(), "the index has no root folder");
    ensure!(take_u16(index, mode) & 0o170_000 == 0o040_000, "the index has no root folder");
    index[mode..mode + 2].copy_from_slice(&0o040_755u16.to_le_bytes());
    renew_checksum(index);
    Ok(())
}

fn renew_checksum(index: &mut [u8]) {
    let checksum = compute_checksum(index);
    index[CHECKSUM..CHECKSUM + 4].copy_from_slice(&checksum.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_area_grows_in_powers_of_two_and_blobs_follow_it() {
        let layout = plan_layout(5 * MIB, &[BLOCK, 3 * BLOCK]).unwrap();
        assert_eq!(layout.index_area, 16 * MIB);
        assert_eq!(layout.blobs, [(16 * MIB, BLOCK), (16 * MIB + BLOCK, 3 * BLOCK)]);
        assert_eq!(layout.total, 16 * MIB + 4 * BLOCK);
        assert_eq!(plan_layout(16 * MIB, &[]).unwrap().index_area, 16 * MIB);
        assert_eq!(plan_layout(16 * MIB + 1, &[]).unwrap().index_area, 32 * MIB);
        assert!(plan_layout(1, &[100]).is_err());
    }
}
