//! What an image is made of: the manifest beside it, and the one inside.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::layers::Diff;
use crate::config::Format;
use crate::config::profile::Profile;
use crate::digest::Digest;
use crate::lock::{LockedPackage, LockedPython};
use crate::progress::StepTime;

/// An image before its root hash is known.
#[derive(Debug, Clone)]
pub struct Description {
    pub profile: String,
    /// `2026.11.20-1a2b3c4d`: the day of the lock's epoch, and the start of the key, which
    /// tells images of one day apart and does not order them.
    pub version: String,
    /// Digest of everything that goes into the image.
    pub key: Digest,
    pub layers: Vec<LayerEntry>,
    pub packages: Vec<PackageEntry>,
    pub artifacts: Vec<ArtifactEntry>,
    pub pythons: Vec<PythonEntry>,
    cmdline: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerEntry {
    pub name: String,
    /// `packages`, `build` or `files`.
    pub diff: String,
    pub key: Digest,
    pub blob: Digest,
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PackageEntry {
    pub name: String,
    pub version: String,
    pub sha256: Digest,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArtifactEntry {
    pub name: String,
    pub layer: String,
    pub sha256: Digest,
}

/// A distribution in a virtualenv.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PythonEntry {
    pub layer: String,
    pub name: String,
    pub version: String,
    pub sha256: Digest,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OutputEntry {
    pub format: Format,
    /// File name, beside the manifest.
    pub file: PathBuf,
    /// As sha256sum(1) gives it. None for a raw disk that was built by itself.
    pub sha256: Option<Digest>,
    /// Of a raw disk: the root hash that `veritysetup format --salt=- FILE TREE` prints.
    pub tree: Option<Digest>,
    pub bytes: u64,
    /// Bytes it takes on the disk; less than `bytes` when it has holes.
    pub allocated: u64,
    /// Nanoseconds since 1970: an output that was touched since is not trusted.
    pub modified: u64,
}

/// `out/NAME.manifest.json`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    pub stanchion: String,
    pub profile: String,
    pub version: String,
    pub key: Digest,
    pub epoch: u64,
    pub root_hash: Digest,
    pub root_bytes: u64,
    pub layers: Vec<LayerEntry>,
    pub packages: Vec<PackageEntry>,
    pub artifacts: Vec<ArtifactEntry>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pythons: Vec<PythonEntry>,
    pub outputs: Vec<OutputEntry>,
    pub steps: Vec<StepTime>,
}

/// What an image says of itself, at `/usr/share/stanchion/manifest.json`. Nothing in it
/// depends on where or when it was built.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InnerManifest {
    pub profile: String,
    pub version: String,
    pub layers: Vec<LayerEntry>,
    pub packages: Vec<PackageEntry>,
    pub artifacts: Vec<ArtifactEntry>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pythons: Vec<PythonEntry>,
}

impl Description {
    pub fn new(
        profile: &Profile,
        diffs: &[Diff],
        packages: &[&LockedPackage],
        pythons: &[&LockedPython],
        key: Digest,
        day: &str,
    ) -> Self {
        let layers = diffs
            .iter()
            .map(|diff| LayerEntry {
                name: diff.layer.clone(),
                diff: diff.name.rsplit(' ').next().unwrap_or_default().to_string(),
                key: diff.key.digest(),
                blob: diff.facts.blob_digest,
                bytes: diff.facts.blob_bytes,
            })
            .collect();
        let packages = packages
            .iter()
            .map(|package| PackageEntry {
                name: package.name.clone(),
                version: package.version.to_string(),
                sha256: package.sha256,
            })
            .collect();
        let artifacts = profile
            .layers
            .iter()
            .flat_map(|layer| {
                layer.artifacts.iter().map(|artifact| ArtifactEntry {
                    name: artifact.name.clone(),
                    layer: layer.name.clone(),
                    sha256: artifact.sha256,
                })
            })
            .collect();
        Description {
            profile: profile.name.clone(),
            version: format!("{day}-{}", &key.to_string()[..8]),
            key,
            layers,
            packages,
            artifacts,
            pythons: list_distributions(pythons),
            cmdline: profile.cmdline.clone(),
        }
    }

    /// os-release(5).
    pub fn write_os_release(&self) -> String {
        let Description { profile, version, .. } = self;
        format!(
            "PRETTY_NAME=\"Stanchion {profile} {version}\"\n\
             NAME=\"Stanchion\"\n\
             ID=stanchion\n\
             ID_LIKE=debian\n\
             VERSION_ID=13\n\
             VERSION_CODENAME=trixie\n\
             IMAGE_ID={profile}\n\
             IMAGE_VERSION={version}\n\
             DEFAULT_HOSTNAME=stanchion\n"
        )
    }

    pub fn write_cmdline(&self, root_hash: &Digest) -> String {
        let mut words = vec![format!("roothash={root_hash}")];
        words.extend(self.cmdline.iter().cloned());
        words.join(" ")
    }

    pub fn write_inner_manifest(&self) -> Result<String> {
        let inner = InnerManifest {
            profile: self.profile.clone(),
            version: self.version.clone(),
            layers: self.layers.clone(),
            packages: self.packages.clone(),
            artifacts: self.artifacts.clone(),
            pythons: self.pythons.clone(),
        };
        Ok(serde_json::to_string_pretty(&inner).context("writing the image's manifest")? + "\n")
    }
}

fn list_distributions(pythons: &[&LockedPython]) -> Vec<PythonEntry> {
    let list = |python: &&LockedPython| {
        let layer = python.layer.clone();
        python.distributions.clone().into_iter().map(move |one| PythonEntry {
            layer: layer.clone(),
            name: one.name,
            version: one.version,
            sha256: one.sha256,
        })
    };
    pythons.iter().flat_map(list).collect()
}

impl Manifest {
    /// The file name of a profile's manifest.
    pub fn name(profile: &str) -> PathBuf {
        format!("{profile}.manifest.json").into()
    }

    /// The manifest of an earlier build, if it can be read.
    pub fn load(out: &Path, profile: &str) -> Option<Self> {
        let bytes = std::fs::read(out.join(Self::name(profile))).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    pub fn save(&self, out: &Path) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(self).context("writing the manifest")?;
        crate::store::write_atomically(&out.join(Self::name(&self.profile)), &bytes)
    }
}
