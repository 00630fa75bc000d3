//! The initrd: systemd from Debian packages, the modules that reach the root, and the
//! layer's own units, as one zstd-compressed cpio archive.
//!
//! Archive format: `newc`, as the kernel's Documentation/driver-api/early-userspace/
//! buffer-format.rst describes it. Entries are sorted and belong to root, so that the
//! same tree gives the same bytes whoever builds it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::error::UserError;
use crate::tools::Tools;

/// Level 12 packs 60 MB in about 2 s on two cores; higher ones save little for much time.
const ZSTD_LEVEL: i32 = 12;

/// What the kernel and systemd expect of a root that packages alone do not bring.
const DIRECTORIES: [&str; 8] = ["dev", "etc", "proc", "root", "run", "sys", "sysroot", "tmp"];
const LINKS: [(&str, &str); 6] = [
    ("bin", "usr/bin"),
    ("sbin", "usr/sbin"),
    ("lib", "usr/lib"),
    ("lib64", "usr/lib64"),
    ("init", "usr/lib/systemd/systemd"),
    ("usr/bin/sh", "dash"),
];

/// Documentation and the like, of no use before the root is there.
const NEEDLESS: [&str; 13] = [
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/bash-completion",
    "usr/share/zsh",
    "usr/share/bug",
    "usr/share/polkit-1",
    "usr/lib/udev/hwdb.d",
    "usr/lib/udev/hwdb.bin",
    "usr/lib/systemd/catalog",
    "var",
];

/// Turn extracted packages into a tree that the kernel can start: links, mount points,
/// systemd's initrd target.
pub fn finish_tree(root: &Path) -> Result<()> {
    for path in NEEDLESS {
        crate::store::remove_tree(&root.join(path))?;
    }
    for directory in DIRECTORIES {
        let path = root.join(directory);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
    }
    for (link, target) in LINKS {
        place_link(&root.join(link), target)?;
    }
    place_link(&root.join("usr/lib/systemd/system/default.target"), "initrd.target")
}

fn place_link(link: &Path, target: &str) -> Result<()> {
    match fs::remove_file(link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => symlink(target, link),
    }
    .with_context(|| format!("linking {}", link.display()))
}

/// The only kernel version below `usr/lib/modules` of `root`.
pub fn find_kernel_version(root: &Path) -> Result<String> {
    let folder = root.join("usr/lib/modules");
    let mut versions: Vec<String> = fs::read_dir(&folder)
        .with_context(|| format!("listing {}", folder.display()))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    match (versions.pop(), versions.is_empty()) {
        (Some(version), true) => Ok(version),
        (None, _) => Err(UserError::new("the image has no kernel")
            .why("no package of its layers holds /usr/lib/modules")
            .help("add `linux-image-amd64` to the layer that has `[initrd]`")
            .into()),
        (Some(version), false) => Err(UserError::new("the image has more than one kernel")
            .why(format!("{version}, {}", versions.join(", ")))
            .help("keep one linux-image package in the profile's layers")
            .into()),
    }
}

/// Copy `names` and what they depend on from the kernel tree `from` (a root directory)
/// into `root`, decompressed, and index them with depmod.
pub fn install_modules(tools: &Tools, from: &Path, names: &[String], root: &Path) -> Result<()> {
    let version = find_kernel_version(from)?;
    let source = from.join("usr/lib/modules").join(&version);
    let target = root.join("usr/lib/modules").join(&version);
    let dependencies = fs::read_to_string(source.join("modules.dep"))
        .context("reading the kernel's modules.dep")?;
    let builtin = fs::read_to_string(source.join("modules.builtin"))
        .context("reading the kernel's modules.builtin")?;

    for path in select_modules(names, &dependencies, &builtin)? {
        let bytes = read_module(&source.join(&path))?;
        let plain = target.join(strip_compression(&path));
        let parent = plain.parent().context("a module lies in a folder")?;
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        fs::write(&plain, bytes).with_context(|| format!("writing {}", plain.display()))?;
    }
    for name in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
        fs::copy(source.join(name), target.join(name))
            .with_context(|| format!("copying the kernel's {name}"))?;
    }
    tools.command("depmod")?.arg("-b").arg(root).arg(&version).run()?;
    Ok(())
}

