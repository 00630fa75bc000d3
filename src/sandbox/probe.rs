//! Tries what the sandbox needs, and says what is missing and how to mend it.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::inside::Inside;
use super::{Sandbox, Spec, child, idmap, mounts};
use crate::error::UserError;
use crate::store::{self, Scratch};

/// One thing the sandbox needs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Check {
    pub name: String,
    pub ok: bool,
    /// What was found.
    pub detail: String,
    /// What to do when it is not `ok`.
    pub mend: String,
}

impl Check {
    fn pass(name: &str, detail: impl Into<String>) -> Self {
        Check { name: name.into(), ok: true, detail: detail.into(), mend: String::new() }
    }

    fn fail(name: &str, error: &anyhow::Error, mend: &str) -> Self {
        let user = error.downcast_ref::<UserError>();
        let detail = user.map_or_else(|| format!("{error:#}"), UserError::summary);
        let mend = user.and_then(UserError::advice).unwrap_or(mend).to_string();
        Check { name: name.into(), ok: false, detail, mend }
    }
}

impl Sandbox {
    /// Try everything on the file system of `directory`, which must be writable. The first
    /// thing that is missing hides what depends on it.
    pub fn probe(&self, directory: &Path) -> Vec<Check> {
        let mut checks = Vec::new();
        match idmap::IdMap::plan() {
            Ok(ids) => checks.push(Check::pass("ids", ids.describe())),
            Err(error) => {
                checks.push(Check::fail("ids", &error, ""));
                return checks;
            }
        }
        let scratch = match make_scratch(directory) {
            Ok(scratch) => scratch,
            Err(error) => {
                checks.push(Check::fail("directory", &error, "make it writable to this user"));
                return checks;
            }
        };
        match self.try_job(scratch.path()) {
            Ok(found) => {
                checks.push(Check::pass("namespaces", "user, mount, pid, ipc, uts, network"));
                checks.extend(found);
            }
            Err(error) => checks.push(Check::fail("namespaces", &error, "")),
        }
        checks
    }

    /// All of [`Sandbox::probe`] in one error.
    pub fn require(&self, directory: &Path) -> Result<()> {
        let failed: Vec<_> = self.probe(directory).into_iter().filter(|check| !check.ok).collect();
        if failed.is_empty() {
            return Ok(());
        }
        let list = |part: fn(&Check) -> String| {
            failed.iter().map(part).filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n")
        };
        Err(UserError::new("this machine cannot run the sandbox")
            .why(list(|check| format!("{}: {}", check.name, check.detail)))
            .help(list(|check| check.mend.clone()))
            .into())
    }

    fn try_job(&self, scratch: &Path) -> Result<Vec<Check>> {
        let path = serde_json::to_value(scratch)?;
        let found: Value = self.start(&Spec::default(), child::PROBE, path, &mut |_| ())?;
        serde_json::from_value(found).context("reading what the probe found")
    }
}

/// What is left in it when it is dropped is this user's own.
fn make_scratch(directory: &Path) -> Result<Scratch> {
    const PREFIX: &str = ".probe-";
    let directory = std::path::absolute(directory)?;
    store::sweep_scratch(&directory, PREFIX);
    store::make_scratch(&directory, PREFIX, "sandbox")
}

