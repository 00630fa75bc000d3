//! A node's root as the initrd lays it on a real boot: the image's verified root read-only
//! below, `/etc` over it in memory, `/var` kept, and the machine's id from there.
//!
//! Everything is mounted in the mount namespace of the node's keeper and in no other, so
//! that it is gone when the node is.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change,
    mount_remount, unmount,
};
use rustix::thread::UnshareFlags;

use crate::disk::gpt;
use crate::disk::region::Region;
use crate::error::UserError;

/// The partition that holds the root, on a disk as it is built.
const SLOT: &str = "root-a";

/// `linux/loop.h`
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LO_FLAGS_READ_ONLY: u32 = 1;
/// The device is free again when its mount is gone, however it went.
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// A node's root, mounted; unmounted when dropped.
pub struct Root {
    /// A tmpfs of the keeper's own, over a folder in which nspawn keeps its state, too.
    area: PathBuf,
}

impl Root {
    /// Mount the root of the raw disk `image` with the directory `var`, which may be empty.
    /// This thread gets a mount namespace of its own.
    pub fn mount(image: &Path, var: &Path) -> Result<Self> {
        let disk = File::open(image).with_context(|| format!("opening {}", image.display()))?;
        let offset = find_root(&disk).with_context(|| format!("reading {}", image.display()))?;
        // SAFETY: no memory or descriptor table is unshared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }
            .context("making a mount namespace")?;
        // The host's changes come in, so that we keep nothing of its busy; ours stay here.
        let downstream = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        mount_change("/", downstream).context("detaching mounts from the host's")?;
        // In this namespace, or it could not be bound here; before the tmpfs may hide it.
        let var = open_folder(rustix::fs::CWD, var)
            .with_context(|| format!("opening {}", var.display()))?;

        let systemd = Path::new("/run/systemd");
        let area = if systemd.is_dir() { systemd } else { Path::new("/run") };
        mount("tmpfs", area, "tmpfs", MountFlags::NODEV | MountFlags::NOSUID, c"mode=755")
            .with_context(|| format!("mounting a tmpfs on {}", area.display()))?;
        let root = Root { area: area.to_owned() };
        root.lay(&disk, offset, &var)?;
        Ok(root)
    }

    fn lay(&self, disk: &File, offset: u64, var: &OwnedFd) -> Result<()> {
        let root = self.path();
        let folders = ["", "root", "upper", "work", "credentials"];
        for name in folders {
            let path = self.folder().join(name);
            fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        }
        mount_image(disk, offset, &root)?;

        let etc = root.join("etc");
        let folder = self.folder();
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            etc.display(),
            folder.join("upper").display(),
            folder.join("work").display()
        );
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount("overlay", &etc, "overlay", flags, &*CString::new(options)?)
            .map_err(explain_overlay)?;

        let (from, to) = (format!("/proc/self/fd/{}", var.as_raw_fd()), root.join("var"));
        mount_bind(from, &to).context("binding the node's /var")?;
        mount_remount(&to, MountFlags::BIND | flags | MountFlags::NOATIME, c"")
            .context("protecting the node's /var")?;

        let id = provide_machine_id(var).context("keeping the machine's id on /var")?;
        let path = etc.join("machine-id");
        // The image's may be there and not be writable: it is replaced.
        let _ = fs::remove_file(&path);
        fs::write(&path, id)
            .and_then(|()| {
                fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o444))
            })
            .context("writing the machine's id")
    }

    fn folder(&self) -> PathBuf {
        self.area.join("stanchion")
    }

    /// Where it is mounted, for this process alone.
    pub fn path(&self) -> PathBuf {
        self.folder().join("root")
    }

    /// Keep a credential in memory, where the node's supervisor finds it.
    pub fn add_credential(&self, name: &str, bytes: &[u8]) -> Result<PathBuf> {
        use std::os::unix::fs::OpenOptionsExt;
        let path = self.folder().join("credentials").join(name);
        File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(bytes))
            .with_context(|| format!("keeping the credential {name}"))?;
        Ok(path)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = unmount(&self.area, UnmountFlags::DETACH);
    }
}

/// Bytes from the start of the disk to its root file system.
fn find_root(disk: &File) -> Result<u64> {
    let table = gpt::read(&Region::whole(disk)?)?;
    let slot = table.partitions.iter().find(|partition| partition.label == SLOT);
    slot.map(|slot| slot.start).with_context(|| format!("there is no partition {SLOT}"))
}

/// Mount the file system at `offset` of the disk: from the file itself, which Linux 6.16 and
/// later can, else through a loop device.
fn mount_image(disk: &File, offset: u64, on: &Path) -> Result<()> {
    let file = format!("/proc/self/fd/{}", disk.as_raw_fd());
    let options = CString::new(format!("fsoffset={offset}"))?;
    let Err(direct) = mount(file, on, "erofs", MountFlags::RDONLY, &*options) else {
        return Ok(());
    };
    let looped = match direct {
        Errno::NODEV => Err(io::Error::from(direct)),
        _ => mount_looped(disk, offset, on),
    };
    looped.map_err(|error| explain_erofs(direct, &error))
}

