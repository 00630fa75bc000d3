//! Each layer's diffs: from the store, or built in the sandbox and stored.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::agent;
use super::placing::place;
use super::sets;
use super::source::Source;
use super::unpacked::add_packages;
use crate::config::layer::{self as config, Layer};
use crate::config::profile::Profile;
use crate::config::tree::TreeFile;
use crate::digest::{Digest, Key};
use crate::disk::guid::Guid;
use crate::disk::{erofs, verity};
use crate::lock::{self, Lock, LockedPackage};
use crate::progress::Step;
use crate::rootfs::accounts::{Account, UserFields};
use crate::rootfs::layer::{Artifact, Common, Deb, FilesJob, PackagesJob, Sealed, StandIn};
use crate::sandbox::{Sandbox, Spec};
use crate::store::Scratch;
use crate::tools::Tools;

/// Raised when a step would make other bytes from the same inputs.
const PACKAGES_VERSION: u32 = 4;
const FILES_VERSION: u32 = 1;

pub const PACKAGES_JOB: &str = "layer/packages";
pub const FILES_JOB: &str = "layer/files";

/// One diff in the store.
#[derive(Debug, Clone)]
pub struct Diff {
    /// `postgres packages`
    pub name: String,
    pub layer: String,
    pub key: Key,
    /// Changes over the diffs below, as an overlay's upper side.
    pub tree: PathBuf,
    pub blob: PathBuf,
    /// Verity leaves of the blob: 32 bytes for each 4096.
    pub leaves: PathBuf,
    pub facts: Facts,
}

/// What the store remembers of a diff.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Facts {
    pub sealed: Sealed,
    pub blob_digest: Digest,
    pub blob_bytes: u64,
}

pub struct LayerBuilder<'a> {
    pub source: &'a Source,
    pub lock: &'a Lock,
    pub tools: &'a Tools,
    pub sandbox: Sandbox,
    pub debug_shell: bool,
}

/// What the layers up to one have in common for the next.
#[derive(Clone, Default)]
pub(super) struct Below {
    pub trees: Vec<PathBuf>,
    pub key: Option<Digest>,
    pub exclude: Vec<String>,
    pub accounts: Vec<Account>,
}

impl Below {
    fn push(&mut self, key: &Key, tree: PathBuf) {
        self.trees.push(tree);
        self.key = Some(key.digest());
    }

    /// As [`Below::push`], for a diff whose own key says nothing of what lies below it.
    fn push_stage(&mut self, stage: &Key, tree: PathBuf) {
        let mut key = Key::new("over", 1);
        key.add("below", self.key.map(|key| key.to_string()).unwrap_or_default());
        key.add("build", stage.digest().as_bytes());
        self.push(&key, tree);
    }
}

/// Describes the sandbox's work, given a scratch folder.
pub(super) type Describe<'a> = Box<dyn FnOnce(&Path, &Step) -> Result<(&'static str, Value)> + 'a>;

/// A diff of which the inputs are known, and how to make it.
pub(super) struct Planned<'a> {
    pub layer: &'a Layer,
    /// `packages`, `build` or `files`.
    pub what: &'static str,
    pub key: Key,
    pub below: &'a Below,
    /// What it is made of.
    pub packages: Vec<&'a LockedPackage>,
    pub describe: Describe<'a>,
}

impl Planned<'_> {
    /// `postgres packages`
    pub fn name(&self) -> String {
        format!("{} {}", self.layer.name, self.what)
    }
}

