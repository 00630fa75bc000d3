//! What is in a finished image, read without mounting anything.
//!
//! An image may come from anywhere: every part is read by a reader that trusts nothing,
//! and what is wrong becomes a line among the report's problems.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::raw_image::{RawImage, Unpacker, explain_unreadable};
use crate::digest::Digest;
use crate::disk::MIB;
use crate::disk::erofs_read::Erofs;
use crate::disk::fat_read::{Entry, Volume};
use crate::disk::gpt::{self, Partition};
use crate::disk::guid::Guid;
use crate::disk::region::Region;
use crate::disk::{uki, verity};

/// Where the builder leaves the image's manifest in the root.
pub const MANIFEST: &str = "usr/share/stanchion/manifest.json";

const MAX_TEXT: u64 = 1 << 20;
const MAX_MANIFEST: u64 = 64 << 20;
const KERNELS: &str = "EFI/Linux";

#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// `raw` or `qcow2`.
    pub format: &'static str,
    /// Bytes of the disk.
    pub size: u64,
    pub disk_guid: Guid,
    pub partitions: Vec<PartitionReport>,
    pub kernels: Vec<KernelReport>,
    pub slots: Vec<SlotReport>,
    /// The manifest in the first slot's root, as it is written there.
    pub manifest: Option<serde_json::Value>,
    /// What does not fit together; empty for a sound image.
    pub problems: Vec<String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct PartitionReport {
    pub label: String,
    /// The name of the type, or its GUID.
    pub kind: String,
    pub guid: Guid,
    /// Bytes.
    pub start: u64,
    pub size: u64,
    pub flags: Vec<&'static str>,
}

/// A unified kernel image on the ESP.
#[derive(Debug, Clone, Serialize)]
pub struct KernelReport {
    pub file: String,
    pub size: u64,
    /// From its os-release.
    pub image: Option<String>,
    pub version: Option<String>,
    pub uname: Option<String>,
    pub cmdline: String,
    pub root_hash: Option<Digest>,
}

/// A root partition and its hashes.
#[derive(Debug, Clone, Serialize)]
pub struct SlotReport {
    pub label: String,
    /// Computed from the topmost block of the hashes.
    pub root_hash: Digest,
    pub uuid: Guid,
    /// Where its root partition starts, in bytes.
    pub start: u64,
    /// Bytes that the hashes cover.
    pub covered: u64,
    /// The kernels that boot it.
    pub kernels: Vec<String>,
}

/// Read an image. A qcow2 image needs an unpacker.
///
/// # Errors
/// A [`UserError`](crate::error::UserError) for what is no image at all; what is wrong in one
/// is in the report.
pub fn inspect(path: &Path, unpacker: Option<Unpacker>) -> Result<Report> {
    inspect_open(path, &RawImage::open(path, unpacker)?)
}

/// As [`inspect`], for an image that is open; `path` names it in errors.
pub fn inspect_open(path: &Path, image: &RawImage) -> Result<Report> {
    inspect_raw(&image.file, image.format).map_err(|error| explain_unreadable(path, &error).into())
}

fn inspect_raw(file: &File, format: &'static str) -> Result<Report> {
    let disk = Region::whole(file)?;
    let table = gpt::read(&disk).context("reading the partition table")?;
    let mut report = Report {
        format,
        size: disk.length(),
        disk_guid: table.disk_guid,
        partitions: table.partitions.iter().map(describe_partition).collect(),
        kernels: Vec::new(),
        slots: Vec::new(),
        manifest: None,
        problems: Vec::new(),
    };
    let part = |partition: &Partition| disk.part(partition.start, partition.size);
    let mut problems = Vec::new();
    match table.partitions.iter().find(|partition| partition.type_guid == gpt::TYPE_ESP) {
        None => problems.push("there is no ESP".to_string()),
        Some(esp) => match part(esp).and_then(|esp| read_kernels(esp, &mut problems)) {
            Ok(kernels) => report.kernels = kernels,
            Err(error) => problems.push(format!("the ESP cannot be read: {error:#}")),
        },
    }
    let is_used = |partition: &&Partition| partition.flags & gpt::FLAG_NO_AUTO == 0;
    let of_type =
        |guid: Guid| table.partitions.iter().filter(is_used).filter(move |p| p.type_guid == guid);
    for hashes in of_type(gpt::TYPE_ROOT_VERITY) {
        let root =
            of_type(gpt::TYPE_ROOT).find(|root| format!("{}-verity", root.label) == hashes.label);
        let Some(root) = root else {
            problems.push(format!("{} has no root partition", hashes.label));
            continue;
        };
        let slot = part(hashes).and_then(|tree| read_slot(&tree, root, hashes, &report.kernels));
        match slot {
            Ok((slot, found)) => {
                problems.extend(found);
                if report.manifest.is_none() {
                    match part(root).and_then(|root| read_manifest(root, slot.covered)) {
                        Ok(manifest) => report.manifest = manifest,
                        Err(error) => problems.push(format!("{}: {error:#}", root.label)),
                    }
                }
                report.slots.push(slot);
            }
            Err(error) => problems.push(format!("{}: {error:#}", hashes.label)),
        }
    }
    for kernel in &report.kernels {
        let Some(hash) = kernel.root_hash else {
            problems.push(format!("{} names no root hash", kernel.file));
            continue;
        };
        if report.slots.iter().all(|slot| slot.root_hash != hash) {
            problems.push(format!("{} boots a root that is not here: {hash}", kernel.file));
        }
    }
    report.problems = problems;
    Ok(report)
}