/// Paths (below the kernel's folder) of the named modules and their dependencies.
fn select_modules(names: &[String], dependencies: &str, builtin: &str) -> Result<Vec<String>> {
    let mut selected = BTreeSet::new();
    for name in names {
        let wanted = normalise_name(name);
        let line = dependencies.lines().find_map(|line| {
            let (path, needs) = line.split_once(':')?;
            (name_module(path) == wanted).then_some((path, needs))
        });
        match line {
            Some((path, needs)) => {
                selected.insert(path.to_string());
                selected.extend(needs.split_whitespace().map(str::to_string));
            }
            None if builtin.lines().any(|path| name_module(path) == wanted) => {}
            None => {
                let known = dependencies.lines().filter_map(|line| line.split_once(':'));
                let known: Vec<String> = known.map(|(path, _)| name_module(path)).collect();
                let nearest = crate::error::find_nearest(&wanted, known.iter().map(String::as_str));
                let error = UserError::new(format!("the kernel has no module `{name}`"))
                    .why("the layer's `[initrd] modules` names it, or `exclude` left it out");
                return Err(match nearest {
                    Some(nearest) => error.help(format!("did you mean `{nearest}`?")),
                    None => error,
                }
                .into());
            }
        }
    }
    Ok(selected.into_iter().collect())
}

fn normalise_name(name: &str) -> String {
    name.replace('-', "_")
}

/// `kernel/fs/ext4/ext4.ko.xz` is `ext4`.
fn name_module(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normalise_name(file.split_once(".ko").map_or(file, |(stem, _)| stem))
}

fn strip_compression(path: &str) -> &str {
    path.strip_suffix(".xz").or_else(|| path.strip_suffix(".zst")).unwrap_or(path)
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut bytes = Vec::new();
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => liblzma::read::XzDecoder::new(file).read_to_end(&mut bytes),
        Some("zst") => zstd::Decoder::new(file)?.read_to_end(&mut bytes),
        _ => io::BufReader::new(file).read_to_end(&mut bytes),
    }
    .with_context(|| format!("decompressing {}", path.display()))?;
    Ok(bytes)
}

/// Write the tree below `root` as a compressed archive to `out`.
pub fn write_archive(root: &Path, epoch: u64, out: &Path) -> Result<()> {
    let file = File::create(out).with_context(|| format!("creating {}", out.display()))?;
    let mut encoder = zstd::Encoder::new(file, ZSTD_LEVEL).context("starting zstd")?;
    // Any number of workers gives the same bytes, other than none.
    encoder.multithread(2).context("starting zstd")?;
    encoder.include_checksum(true).context("starting zstd")?;
    let mut archive = Archive { out: encoder, epoch, inode: 0 };
    let mut paths = Vec::new();
    list_tree(root, Path::new(""), &mut paths)?;
    paths.sort();
    for path in &paths {
        archive.append(root, path).with_context(|| format!("packing {}", path.display()))?;
    }
    archive.append_entry(b"TRAILER!!!", 0, &[])?;
    archive.out.finish().and_then(|file| file.sync_all()).context("ending the initrd")
}

fn list_tree(root: &Path, below: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    let folder = root.join(below);
    for entry in fs::read_dir(&folder).with_context(|| format!("listing {}", folder.display()))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            list_tree(root, &path, paths)?;
        }
        paths.push(path);
    }
    Ok(())
}

struct Archive<W> {
    out: W,
    epoch: u64,
    inode: u32,
}

