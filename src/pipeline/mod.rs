//! The whole build as one list of verbs.

mod agent;
mod artifacts;
mod explain;
mod image;
mod layers;
mod locking;
mod manifest;
mod outputs;
mod placing;
mod python;
mod room;
mod sets;
mod source;
mod stage;
mod templates;
mod unpacked;
mod why;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::config::Format;
use crate::config::Project;
use crate::config::profile::Profile;
use crate::digest::Digest;
use crate::lock::{Lock, LockedPackage};
use crate::progress::{Progress, StepTime};
use crate::rootfs::{layer, stage as stage_jobs};
use crate::sandbox::{Inside, Sandbox};
use crate::store::Scratch;
use crate::tools;
pub use artifacts::GivenArtifact;
pub use explain::Explanation;
use explain::Record;
use image::ImageBuilder;
use layers::LayerBuilder;
pub use locking::{Failures, lock_path, prepare_lock, relock};
pub use manifest::{InnerManifest, LayerEntry, Manifest, OutputEntry};
pub use source::{FetchOptions, Source};
pub use unpacked::provide_tools;
pub use why::explain_presence;

#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Folder for the images; made when it is not there.
    pub out: PathBuf,
    /// Empty: those of each profile.
    pub formats: Vec<Format>,
    pub locked: bool,
    pub debug_shell: bool,
    pub artifacts: Vec<GivenArtifact>,
    pub fetch: FetchOptions,
}

/// A finished image.
#[derive(Debug, Serialize)]
pub struct Built {
    pub profile: String,
    pub version: String,
    pub root_hash: Digest,
    pub outputs: Vec<Output>,
    pub seconds: f64,
    /// Nothing had to be done.
    pub cached: bool,
}

#[derive(Debug, Serialize)]
pub struct Output {
    pub path: PathBuf,
    /// None for a raw disk that was built by itself.
    pub sha256: Option<Digest>,
    /// Of a raw disk: the root hash of a dm-verity tree over all of it.
    pub tree: Option<Digest>,
    pub bytes: u64,
    pub allocated: u64,
}

/// Build each named profile. One that fails does not keep the others from being built.
/// Returned are the outcomes by name, in the order of the names.
///
/// # Errors
/// What concerns all of them: an unknown profile, no room, a lock that cannot be made.
pub fn build(
    project: &Project,
    names: &[String],
    options: &BuildOptions,
    progress: &Progress,
) -> Result<Vec<(String, Result<Built>)>> {
    let mut failures = Failures::new();
    let mut profiles = Vec::new();
    for name in names {
        if profiles.iter().any(|profile: &Profile| profile.name == *name) {
            continue;
        }
        let loaded = project.load_profile(name);
        match loaded.and_then(|profile| templates::check(&profile).map(|()| profile)) {
            Ok(profile) => profiles.push(profile),
            Err(error) => drop(failures.insert(name.clone(), error)),
        }
    }
    let mut built = match profiles.is_empty() {
        true => BTreeMap::new(),
        false => build_sound(project, &profiles, options, progress, &mut failures)?,
    };
    let take = |name: &String| {
        let outcome = failures.remove(name).map(Err).or_else(|| built.remove(name).map(Ok))?;
        Some((name.clone(), outcome))
    };
    Ok(names.iter().filter_map(take).collect())
}