impl LayerBuilder<'_> {
    /// All diffs of the profile, bottom first.
    pub fn build(&self, profile: &Profile) -> Result<Vec<Diff>> {
        let mut diffs = Vec::new();
        self.walk(profile, |planned| {
            let diff = self.provide(planned)?;
            let tree = diff.tree.clone();
            diffs.push(diff);
            Ok(tree)
        })?;
        Ok(diffs)
    }

    /// Names and keys of all diffs of the profile, bottom first; nothing is built.
    pub fn list_keys(&self, profile: &Profile) -> Result<Vec<(String, Key)>> {
        let mut keys = Vec::new();
        self.walk(profile, |planned| {
            keys.push((planned.name(), planned.key));
            Ok(PathBuf::new())
        })?;
        Ok(keys)
    }

    /// Whether the store has the diff of this key, whole.
    pub fn has(&self, key: &Key) -> bool {
        let entry = self.source.store.find_entry("layer", &key.digest());
        entry.is_some_and(|entry| {
            open_diff(String::new(), String::new(), key.clone(), &entry).is_ok()
        })
    }

    /// Visit all diffs in the order in which they lie on each other. `visit` tells where the
    /// diff's tree is.
    fn walk(
        &self,
        profile: &Profile,
        mut visit: impl FnMut(Planned<'_>) -> Result<PathBuf>,
    ) -> Result<()> {
        let mut lay = |planned: Option<Planned<'_>>| {
            let laid = planned.map(|planned| {
                let key = planned.key.clone();
                anyhow::Ok((key, visit(planned)?))
            });
            laid.transpose()
        };
        let mut below = Below::default();
        let mut belows = vec![below.clone()];
        for (index, layer) in profile.layers.iter().enumerate() {
            below.exclude = layer.exclude.clone();
            below.accounts.extend(list_accounts(layer));
            let laid = lay(self.plan_packages(profile, index, &below)?)?;
            if let Some((key, tree)) = laid {
                below.push(&key, tree);
            }
            if let Some(under) = self.find_below_stage(profile, index, &belows)
                && let Some((key, tree)) = lay(self.plan_stage(profile, index, &under)?)?
            {
                below.push_stage(&key, tree);
            }
            let laid = lay(self.plan_files(profile, layer, &below)?)?;
            if let Some((key, tree)) = laid {
                below.push(&key, tree);
            }
            belows.push(below.clone());
        }
        Ok(())
    }

    fn plan_packages<'a>(
        &'a self,
        profile: &'a Profile,
        index: usize,
        below: &'a Below,
    ) -> Result<Option<Planned<'a>>> {
        let layer = &profile.layers[index];
        let set = sets::name_layer_set(profile, index);
        let packages = self.lock.list_set(&set)?;
        if packages.is_empty() && layer.skeleton.is_empty() && list_accounts(layer).is_empty() {
            return Ok(None);
        }
        let mut key = self.begin_key("packages", PACKAGES_VERSION, layer, below);
        add_packages(&mut key, &packages);
        layer.provides.iter().for_each(|name| {
            key.add("provides", name);
        });
        place(profile, &layer.skeleton, None, &mut key)?;

        let debs = packages.clone();
        let describe = move |scratch: &Path, _: &Step| {
            let skeleton = place(profile, &layer.skeleton, Some(scratch), &mut Key::default())?;
            let job = PackagesJob {
                common: self.describe_common(layer, below, scratch),
                debs: self.describe_debs(&debs),
                skeleton,
                stand_in: (!layer.provides.is_empty()).then(|| StandIn {
                    name: lock::name_stand_in(&set),
                    provides: layer.provides.clone(),
                }),
                threads: self.source.threads,
            };
            Ok((PACKAGES_JOB, serde_json::to_value(job)?))
        };
        Ok(Some(Planned {
            layer,
            what: "packages",
            key,
            below,
            packages,
            describe: Box::new(describe),
        }))
    }

    /// Packages of the store, as the sandbox takes them.
    pub(super) fn describe_debs(&self, packages: &[&LockedPackage]) -> Vec<Deb> {
        let describe = |package: &&LockedPackage| Deb {
            name: package.name.clone(),
            path: self.source.store.file_path(&package.sha256),
            installed_size: package.installed_size,
        };
        packages.iter().map(describe).collect()
    }

    fn plan_files<'a>(
        &'a self,
        profile: &'a Profile,
        layer: &'a Layer,
        below: &'a Below,
    ) -> Result<Option<Planned<'a>>> {
        let units = &layer.units;
        let files: Vec<TreeFile> = layer.files.iter().chain(&layer.boot).cloned().collect();
        // With a build stage the artifacts belong to it.
        let own_artifacts = if layer.build.is_some() { &[][..] } else { &layer.artifacts[..] };
        let nothing = files.is_empty()
            && own_artifacts.is_empty()
            && layer.commands.is_empty()
            && !layer.agent
            && units.enable.is_empty()
            && units.disable.is_empty()
            && units.mask.is_empty();
        if nothing {
            return Ok(None);
        }
        let mut key = self.begin_key("files", FILES_VERSION, layer, below);
        place(profile, &files, None, &mut key)?;
        add_artifacts(&mut key, own_artifacts);
        let program = layer.agent.then(agent::read_program).transpose()?;
        if let Some(program) = &program {
            key.add(format!("agent {}", agent::PATH), Digest::of(program).as_bytes());
        }
        for (what, names) in
            [("enable", &units.enable), ("disable", &units.disable), ("mask", &units.mask)]
        {
            names.iter().for_each(|unit| {
                key.add(format!("{what} {unit}"), "");
            });
        }
        layer.commands.iter().for_each(|command| {
            key.add("command", command);
        });

        let describe = move |scratch: &Path, _: &Step| {
            let mut artifacts = describe_artifacts(self.source, own_artifacts);
            if let Some(program) = &program {
                artifacts.push(describe_agent(program, scratch)?);
            }
            let job = FilesJob {
                common: self.describe_common(layer, below, scratch),
                files: place(profile, &files, Some(scratch), &mut Key::default())?,
                artifacts,
                enable: units.enable.clone(),
                disable: units.disable.clone(),
                mask: units.mask.clone(),
                commands: layer.commands.clone(),
            };
            Ok((FILES_JOB, serde_json::to_value(job)?))
        };
        let describe = Box::new(describe);
        Ok(Some(Planned { layer, what: "files", key, below, packages: Vec::new(), describe }))
    }

    pub(super) fn begin_key(&self, step: &str, version: u32, layer: &Layer, below: &Below) -> Key {
        let mut key = Key::new(step, version);
        key.add("layer", &layer.name);
        key.add("below", below.key.map(|key| key.to_string()).unwrap_or_default());
        key.add("epoch", self.lock.epoch.to_string());
        key.add("tools", self.tools.name());
        below.exclude.iter().for_each(|glob| {
            key.add("exclude", glob);
        });
        layer.remove.iter().for_each(|remove| {
            key.add("remove", &remove.path);
        });
        for account in &below.accounts {
            key.add(format!("account {}", account.name), format!("{account:?}"));
        }
        key
    }

    pub(super) fn describe_common(&self, layer: &Layer, below: &Below, scratch: &Path) -> Common {
        Common {
            layer: layer.name.clone(),
            epoch: self.lock.epoch,
            exclude: below.exclude.clone(),
            remove: layer.remove.iter().map(|remove| remove.path.clone()).collect(),
            accounts: below.accounts.clone(),
            tar: scratch.join("layer.tar"),
            debug_shell: self.debug_shell,
        }
    }

    /// The diff from the store, or made by the sandbox and stored.
    fn provide(&self, planned: Planned<'_>) -> Result<Diff> {
        let name = planned.name();
        let Planned { layer, key, below, packages, describe, .. } = planned;
        let step = self.source.progress.begin(&name);
        let digest = key.digest();
        let open = |entry: &Path| open_diff(name.clone(), layer.name.clone(), key.clone(), entry);
        if let Some(entry) = self.source.store.find_entry("layer", &digest) {
            if let Ok(diff) = open(&entry) {
                step.finish_cached("");
                return Ok(diff);
            }
            self.source.store.discard_entry("layer", &digest)?;
        }
        let scratch = self.source.store.make_scratch("layer")?;
        let done = self.work(&scratch, below, describe, &step);
        // An ordinary user's files belong to subordinate ids: plain removal may not do.
        if let Err(error) = done {
            let _ = self.sandbox.remove_tree(scratch.path());
            return Err(self.source.explain_rot(&packages, error));
        }
        let entry = self.source.store.commit_entry("layer", &digest, scratch)?;
        let diff = open(&entry)?;
        step.finish(format!(
            "{} files, {}",
            diff.facts.sealed.files,
            crate::progress::format_bytes(diff.facts.sealed.bytes)
        ));
        Ok(diff)
    }

    fn work(
        &self,
        scratch: &Scratch,
        below: &Below,
        describe: Describe<'_>,
        step: &Step,
    ) -> Result<()> {
        let folder = scratch.path();
        let spec = Spec {
            lower: below.trees.clone(),
            upper: Some(folder.join("tree")),
            work: Some(folder.join("work")),
            merged: Some(folder.join("merged")),
            env: [("SOURCE_DATE_EPOCH".to_string(), self.lock.epoch.to_string())].into(),
            ..Spec::default()
        };
        for path in [&spec.upper, &spec.work, &spec.merged].into_iter().flatten() {
            // The upper side's own mode becomes that of `/`: no umask may show in it.
            fs::create_dir(path)
                .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)))
                .with_context(|| format!("making {}", path.display()))?;
        }
        let (job, input) = describe(folder, step)?;
        let sealed = self.sandbox.start(&spec, job, input, &mut |line| step.update(line))?;
        let sealed: Sealed = serde_json::from_value(sealed).context("reading the job's answer")?;

        step.update("writing the blob");
        // Named by its content: the same changes over other layers make the same blob.
        let digest = sealed.tar_digest;
        let (tar, blob) = (folder.join("layer.tar"), folder.join("blob.erofs"));
        erofs::make_blob(self.tools, &tar, &blob, self.lock.epoch, &Guid::derive(&digest, "blob"))?;
        fs::remove_file(&tar).context("removing the layer's tar")?;
        let blob_bytes = fs::metadata(&blob)?.len();
        let blob_digest = Digest::of_file(&blob)?;
        let blocks = blob_bytes / verity::BLOCK as u64;
        let file = fs::File::open(&blob).context("opening the blob")?;
        let leaves = verity::hash_leaves(&file, 0, blocks, self.source.threads)?;
        fs::write(folder.join("leaves"), leaves.as_flattened()).context("writing verity leaves")?;
        let facts = Facts { sealed, blob_digest, blob_bytes };
        fs::write(folder.join("facts.json"), serde_json::to_vec_pretty(&facts)?)
            .context("writing the layer's facts")?;
        for leftover in fs::read_dir(folder)? {
            let path = leftover?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !["tree", "blob.erofs", "leaves", "facts.json"].contains(&name) {
                self.sandbox.remove_tree(&path)?;
            }
        }
        Ok(())
    }
}

