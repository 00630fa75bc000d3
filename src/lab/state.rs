//! What is known of a lab on disk, enough to take it down when nothing else is left of it.
//!
//! ```text
//! labs/NAME/lab.json           the lab as it was asked for
//! labs/NAME/cluster.toml       its cluster, where it has one, and
//! labs/NAME/cluster/           that cluster's CA and secrets
//! labs/NAME/backups/           what its nodes share for their backups, where they make any
//! labs/NAME/network            its network namespace, mounted
//! labs/NAME/nodes/NODE/var/    the node's /var
//! labs/NAME/nodes/NODE/...     its console, its seed, and what runs while it runs
//! ```

use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::cgroup::{Group, Hierarchies};
use super::nspawn::Nspawn;
use super::process;
use crate::config::cluster::{Cluster, Ipv4Network};
use crate::digest::Digest;
use crate::error::UserError;
use crate::store;

const FORMAT: u32 = 1;
/// Until another command has done what it is doing to the lab.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where labs are kept, and the program that keeps their nodes.
#[derive(Debug, Clone)]
pub struct Places {
    pub labs: PathBuf,
    /// An executable that calls [`serve_if_asked`](super::serve_if_asked).
    pub program: PathBuf,
}

impl Places {
    /// `$XDG_STATE_HOME/stanchion/labs`, and this executable.
    pub fn find() -> Result<Self> {
        let absolute = |name: &str| {
            std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
        };
        let state = absolute("XDG_STATE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
            .ok_or_else(|| {
                UserError::new("there is no place for a lab's state")
                    .why("neither XDG_STATE_HOME nor HOME is an absolute path")
                    .help("set XDG_STATE_HOME to a directory")
            })?;
        Ok(Places { labs: state.join("stanchion/labs"), program: "/proc/self/exe".into() })
    }

    /// The names of labs that are there, whole or in part, sorted.
    pub fn list_names(&self) -> Result<Vec<String>> {
        let entries = match fs::read_dir(&self.labs) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| format!("listing {}", self.labs.display()))?,
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| is_name(name))
            .collect();
        names.sort();
        Ok(names)
    }

    /// # Errors
    /// A [`UserError`] when it is no name of a lab: it becomes a part of paths.
    pub fn find_folder(&self, name: &str) -> Result<Folder> {
        if !is_name(name) {
            return Err(UserError::new(format!("`{name}` is no name of a lab"))
                .help("a name has lower-case letters, digits and `-`, at most 40")
                .into());
        }
        Ok(Folder { path: self.labs.join(name), name: name.to_string() })
    }
}

/// Lower-case letters, digits and `-`, at most 40.
pub fn is_name(name: &str) -> bool {
    name.len() <= 40
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// The folder of one lab, which need not exist, and what follows from its path alone.
#[derive(Debug, Clone)]
pub struct Folder {
    pub path: PathBuf,
    pub name: String,
}

impl Folder {
    pub fn exists(&self) -> bool {
        self.path.is_dir()
    }

    /// For root alone: seeds hold secrets.
    pub fn create(&self) -> Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(self.path.join("nodes"))
            .with_context(|| format!("making {}", self.path.display()))
    }

    pub fn pin(&self) -> PathBuf {
        self.path.join("network")
    }

    /// The CA and the secrets of its cluster.
    pub fn secrets(&self) -> PathBuf {
        self.path.join("cluster")
    }

    pub fn cluster_file(&self) -> PathBuf {
        self.path.join("cluster.toml")
    }

    /// What the nodes have as the directory of their backups.
    pub fn backups(&self) -> PathBuf {
        self.path.join("backups")
    }

    pub fn node(&self, name: &str) -> NodeFolder {
        NodeFolder(self.path.join("nodes").join(name))
    }

    /// The lab's name among all labs of the machine, wherever their state is kept.
    pub fn name_group(&self) -> Result<String> {
        let path = std::path::absolute(&self.path).context("finding the lab's folder")?;
        let digest = Digest::of(path.as_os_str().as_bytes());
        Ok(format!("stanchion-lab-{}-{}", self.name, digest.short()))
    }

    pub fn find_group(&self) -> Result<Group> {
        Ok(Hierarchies::find()?.name_group(&self.name_group()?))
    }

    pub fn save(&self, state: &State) -> Result<()> {
        store::write_atomically(&self.path.join("lab.json"), &serde_json::to_vec_pretty(state)?)
    }

    /// # Errors
    /// A [`UserError`] when there is no such lab, or only a part of one.
    pub fn load(&self) -> Result<State> {
        if !self.exists() {
            return Err(UserError::new(format!("there is no lab `{}`", self.name))
                .help("stanchion lab up")
                .into());
        }
        let path = self.path.join("lab.json");
        let broken = |why: String| {
            UserError::new(format!("the lab `{}` is there only in part", self.name))
                .in_file(&path)
                .why(why)
                .help(format!("stanchion lab down --name {}", self.name))
        };
        let bytes = fs::read(&path).map_err(|error| broken(error.to_string()))?;
        let state: State =
            serde_json::from_slice(&bytes).map_err(|error| broken(error.to_string()))?;
        match state.format {
            FORMAT => Ok(state),
            _ => Err(broken("another version of stanchion made it".to_string()).into()),
        }
    }

    /// Keep others from changing the lab (`exclusive`), or from taking it down.
    pub fn lock(&self, exclusive: bool) -> Result<File> {
        lock(&self.path, exclusive, &format!("the lab `{}`", self.name))
    }
}

