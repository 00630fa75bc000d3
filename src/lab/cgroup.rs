//! Control groups: each node has one, so that it can be frozen, and so that a lab's processes
//! are known and killed by where they are, whatever they are called.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::process::{self, Process};
use crate::error::UserError;

/// Far more than the kernel takes for a few hundred processes.
const LIMIT: Duration = Duration::from_secs(20);

/// The hierarchies of this machine that a group must be in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchies {
    /// cgroup v2.
    unified: PathBuf,
    /// On a machine with v1 beside it: the one without controllers, which systemd looks for.
    named: Option<PathBuf>,
}

/// A group by its path in every hierarchy; it need not exist.
#[derive(Debug, Clone)]
pub struct Group {
    unified: PathBuf,
    named: Option<PathBuf>,
}

impl Hierarchies {
    /// # Errors
    /// A [`UserError`] when this machine has no cgroup v2.
    pub fn find() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("listing mounts")?;
        parse_mounts(&mounts).ok_or_else(|| {
            UserError::new("this machine cannot run a lab")
                .why("no cgroup v2 hierarchy is mounted")
                .help("mount -t cgroup2 none /sys/fs/cgroup/unified")
                .into()
        })
    }

    pub fn name_group(&self, name: &str) -> Group {
        Group {
            unified: self.unified.join(name),
            named: self.named.as_ref().map(|named| named.join(name)),
        }
    }
}

impl Group {
    pub fn name_child(&self, name: &str) -> Group {
        Group {
            unified: self.unified.join(name),
            named: self.named.as_ref().map(|named| named.join(name)),
        }
    }

    fn list_folders(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.unified].into_iter().chain(&self.named)
    }

    /// Make it and those it lies in; no matter if they exist.
    pub fn create(&self) -> Result<()> {
        for folder in self.list_folders() {
            fs::create_dir_all(folder).map_err(|error| match error.kind() {
                io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
                    UserError::new("this machine cannot run a lab")
                        .in_file(folder)
                        .why(format!("a control group cannot be made: {error}"))
                        .help("in a container: give it a writable /sys/fs/cgroup")
                        .into()
                }
                _ => anyhow::Error::new(error).context(format!("making {}", folder.display())),
            })?;
        }
        if !self.unified.join("cgroup.kill").exists() {
            return Err(UserError::new("this machine cannot run a lab")
                .why("its kernel cannot kill a control group")
                .help("take Linux 5.14 or later")
                .into());
        }
        Ok(())
    }

    /// Let groups in it have limits, where the machine gives controllers away.
    pub fn delegate(&self) {
        let given = fs::read_to_string(self.unified.join("cgroup.controllers"));
        for controller in given.unwrap_or_default().split_ascii_whitespace() {
            // One that processes elsewhere keep busy is not to be had.
            let _ =
                fs::write(self.unified.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }

    /// Files through which a process enters: it writes `0`.
    pub fn open_doors(&self) -> Result<Vec<File>> {
        self.list_folders()
            .map(|folder| {
                let door = folder.join("cgroup.procs");
                File::options()
                    .write(true)
                    .open(&door)
                    .with_context(|| format!("opening {}", door.display()))
            })
            .collect()
    }

    pub fn set_frozen(&self, frozen: bool) -> Result<()> {
        let path = self.unified.join("cgroup.freeze");
        fs::write(&path, if frozen { "1" } else { "0" })
            .with_context(|| format!("writing {}", path.display()))?;
        let settled = || self.read_event("frozen") == Some(frozen);
        match process::wait_until(LIMIT, settled) {
            true => Ok(()),
            false => bail!("{} does not become frozen={frozen}", self.unified.display()),
        }
    }

    pub fn exists(&self) -> bool {
        self.unified.is_dir()
    }

    /// Whether all processes in it stand still.
    pub fn is_frozen(&self) -> bool {
        self.read_event("frozen") == Some(true)
    }

    /// A line of `cgroup.events`. `None`: there is no such group.
    fn read_event(&self, name: &str) -> Option<bool> {
        let events = fs::read_to_string(self.unified.join("cgroup.events")).ok()?;
        let value = events.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        Some(value == "1")
    }

    /// Kill every process in it and in the groups in it, frozen or not, and wait until they
    /// are gone.
    pub fn kill(&self) -> Result<()> {
        let path = self.unified.join("cgroup.kill");
        match fs::write(&path, "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            written => written.with_context(|| format!("writing {}", path.display()))?,
        }
        let empty = || self.read_event("populated") != Some(true);
        if process::wait_until(LIMIT, empty) {
            return Ok(());
        }
        bail!("processes in {} outlive SIGKILL", self.unified.display())
    }

    /// Remove it with the groups in it, all without processes.
    pub fn remove(&self) -> Result<()> {
        for folder in self.list_folders() {
            let mut last = Ok(());
            // A process that has ended leaves its group a moment later.
            process::wait_until(LIMIT, || {
                last = remove_folders(folder);
                last.is_ok()
            });
            last.with_context(|| format!("removing {}", folder.display()))?;
        }
        Ok(())
    }

    /// The processes in it and in the groups in it.
    pub fn list_processes(&self) -> Vec<Process> {
        let mut found = Vec::new();
        collect_processes(&self.unified, &mut found);
        found
    }
}

/// Enter the group whose doors these are; async-signal-safe.
pub fn enter(doors: &[File]) -> io::Result<()> {
    doors.iter().try_for_each(|mut door| door.write_all(b"0"))
}

fn remove_folders(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_folders(&entry.path())?;
        }
    }
    fs::remove_dir(folder)
}

fn collect_processes(folder: &Path, found: &mut Vec<Process>) {
    let listed = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    found.extend(listed.lines().filter_map(|pid| Process::find(pid.parse().ok()?)));
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_processes(&entry.path(), found);
        }
    }
}

/// `proc_pid_mountinfo(5)`.
fn parse_mounts(mounts: &str) -> Option<Hierarchies> {
    let (mut unified, mut named) = (None, None);
    for line in mounts.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let Some(place) = before.split(' ').nth(4).map(PathBuf::from) else { continue };
        let mut after = after.split(' ');
        match (after.next(), after.nth(1)) {
            (Some("cgroup2"), _) => unified = unified.or(Some(place)),
            (Some("cgroup"), Some(options))
                if options.split(',').any(|option| option == "name=systemd") =>
            {
                named = named.or(Some(place));
            }
            _ => {}
        }
    }
    Some(Hierarchies { unified: unified?, named })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_on_unified_and_on_hybrid_machines() {
        let unified =
            "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = parse_mounts(unified).unwrap();
        assert_eq!(found.unified, Path::new("/sys/fs/cgroup"));
        assert_eq!(found.named, None);

        let hybrid = "31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
            32 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n";
        let found = parse_mounts(hybrid).unwrap();
        assert_eq!(found.unified, Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(found.named.as_deref(), Some(Path::new("/sys/fs/cgroup/systemd")));
        assert_eq!(parse_mounts("1 2 0:3 / /proc rw - proc proc rw\n"), None);
    }
}
