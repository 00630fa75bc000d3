//! What the lock holds beside Debian's packages: artifacts, and distributions of Python.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Change, Lock};
use crate::digest::{Digest, Key};

/// A layer's file from outside the package repositories.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedArtifact {
    pub layer: String,
    pub name: String,
    /// Digest of the [`ArtifactRequest`] it answers.
    pub request: Digest,
    /// The layer's own digest, or that of the file that was given in its place.
    pub sha256: Digest,
}

/// All that one virtualenv of a layer holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedPython {
    pub layer: String,
    /// The virtualenv's folder in the image.
    pub path: String,
    /// Digest of the [`PythonRequest`] it answers.
    pub request: Digest,
    /// Sorted by name.
    #[serde(rename = "distribution")]
    pub distributions: Vec<LockedDistribution>,
}

/// A wheel or a source archive.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedDistribution {
    /// Normalized: lower case, `-` for `_` and `.`.
    pub name: String,
    pub version: String,
    /// File name; which index serves it is no business of the lock.
    pub file: String,
    pub sha256: Digest,
}

/// What a layer says of an artifact.
#[derive(Debug, Clone, PartialEq)]
pub struct ArtifactRequest {
    pub layer: String,
    pub name: String,
    pub url: String,
    pub sha256: Digest,
}

/// What a layer says of a virtualenv.
#[derive(Debug, Clone, PartialEq)]
pub struct PythonRequest {
    pub layer: String,
    pub path: String,
    pub requirements: Vec<String>,
}

/// What profiles ask for from outside.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OutsideRequests {
    pub artifacts: Vec<ArtifactRequest>,
    pub pythons: Vec<PythonRequest>,
}

impl ArtifactRequest {
    /// What a [`LockedArtifact`] remembers of it.
    pub fn digest(&self) -> Digest {
        let mut key = Key::new("artifact", 1);
        key.add("url", &self.url);
        key.add("sha256", self.sha256.as_bytes());
        key.digest()
    }
}

impl PythonRequest {
    /// What a [`LockedPython`] remembers of it.
    pub fn digest(&self) -> Digest {
        let mut key = Key::new("python", 1);
        self.requirements.iter().for_each(|requirement| {
            key.add("requirement", requirement);
        });
        key.digest()
    }
}

impl Lock {
    /// The lock's answer to this request, unless it answers another.
    pub fn find_artifact(&self, request: &ArtifactRequest) -> Option<&LockedArtifact> {
        self.artifacts.iter().find(|locked| {
            locked.layer == request.layer
                && locked.name == request.name
                && locked.request == request.digest()
        })
    }

    /// The lock's answer to this request, unless it answers another.
    pub fn find_python(&self, request: &PythonRequest) -> Option<&LockedPython> {
        self.pythons.iter().find(|locked| {
            locked.layer == request.layer
                && locked.path == request.path
                && locked.request == request.digest()
        })
    }

    /// What is asked for from outside and not locked, in words.
    pub fn find_stale_outside(&self, requests: &OutsideRequests) -> Vec<String> {
        let artifacts = requests.artifacts.iter().filter(|one| self.find_artifact(one).is_none());
        let pythons = requests.pythons.iter().filter(|one| self.find_python(one).is_none());
        artifacts
            .map(|one| format!("artifact {}", one.name))
            .chain(pythons.map(|one| format!("Python in {}", one.path)))
            .collect()
    }

    /// Put the answer in the place of an earlier one.
    pub fn put_artifact(&mut self, request: &ArtifactRequest, sha256: Digest) {
        self.artifacts.retain(|one| (&one.layer, &one.name) != (&request.layer, &request.name));
        self.artifacts.push(LockedArtifact {
            layer: request.layer.clone(),
            name: request.name.clone(),
            request: request.digest(),
            sha256,
        });
        self.artifacts.sort_by(|a, b| (&a.layer, &a.name).cmp(&(&b.layer, &b.name)));
    }

    /// Put the answer in the place of an earlier one.
    pub fn put_python(
        &mut self,
        request: &PythonRequest,
        mut distributions: Vec<LockedDistribution>,
    ) {
        distributions.sort_by(|a, b| a.name.cmp(&b.name));
        self.pythons.retain(|one| (&one.layer, &one.path) != (&request.layer, &request.path));
        self.pythons.push(LockedPython {
            layer: request.layer.clone(),
            path: request.path.clone(),
            request: request.digest(),
            distributions,
        });
        self.pythons.sort_by(|a, b| (&a.layer, &a.path).cmp(&(&b.layer, &b.path)));
    }

