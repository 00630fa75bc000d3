//! The whole disk: ESP, slot A with its verity tree, an empty slot B, and free space in
//! which systemd-repart makes `/var` at the first boot.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::MIB;
use super::erofs::Layout;
use super::esp::{EspFile, write_esp};
use super::gpt::{
    self, BACKUP_SIZE, FLAG_NO_AUTO, FLAG_READ_ONLY, Partition, TYPE_ESP, TYPE_ROOT,
    TYPE_ROOT_VERITY, Table,
};
use super::guid::Guid;
use super::region::Region;
use super::verity::{self, Tree};
use crate::digest::Digest;
use crate::error::UserError;

/// What a disk is assembled from. Sizes are bytes.
#[derive(Debug, Clone, Copy)]
pub struct Plan<'a> {
    /// Size of the disk: a multiple of 1 MiB, like the two below.
    pub disk_size: u64,
    pub esp_size: u64,
    /// Size of each of the two root partitions.
    pub slot_size: u64,
    /// The erofs index and the blobs behind it, as [`super::erofs::make_index`] laid them out.
    pub index: &'a Path,
    pub blobs: &'a [PathBuf],
    pub layout: &'a Layout,
    /// The verity tree over exactly those bytes.
    pub tree: &'a Tree,
    pub esp_files: &'a [EspFile],
    /// Seconds since 1970, for the files on the ESP.
    pub epoch: u64,
}

/// A finished disk.
#[derive(Debug, Clone)]
pub struct Assembled {
    pub root_hash: Digest,
    pub partitions: Vec<Partition>,
    /// Bytes of slot A that are in use, and of its verity partition.
    pub root_size: u64,
    pub tree_size: u64,
    /// Bytes left for `/var`.
    pub free: u64,
}

/// Write the disk as a sparse raw image beside `out` and rename it to `out` when it is
/// whole. The same plan gives the same bytes.
pub fn assemble_disk(plan: &Plan, out: &Path) -> Result<Assembled> {
    let (table, free) = plan_table(plan)?;
    let mut beside = out.as_os_str().to_owned();
    beside.push(format!(".{}.tmp", std::process::id()));
    let beside = PathBuf::from(beside);
    write_disk(plan, &table, &beside)
        .and_then(|()| Ok(fs::rename(&beside, out)?))
        .inspect_err(|_| drop(fs::remove_file(&beside)))
        .with_context(|| format!("writing {}", out.display()))?;
    Ok(Assembled {
        root_hash: plan.tree.root_hash,
        partitions: table.partitions,
        root_size: plan.layout.total,
        tree_size: plan.tree.bytes.len() as u64,
        free,
    })
}

/// Bytes of the verity partition that a slot of so many bytes needs.
pub fn measure_verity_slot(slot_size: u64) -> u64 {
    verity::tree_size(slot_size / verity::BLOCK as u64).next_multiple_of(MIB)
}

/// The partition table, and the bytes that it leaves free.
fn plan_table(plan: &Plan) -> Result<(Table, u64)> {
    check_sizes(plan)?;
    let root_hash = &plan.tree.root_hash;
    let (root, root_verity) = Guid::split_root_hash(root_hash);
    let derive = |name| Guid::derive(root_hash, name);
    let verity_size = measure_verity_slot(plan.slot_size);
    let in_use = FLAG_READ_ONLY;
    let mut start = MIB;
    let partitions: Vec<Partition> = [
        (TYPE_ESP, derive("esp"), "esp", plan.esp_size, 0),
        (TYPE_ROOT, root, "root-a", plan.slot_size, in_use),
        (TYPE_ROOT_VERITY, root_verity, "root-a-verity", verity_size, in_use),
        (TYPE_ROOT, derive("root-b"), "_empty", plan.slot_size, FLAG_NO_AUTO),
        (TYPE_ROOT_VERITY, derive("root-b-verity"), "_empty", verity_size, FLAG_NO_AUTO),
    ]
    .into_iter()
    .map(|(type_guid, guid, label, size, flags)| {
        let place = start;
        start += size;
        Partition { type_guid, guid, label: label.to_string(), start: place, size, flags }
    })
    .collect();
    let room = plan.disk_size.saturating_sub(BACKUP_SIZE);
    let Some(free) = room.checked_sub(start) else {
        let needed = (start + BACKUP_SIZE).div_ceil(MIB);
        return Err(UserError::new(format!(
            "the disk of {} MiB is too small",
            plan.disk_size / MIB
        ))
        .why(format!(
            "the ESP ({} MiB) and two slots ({} MiB each, with {} MiB of hashes) need {needed} MiB",
            plan.esp_size / MIB,
            plan.slot_size / MIB,
            verity_size / MIB
        ))
        .help("make the disk larger, with some gigabytes more for /var, or the slots smaller")
        .into());
    };
    Ok((Table { disk_guid: derive("disk"), partitions }, free))
}