fn describe_partition(partition: &Partition) -> PartitionReport {
    let kind = match partition.type_guid {
        gpt::TYPE_ESP => "ESP".to_string(),
        gpt::TYPE_ROOT => "root".to_string(),
        gpt::TYPE_ROOT_VERITY => "root-verity".to_string(),
        gpt::TYPE_VAR => "var".to_string(),
        other => other.to_string(),
    };
    let names = [
        (gpt::FLAG_READ_ONLY, "read-only"),
        (gpt::FLAG_NO_AUTO, "no-auto"),
        (gpt::FLAG_GROW, "grow"),
    ];
    let flags = names.iter().filter(|(flag, _)| partition.flags & flag != 0);
    PartitionReport {
        label: partition.label.clone(),
        kind,
        guid: partition.guid,
        start: partition.start,
        size: partition.size,
        flags: flags.map(|(_, name)| *name).collect(),
    }
}

fn read_kernels(esp: Region, problems: &mut Vec<String>) -> Result<Vec<KernelReport>> {
    let volume = Volume::open(esp)?;
    let Some(folder) = volume.find(KERNELS)?.filter(|entry| entry.is_folder) else {
        problems.push(format!("the ESP has no folder {KERNELS}"));
        return Ok(Vec::new());
    };
    let mut kernels = Vec::new();
    for entry in volume.list(Some(&folder))? {
        if entry.name.to_lowercase().ends_with(".efi") && !entry.is_folder {
            match read_kernel(&volume, &entry) {
                Ok(kernel) => kernels.push(kernel),
                Err(error) => problems.push(format!("{KERNELS}/{}: {error:#}", entry.name)),
            }
        }
    }
    if kernels.is_empty() {
        problems.push("the ESP has no kernel".to_string());
    }
    Ok(kernels)
}

fn read_kernel(volume: &Volume, entry: &Entry) -> Result<KernelReport> {
    let head = volume.read(entry, 0..entry.size.min(uki::MAX_HEADERS as u64))?;
    let sections = uki::read_sections(&head, entry.size)?;
    let read_text = |name: &str| -> Result<Option<String>> {
        let Some(range) = sections.get(name) else { return Ok(None) };
        ensure!(range.end - range.start <= MAX_TEXT, "section {name} is too large");
        let bytes = volume.read(entry, range.clone())?;
        Ok(Some(String::from_utf8_lossy(&bytes).trim_end_matches(['\0', '\n', ' ']).to_string()))
    };
    let os_release = parse_os_release(&read_text(".osrel")?.unwrap_or_default());
    let cmdline = read_text(".cmdline")?.unwrap_or_default();
    let root_hash = cmdline.split_whitespace().find_map(|word| word.strip_prefix("roothash="));
    Ok(KernelReport {
        file: format!("{KERNELS}/{}", entry.name),
        size: entry.size,
        image: os_release.get("IMAGE_ID").cloned(),
        version: os_release.get("IMAGE_VERSION").cloned(),
        uname: read_text(".uname")?,
        root_hash: root_hash.and_then(|text| text.parse().ok()),
        cmdline,
    })
}

/// Names and values of an os-release, without quotes (os-release(5); values with escapes,
/// which IMAGE_ID and IMAGE_VERSION cannot have, come as they are written).
fn parse_os_release(text: &str) -> BTreeMap<String, String> {
    let pairs = text.lines().filter_map(|line| line.trim().split_once('='));
    pairs
        .filter(|(name, _)| !name.starts_with('#'))
        .map(|(name, value)| (name.to_string(), value.trim_matches(['"', '\'']).to_string()))
        .collect()
}

