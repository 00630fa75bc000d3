//! Artifacts: files that stand in for them, and those that are fetched.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::source::Source;
use crate::config::profile::Profile;
use crate::digest::Digest;
use crate::error::{UserError, exit_code, find_nearest};
use crate::fetch::{Download, Vanished};
use crate::lock::{ArtifactRequest, Lock};
use crate::store::Scratch;

/// A local file in an artifact's stead, as the command line names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GivenArtifact {
    pub name: String,
    pub file: PathBuf,
}

/// A given file, copied, so that nobody changes what was hashed.
pub struct TakenArtifact {
    given: GivenArtifact,
    copy: PathBuf,
    digest: Digest,
    _scratch: Scratch,
}

/// What profiles say of their artifacts, each once.
pub fn list_requests(profiles: &[Profile]) -> Vec<ArtifactRequest> {
    let mut requests: Vec<ArtifactRequest> = Vec::new();
    for layer in profiles.iter().flat_map(|profile| &profile.layers) {
        for artifact in &layer.artifacts {
            let request = ArtifactRequest {
                layer: layer.name.clone(),
                name: artifact.name.clone(),
                url: artifact.url.clone(),
                sha256: artifact.sha256,
            };
            if !requests.contains(&request) {
                requests.push(request);
            }
        }
    }
    requests
}

/// Copy and hash what was given.
///
/// # Errors
/// A [`UserError`] for a name that no layer of the profiles has, for one that is given
/// twice, and for a file that cannot be read.
pub fn take(
    source: &Source,
    profiles: &[Profile],
    given: &[GivenArtifact],
) -> Result<Vec<TakenArtifact>> {
    let requests = list_requests(profiles);
    let mut taken: Vec<TakenArtifact> = Vec::new();
    for one in given {
        if !requests.iter().any(|request| request.name == one.name) {
            return Err(explain_unknown(&one.name, &requests).into());
        }
        if taken.iter().any(|taken| taken.given.name == one.name) {
            let what = format!("the artifact `{}` is given twice", one.name);
            return Err(UserError::new(what).help("give one file for it").into());
        }
        let metadata = fs::metadata(&one.file).and_then(|metadata| match metadata.is_file() {
            true => Ok(()),
            false => Err(std::io::Error::other("it is not a file")),
        });
        let scratch = source.store.make_scratch("artifact")?;
        let copy = scratch.path().join("file");
        if let Err(error) = metadata.and_then(|()| fs::File::open(&one.file).map(drop)) {
            return Err(UserError::new(format!(
                "the file for the artifact `{}` cannot be read",
                one.name
            ))
            .in_file(&one.file)
            .why(error.to_string())
            .help(format!("write `--artifact {}=FILE` with the path of the file", one.name))
            .into());
        }
        fs::copy(&one.file, &copy).with_context(|| format!("copying {}", one.file.display()))?;
        let digest = Digest::of_file(&copy)?;
        taken.push(TakenArtifact { given: one.clone(), copy, digest, _scratch: scratch });
    }
    Ok(taken)
}

fn explain_unknown(name: &str, requests: &[ArtifactRequest]) -> UserError {
    let known = || requests.iter().map(|request| request.name.as_str());
    let error = UserError::new(format!("there is no artifact `{}`", name.escape_debug()));
    let error = match requests.is_empty() {
        true => error.why("no layer of these profiles has an artifact"),
        false => error.why(format!(
            "the artifacts of these profiles are: {}",
            known().collect::<Vec<_>>().join(", ")
        )),
    };
    match find_nearest(name, known()) {
        Some(nearest) => error.help(format!("did you mean `{nearest}`?")),
        None => error,
    }
}

/// Lock the given files in the place of what the layers say, and put them into the store.
pub fn lock_taken(
    source: &Source,
    lock: &mut Lock,
    requests: &[ArtifactRequest],
    taken: &[TakenArtifact],
) -> Result<()> {
    for one in taken {
        for request in requests.iter().filter(|request| request.name == one.given.name) {
            lock.put_artifact(request, one.digest);
        }
        source.store.insert_file(&one.copy, &one.digest)?;
    }
    Ok(())
}