fn check_sizes(plan: &Plan) -> Result<()> {
    for (what, size) in [("disk", plan.disk_size), ("ESP", plan.esp_size), ("slot", plan.slot_size)]
    {
        if size == 0 || !size.is_multiple_of(MIB) || size > 1 << 50 {
            return Err(UserError::new(format!("a {what} of {size} bytes"))
                .why("sizes on a disk are multiples of 1 MiB, up to 1 PiB")
                .into());
        }
    }
    ensure!(
        plan.tree.data_blocks * verity::BLOCK as u64 == plan.layout.total
            && plan.blobs.len() == plan.layout.blobs.len(),
        "the verity tree does not belong to this root"
    );
    if plan.layout.total > plan.slot_size {
        let (root, slot) = (plan.layout.total.div_ceil(MIB), plan.slot_size / MIB);
        return Err(UserError::new(format!("the root does not fit into its slot of {slot} MiB"))
            .why(format!("it has {root} MiB"))
            .help(format!("make the slots at least {root} MiB large, with room for updates"))
            .into());
    }
    Ok(())
}

fn write_disk(plan: &Plan, table: &Table, path: &Path) -> Result<()> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    file.set_len(plan.disk_size)?;
    let disk = Region::whole(&file)?;
    let part = |i: usize| disk.part(table.partitions[i].start, table.partitions[i].size);

    let volume_id = u32::from_le_bytes(take_first(plan.tree.root_hash.as_bytes()));
    write_esp(&part(0)?, plan.esp_files, plan.epoch, volume_id)?;
    let pieces = plan.layout.blobs.iter().zip(plan.blobs);
    let pieces = pieces.map(|((offset, length), path)| (*offset, *length, path.as_path()));
    for (offset, length, path) in
        [(0, plan.layout.index_area, plan.index)].into_iter().chain(pieces)
    {
        let copy = || {
            let from = File::open(path)?;
            let size = from.metadata()?.len();
            ensure!(size == length, "it has {size} bytes instead of {length}");
            part(1)?.write_file_at(offset, &from, length)
        };
        copy().with_context(|| format!("copying {} into the root", path.display()))?;
    }
    part(2)?.write_at(0, &plan.tree.bytes)?;
    gpt::write(table, &file, plan.disk_size)?;
    file.sync_all().context("syncing the disk image")
}