/// Artifacts as inputs of a step.
pub(super) fn add_artifacts(key: &mut Key, artifacts: &[config::Artifact]) {
    for artifact in artifacts {
        key.add(format!("artifact {}", artifact.name), artifact.sha256.as_bytes());
        key.add("artifact path", artifact.path.as_os_str().as_encoded_bytes());
        key.add("artifact unpack", format!("{} {}", artifact.unpack, artifact.strip));
        key.add(
            "artifact owner and mode",
            format!("{}:{} {:o}", artifact.owner, artifact.group, artifact.mode),
        );
    }
}

pub(super) fn describe_artifacts(source: &Source, artifacts: &[config::Artifact]) -> Vec<Artifact> {
    artifacts
        .iter()
        .map(|artifact| Artifact {
            path: source.store.file_path(&artifact.sha256),
            target: artifact.path.clone(),
            unpack: artifact.unpack.then_some(artifact.strip as usize),
            owner: artifact.owner.clone(),
            group: artifact.group.clone(),
            mode: artifact.mode,
        })
        .collect()
}

/// The agent's program as a file for the sandbox, written to `scratch`.
fn describe_agent(program: &[u8], scratch: &Path) -> Result<Artifact> {
    let path = scratch.join("agent");
    fs::write(&path, program).with_context(|| format!("writing {}", path.display()))?;
    Ok(Artifact {
        path,
        target: agent::PATH.into(),
        unpack: None,
        owner: "root".to_string(),
        group: "root".to_string(),
        mode: agent::MODE,
    })
}

