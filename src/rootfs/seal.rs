//! The end of a diff: what must not be in an image goes, what `/var` needs becomes
//! tmpfiles.d lines, and the rest becomes the layer's tar.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

use super::exclude::Excludes;
use super::layer::{Common, Sealed};
use super::place::{self, Walker};
use super::{accounts, dpkg, pack};
use crate::digest::Hasher;
use crate::sandbox::Inside;

/// Left out of every image: what is made anew on each machine, and what only the build
/// needed. `/var` is a partition of its own, made at first boot.
const NOT_SHIPPED: [&str; 22] = [
    "/dev/*",
    "/etc/.pwd.lock",
    "/etc/group-",
    "/etc/gshadow-",
    "/etc/hostname",
    "/etc/ld.so.cache~",
    "/etc/machine-id",
    "/etc/passwd-",
    "/etc/shadow-",
    "/etc/ssh/ssh_host_*",
    "/etc/subgid-",
    "/etc/subuid-",
    "/proc/*",
    "/root/.*",
    "/run/*",
    "/sys/*",
    "/tmp/*",
    "/usr/sbin/policy-rc.d",
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/man/*",
    "/var/*",
];

/// Folders below `/var` that a running node does not need: they belong to the build, or
/// systemd makes them itself.
const NO_VAR: [&str; 8] = [
    "/var/backups",
    "/var/cache",
    "/var/lib/apt",
    "/var/lib/dpkg",
    "/var/lib/systemd",
    "/var/lib/ucf",
    "/var/log/apt",
    "/var/tmp",
];

/// Pack the upper side. `own` are the targets that the layer itself laid down: patterns of
/// what packages bring do not concern them.
pub fn seal(common: &Common, own: &[&Path], inside: &mut Inside, diff: &str) -> Result<Sealed> {
    inside.say("packing")?;
    let root = inside.root()?;
    let upper = inside.spec().upper.clone().context("a layer is built on an upper side")?;
    accounts::fix_days(&root, common.epoch)?;
    accounts::check_fixed(&root, &common.accounts)?;
    write_tmpfiles(&root, &upper, &format!("stanchion-{}-{diff}", common.layer))?;

    let globs = NOT_SHIPPED.into_iter().chain(common.exclude.iter().map(String::as_str));
    let globs = globs.chain(common.remove.iter().map(String::as_str));
    let left_out = globs.fold(Excludes::default(), Excludes::exclude);
    let file =
        File::create(&common.tar).with_context(|| format!("creating {}", common.tar.display()))?;
    let mut out = Tee { file: BufWriter::with_capacity(1 << 20, file), hasher: Hasher::new() };
    let choose = |path: &Path| {
        let path = Path::new("/").join(path);
        // What is below an own folder, and the folders above an own file.
        let is_own = own.iter().any(|own| path.starts_with(own) || own.starts_with(&path));
        match !is_own && left_out.matches(path.as_os_str().as_bytes()) {
            true => pack::Choice::Drop,
            false => pack::Choice::Keep,
        }
    };
    let stats = pack::pack_layer(&upper, common.epoch, choose, &mut out)?;
    out.flush().context("writing the layer")?;
    Ok(Sealed { files: stats.files, bytes: stats.bytes, tar_digest: out.hasher.finish() })
}

struct Tee<W> {
    file: W,
    hasher: Hasher,
}

impl<W: Write> Write for Tee<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// `/var` starts empty on a new machine: the folders that packages made there, with their
/// modes and owners, become lines for systemd-tmpfiles.
fn write_tmpfiles(root: &Path, upper: &Path, name: &str) -> Result<()> {
    let mut lines = Vec::new();
    list_var(&upper.join("var"), "/var", &mut lines)?;
    if lines.is_empty() {
        return Ok(());
    }
    let fd = place::open_root(root)?;
    Walker::new(&fd, dpkg::make_folder)?.open(b"usr/lib/tmpfiles.d")?;
    let path = root.join("usr/lib/tmpfiles.d").join(format!("{name}.conf"));
    fs::write(&path, lines.join("\n") + "\n").with_context(|| format!("writing {}", path.display()))
}

fn list_var(folder: &Path, shown: &str, lines: &mut Vec<String>) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.with_context(|| format!("listing {shown}"))?,
    };
    let mut names = entries
        .map(|entry| Ok(entry?.file_name()))
        .collect::<std::io::Result<Vec<_>>>()
        .with_context(|| format!("listing {shown}"))?;
    names.sort();
    for name in names {
        // A name that tmpfiles.d could misread is no folder of a package.
        let Some(name) = name
            .to_str()
            .filter(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || "._-+@".contains(c)))
        else {
            continue;
        };
        let path = format!("{shown}/{name}");
        let metadata = fs::symlink_metadata(folder.join(name))?;
        if !metadata.is_dir() || NO_VAR.contains(&path.as_str()) {
            continue;
        }
        let (mode, uid, gid) = (metadata.mode() & 0o7777, metadata.uid(), metadata.gid());
        lines.push(format!("d {path} {mode:04o} {uid} {gid} -"));
        list_var(&folder.join(name), &path, lines)?;
    }
    Ok(())
}
