//! What is mounted where.
//!
//! The worker mounts a tmpfs on the job's directory and on it:
//!
//! ```text
//! root/    the tree: an overlay, or the upper side itself
//! dev/     devices of the host, bound; a devpts of its own; shm, and the usual links
//! run/     for /run, with run/lock     shared by all programs of one job, so that one
//! tmp/     for /tmp                    sees what the one before it left
//! sys/     for /sys: empty, read-only
//! bare/    empty mount points, the bottom of a tree that cannot be written to
//! ```
//!
//! Each program gets these on `/dev`, `/run`, `/tmp` and `/sys` of the tree, and a fresh
//! `/proc`, in a mount namespace of its own, so the job sees the tree alone in `root/`. These
//! five directories are made in the upper side where the tree lacks them, with the modes
//! `base-files` gives them: any Debian tree ships them, so a layer gains nothing that its
//! base has not.

use std::ffi::CString;
use std::fmt::Write;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_bind, mount_change, move_mount, open_tree, unmount,
};

use super::{Bind, Spec};
use crate::store;

/// Where the tree is, under the directory that a job mounts on.
pub const ROOT: &str = "root";

const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

const DEVICE_LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

/// What is read-only in `/proc`, as in Docker's containers.
const KERNEL_FILES: [&str; 5] = ["bus", "fs", "irq", "sys", "sysrq-trigger"];

/// `(name, mode)` of what programs have over the tree.
const OVER_TREE: [(&str, u32); 5] =
    [("dev", 0o755), ("proc", 0o755), ("run", 0o755), ("sys", 0o755), ("tmp", 0o1777)];

/// Let no mount of ours reach the host, nor one of the host reach us.
pub fn detach_from_host() -> io::Result<()> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(mount_change("/", private)?)
}

/// Mount all that programs of this job share.
pub fn prepare(spec: &Spec) -> Result<()> {
    let base = spec.merged.as_deref().context("there is no directory to mount on")?;
    mount_tmpfs(base)?;
    for name in [ROOT, "bare", "dev", "run", "sys", "tmp", "run/lock"] {
        let path = base.join(name);
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
    }
    for name in ["tmp", "run/lock"] {
        fs::set_permissions(base.join(name), Permissions::from_mode(0o1777))?;
    }
    mount_tree(spec, base)?;
    prepare_devices(&base.join("dev"))
}

fn mount_tmpfs(on: &Path) -> Result<()> {
    let options = c"mode=755".to_owned();
    mount("tmpfs", on, "tmpfs", MountFlags::empty(), &*options)
        .with_context(|| format!("mounting a tmpfs on {}", on.display()))
}

fn mount_tree(spec: &Spec, base: &Path) -> Result<()> {
    let root = base.join(ROOT);
    match (&spec.lower[..], &spec.upper) {
        ([], Some(upper)) => {
            mount_bind(upper, &root).with_context(|| format!("binding {}", upper.display()))
        }
        (lower, upper) => {
            let upper = match (upper, &spec.work) {
                (None, _) => None,
                (Some(upper), Some(work)) => Some((upper.as_path(), work.as_path())),
                (Some(_), None) => return Err(anyhow!("an overlay needs a work directory")),
            };
            let mut lower = lower.to_vec();
            if upper.is_none() {
                ensure!(!lower.is_empty(), "there is no tree to mount");
                let bare = base.join("bare");
                make_mountpoints(&bare)?;
                lower.insert(0, bare);
            }
            mount_overlay(&lower, upper, &root)
        }
    }
}

/// `lower` bottom first, at least two where there is no `upper`, which comes with its work
/// directory.
///
/// The options must fit in a page and use `:` and `,` themselves, so directories are named
/// by their descriptors, relative to `/proc/self/fd`.
fn mount_overlay(lower: &[PathBuf], upper: Option<(&Path, &Path)>, on: &Path) -> Result<()> {
    let open = |path: &Path| -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
            .with_context(|| format!("opening {}", path.display()))
    };
    let below = lower.iter().rev().map(|path| open(path)).collect::<Result<Vec<_>>>()?;
    let mut options = "userxattr,lowerdir=".to_string();
    for (i, directory) in below.iter().enumerate() {
        let separator = if i == 0 { "" } else { ":" };
        write!(options, "{separator}{}", directory.as_raw_fd())?;
    }
    let above = match upper {
        Some((upper, work)) => {
            // What an earlier mount left there makes the kernel refuse a volatile one.
            store::remove_tree(work)?;
            fs::create_dir(work).with_context(|| format!("making {}", work.display()))?;
            Some((open(upper)?, open(work)?))
        }
        None => None,
    };
    if let Some((upper, work)) = &above {
        let (upper, work) = (upper.as_raw_fd(), work.as_raw_fd());
        write!(options, ",upperdir={upper},workdir={work},volatile")?;
    }
    ensure!(options.len() < 4096, "{} trees are too many for one overlay", lower.len());
    let before = std::env::current_dir().context("finding the current directory")?;
    let on = std::path::absolute(on)?;
    std::env::set_current_dir("/proc/self/fd")?;
    let mounted = mount("overlay", &on, "overlay", MountFlags::empty(), &*CString::new(options)?);
    std::env::set_current_dir(before)?;
    mounted.with_context(|| format!("mounting an overlay on {}", on.display()))
}