/// The folder of one node.
#[derive(Debug, Clone)]
pub struct NodeFolder(PathBuf);

impl NodeFolder {
    pub fn create(&self) -> Result<()> {
        fs::create_dir_all(self.var()).with_context(|| format!("making {}", self.var().display()))
    }

    pub fn var(&self) -> PathBuf {
        self.0.join("var")
    }

    pub fn seed(&self) -> PathBuf {
        self.0.join("seed.json")
    }

    /// The address that a node without a seed gets.
    pub fn address(&self) -> PathBuf {
        self.0.join("address.network")
    }

    pub fn console(&self) -> PathBuf {
        self.0.join("console.log")
    }

    pub fn running(&self) -> PathBuf {
        self.0.join("running.json")
    }

    /// There while the node is cut off the network.
    pub fn partitioned(&self) -> PathBuf {
        self.0.join("partitioned")
    }

    /// Keep others from starting or ending the node.
    pub fn lock(&self, name: &str) -> Result<File> {
        lock(&self.0, true, &format!("node `{name}`"))
    }
}

fn lock(folder: &Path, exclusive: bool, what: &str) -> Result<File> {
    let file = File::open(folder).with_context(|| format!("opening {}", folder.display()))?;
    let operation = match exclusive {
        true => FlockOperation::NonBlockingLockExclusive,
        false => FlockOperation::NonBlockingLockShared,
    };
    if process::wait_until(PATIENCE, || rustix::fs::flock(&file, operation).is_ok()) {
        return Ok(file);
    }
    Err(UserError::new(format!("another command is busy with {what}"))
        .why(format!("it holds {} for more than {} s", folder.display(), PATIENCE.as_secs()))
        .into())
}

/// `lab.json`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    format: u32,
    pub name: String,
    pub network: Ipv4Network,
    pub nspawn: Nspawn,
    pub nodes: Vec<NodeState>,
    /// What its nodes have seeds of.
    pub cluster: Option<Cluster>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeState {
    pub name: String,
    pub address: Ipv4Addr,
    /// The raw disk, absolute.
    pub image: PathBuf,
    /// What nspawn calls it.
    pub machine: String,
}

impl State {
    pub fn new(
        name: &str,
        network: Ipv4Network,
        nspawn: Nspawn,
        nodes: Vec<NodeState>,
        cluster: Option<Cluster>,
    ) -> Self {
        State { format: FORMAT, name: name.to_string(), network, nspawn, nodes, cluster }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(folder: &Path) -> Places {
        Places { labs: folder.to_owned(), program: "/proc/self/exe".into() }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let places = places(Path::new("/nowhere"));
        for name in ["", "..", "a/b", "A", "-a", &"a".repeat(41)] {
            assert!(places.find_folder(name).is_err(), "{name}");
        }
        places.find_folder("ci-7").unwrap();
    }

    #[test]
    fn labs_of_one_name_in_two_places_have_groups_of_their_own() {
        let name =
            |at: &str| places(Path::new(at)).find_folder("lab").unwrap().name_group().unwrap();
        assert_eq!(name("/a"), name("/a"));
        assert_ne!(name("/a"), name("/b"));
        assert!(name("/a").starts_with("stanchion-lab-lab-"));
    }

    #[test]
    fn a_lab_that_is_there_in_part_says_how_to_be_rid_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let lab = places(folder.path()).find_folder("half").unwrap();
        let error = lab.load().unwrap_err().to_string();
        assert!(error.contains("there is no lab `half`"), "{error}");
        lab.create().unwrap();
        let error = lab.load().unwrap_err().to_string();
        assert!(error.contains("stanchion lab down --name half"), "{error}");
        assert_eq!(places(folder.path()).list_names().unwrap(), ["half"]);
    }
}
