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

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::MIB;
use super::erofs_merge::merge_layers;
use super::erofs_read::{BLOCK, Erofs};
use super::erofs_write::{Device, encode_index, set_addresses};
use super::guid::Guid;
use super::region::Region;
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
/// that has a folder gives its owner and mode. Files keep their times: Python's bytecode is
/// valid only for the time of its source.
pub fn make_blob(tools: &Tools, tar: &Path, out: &Path, epoch: u64, uuid: &Guid) -> Result<()> {
    // The program keeps file data in $TMPDIR for a while, and /tmp may be small. It also
    // reads SOURCE_DATE_EPOCH: nothing around us may change the result.
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty());
    tools
        .command("mkfs.erofs")?
        .clear_env()
        .env("LC_ALL", "C.UTF-8")
        .env("TMPDIR", folder.unwrap_or(Path::new(".")))
        .args(["--quiet", "-b4096", "-Enoinline_data", "--tar=f", "--aufs"])
        .args([format!("-T{epoch}"), "--mkfs-time".to_string(), format!("-U{uuid}")])
        .arg(out)
        .arg(tar)
        .run()
        .map(drop)
        .with_context(|| format!("making an erofs of {}", tar.display()))
}

/// Merge the blobs, later layers over earlier ones, into an index at `out`, a sparse file
/// as long as its area. With the blobs behind it, as the layout says, it is the root.
pub fn make_index(blobs: &[PathBuf], out: &Path, epoch: u64, uuid: &Guid) -> Result<Layout> {
    let mut files = Vec::new();
    for blob in blobs {
        let file = File::open(blob).with_context(|| format!("opening {}", blob.display()))?;
        files.push(file);
    }
    let mut layers = Vec::new();
    let mut devices = Vec::new();
    for (file, path) in files.iter().zip(blobs) {
        let region = Region::whole(file)?;
        let length = region.length();
        let erofs = Erofs::open(region).with_context(|| format!("reading {}", path.display()))?;
        devices.push(Device { uuid: erofs.superblock().uuid, length });
        layers.push(erofs);
    }
    let nodes = merge_layers(&layers).context("merging the layers")?;
    let mut index = encode_index(&nodes, &devices, epoch, uuid).context("writing the index")?;
    let lengths: Vec<u64> = devices.iter().map(|device| device.length).collect();
    let layout = plan_layout(index.len() as u64, &lengths)?;
    set_addresses(&mut index, layout.blobs.iter().map(|(offset, _)| *offset))?;
    let write = || -> std::io::Result<()> {
        let file = File::create(out)?;
        file.write_all_at(&index, 0)?;
        file.set_len(layout.index_area)
    };
    write().with_context(|| format!("writing {}", out.display()))?;
    Ok(layout)
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