/// Put the given files into the store.
///
/// # Errors
/// A [`UserError`] when one is not what the lock says.
pub fn store_taken(
    source: &Source,
    lock: &Lock,
    requests: &[ArtifactRequest],
    taken: &[TakenArtifact],
) -> Result<()> {
    for one in taken {
        let TakenArtifact { given: GivenArtifact { name, file }, digest, .. } = one;
        let asked = requests.iter().filter(|request| request.name == *name);
        for locked in asked.filter_map(|request| lock.find_artifact(request)) {
            if locked.sha256 != *digest {
                let what =
                    format!("this is not the file that the lock names for the artifact `{name}`");
                return Err(UserError::new(what)
                    .in_file(file)
                    .why(format!("its SHA-256 is {digest}, the lock has {}", locked.sha256))
                    .help(format!(
                        "give the right file, or take this one: `stanchion lock --artifact {name}={}`",
                        file.display()
                    ))
                    .into());
            }
        }
        source.store.insert_file(&one.copy, digest)?;
    }
    Ok(())
}

/// The profile with the artifacts that the lock names.
pub fn pin(profile: &Profile, lock: &Lock) -> Profile {
    let mut profile = profile.clone();
    for request in list_requests(std::slice::from_ref(&profile)) {
        let Some(locked) = lock.find_artifact(&request) else { continue };
        let layers = profile.layers.iter_mut().filter(|layer| layer.name == request.layer);
        for artifact in layers.flat_map(|layer| &mut layer.artifacts) {
            if artifact.name == request.name {
                artifact.sha256 = locked.sha256;
            }
        }
    }
    profile
}

/// Have the artifacts of the profile, as the lock names them, in the store.
///
/// # Errors
/// A [`UserError`] that says how to give a file that cannot be fetched.
pub fn fetch(source: &Source, profile: &Profile, lock: &Lock) -> Result<()> {
    let mut downloads = Vec::new();
    for request in list_requests(std::slice::from_ref(profile)) {
        let sha256 = lock.find_artifact(&request).map_or(request.sha256, |locked| locked.sha256);
        if source.store.has_file(&sha256, None) {
            continue;
        }
        if sha256 != request.sha256 {
            let name = &request.name;
            return Err(UserError::new(format!("the store lacks the artifact `{name}`"))
                .why(format!(
                    "it was locked from a file with the SHA-256 {sha256}, which is not what its URL has"
                ))
                .help(format!("give that file: --artifact {name}=FILE; or lock what the layer names: stanchion lock --update"))
                .into());
        }
        let what = format!("artifact `{}` of layer `{}`", request.name, request.layer);
        downloads.push((
            request.name,
            Download { name: what, urls: vec![request.url], digest: sha256, size: None },
        ));
    }
    for (name, download) in &downloads {
        let fetched = source.fetch_files(std::slice::from_ref(download));
        fetched.map_err(|error| explain_unfetched(name, download, error))?;
    }
    Ok(())
}

fn explain_unfetched(name: &str, download: &Download, error: anyhow::Error) -> anyhow::Error {
    let why = match error.downcast_ref::<Vanished>() {
        Some(_) => format!("there is no such file (any more): {}", download.urls.join(", ")),
        None if exit_code(&error) == 2 => error
            .chain()
            .find_map(|cause| cause.downcast_ref::<UserError>())
            .map(UserError::summary)
            .unwrap_or_else(|| format!("{error:#}")),
        None => return error,
    };
    UserError::new(format!("the {} cannot be fetched", download.name))
        .why(why)
        .help(format!(
            "with the file at hand, give it: --artifact {name}=FILE; else look at the network, or mend the artifact's `url` and `sha256` in layer.toml"
        ))
        .into()
}