impl<W: Write> Archive<W> {
    fn append(&mut self, root: &Path, path: &Path) -> Result<()> {
        let full = root.join(path);
        let metadata = fs::symlink_metadata(&full)?;
        let data = match metadata.file_type() {
            kind if kind.is_file() => fs::read(&full)?,
            kind if kind.is_symlink() => fs::read_link(&full)?.as_os_str().as_bytes().to_vec(),
            kind if kind.is_dir() => Vec::new(),
            _ => bail!("neither a file, a link nor a directory"),
        };
        // Of the bits only "a program" means something in an initrd, where all is root's; the
        // others may be those of a umask.
        let bits = match metadata.file_type() {
            kind if kind.is_symlink() => 0o777,
            kind if kind.is_dir() || metadata.mode() & 0o100 != 0 => 0o755,
            _ => 0o644,
        };
        let mode = metadata.mode() & !0o7777 | bits;
        self.append_entry(path.as_os_str().as_bytes(), mode, &data)
    }

    fn append_entry(&mut self, name: &[u8], mode: u32, data: &[u8]) -> Result<()> {
        self.inode += 1;
        let size = u32::try_from(data.len()).context("a file of 4 GiB or more")?;
        let (inode, mtime) = (self.inode, self.epoch as u32);
        let name_size = name.len() as u32 + 1;
        // magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor,
        // rdevmajor, rdevminor, namesize, check
        write!(
            self.out,
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{mtime:08x}{size:08x}{0:08x}{0:08x}{0:08x}{0:08x}{name_size:08x}{0:08x}",
            0, 1
        )?;
        self.out.write_all(name)?;
        self.out.write_all(&[0])?;
        self.pad(110 + name.len() + 1)?;
        self.out.write_all(data)?;
        self.pad(data.len())
    }

    /// Fill up to a multiple of four bytes.
    fn pad(&mut self, written: usize) -> Result<()> {
        Ok(self.out.write_all(&[0; 3][..written.wrapping_neg() % 4])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Command;
    use std::os::unix::fs::PermissionsExt;

    const DEPENDENCIES: &str = "kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/lib/crc16.ko.xz\nkernel/fs/jbd2/jbd2.ko.xz:\nkernel/drivers/md/dm-mod.ko.xz:\n";

    #[test]
    fn a_module_brings_its_dependencies_and_a_builtin_one_nothing() {
        let names = ["ext4", "dm_mod", "virtio-pci"].map(String::from);
        let selected =
            select_modules(&names, DEPENDENCIES, "kernel/drivers/virtio/virtio_pci.ko\n").unwrap();
        assert_eq!(
            selected,
            [
                "kernel/drivers/md/dm-mod.ko.xz",
                "kernel/fs/ext4/ext4.ko.xz",
                "kernel/fs/jbd2/jbd2.ko.xz",
                "kernel/lib/crc16.ko.xz"
            ]
        );
    }

    #[test]
    fn an_unknown_module_is_named_with_the_nearest() {
        let error = select_modules(&["ext5".into()], DEPENDENCIES, "").unwrap_err().to_string();
        assert!(error.contains("no module `ext5`"), "{error}");
        assert!(error.contains("did you mean `ext4`?"), "{error}");
    }

    #[test]
    fn the_archive_is_read_by_cpio_and_is_the_same_under_any_umask() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/b/file"), "content").unwrap();
        symlink("b/file", root.join("a/link")).unwrap();
        let out = |name: &str| dir.path().join(name);
        write_archive(&root, 1_700_000_000, &out("1")).unwrap();
        for (path, mode) in [("a", 0o700), ("a/b", 0o770), ("a/b/file", 0o600)] {
            fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode)).unwrap();
        }
        write_archive(&root, 1_700_000_000, &out("2")).unwrap();
        assert_eq!(fs::read(out("1")).unwrap(), fs::read(out("2")).unwrap());

        let plain = zstd::decode_all(File::open(out("1")).unwrap()).unwrap();
        match Command::new("cpio").args(["-tv", "--quiet", "-n"]).input(plain).run() {
            Ok(output) => {
                let list = String::from_utf8(output.stdout).unwrap();
                let names: Vec<&str> =
                    list.lines().map(|line| line.rsplit_once("2023 ").unwrap().1).collect();
                assert_eq!(names, ["a", "a/b", "a/b/file", "a/link -> b/file"]);
            }
            Err(error) => println!("skipped: no cpio to read the archive with ({error:#})"),
        }
    }
}