fn take_first(bytes: &[u8; 32]) -> [u8; 4] {
    [bytes[0], bytes[1], bytes[2], bytes[3]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::esp::Content;
    use crate::disk::fat_read::Volume;
    use std::os::unix::fs::FileExt;

    struct Parts {
        folder: tempfile::TempDir,
        index: PathBuf,
        blobs: Vec<PathBuf>,
        layout: Layout,
        tree: Tree,
        esp_files: Vec<EspFile>,
    }

    fn make_parts() -> Parts {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let (index, blobs) = (path("index"), vec![path("a"), path("b")]);
        File::create(&index).unwrap().set_len(MIB).unwrap();
        fs::write(&blobs[0], [b'a'; 4096]).unwrap();
        fs::write(&blobs[1], [b'b'; 8192]).unwrap();
        let layout = Layout {
            index_area: MIB,
            blobs: vec![(MIB, 4096), (MIB + 4096, 8192)],
            total: MIB + 12288,
        };
        let mut leaves = Vec::new();
        for file in [&index, &blobs[0], &blobs[1]] {
            let file = File::open(file).unwrap();
            let blocks = file.metadata().unwrap().len() / 4096;
            leaves.extend(verity::hash_leaves(&file, 0, blocks, 1).unwrap());
        }
        let tree = verity::build_tree(&leaves, &Guid::default()).unwrap();
        let esp_files =
            vec![EspFile { path: "EFI/x.efi".into(), content: Content::Bytes(b"efi".into()) }];
        Parts { folder, index, blobs, layout, tree, esp_files }
    }

    fn make_plan(parts: &Parts) -> Plan<'_> {
        Plan {
            disk_size: 128 * MIB,
            esp_size: 40 * MIB,
            slot_size: 20 * MIB,
            index: &parts.index,
            blobs: &parts.blobs,
            layout: &parts.layout,
            tree: &parts.tree,
            esp_files: &parts.esp_files,
            epoch: 1_700_000_000,
        }
    }

    #[test]
    fn every_partition_holds_what_belongs_into_it() {
        let parts = make_parts();
        let out = parts.folder.path().join("db.raw");
        let made = assemble_disk(&make_plan(&parts), &out).unwrap();
        let file = File::open(&out).unwrap();
        let disk = Region::whole(&file).unwrap();
        let table = gpt::read(&disk).unwrap();
        assert_eq!(table.partitions, made.partitions);
        let labels: Vec<_> = table.partitions.iter().map(|p| p.label.as_str()).collect();
        assert_eq!(labels, ["esp", "root-a", "root-a-verity", "_empty", "_empty"]);
        let part =
            |i: usize| disk.part(table.partitions[i].start, table.partitions[i].size).unwrap();
        let volume = Volume::open(part(0)).unwrap();
        assert_eq!(volume.read(&volume.find("EFI/x.efi").unwrap().unwrap(), 0..3).unwrap(), b"efi");
        let root = table.partitions[1].start;
        let blocks = parts.layout.total / 4096;
        let leaves = verity::hash_leaves(&file, root, blocks, 2).unwrap();
        let tree = verity::build_tree(&leaves, &Guid::default()).unwrap();
        assert_eq!(tree, parts.tree);
        assert_eq!(part(2).read_at(0, tree.bytes.len()).unwrap(), tree.bytes);
        let guids = (table.partitions[1].guid, table.partitions[2].guid);
        assert_eq!(guids, Guid::split_root_hash(&tree.root_hash));
        let kept = fs::read_dir(parts.folder.path()).unwrap().count();
        assert_eq!(kept, 4, "only the inputs and the disk are left");
    }

    #[test]
    fn the_same_plan_gives_the_same_bytes() {
        let parts = make_parts();
        let [a, b] = ["a.raw", "b.raw"].map(|name| parts.folder.path().join(name));
        assemble_disk(&make_plan(&parts), &a).unwrap();
        assemble_disk(&make_plan(&parts), &b).unwrap();
        assert_eq!(Digest::of_file(&a).unwrap(), Digest::of_file(&b).unwrap());
    }

    #[test]
    fn what_does_not_fit_is_told_with_numbers() {
        let parts = make_parts();
        let plan = make_plan(&parts);
        let out = parts.folder.path().join("db.raw");
        let fail = |plan: Plan| {
            let error = assemble_disk(&plan, &out).unwrap_err();
            assert!(crate::error::exit_code(&error) == 2 && !out.exists());
            format!("{error:#}")
        };
        let text = fail(Plan { slot_size: MIB, ..plan });
        assert!(text.contains("slot of 1 MiB") && text.contains("it has 2 MiB"), "{text}");
        let text = fail(Plan { disk_size: 83 * MIB, ..plan });
        assert!(text.contains("need 84 MiB"), "{text}");
        let text = fail(Plan { esp_size: 10 * MIB, ..plan });
        assert!(text.contains("ESP of 10 MiB"), "{text}");
        fail(Plan { disk_size: 128 * MIB + 1, ..plan });
        assemble_disk(&Plan { disk_size: 84 * MIB, ..plan }, &out).unwrap();
    }

    #[test]
    fn a_blob_that_has_changed_since_is_not_copied() {
        let parts = make_parts();
        File::options().write(true).open(&parts.blobs[0]).unwrap().write_at(b"x", 4096).unwrap();
        let out = parts.folder.path().join("db.raw");
        let error = assemble_disk(&make_plan(&parts), &out).unwrap_err();
        assert!(format!("{error:#}").contains("4097 bytes instead of 4096"), "{error:#}");
        assert_eq!(fs::read_dir(parts.folder.path()).unwrap().count(), 3, "nothing is left");
    }
}