fn prepare_devices(dev: &Path) -> Result<()> {
    for name in DEVICES {
        // Making device nodes takes rights over the host that no user namespace gives.
        let (from, to) = (Path::new("/dev").join(name), dev.join(name));
        fs::File::create(&to)
            .and_then(|_| Ok(mount_bind(&from, &to)?))
            .with_context(|| format!("binding {}", from.display()))?;
    }
    for (to, name) in DEVICE_LINKS {
        symlink(to, dev.join(name)).with_context(|| format!("making /dev/{name}"))?;
    }
    for name in ["pts", "shm"] {
        fs::create_dir(dev.join(name)).with_context(|| format!("making /dev/{name}"))?;
    }
    fs::set_permissions(dev.join("shm"), Permissions::from_mode(0o1777))?;
    let options = c"newinstance,ptmxmode=0666,mode=0620,gid=5".to_owned();
    mount("devpts", dev.join("pts"), "devpts", MountFlags::NOSUID | MountFlags::NOEXEC, &*options)
        .context("mounting a devpts")
}

/// Make the tree under `base` this process's root and forget the host. The process must be
/// in a mount namespace and a pid namespace of its own. Whether `/proc` is a fresh one:
/// where a container hides parts of its own, the kernel refuses, and programs see that one.
///
/// After the pivot the old root lies over the new one: `.` still names it, `/` the new one,
/// so that no link in the tree can lead a mount to the host (`pivot_root(2)`).
pub fn enter(base: &Path, binds: &[Bind]) -> Result<bool> {
    let root = base.join(ROOT);
    make_mountpoints(&root)?;
    let mut pieces = Vec::new();
    for name in ["dev", "run", "tmp", "sys"] {
        let piece = clone_tree(&base.join(name))?;
        if name == "sys" {
            protect(&piece)?;
        }
        pieces.push((piece, Path::new("/").join(name)));
    }
    for bind in binds {
        let piece = clone_tree(&bind.from)?;
        if bind.read_only {
            protect(&piece)?;
        }
        if let Ok(below) = bind.to.strip_prefix("/run").or_else(|_| bind.to.strip_prefix("/tmp")) {
            let area = if bind.to.starts_with("/run") { "run" } else { "tmp" };
            make_target(&base.join(area), below, bind.from.is_dir())?;
        }
        pieces.push((piece, bind.to.clone()));
    }
    let host_proc = clone_tree(Path::new("/proc"))?;
    std::env::set_current_dir(&root).context("entering the tree")?;
    rustix::process::pivot_root(".", ".").context("making the tree the root")?;
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let fresh = mount("proc", "/proc", "proc", safe, None::<&std::ffi::CStr>).is_ok();
    if fresh {
        protect_kernel()?;
    } else {
        protect(&host_proc)?;
        attach(&host_proc, Path::new("/proc"))?;
    }
    for (piece, to) in &pieces {
        attach(piece, to)?;
    }
    unmount(".", UnmountFlags::DETACH).context("letting go of the host's root")?;
    std::env::set_current_dir("/").context("entering the new root")?;
    Ok(fresh)
}

/// Where the builder is root, so is the program to the kernel's settings, which ask for the
/// id alone: a maintainer script must not change the host's.
fn protect_kernel() -> Result<()> {
    for name in KERNEL_FILES {
        let path = Path::new("/proc").join(name);
        if path.exists() {
            let piece = clone_tree(&path)?;
            protect(&piece)?;
            attach(&piece, &path)?;
        }
    }
    Ok(())
}

fn make_mountpoints(root: &Path) -> Result<()> {
    for (name, mode) in OVER_TREE {
        let path = root.join(name);
        // Another kind of file there makes the mount fail, with its name.
        if path.symlink_metadata().is_err() {
            fs::create_dir(&path)
                .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(mode)))
                .with_context(|| format!("making /{name} in the tree"))?;
        }
    }
    Ok(())
}

/// An empty file or directory at `below`, a path without `..`, under `area`.
fn make_target(area: &Path, below: &Path, directory: bool) -> Result<()> {
    let plain = below.components().all(|part| matches!(part, Component::Normal(_)));
    ensure!(plain && !below.as_os_str().is_empty(), "{} is no place for a bind", below.display());
    let target = area.join(below);
    let make = || -> io::Result<()> {
        if directory {
            return fs::create_dir_all(&target);
        }
        fs::create_dir_all(target.parent().unwrap_or(area))?;
        fs::OpenOptions::new().append(true).create(true).open(&target).map(drop)
    };
    make().with_context(|| format!("making {}", target.display()))
}

/// A copy of the mounts at `path`, attached nowhere yet.
fn clone_tree(path: &Path) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, path, flags).with_context(|| format!("binding {}", path.display()))
}

fn attach(piece: &OwnedFd, to: &Path) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(piece, "", CWD, to, flags)
        .with_context(|| format!("mounting on {} of the tree", to.display()))
}

/// Make a detached mount and all below it read-only (`mount_setattr(2)`).
fn protect(piece: &OwnedFd) -> io::Result<()> {
    // SAFETY: a C struct of numbers, for which zeros are valid.
    let mut change: libc::mount_attr = unsafe { std::mem::zeroed() };
    change.attr_set = libc::MOUNT_ATTR_RDONLY;
    // SAFETY: the arguments are those of the manual page; the kernel only reads them.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            piece.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const change,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
