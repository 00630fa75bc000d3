//! Programs that are not crates (mkfs.erofs, veritysetup, qemu-img, QEMU), run from a
//! tools root that is made of locked Debian packages: the host needs none of them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::command::Command;
use crate::error::UserError;
use crate::lock::SetRequest;

/// An extracted tree of Debian packages whose programs can be run where they lie.
#[derive(Debug, Clone)]
pub struct Tools {
    root: PathBuf,
}

impl Tools {
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Tools { root: root.into() }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The key under which the store has it, the same wherever the store is.
    pub fn name(&self) -> &[u8] {
        self.root.file_name().unwrap_or_default().as_encoded_bytes()
    }

    /// A command that runs `program` with the tools root's own loader and libraries, so
    /// that neither a chroot nor the host's libc is needed (`ld.so(8)`).
    pub fn command(&self, program: &str) -> Result<Command> {
        let path = ["usr/bin", "usr/sbin", "usr/lib/systemd"]
            .iter()
            .map(|folder| self.root.join(folder).join(program))
            .find(|path| path.is_file())
            .ok_or_else(|| {
                UserError::new(format!("the tools root has no program `{program}`"))
                    .in_file(&self.root)
                    .help("remove this folder; the next build makes it anew")
            })?;
        Ok(Command::new(self.root.join("usr/lib64/ld-linux-x86-64.so.2"))
            .arg("--library-path")
            .arg(self.list_libraries())
            .arg("--argv0")
            .arg(program)
            .arg(path)
            .env("LC_ALL", "C.UTF-8"))
    }

    /// The second folder holds what systemd's programs share.
    fn list_libraries(&self) -> OsString {
        let libraries = self.root.join("usr/lib/x86_64-linux-gnu");
        let mut list = libraries.clone().into_os_string();
        list.push(":");
        list.push(libraries.join("systemd"));
        list
    }
}

/// Sets of tools, each made into a root of its own when it is needed.
pub mod set {
    /// What every build needs.
    pub const BUILD: &str = "tools:build";
    /// What booting an image on this machine needs.
    pub const BOOT: &str = "tools:boot";
    /// Independent readers of what we write, for tests.
    pub const CHECK: &str = "tools:check";
    /// What asks Python's index.
    pub const PYTHON: &str = "tools:python";
    /// What a lab's nodes run in.
    pub const LAB: &str = "tools:lab";
}

/// What the lock must hold for the tools.
pub fn list_requests() -> Vec<SetRequest> {
    let sets: [(&str, &[&str]); 4] = [
        (set::BUILD, &["erofs-utils", "kmod", "qemu-utils", "systemd-boot-efi"]),
        (set::BOOT, &["ovmf", "qemu-system-x86"]),
        (
            set::CHECK,
            &[
                "apt",
                "cpio",
                "cryptsetup-bin",
                "dosfstools",
                "fdisk",
                "gpgv",
                "mtools",
                "systemd-ukify",
                "xorriso",
            ],
        ),
        (set::LAB, &["systemd-container"]),
    ];
    sets.iter().map(|(name, wanted)| request_set(name, wanted)).collect()
}

/// What the lock must hold besides where a layer has a virtualenv.
pub fn request_python() -> SetRequest {
    request_set(set::PYTHON, &["ca-certificates", "python3-pip", "python3-setuptools"])
}

fn request_set(name: &str, wanted: &[&str]) -> SetRequest {
    SetRequest {
        name: name.to_string(),
        parent: None,
        wanted: wanted.iter().map(|name| name.to_string()).collect(),
        provides: Vec::new(),
        recommends: false,
        essential: false,
    }
}

/// Whether a build can do without the set.
pub fn is_optional(set: &str) -> bool {
    [set::BOOT, set::CHECK, set::LAB, set::PYTHON].contains(&set)
}