    /// Drop what nothing asks for any more.
    pub(super) fn prune_outside(&mut self, requests: &OutsideRequests) {
        self.artifacts.retain(|locked| {
            let is_it =
                |one: &ArtifactRequest| one.layer == locked.layer && one.name == locked.name;
            requests.artifacts.iter().any(is_it)
        });
        self.pythons.retain(|locked| {
            let is_it = |one: &PythonRequest| one.layer == locked.layer && one.path == locked.path;
            requests.pythons.iter().any(is_it)
        });
    }

    /// What differs from `older` in artifacts and distributions.
    pub(super) fn compare_outside(&self, older: &Lock) -> Vec<Change> {
        let (old, new) = (older.list_outside(), self.list_outside());
        let names: BTreeSet<&String> = old.iter().chain(&new).map(|(name, _)| name).collect();
        let find = |list: &[(String, String)], name: &String| {
            list.iter().find(|(one, _)| one == name).map(|(_, version)| version.clone())
        };
        let change = |name: &String| Change {
            package: name.clone(),
            old: find(&old, name),
            new: find(&new, name),
        };
        names.into_iter().map(change).filter(|change| change.old != change.new).collect()
    }

    /// Everything from outside, by a name and a version of words.
    fn list_outside(&self) -> Vec<(String, String)> {
        let artifacts = self
            .artifacts
            .iter()
            .map(|one| (format!("artifact {}", one.name), one.sha256.short().to_string()));
        let distributions = self.pythons.iter().flat_map(|python| {
            python
                .distributions
                .iter()
                .map(|one| (format!("{}/{}", python.layer, one.name), one.version.clone()))
        });
        artifacts.chain(distributions).collect()
    }

    /// What must hold of a lock that somebody may have edited.
    pub(super) fn check_outside(&self) -> Result<(), String> {
        let mut seen = BTreeSet::new();
        for one in &self.artifacts {
            if !seen.insert(("artifact", &one.layer, one.name.as_str())) {
                return Err(format!("artifact `{}` is locked twice", one.name.escape_debug()));
            }
        }
        for python in &self.pythons {
            if !seen.insert(("python", &python.layer, python.path.as_str())) {
                return Err(format!("the Python in {:?} is locked twice", python.path));
            }
            let mut names = BTreeSet::new();
            for one in &python.distributions {
                one.check()?;
                if !names.insert(&one.name) {
                    return Err(format!("`{}` is locked twice in {:?}", one.name, python.path));
                }
            }
        }
        Ok(())
    }
}

