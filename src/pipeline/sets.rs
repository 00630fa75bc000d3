//! What the lock must hold for a project's profiles.

use super::artifacts;
use crate::config::build::Build;
use crate::config::layer::PackageWish;
use crate::config::profile::Profile;
use crate::lock::{OutsideRequests, PythonRequest, SetRequest};
use crate::tools;

/// The set of what `profile`'s layer at `index` adds: named by the chain of layers, so that
/// profiles that begin alike share it.
pub fn name_layer_set(profile: &Profile, index: usize) -> String {
    let names: Vec<&str> =
        profile.layers[..=index].iter().map(|layer| layer.name.as_str()).collect();
    names.join("+")
}

/// The set of what is unpacked into the initrd of a layer.
pub fn name_initrd_set(layer: &str) -> String {
    format!("initrd:{layer}")
}

/// What a virtualenv is made with, besides the layer's own Python.
const PYTHON_PACKAGES: [&str; 3] = ["python3-pip", "python3-setuptools", "python3-venv"];

/// How many of the profile's layers lie below the build stage of its layer at `index`.
pub fn count_below_stage(profile: &Profile, index: usize, build: &Build) -> usize {
    let over = build.over.as_ref();
    let found = over.and_then(|over| profile.layers.iter().position(|one| one.name == *over));
    found.map_or(index, |found| found + 1)
}

/// The set of what the build stage of `profile`'s layer at `index` adds to the layers
/// below it: named by those and the layer, so that profiles share it.
pub fn name_build_set(profile: &Profile, index: usize, build: &Build) -> String {
    let count = count_below_stage(profile, index, build);
    let below = profile.layers[..count].iter().map(|layer| layer.name.as_str());
    let names: Vec<&str> = below.chain([profile.layers[index].name.as_str()]).collect();
    format!("build:{}", names.join("+"))
}

fn request_build(profile: &Profile, index: usize, build: &Build) -> SetRequest {
    let layer = &profile.layers[index];
    let count = count_below_stage(profile, index, build);
    let own = layer.packages.iter().chain(&build.packages).map(PackageWish::to_string);
    let mut wanted: Vec<String> = own.collect();
    if !build.pythons.is_empty() {
        wanted.extend(PYTHON_PACKAGES.map(str::to_string));
    }
    wanted.sort();
    wanted.dedup();
    SetRequest {
        name: name_build_set(profile, index, build),
        parent: count.checked_sub(1).map(|under| name_layer_set(profile, under)),
        wanted,
        provides: layer.provides.clone(),
        recommends: layer.recommends,
        essential: count == 0,
    }
}

/// What the profiles ask for from outside of Debian, none twice.
pub fn list_outside(profiles: &[Profile]) -> OutsideRequests {
    let mut pythons: Vec<PythonRequest> = Vec::new();
    for layer in profiles.iter().flat_map(|profile| &profile.layers) {
        for python in layer.build.iter().flat_map(|build| &build.pythons) {
            let request = PythonRequest {
                layer: layer.name.clone(),
                path: python.path.to_string_lossy().into_owned(),
                requirements: python.requirements.clone(),
            };
            if !pythons.contains(&request) {
                pythons.push(request);
            }
        }
    }
    OutsideRequests { artifacts: artifacts::list_requests(profiles), pythons }
}

/// Requests for all sets of the profiles and for the tools, parents first, none twice.
pub fn list_requests(profiles: &[Profile]) -> Vec<SetRequest> {
    let mut requests: Vec<SetRequest> = tools::list_requests();
    for profile in profiles {
        for (index, layer) in profile.layers.iter().enumerate() {
            requests.push(SetRequest {
                name: name_layer_set(profile, index),
                parent: index.checked_sub(1).map(|under| name_layer_set(profile, under)),
                wanted: layer.packages.iter().map(PackageWish::to_string).collect(),
                provides: layer.provides.clone(),
                recommends: layer.recommends,
                essential: index == 0,
            });
            if let Some(build) = &layer.build {
                requests.push(request_build(profile, index, build));
                if !build.pythons.is_empty() {
                    requests.push(tools::request_python());
                }
            }
            if let Some(initrd) = &layer.initrd {
                requests.push(SetRequest {
                    name: name_initrd_set(&layer.name),
                    parent: None,
                    wanted: initrd.packages.iter().map(PackageWish::to_string).collect(),
                    provides: Vec::new(),
                    recommends: false,
                    essential: false,
                });
            }
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    requests.retain(|request| seen.insert(request.name.clone()));
    requests
}
