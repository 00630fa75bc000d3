//! From diffs to a disk: identity, index, verity, initrd, UKI, ESP, GPT.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::explain::Record;
use super::layers::Diff;
use super::locking;
use super::manifest::Description;
use super::placing::place;
use super::sets;
use super::source::Source;
use super::unpacked::{self, unpack};
use crate::config::layer::Layer;
use crate::config::profile::Profile;
use crate::debian::release::format_date;
use crate::digest::Key;
use crate::disk::erofs::{self, Layout};
use crate::disk::esp::{Content, EspFile};
use crate::disk::guid::Guid;
use crate::disk::image::{self, Assembled, Plan};
use crate::disk::{initrd, uki, verity};
use crate::error::UserError;
use crate::lock::Lock;
use crate::rootfs::layer::{Placed, PlacedKind};
use crate::store::Scratch;
use crate::tools::Tools;

/// Raised when a step would make other bytes from the same inputs.
const INITRD_VERSION: u32 = 3;
/// Of everything after the layers and the initrd.
const IMAGE_VERSION: u32 = 3;

/// A boot is tried so often before systemd-boot falls back to the other slot.
const BOOT_TRIES: u32 = 3;

pub struct ImageBuilder<'a> {
    pub source: &'a Source,
    pub lock: &'a Lock,
    pub tools: &'a Tools,
}

