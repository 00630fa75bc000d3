//! A project: the directory that holds `profiles/` and `layers/`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::check::{NAME_HELP, is_name};
use super::profile::{Profile, read_profile};
use super::source::quote;
use crate::error::{UserError, find_nearest};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Project {
    /// Absolute.
    pub root: PathBuf,
}

impl Project {
    /// The project that `start` lies in: `start` itself or the nearest directory above.
    ///
    /// # Errors
    /// A [`UserError`] when there is none.
    pub fn find(start: &Path) -> Result<Self> {
        let absolute = match start.canonicalize() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let what = format!("there is no directory {}", quote(&start.to_string_lossy()));
                return Err(UserError::new(what).into());
            }
            result => result.with_context(|| format!("resolving {}", start.display()))?,
        };
        let is_root =
            |folder: &Path| ["profiles", "layers"].iter().all(|name| folder.join(name).is_dir());
        match absolute.ancestors().find(|folder| is_root(folder)) {
            Some(root) => Ok(Project { root: root.to_owned() }),
            None => Err(UserError::new("there is no project here")
                .in_file(&absolute)
                .why("neither this directory nor one above it holds both `profiles/` and `layers/`")
                .help("change to the project's directory, or name it with `--project DIR`")
                .into()),
        }
    }

    /// The names of the profiles, sorted.
    pub fn list_profiles(&self) -> Result<Vec<String>> {
        let is_profile = |name: &str| name.strip_suffix(".toml").map(str::to_string);
        list_names(&self.root.join("profiles"), is_profile)
    }

    /// Read a profile and its layers, check them, and resolve all that they refer to.
    ///
    /// # Errors
    /// A [`UserError`] for each mistake in them, with file and line (relative to the
    /// project's root).
    pub fn load_profile(&self, name: &str) -> Result<Profile> {
        let known = self.list_profiles()?;
        if !known.iter().any(|known| known == name) {
            return Err(explain_missing("profile", name, "profiles/", &known).into());
        }
        read_profile(&self.root, name)
    }
}

/// The names of the layers, sorted.
pub(super) fn list_layers(root: &Path) -> Result<Vec<String>> {
    let layers = root.join("layers");
    list_names(&layers, |name| layers.join(name).is_dir().then(|| name.to_string()))
}

/// The good names that `read_name` finds in a directory; all else there is no concern.
fn list_names(folder: &Path, read_name: impl Fn(&str) -> Option<String>) -> Result<Vec<String>> {
    let reading = || format!("reading {}", folder.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).with_context(reading)? {
        let entry = entry.with_context(reading)?.file_name();
        names.extend(entry.to_str().and_then(&read_name).filter(|name| is_name(name)));
    }
    names.sort();
    Ok(names)
}

pub(super) fn explain_missing(what: &str, name: &str, folder: &str, known: &[String]) -> UserError {
    let error = UserError::new(format!("there is no {what} {}", quote(name)));
    let error = match known {
        [] => error.why(format!("{folder} holds none")),
        known => error.why(format!("{folder} holds: {}", known.join(", "))),
    };
    if !is_name(name) {
        return error.help(NAME_HELP);
    }
    match find_nearest(name, known.iter().map(String::as_str)) {
        Some(nearest) => error.help(format!("did you mean `{nearest}`?")),
        None => error,
    }
}
