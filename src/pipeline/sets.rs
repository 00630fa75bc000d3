//! What the lock must hold for a project's profiles.

use crate::config::layer::PackageWish;
use crate::config::profile::Profile;
use crate::lock::SetRequest;
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
