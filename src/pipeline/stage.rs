//! A layer's build stage: from the store, or run in the sandbox and its kept paths stored
//! as a diff of their own, between the layer's packages and its files.
//!
//! What a stage makes does not depend on the layers between those it is built over and its
//! own, so profiles that differ only there share it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};

use super::layers::{
    Below, LayerBuilder, Planned, add_artifacts, describe_artifacts, list_accounts,
};
use super::placing::place;
use super::unpacked::add_packages;
use super::{python, sets};
use crate::config::build::Build;
use crate::config::profile::Profile;
use crate::digest::Key;
use crate::lock::{self, LockedPackage, LockedPython};
use crate::progress::Step;
use crate::rootfs::layer::{PackagesJob, StandIn};
use crate::rootfs::stage::{Distribution, Environment, KeepJob, StageJob};
use crate::sandbox::{Bind, Spec};

/// Raised when a stage would make other bytes from the same inputs.
const BUILD_VERSION: u32 = 1;

pub const STAGE_JOB: &str = "layer/stage";
pub const KEEP_JOB: &str = "layer/keep";

/// Where programs of a stage see Python's distributions, one folder a virtualenv.
const DISTRIBUTIONS: &str = "/run/stanchion/python";

/// A stage before it runs.
struct Stage<'a> {
    profile: &'a Profile,
    index: usize,
    build: &'a Build,
    below: &'a Below,
    packages: Vec<&'a LockedPackage>,
    pythons: Vec<&'a LockedPython>,
}

impl LayerBuilder<'_> {
    /// What the stage of the layer at `index` lies over, if it has one; `belows` are the
    /// states after no layer, after the first, and so on.
    pub(super) fn find_below_stage(
        &self,
        profile: &Profile,
        index: usize,
        belows: &[Below],
    ) -> Option<Below> {
        let build = profile.layers[index].build.as_ref()?;
        Some(describe_below(profile, index, build, belows))
    }

    /// The diff of what the stage of the layer at `index` keeps.
    pub(super) fn plan_stage<'a>(
        &'a self,
        profile: &'a Profile,
        index: usize,
        below: &'a Below,
    ) -> Result<Option<Planned<'a>>> {
        let layer = &profile.layers[index];
        let Some(build) = &layer.build else { return Ok(None) };
        let packages = self.lock.list_set(&sets::name_build_set(profile, index, build))?;
        let stage = Stage {
            profile,
            index,
            build,
            below,
            packages: packages.clone(),
            pythons: python::list_locked(self.lock, layer, build)?,
        };
        let key = self.describe_inputs(&stage)?;
        let describe = move |scratch: &Path, step: &Step| {
            let (spec, job) = self.describe_stage(&stage, scratch)?;
            let input = serde_json::to_value(job)?;
            self.sandbox.start(&spec, STAGE_JOB, input, &mut |line| step.update(line))?;
            let job = KeepJob { common: self.describe_common(layer, below, scratch) };
            Ok((KEEP_JOB, serde_json::to_value(job)?))
        };
        let describe = Box::new(describe);
        Ok(Some(Planned { layer, what: "build", key, below, packages, describe }))
    }

    fn describe_inputs(&self, stage: &Stage<'_>) -> Result<Key> {
        let Stage { profile, build, .. } = *stage;
        let layer = &profile.layers[stage.index];
        let mut key = self.begin_key("build", BUILD_VERSION, layer, stage.below);
        add_packages(&mut key, &stage.packages);
        layer.provides.iter().for_each(|name| {
            key.add("provides", name);
        });
        place(profile, &layer.skeleton, None, &mut key)?;
        key.add("files of the stage", "");
        place(profile, &build.files, None, &mut key)?;
        add_artifacts(&mut key, &layer.artifacts);
        for python in &stage.pythons {
            key.add("virtualenv", &python.path);
            for one in &python.distributions {
                key.add(
                    format!("distribution {} {}", one.name, one.version),
                    one.sha256.as_bytes(),
                );
                key.add("distribution file", &one.file);
            }
        }
        build.commands.iter().for_each(|command| {
            key.add("command", command);
        });
        build.keep.iter().for_each(|path| {
            key.add("keep", path.as_os_str().as_encoded_bytes());
        });
        Ok(key)
    }

    /// The stage's own sandbox in `scratch`, whose `tree` gets what is kept.
    fn describe_stage(&self, stage: &Stage<'_>, scratch: &Path) -> Result<(Spec, StageJob)> {
        let Stage { profile, build, .. } = *stage;
        let layer = &profile.layers[stage.index];
        let folder = scratch.join("stage");
        let make = |name: &str| {
            let path = folder.join(name);
            fs::create_dir_all(&path)
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
                .with_context(|| format!("making {}", path.display()))?;
            anyhow::Ok(path)
        };
        let mut binds = Vec::new();
        let mut environments = Vec::new();
        for (number, python) in stage.pythons.iter().enumerate() {
            let files = make(&format!("python-{number}"))?;
            python::lay_files(self.source, python, &files)?;
            let to = format!("{DISTRIBUTIONS}/{number}");
            binds.push(Bind { from: files, to: to.clone().into(), read_only: true });
            let distributions = python.distributions.iter().map(|one| Distribution {
                name: one.name.clone(),
                version: one.version.clone(),
                file: one.file.clone(),
                is_source: one.is_source(),
            });
            environments.push(Environment {
                path: python.path.clone().into(),
                files: to,
                distributions: distributions.collect(),
            });
        }
        let (skeletons, placed) = (make("skeleton")?, make("files")?);
        let job = StageJob {
            packages: PackagesJob {
                common: self.describe_common(layer, stage.below, scratch),
                debs: self.describe_debs(&stage.packages),
                skeleton: place(profile, &layer.skeleton, Some(&skeletons), &mut Key::default())?,
                stand_in: (!layer.provides.is_empty()).then(|| StandIn {
                    name: lock::name_stand_in(&sets::name_build_set(profile, stage.index, build)),
                    provides: layer.provides.clone(),
                }),
                threads: self.source.threads,
            },
            artifacts: describe_artifacts(self.source, &layer.artifacts),
            files: place(profile, &build.files, Some(&placed), &mut Key::default())?,
            environments,
            commands: build.commands.clone(),
            keep: build.keep.clone(),
            into: scratch.join("tree"),
        };
        let env = [("SOURCE_DATE_EPOCH".to_string(), self.lock.epoch.to_string())];
        let spec = Spec {
            lower: stage.below.trees.clone(),
            upper: Some(make("upper")?),
            work: Some(make("work")?),
            merged: Some(make("merged")?),
            binds,
            env: BTreeMap::from(env),
            ..Spec::default()
        };
        Ok((spec, job))
    }
}

/// What the stage lies over, with the layer's own accounts and excludes.
fn describe_below(profile: &Profile, index: usize, build: &Build, belows: &[Below]) -> Below {
    let layer = &profile.layers[index];
    let count = sets::count_below_stage(profile, index, build);
    let mut below = belows[count].clone();
    let excluded = |count: usize| {
        let last = count.checked_sub(1).map(|last| &profile.layers[last].exclude[..]);
        last.unwrap_or_default()
    };
    below.exclude = excluded(count).to_vec();
    below.exclude.extend_from_slice(&layer.exclude[excluded(index).len()..]);
    below.accounts.extend(list_accounts(layer));
    below
}
