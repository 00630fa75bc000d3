//! Where things are on a node. Tests put everything under a folder of their own.

use std::path::{Path, PathBuf};

/// Folders and files, all under one root.
#[derive(Debug, Clone)]
pub struct Places {
    root: PathBuf,
}

impl Places {
    /// `/` on a node.
    pub fn under(root: impl Into<PathBuf>) -> Self {
        Places { root: root.into() }
    }

    /// An absolute path of the node, under the root.
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Where systemd puts the credential that the agent's unit imports. Those of the machine
    /// itself are hidden from a unit with a file system view of its own.
    pub fn credential(&self) -> PathBuf {
        self.join("/run/credentials/stanchion-agent.service/stanchion.seed")
    }

    /// Block devices by the label of the file system on them.
    pub fn volume(&self, label: &str) -> PathBuf {
        self.join("/dev/disk/by-label").join(label)
    }

    /// What the agent keeps across boots.
    pub fn state(&self) -> PathBuf {
        self.join("/var/lib/stanchion")
    }

    pub fn identity(&self) -> PathBuf {
        self.state().join("identity.json")
    }

    /// What the node has written down about its membership of etcd.
    pub fn etcd_record(&self) -> PathBuf {
        self.state().join("etcd.json")
    }

    /// What is gone with the next boot.
    pub fn run(&self) -> PathBuf {
        self.join("/run/stanchion")
    }

    pub fn tls(&self) -> PathBuf {
        self.run().join("tls")
    }

    /// Where `stanchion-agent status` asks.
    pub fn socket(&self) -> PathBuf {
        self.run().join("agent.sock")
    }

    /// The layers' templates, one folder a layer.
    pub fn templates(&self) -> PathBuf {
        self.join("/usr/share/stanchion/boot")
    }

    /// Files that wait for their service's own check.
    pub fn candidates(&self) -> PathBuf {
        self.run().join("candidates")
    }

    pub fn etcd_data(&self) -> PathBuf {
        self.join("/var/lib/etcd")
    }

    /// Units that have not taken in their changed files yet.
    pub fn untold(&self) -> PathBuf {
        self.run().join("untold.json")
    }

    /// Where systemd puts the credentials that the machine was given.
    pub fn machine_credential(&self) -> PathBuf {
        self.join("/run/credentials/@system/stanchion.seed")
    }
}