/// The diff of an entry that has all its parts.
fn open_diff(name: String, layer: String, key: Key, entry: &Path) -> Result<Diff> {
    let facts = entry.join("facts.json");
    let text = fs::read(&facts).with_context(|| format!("reading {}", facts.display()))?;
    let diff = Diff {
        name,
        layer,
        key,
        tree: entry.join("tree"),
        blob: entry.join("blob.erofs"),
        leaves: entry.join("leaves"),
        facts: serde_json::from_slice(&text)
            .with_context(|| format!("reading {}", facts.display()))?,
    };
    let blob_bytes = diff.facts.blob_bytes;
    let leaves_bytes = blob_bytes / verity::BLOCK as u64 * verity::HASH as u64;
    let measure = |path: &Path| fs::metadata(path).map(|metadata| metadata.len()).ok();
    ensure!(
        diff.tree.is_dir()
            && measure(&diff.blob) == Some(blob_bytes)
            && measure(&diff.leaves) == Some(leaves_bytes),
        "{} is not whole",
        entry.display()
    );
    Ok(diff)
}

/// Groups first: users may be in them.
pub(super) fn list_accounts(layer: &Layer) -> Vec<Account> {
    let show = |path: &Path| path.to_string_lossy().into_owned();
    let groups = layer.groups.iter().map(|group| Account {
        name: group.name.clone(),
        id: group.id,
        user: None,
        groups: Vec::new(),
    });
    let users = layer.users.iter().map(|user| Account {
        name: user.name.clone(),
        id: user.id,
        user: Some(UserFields { home: show(&user.home), shell: show(&user.shell) }),
        groups: user.groups.clone(),
    });
    groups.chain(users).collect()
}