/// The worker's part: an overlay, a file capability on it, and a program's way into it.
pub fn try_inside(directory: &Path) -> Vec<Check> {
    let mut checks = Vec::new();
    let spec = Spec {
        lower: vec![directory.join("lower")],
        upper: Some(directory.join("upper")),
        work: Some(directory.join("work")),
        merged: Some(directory.join("merged")),
        ..Spec::default()
    };
    match try_overlay(directory, &spec) {
        Ok(()) => checks.push(Check::pass("overlay", "userxattr, on the store's file system")),
        Err(error) => {
            checks.push(Check::fail("overlay", &error, OVERLAY_MEND));
            return checks;
        }
    }
    let root = directory.join("merged").join(mounts::ROOT);
    checks.push(match try_capability(&root) {
        Ok(()) => Check::pass("file capabilities", "kept"),
        Err(error) => Check::fail("file capabilities", &error, OVERLAY_MEND),
    });
    checks.push(
        match fs::File::open("/dev/null")
            .map_err(Into::into)
            .and_then(|events| Inside::new(spec, events).try_to_enter())
        {
            Ok(true) => Check::pass("root and /proc", "pivot_root, a fresh /proc"),
            Ok(false) => Check::pass("root and /proc", "pivot_root, the /proc of the host"),
            Err(error) => {
                Check::fail("root and /proc", &error, "update the kernel to 5.12 or later")
            }
        },
    );
    // The overlay's work directory is not the user's to remove from outside.
    let _ = store::remove_tree(&directory.join("work"));
    checks
}

const OVERLAY_MEND: &str = "use Linux 5.11 or later, and put the store on a local ext4, xfs or \
     btrfs: set XDG_CACHE_HOME";

fn try_overlay(directory: &Path, spec: &Spec) -> Result<()> {
    for name in ["lower", "upper", "merged"] {
        fs::create_dir(directory.join(name))?;
    }
    fs::write(directory.join("lower/file"), "below")?;
    mounts::prepare(spec)?;
    let root = directory.join("merged").join(mounts::ROOT);
    let file = root.join("file");
    fs::write(&file, "above").context("changing a file of the lower side")?;
    fs::remove_file(&file).context("deleting a file of the lower side")
}

/// `capabilities(7)`, "File capability extended attribute versioning": version 2,
/// `cap_net_raw+ep`.
fn try_capability(root: &Path) -> Result<()> {
    let file = root.join("capable");
    fs::write(&file, "")?;
    let mut value = [0_u8; 20];
    value[..4].copy_from_slice(&0x0200_0001_u32.to_le_bytes());
    value[4..8].copy_from_slice(&(1_u32 << 13).to_le_bytes());
    rustix::fs::setxattr(&file, "security.capability", &value, XattrFlags::empty())
        .context("setting security.capability")?;
    let mut read = [0_u8; 64];
    let length = rustix::fs::getxattr(&file, "security.capability", &mut read)?;
    match read[..length] == value {
        true => Ok(()),
        false => Err(anyhow!("security.capability came back as something else")),
    }
}

/// Why the kernel refuses new namespaces.
pub fn explain_unshare(errno: Errno) -> UserError {
    let error = UserError::new("the kernel refuses new namespaces");
    let why = io::Error::from(errno).to_string();
    if errno == Errno::NOSPC || read_sysctl("user/max_user_namespaces") == Some(0) {
        return error
            .why(format!("{why} (a limit on their number)"))
            .help("sudo sysctl -w user.max_user_namespaces=15000");
    }
    if read_sysctl("kernel/unprivileged_userns_clone") == Some(0) {
        return error
            .why(format!("{why} (kernel.unprivileged_userns_clone is 0)"))
            .help("sudo sysctl -w kernel.unprivileged_userns_clone=1");
    }
    error.why(why).help(
        "in a container: allow user namespaces in its seccomp profile (Docker: \
         --security-opt seccomp=unconfined); in a chroot: none are possible, leave it",
    )
}

/// Why the first mount in namespaces of our own fails: they gave no rights. Ubuntu 24.04
/// does this by AppArmor to every program without a profile.
pub fn explain_first_mount(found: io::Error) -> UserError {
    let error = UserError::new("the new namespaces give no rights in them");
    if read_sysctl("kernel/apparmor_restrict_unprivileged_userns") == Some(1) {
        return error
            .why(format!("{found} (AppArmor: kernel.apparmor_restrict_unprivileged_userns is 1)"))
            .help("sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0");
    }
    error
        .why(format!("the first mount: {found}"))
        .help("look for a denial by AppArmor, SELinux or seccomp in the kernel's log (sudo dmesg)")
}

fn read_sysctl(name: &str) -> Option<u32> {
    fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?.trim().parse().ok()
}