/// Build profiles that could be read; those that fail join the failures.
fn build_sound(
    project: &Project,
    profiles: &[Profile],
    options: &BuildOptions,
    progress: &Progress,
    failures: &mut Failures,
) -> Result<BTreeMap<String, Built>> {
    let source = Source::open(&options.fetch, progress)?;
    let growing = outputs::prepare_folder(&options.out)?;
    room::check(&source, &options.out, profiles)?;
    Sandbox::default().require(source.store.root())?;
    let taken = artifacts::take(&source, profiles, &options.artifacts)?;
    let explain_full = |error| room::explain_full(error, source.store.root(), &options.out);
    let (lock, unlocked) =
        locking::prepare_lock(project, &source, profiles, options.locked).map_err(explain_full)?;
    failures.extend(unlocked);
    if let Some(lock) = &lock {
        let requests = artifacts::list_requests(profiles);
        artifacts::store_taken(&source, lock, &requests, &taken).map_err(explain_full)?;
    }
    let is_left = |profile: &Profile| !failures.contains_key(&profile.name);
    let Some(lock) = lock.filter(|_| profiles.iter().any(is_left)) else {
        return Ok(BTreeMap::new());
    };
    let tools = provide_tools(&source, &lock, tools::set::BUILD).map_err(explain_full)?;
    let shared = progress.step_times();
    let builder = Builder {
        project,
        source: &source,
        lock: &lock,
        tools: &tools,
        options,
        growing: &growing,
        shared: &shared,
    };

    let mut built = BTreeMap::new();
    for profile in profiles {
        if failures.contains_key(&profile.name) {
            continue;
        }
        let outcome = fetch_outside(&source, &lock, profile)
            .and_then(|()| builder.build(&artifacts::pin(profile, &lock)).map_err(explain_full))
            .with_context(|| format!("building profile `{}`", profile.name));
        match outcome {
            Ok(image) => drop(built.insert(profile.name.clone(), image)),
            Err(error) => drop(failures.insert(profile.name.clone(), error)),
        }
    }
    Ok(built)
}

/// Have what the profile needs from outside of Debian in the store.
fn fetch_outside(source: &Source, lock: &Lock, profile: &Profile) -> Result<()> {
    artifacts::fetch(source, profile, lock)?;
    python::fetch(source, lock, &python::list_all(lock, profile)?)
}

struct Builder<'a> {
    project: &'a Project,
    source: &'a Source,
    lock: &'a Lock,
    tools: &'a tools::Tools,
    options: &'a BuildOptions,
    /// Where outputs are until all of a profile's are finished.
    growing: &'a Scratch,
    /// Steps that were taken for all profiles.
    shared: &'a [StepTime],
}

impl Builder<'_> {
    fn build(&self, profile: &Profile) -> Result<Built> {
        let began = Instant::now();
        let before = self.source.progress.step_times().len();
        let out = &self.options.out;
        let formats = match self.options.formats.is_empty() {
            true => &profile.formats,
            false => &self.options.formats,
        };
        let diffs = LayerBuilder {
            source: self.source,
            lock: self.lock,
            tools: self.tools,
            sandbox: Sandbox::default(),
            debug_shell: self.options.debug_shell,
        }
        .build(profile)?;
        let images = ImageBuilder { source: self.source, lock: self.lock, tools: self.tools };
        let (initrd, initrd_key) = images.build_initrd(profile, &diffs)?;
        let layers = diffs.iter().map(|diff| (diff.name.clone(), diff.key.clone())).collect();
        let record = images.describe_image(profile, layers, initrd_key);
        let key = record.image.digest();
        record.save(&self.source.store, self.project, &profile.name)?;

        if let Some(manifest) = outputs::find_current(out, profile, &key, formats) {
            return Ok(describe(&manifest, out, began, true));
        }
        let packages = self.list_packages(profile)?;
        let pythons = python::list_all(self.lock, profile)?;
        let day = image::format_day(self.lock.epoch);
        let description =
            manifest::Description::new(profile, &diffs, &packages, &pythons, key, &day);
        let raw = self.growing.path().join(format!("{}.raw", profile.name));
        let disk = images.build_disk(profile, &diffs, &initrd, &description, &raw)?;
        let written = outputs::write(self.source, self.tools, profile, formats, &raw)?;

        let manifest = Manifest {
            stanchion: env!("CARGO_PKG_VERSION").to_string(),
            profile: profile.name.clone(),
            version: description.version.clone(),
            key,
            epoch: self.lock.epoch,
            root_hash: disk.root_hash,
            root_bytes: disk.root_size,
            layers: description.layers,
            packages: description.packages,
            artifacts: description.artifacts,
            pythons: description.pythons,
            outputs: written,
            steps: [self.shared, &self.source.progress.step_times()[before..]].concat(),
        };
        outputs::publish(self.growing, &manifest, out, &self.source.progress)?;
        Ok(describe(&manifest, out, began, false))
    }

    fn list_packages(&self, profile: &Profile) -> Result<Vec<&LockedPackage>> {
        let mut packages = Vec::new();
        for index in 0..profile.layers.len() {
            packages.extend(self.lock.list_set(&sets::name_layer_set(profile, index))?);
        }
        packages.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(packages)
    }
}