fn mount_looped(disk: &File, offset: u64, on: &Path) -> io::Result<()> {
    let control = File::options().read(true).write(true).open("/dev/loop-control")?;
    loop {
        // SAFETY: this verb takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = format!("/dev/loop{number}");
        let device = File::open(&path)?;
        match configure_loop(&device, disk, offset) {
            Ok(()) => return Ok(mount(&path, on, "erofs", MountFlags::RDONLY, c"")?),
            // Somebody else took it.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(error),
        }
    }
}

/// `struct loop_config`
#[repr(C)]
struct LoopConfig {
    file: u32,
    block_size: u32,
    numbers: [u64; 3],
    offset: u64,
    size_limit: u64,
    number: u32,
    encryption: [u32; 2],
    flags: u32,
    names: [u8; 160],
    init: [u64; 2],
    reserved: [u64; 8],
}

fn configure_loop(device: &File, disk: &File, offset: u64) -> io::Result<()> {
    let config = LoopConfig {
        file: disk.as_fd().as_raw_fd() as u32,
        block_size: 0,
        numbers: [0; 3],
        offset,
        size_limit: 0,
        number: 0,
        encryption: [0; 2],
        flags: LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR,
        names: [0; 160],
        init: [0; 2],
        reserved: [0; 8],
    };
    // SAFETY: the argument is laid out as the kernel's `struct loop_config`, which it reads.
    match unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn explain_erofs(direct: Errno, looped: &io::Error) -> anyhow::Error {
    let error = UserError::new("this machine cannot mount an image's root");
    match direct {
        Errno::NODEV => error
            .why("its kernel knows no erofs")
            .help("load the module `erofs`, or take a kernel with CONFIG_EROFS_FS"),
        _ => error.why(format!("from the file: {direct}; through a loop device: {looped}")).help(
            "take Linux 6.16 or later, or give this machine /dev/loop-control and /dev/loop*",
        ),
    }
    .into()
}

fn explain_overlay(error: Errno) -> anyhow::Error {
    match error {
        Errno::NODEV => UserError::new("this machine cannot mount a node's /etc")
            .why("its kernel knows no overlay file systems")
            .help("load the module `overlay`, or take a kernel with CONFIG_OVERLAY_FS")
            .into(),
        _ => anyhow!(error).context("mounting the node's /etc"),
    }
}

/// The id in `lib/stanchion/machine-id` with a newline, made when there is none. What a node
/// left on its `/var` is followed nowhere.
fn provide_machine_id(var: &OwnedFd) -> Result<String> {
    let mut folder = var.try_clone()?;
    for name in ["lib", "stanchion"] {
        match rustix::fs::mkdirat(&folder, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => folder = open_folder(&folder, Path::new(name))?,
            Err(error) => return Err(error.into()),
        }
    }
    let open = |name: &str, flags: OFlags| {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        rustix::fs::openat(&folder, name, flags, Mode::from_raw_mode(0o644)).map(File::from)
    };
    let mut id = String::new();
    if let Ok(file) = open("machine-id", OFlags::RDONLY)
        && file.take(64).read_to_string(&mut id).is_ok()
        && is_machine_id(id.trim_end())
    {
        return Ok(id);
    }
    let mut bytes = [0_u8; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    // A version 4 UUID, as `machine-id(5)` asks for.
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let id = format!("{:032x}\n", u128::from_be_bytes(bytes));
    let mut file = open("machine-id.new", OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC)?;
    file.write_all(id.as_bytes())?;
    file.sync_all()?;
    rustix::fs::renameat(&folder, "machine-id.new", &folder, "machine-id")?;
    Ok(id)
}

fn is_machine_id(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn open_folder(at: impl AsFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, path, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_id_is_made_once_and_kept() {
        let var = tempfile::tempdir().unwrap();
        let folder = open_folder(rustix::fs::CWD, var.path()).unwrap();
        let id = provide_machine_id(&folder).unwrap();
        assert!(is_machine_id(id.trim_end()) && id.ends_with('\n'), "{id}");
        assert_eq!(&id[12..13], "4");
        assert_eq!(provide_machine_id(&folder).unwrap(), id);
        fs::write(var.path().join("lib/stanchion/machine-id"), "rubbish").unwrap();
        assert_ne!(provide_machine_id(&folder).unwrap(), id);
    }

    #[test]
    fn a_link_that_a_node_left_leads_nowhere() {
        let (var, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink(host.path(), var.path().join("lib")).unwrap();
        let folder = open_folder(rustix::fs::CWD, var.path()).unwrap();
        provide_machine_id(&folder).unwrap_err();
        fs::remove_file(var.path().join("lib")).unwrap();
        fs::create_dir_all(var.path().join("lib/stanchion")).unwrap();
        let secret = host.path().join("secret");
        fs::write(&secret, "kept").unwrap();
        let lure = var.path().join("lib/stanchion/machine-id.new");
        std::os::unix::fs::symlink(&secret, lure).unwrap();
        provide_machine_id(&folder).unwrap_err();
        assert_eq!(fs::read_to_string(&secret).unwrap(), "kept");
    }
}