impl LockedDistribution {
    /// Its texts become lines of a requirements file and names of files.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self) -> Result<(), String> {
        let is_in = |text: &str, others: &[u8]| {
            (1..=200).contains(&text.len())
                && text.as_bytes()[0].is_ascii_alphanumeric()
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || others.contains(&b))
        };
        if !is_in(&self.name, b"-") {
            return Err(format!("`{}` is no distribution's name", self.name.escape_debug()));
        }
        if !is_in(&self.version, b".+!-_") {
            return Err(format!("`{}` is no distribution's version", self.version.escape_debug()));
        }
        let is_archive =
            [".whl", ".tar.gz", ".zip"].iter().any(|suffix| self.file.ends_with(suffix));
        if !is_archive || !is_in(&self.file, b"._+!-") {
            return Err(format!("`{}` is no distribution's file name", self.file.escape_debug()));
        }
        Ok(())
    }

    /// Whether it is a source archive, of which the stage makes a wheel.
    pub fn is_source(&self) -> bool {
        !self.file.ends_with(".whl")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lock::FILE_NAME;

    fn artifact(url: &str) -> ArtifactRequest {
        ArtifactRequest {
            layer: "netbox".into(),
            name: "netbox".into(),
            url: url.into(),
            sha256: Digest::of(b"declared"),
        }
    }

    fn python(requirements: &[&str]) -> PythonRequest {
        PythonRequest {
            layer: "netbox".into(),
            path: "/opt/venv".into(),
            requirements: requirements.iter().map(|text| text.to_string()).collect(),
        }
    }

    fn distribution(name: &str, file: &str) -> LockedDistribution {
        LockedDistribution {
            name: name.into(),
            version: "1.0".into(),
            file: file.into(),
            sha256: Digest::of(file.as_bytes()),
        }
    }

    fn empty() -> Lock {
        Lock {
            version: 1,
            epoch: 0,
            suites: Vec::new(),
            packages: Vec::new(),
            sets: Vec::new(),
            artifacts: Vec::new(),
            pythons: Vec::new(),
        }
    }

    fn full() -> Lock {
        let mut lock = empty();
        lock.put_artifact(&artifact("https://example.org/a"), Digest::of(b"given"));
        let files =
            [distribution("b", "b-1.0.tar.gz"), distribution("a-c", "a_c-1.0-py3-none-any.whl")];
        lock.put_python(&python(&["b==1.0"]), files.to_vec());
        lock
    }

    #[test]
    fn what_is_from_outside_survives_the_file_sorted_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let lock = full();
        assert_eq!(lock.pythons[0].distributions[0].name, "a-c");
        lock.save(&path).unwrap();
        assert_eq!(Lock::load(&path).unwrap().as_ref(), Some(&lock));
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains("://"), "{text}");
        empty().save(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains("artifact") && !text.contains("python"), "{text}");
    }

    #[test]
    fn an_answer_holds_until_the_layer_asks_for_something_else() {
        let mut lock = full();
        let same = OutsideRequests {
            artifacts: vec![artifact("https://example.org/a")],
            pythons: vec![python(&["b==1.0"])],
        };
        assert!(lock.find_stale_outside(&same).is_empty());
        assert_eq!(lock.find_artifact(&same.artifacts[0]).unwrap().sha256, Digest::of(b"given"));
        let other = OutsideRequests {
            artifacts: vec![artifact("https://example.org/b")],
            pythons: vec![python(&["b==1.1"])],
        };
        assert_eq!(lock.find_stale_outside(&other), ["artifact netbox", "Python in /opt/venv"]);
        lock.put_artifact(&other.artifacts[0], Digest::of(b"declared"));
        lock.put_python(&other.pythons[0], vec![]);
        assert!(lock.find_stale_outside(&other).is_empty());
        assert_eq!((lock.artifacts.len(), lock.pythons.len()), (1, 1));
        lock.prune_outside(&OutsideRequests::default());
        assert_eq!(lock, empty());
    }

    #[test]
    fn changes_are_told_by_layer_and_name() {
        let changes: Vec<String> = full().compare(&empty()).iter().map(Change::to_string).collect();
        let digest = Digest::of(b"given").short();
        assert_eq!(
            changes,
            [
                format!("artifact netbox {digest} added"),
                "netbox/a-c 1.0 added".into(),
                "netbox/b 1.0 added".into(),
            ]
        );
    }

    #[test]
    fn a_lock_that_somebody_has_edited_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        full().save(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        for (from, to) in [
            ("b-1.0.tar.gz", "../b-1.0.tar.gz"),
            ("b-1.0.tar.gz", "/etc/b.zip"),
            ("b-1.0.tar.gz", "b-1.0.exe"),
            ("b-1.0.tar.gz", "b 1.0.tar.gz"),
            ("name = \"b\"", "name = \"a-c\""),
            ("name = \"b\"", "name = \"-r x\""),
            ("version = \"1.0\"", "version = \"1.0 --pre\""),
            ("sha256 = \"", "sha256 = \"x"),
        ] {
            let hostile = text.replace(from, to);
            assert_ne!(hostile, text, "{from}");
            std::fs::write(&path, hostile).unwrap();
            let error = Lock::load(&path).unwrap_err();
            assert_eq!(crate::error::exit_code(&error), 2, "{error:#}");
        }
    }

    proptest! {
        #[test]
        fn names_of_files_never_lead_anywhere(file in "[a-z./ \\\\\n%-]{0,12}(\\.whl|\\.zip)?") {
            let distribution = LockedDistribution { file: file.clone(), ..distribution("a", "a.whl") };
            if distribution.check().is_ok() {
                prop_assert!(!file.contains(['/', '\\', ' ', '\n', '%']) && !file.starts_with('.'));
            }
        }
    }
}