/// Tell for each step of a profile's build whether it would be done, and which of its inputs
/// are not those of the last build. `out` is where that left the images. Nothing is built
/// but, where the store lacks them, the tools.
///
/// # Errors
/// A [`UserError`](crate::error::UserError) for an unknown profile, and for a lock that does
/// not hold what it asks for.
pub fn explain(
    project: &Project,
    name: &str,
    out: &Path,
    fetch: &FetchOptions,
    progress: &Progress,
) -> Result<Vec<Explanation>> {
    let profile = project.load_profile(name)?;
    let lock = locking::load_current(project, &profile)?;
    let profile = artifacts::pin(&profile, &lock);
    let source = Source::open(fetch, progress)?;
    let tools = provide_tools(&source, &lock, tools::set::BUILD)?;
    let (source, lock, tools) = (&source, &lock, &tools);
    let sandbox = Sandbox::default();
    let layers = LayerBuilder { source, lock, tools, sandbox, debug_shell: false };
    let images = ImageBuilder { source, lock, tools };
    let steps = layers.list_keys(&profile)?;
    let kernel = images.name_kernel(&profile)?;
    let kernel = steps.iter().find(|(name, _)| *name == kernel).context("no layer has a kernel")?;
    let initrd = images.describe_initrd(&profile, &kernel.1)?;
    let now = images.describe_image(&profile, steps, initrd);
    let last = Record::load(&source.store, project, name)?;
    Ok(explain::compare(&now, last.as_ref(), |step, key| match step {
        explain::INITRD => images.find_initrd(key).is_some(),
        explain::IMAGE => {
            outputs::find_current(out, &profile, &key.digest(), &profile.formats).is_some()
        }
        _ => layers.has(key),
    }))
}

fn describe(manifest: &Manifest, out: &Path, began: Instant, cached: bool) -> Built {
    Built {
        profile: manifest.profile.clone(),
        version: manifest.version.clone(),
        root_hash: manifest.root_hash,
        outputs: manifest
            .outputs
            .iter()
            .map(|output| Output {
                path: out.join(&output.file),
                sha256: output.sha256,
                tree: output.tree,
                bytes: output.bytes,
                allocated: output.allocated,
            })
            .collect(),
        seconds: began.elapsed().as_secs_f64(),
        cached,
    }
}

/// Jobs of the builder that run inside the sandbox.
pub fn handle_job(
    job: &str,
    input: serde_json::Value,
    inside: &mut Inside,
) -> Result<serde_json::Value> {
    let sealed = match job {
        python::PIP_JOB => {
            let output = python::run_job(&serde_json::from_value(input)?, inside)?;
            return Ok(output.into());
        }
        stage::STAGE_JOB => {
            stage_jobs::build_stage(&serde_json::from_value(input)?, inside)?;
            return Ok(serde_json::Value::Null);
        }
        stage::KEEP_JOB => stage_jobs::seal_kept(&serde_json::from_value(input)?, inside)?,
        layers::PACKAGES_JOB => layer::build_packages(&serde_json::from_value(input)?, inside)?,
        layers::FILES_JOB => layer::build_files(&serde_json::from_value(input)?, inside)?,
        _ => anyhow::bail!("this program has no job named `{job}`"),
    };
    Ok(serde_json::to_value(sealed)?)
}