impl ImageBuilder<'_> {
    /// The keys of a build: of the layers' diffs, of the initrd, and of all that goes into
    /// the image.
    pub fn describe_image(
        &self,
        profile: &Profile,
        layers: Vec<(String, Key)>,
        initrd: Key,
    ) -> Record {
        let mut key = Key::new("image", IMAGE_VERSION);
        key.add("profile", &profile.name);
        key.add("description", &profile.description);
        key.add("epoch", self.lock.epoch.to_string());
        key.add("disk", format!("{:?}", profile.disk));
        key.add("cmdline", profile.cmdline.join(" "));
        key.add("tools", self.tools.name());
        key.add("initrd", initrd.digest().as_bytes());
        for (name, layer) in &layers {
            key.add(name, layer.digest().as_bytes());
        }
        Record { layers, initrd, image: key }
    }

    /// The name of the diff in which the profile's kernel is.
    pub fn name_kernel(&self, profile: &Profile) -> Result<String> {
        Ok(format!("{} packages", find_initrd_layer(profile)?.name))
    }

    /// The inputs of the profile's initrd; `kernel` is the key of the diff with the kernel.
    pub fn describe_initrd(&self, profile: &Profile, kernel: &Key) -> Result<Key> {
        let layer = find_initrd_layer(profile)?;
        let Some(config) = &layer.initrd else { anyhow::bail!("a layer with an initrd has one") };
        let set = sets::name_initrd_set(&layer.name);
        let mut key = Key::new("initrd", INITRD_VERSION);
        key.add("kernel", kernel.digest().as_bytes());
        key.add("tools", self.tools.name());
        key.add("epoch", self.lock.epoch.to_string());
        key.add("unpacked", unpacked::VERSION.to_string());
        unpacked::add_packages(&mut key, &self.lock.list_set(&set)?);
        config.modules.iter().for_each(|name| {
            key.add("module", name);
        });
        place(profile, &config.files, None, &mut key)?;
        Ok(key)
    }

    /// The initrd of this key, if the store has it.
    pub fn find_initrd(&self, key: &Key) -> Option<PathBuf> {
        let entry = self.source.store.find_entry("initrd", &key.digest())?;
        Some(entry.join("initrd.cpio.zst")).filter(|archive| archive.is_file())
    }

    /// The initrd of the profile, from the store or made; with the key it depends on.
    pub fn build_initrd(&self, profile: &Profile, diffs: &[Diff]) -> Result<(PathBuf, Key)> {
        let layer = find_initrd_layer(profile)?;
        let Some(config) = &layer.initrd else { anyhow::bail!("a layer with an initrd has one") };
        let kernel = find_kernel(diffs, layer)?;
        let set = sets::name_initrd_set(&layer.name);
        let key = self.describe_initrd(profile, &kernel.key)?;
        let digest = key.digest();
        let step = self.source.progress.begin("initrd");
        if let Some(archive) = self.find_initrd(&key) {
            step.finish_cached("");
            return Ok((archive, key));
        }
        self.source.store.discard_entry("initrd", &digest)?;
        let scratch = self.source.store.make_scratch("initrd")?;
        let root = scratch.path().join("root");
        fs::create_dir(&root).context("making the initrd's root")?;
        let debs = locking::fetch_set(self.source, self.lock, &set)?;
        unpack(self.source, self.lock, &set, &debs, &root)?;
        initrd::finish_tree(&root)?;
        let files = place(profile, &config.files, Some(scratch.path()), &mut Key::default())?;
        lay_files(&files, &root)?;
        initrd::install_modules(self.tools, &kernel.tree, &config.modules, &root)?;
        let archive = scratch.path().join("initrd.cpio.zst");
        initrd::write_archive(&root, self.lock.epoch, &archive)?;
        crate::store::remove_tree(&root)?;
        let size = fs::metadata(&archive)?.len();
        let entry = self.source.store.commit_entry("initrd", &digest, scratch)?;
        step.finish(crate::progress::format_bytes(size));
        Ok((entry.join("initrd.cpio.zst"), key))
    }

    /// Assemble the raw disk at `out`.
    pub fn build_disk(
        &self,
        profile: &Profile,
        diffs: &[Diff],
        initrd: &Path,
        description: &Description,
        out: &Path,
    ) -> Result<Assembled> {
        let step = self.source.progress.begin(format!("{} disk", profile.name));
        let scratch = self.source.store.make_scratch("disk")?;
        let uuid = Guid::derive(&description.key, "root");
        let epoch = self.lock.epoch;

        step.update("index");
        let identity = self.build_identity(&scratch, description, &uuid)?;
        let mut blobs: Vec<PathBuf> = diffs.iter().map(|diff| diff.blob.clone()).collect();
        blobs.push(identity);
        let index = scratch.path().join("index.erofs");
        let layout = erofs::make_index(&blobs, &index, epoch, &uuid)?;

        step.update("verity");
        let leaves = self.collect_leaves(diffs, &index, &blobs, &layout)?;
        let tree = verity::build_tree(&leaves, &uuid)?;

        step.update("UKI");
        let kernel = find_kernel(diffs, find_initrd_layer(profile)?)?;
        let version = initrd::find_kernel_version(&kernel.tree)?;
        let linux = kernel.tree.join(format!("boot/vmlinuz-{version}"));
        let boot = self.tools.root().join("usr/lib/systemd/boot/efi");
        let cmdline = description.write_cmdline(&tree.root_hash);
        let image = uki::assemble(
            &read(&boot.join("linuxx64.efi.stub"))?,
            &uki::Parts {
                os_release: description.write_os_release().as_bytes(),
                cmdline: &cmdline,
                uname: &version,
                linux: &read(&linux)?,
                initrd: &read(initrd)?,
            },
        )?;
        let esp_files = [
            EspFile {
                path: "EFI/BOOT/BOOTX64.EFI".into(),
                content: Content::File(boot.join("systemd-bootx64.efi")),
            },
            EspFile {
                path: format!("EFI/Linux/stanchion_{}+{BOOT_TRIES}-0.efi", description.version),
                content: Content::Bytes(image),
            },
            EspFile {
                path: "loader/loader.conf".into(),
                // Without `editor no` whoever is at the console can edit the root hash away.
                content: Content::Bytes(b"timeout 0\neditor no\nauto-firmware no\n".to_vec()),
            },
        ];
        step.update("disk");
        let assembled = image::assemble_disk(
            &Plan {
                disk_size: profile.disk.size,
                esp_size: profile.disk.esp,
                slot_size: profile.disk.slot,
                index: &index,
                blobs: &blobs,
                layout: &layout,
                tree: &tree,
                esp_files: &esp_files,
                epoch,
            },
            out,
        )?;
        step.finish(format!(
            "root {}, room for /var {}",
            crate::progress::format_bytes(assembled.root_size),
            crate::progress::format_bytes(assembled.free)
        ));
        Ok(assembled)
    }

    /// The topmost blob: who this image is, and what is in it.
    fn build_identity(
        &self,
        scratch: &Scratch,
        description: &Description,
        uuid: &Guid,
    ) -> Result<PathBuf> {
        let tar = scratch.path().join("identity.tar");
        let file = File::create(&tar).context("writing the image's identity")?;
        let mut archive = tar::Builder::new(file);
        let files = [
            ("usr/lib/os-release", description.write_os_release()),
            ("usr/share/stanchion/manifest.json", description.write_inner_manifest()?),
        ];
        // The topmost layer that has a folder gives its mode: `/` must be among them.
        for folder in [".", "usr", "usr/lib", "usr/share", "usr/share/stanchion"] {
            let mut header = self.make_header(tar::EntryType::Directory, 0o755, 0);
            archive
                .append_data(&mut header, format!("{folder}/"), std::io::empty())
                .context("writing the image's identity")?;
        }
        for (path, text) in files {
            let mut header = self.make_header(tar::EntryType::Regular, 0o644, text.len() as u64);
            archive
                .append_data(&mut header, path, text.as_bytes())
                .context("writing the image's identity")?;
        }
        archive.finish().context("writing the image's identity")?;
        let blob = scratch.path().join("identity.erofs");
        erofs::make_blob(self.tools, &tar, &blob, self.lock.epoch, uuid)?;
        Ok(blob)
    }

    fn make_header(&self, kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(size);
        header.set_mtime(self.lock.epoch);
        header
    }

    /// Leaves of the whole root: hashed anew for the index and the identity, from the
    /// store for the layers.
    fn collect_leaves(
        &self,
        diffs: &[Diff],
        index: &Path,
        blobs: &[PathBuf],
        layout: &Layout,
    ) -> Result<Vec<verity::Leaf>> {
        let threads = self.source.threads;
        let mut leaves = hash_file(index, threads)?;
        for diff in diffs {
            let cached = read(&diff.leaves)?;
            let (whole, rest) = cached.as_chunks::<{ verity::HASH }>();
            anyhow::ensure!(
                rest.is_empty()
                    && whole.len() as u64 * verity::BLOCK as u64 == diff.facts.blob_bytes,
                "{} does not belong to its blob",
                diff.leaves.display()
            );
            leaves.extend_from_slice(whole);
        }
        let identity = blobs.last().context("an image has an identity")?;
        leaves.extend(hash_file(identity, threads)?);
        anyhow::ensure!(
            leaves.len() as u64 * verity::BLOCK as u64 == layout.total,
            "the leaves do not cover the root"
        );
        Ok(leaves)
    }
}