fn read_slot(
    tree: &Region,
    root: &Partition,
    hashes: &Partition,
    kernels: &[KernelReport],
) -> Result<(SlotReport, Vec<String>)> {
    let head = tree.read_at(0, 2 * verity::BLOCK)?;
    let superblock = verity::read_superblock(&head)?;
    let root_hash = verity::compute_root_hash(&head)?;
    let mut problems = Vec::new();
    let (first, last) = Guid::split_root_hash(&root_hash);
    for (partition, expected) in [(root, first), (hashes, last)] {
        if partition.guid != expected {
            problems.push(format!("{} should have the GUID {expected}", partition.label));
        }
    }
    let covered = superblock.data_blocks.checked_mul(verity::BLOCK as u64);
    let covered = covered.filter(|covered| {
        *covered <= root.size && verity::tree_size(superblock.data_blocks) <= hashes.size
    });
    let covered = covered.context("the hashes cover more than the partition")?;
    let boots = kernels.iter().filter(|kernel| kernel.root_hash == Some(root_hash));
    let slot = SlotReport {
        label: root.label.clone(),
        root_hash,
        uuid: superblock.uuid,
        start: root.start,
        covered,
        kernels: boots.map(|kernel| kernel.file.clone()).collect(),
    };
    Ok((slot, problems))
}

fn read_manifest(root: Region, covered: u64) -> Result<Option<serde_json::Value>> {
    let erofs = Erofs::open(root.part(0, covered)?)?;
    let Some(inode) = erofs.find(MANIFEST)? else { return Ok(None) };
    ensure!(inode.is_file(), "{MANIFEST} is no file");
    let bytes = erofs.read(&inode, MAX_MANIFEST)?;
    serde_json::from_slice(&bytes).with_context(|| format!("reading {MANIFEST}"))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} disk, {} MiB, {}", self.format, self.size / MIB, self.disk_guid)?;
        writeln!(f, "\n{:<16} {:<12} {:>9} {:>9}  flags", "partition", "type", "start", "MiB")?;
        for partition in &self.partitions {
            let PartitionReport { label, kind, start, size, flags, .. } = partition;
            let (start, size) = (start / MIB, size / MIB);
            let line = format!(
                "{:<16} {:<12} {start:>9} {size:>9}  {}",
                clean(label),
                kind,
                flags.join(" ")
            );
            writeln!(f, "{}", line.trim_end())?;
        }
        for kernel in &self.kernels {
            writeln!(f, "\n{} ({} MiB)", clean(&kernel.file), kernel.size.div_ceil(MIB))?;
            let shown = |value: &Option<String>| clean(value.as_deref().unwrap_or("-"));
            writeln!(f, "  image    {} {}", shown(&kernel.image), shown(&kernel.version))?;
            writeln!(f, "  kernel   {}", shown(&kernel.uname))?;
            writeln!(f, "  cmdline  {}", clean(&kernel.cmdline))?;
        }
        for slot in &self.slots {
            writeln!(f, "\n{} ({} MiB covered)", clean(&slot.label), slot.covered.div_ceil(MIB))?;
            writeln!(f, "  hash     {}", slot.root_hash)?;
            writeln!(f, "  booted by {}", clean(&slot.kernels.join(" ")))?;
        }
        if let Some(manifest) = &self.manifest {
            writeln!(f, "\nmanifest")?;
            for (what, items) in ["layers", "packages"].map(|what| (what, &manifest[what])) {
                if let Some(items) = items.as_array() {
                    writeln!(f, "  {} {what}", items.len())?;
                    for item in items {
                        writeln!(f, "    {}", describe_item(item))?;
                    }
                }
            }
        }
        for problem in &self.problems {
            writeln!(f, "\nproblem: {}", clean(problem))?;
        }
        Ok(())
    }
}

/// A layer (name and diff) or a package (name and version) of the manifest.
fn describe_item(item: &serde_json::Value) -> String {
    let text = |value: &serde_json::Value| clean(value.as_str().unwrap_or_default());
    let line = match item.get("name") {
        Some(name) => {
            let detail = ["version", "diff"].map(|key| text(&item[key])).concat();
            format!("{} {detail}", text(name))
        }
        None => text(item),
    };
    line.trim_end().to_string()
}

/// Text from an image, without what would steer the terminal.
pub(super) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_os_release_is_read_with_and_without_quotes() {
        let read = parse_os_release("# c=d\nIMAGE_ID=db\nIMAGE_VERSION=\"1.2\"\nX\n");
        assert_eq!(read["IMAGE_ID"], "db");
        assert_eq!(read["IMAGE_VERSION"], "1.2");
        assert_eq!(read.len(), 2);
    }

    #[test]
    fn what_is_no_image_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("no.raw");
        for bytes in [&b""[..], b"QF", &[0; 4096]] {
            std::fs::write(&path, bytes).unwrap();
            let error = format!("{:#}", inspect(&path, None).unwrap_err());
            assert!(error.contains("no.raw"), "{error}");
        }
    }

    #[test]
    fn control_characters_of_an_image_do_not_reach_the_terminal() {
        assert_eq!(clean("a\x1b[2Jb\n"), "a?[2Jb?");
    }
}