fn hash_file(path: &Path, threads: usize) -> Result<Vec<verity::Leaf>> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let blocks = file.metadata()?.len() / verity::BLOCK as u64;
    verity::hash_leaves(&file, 0, blocks, threads)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}

fn find_initrd_layer(profile: &Profile) -> Result<&Layer> {
    profile.layers.iter().find(|layer| layer.initrd.is_some()).ok_or_else(|| {
        UserError::new(format!("profile `{}` has no initrd", profile.name))
            .why("none of its layers has an `[initrd]` table")
            .help("add the layer `kernel`")
            .into()
    })
}

/// The diff in which the layer's packages brought the kernel.
fn find_kernel<'a>(diffs: &'a [Diff], layer: &Layer) -> Result<&'a Diff> {
    diffs
        .iter()
        .find(|diff| diff.layer == layer.name && diff.tree.join("usr/lib/modules").is_dir())
        .ok_or_else(|| {
            UserError::new(format!("layer `{}` has an initrd and no kernel", layer.name))
                .help("add `linux-image-amd64` to its packages")
                .into()
        })
}

/// Lay the layer's `initrd/` files over the tree; everything in an initrd is root's.
fn lay_files(files: &[Placed], root: &Path) -> Result<()> {
    use std::os::unix::fs::{PermissionsExt, symlink};
    for file in files {
        let path = root.join(file.target.strip_prefix("/").unwrap_or(&file.target));
        let lay = || -> Result<()> {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            let is_folder = matches!(file.kind, PlacedKind::Directory { .. });
            if !is_folder && path.symlink_metadata().is_ok() {
                fs::remove_file(&path)?;
            }
            match &file.kind {
                PlacedKind::File(source) => {
                    fs::copy(source, &path)?;
                    fs::set_permissions(&path, fs::Permissions::from_mode(file.mode))?;
                }
                PlacedKind::Link(to) => symlink(to, &path)?,
                PlacedKind::Directory { .. } => fs::create_dir_all(&path)?,
            }
            Ok(())
        };
        lay().with_context(|| format!("laying {} into the initrd", file.target.display()))?;
    }
    Ok(())
}

/// `2026.11.20`
pub fn format_day(epoch: u64) -> String {
    // Fri, 20 Nov 2026 02:11:10 UTC
    let date = format_date(epoch);
    let mut words = date.split(' ').skip(1);
    let (day, month, year) =
        (words.next().unwrap_or(""), words.next().unwrap_or(""), words.next().unwrap_or(""));
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let month = MONTHS.iter().position(|name| *name == month).map_or(0, |at| at + 1);
    format!("{year}.{month:02}.{day}")
}
