//! Why a build would do again what it did before: each step's inputs by name, beside those
//! of the last build of the same profile from the same folder.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::config::Project;
use crate::digest::{Digest, Key};
use crate::store::{Store, write_atomically};

/// Of a record; some thousand inputs are a few hundred KiB.
const MAX_RECORD: u64 = 64 << 20;

/// What the steps after the layers are called.
pub const INITRD: &str = "initrd";
pub const IMAGE: &str = "image";

/// The keys of all steps of a build.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// By name, in their order.
    pub layers: Vec<(String, Key)>,
    pub initrd: Key,
    pub image: Key,
}

/// What a build would do at a step, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    pub step: String,
    /// It would be taken from the store.
    pub cached: bool,
    /// Inputs that are not those of the last build, in words; empty when there was none, or
    /// when only the store has lost what was made.
    pub changes: Vec<String>,
    /// The last build had this step.
    pub known: bool,
}

impl Record {
    fn list_steps(&self) -> impl Iterator<Item = (&str, &Key)> {
        let layers = self.layers.iter().map(|(name, key)| (name.as_str(), key));
        layers.chain([(INITRD, &self.initrd), (IMAGE, &self.image)])
    }

    /// Where the store remembers the last build of a profile.
    fn name(project: &Project, profile: &str) -> String {
        let mut key = Key::new("record", 1);
        key.add("project", project.root.as_os_str().as_encoded_bytes());
        key.add("profile", profile);
        format!("built-{}.json", key.digest())
    }

    pub fn save(&self, store: &Store, project: &Project, profile: &str) -> Result<()> {
        let path = store.state_path(&Record::name(project, profile));
        write_atomically(&path, &serde_json::to_vec(self)?)
    }

    /// That of the last build; one that cannot be read counts as none.
    pub fn load(store: &Store, project: &Project, profile: &str) -> Result<Option<Record>> {
        let path = store.state_path(&Record::name(project, profile));
        let is_small = |path: &Path| path.metadata().is_ok_and(|meta| meta.len() <= MAX_RECORD);
        if !is_small(&path) {
            return Ok(None);
        }
        let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(serde_json::from_slice(&text).ok())
    }
}

/// Compare what a build would do now with what the last one did. `is_cached` says whether
/// the store has what a step makes.
pub fn compare(
    now: &Record,
    last: Option<&Record>,
    is_cached: impl Fn(&str, &Key) -> bool,
) -> Vec<Explanation> {
    let find = |name: &str| {
        let mut steps = last.into_iter().flat_map(Record::list_steps);
        steps.find(|(step, _)| *step == name).map(|(_, key)| key)
    };
    let explain = |(step, key): (&str, &Key)| {
        let before = find(step);
        Explanation {
            step: step.to_string(),
            cached: is_cached(step, key),
            changes: before.map(|before| list_changes(before, key)).unwrap_or_default(),
            known: before.is_some(),
        }
    };
    now.list_steps().map(explain).collect()
}

/// Inputs by name, each with its values in their order.
fn index(key: &Key) -> BTreeMap<&str, Vec<Digest>> {
    let mut inputs: BTreeMap<&str, Vec<Digest>> = BTreeMap::new();
    for (name, value) in key.inputs() {
        inputs.entry(name).or_default().push(*value);
    }
    inputs
}

fn list_changes(before: &Key, now: &Key) -> Vec<String> {
    let (before, now) = (index(before), index(now));
    let mut changes = Vec::new();
    for (name, values) in &now {
        match before.get(name) {
            None => changes.push(format!("{} is new", describe(name))),
            Some(old) if old != values => changes.push(format!("{} changed", describe(name))),
            Some(_) => {}
        }
    }
    let gone = before.keys().filter(|name| !now.contains_key(*name));
    changes.extend(gone.map(|name| format!("{} is gone", describe(name))));
    changes
}

/// An input as people know it.
fn describe(name: &str) -> String {
    match name {
        "below" => "what lies below".to_string(),
        "epoch" => "the date of the lock".to_string(),
        "step" => "the builder's version of the step".to_string(),
        "tools" => "the set of tools".to_string(),
        other => other.to_string(),
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.cached { "cached" } else { "to do" };
        write!(f, "{state:<7} {}", self.step)?;
        match (self.cached, self.known) {
            (_, true) if !self.changes.is_empty() => {
                self.changes.iter().try_for_each(|change| write!(f, "\n          {change}"))
            }
            (false, true) => write!(f, "\n          the store has lost it"),
            (false, false) => write!(f, "\n          no earlier build had it"),
            (true, _) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(inputs: &[(&str, &str)]) -> Key {
        let mut key = Key::new("files", 1);
        inputs.iter().for_each(|(name, value)| {
            key.add(*name, value);
        });
        key
    }

    fn record(steps: &[(&str, &[(&str, &str)])]) -> Record {
        let layers = steps.iter().map(|(name, inputs)| (name.to_string(), key(inputs)));
        Record { layers: layers.collect(), initrd: key(&[]), image: key(&[]) }
    }

    #[test]
    fn each_changed_input_is_named() {
        let last = record(&[("a", &[("x", "1"), ("gone", "1"), ("command", "p")])]);
        let now = record(&[("a", &[("x", "2"), ("new", "1"), ("command", "p")])]);
        let found = compare(&now, Some(&last), |_, _| false);
        assert_eq!(found[0].changes, ["new is new", "x changed", "gone is gone"]);
        let order = record(&[("a", &[("command", "q"), ("command", "p")])]);
        let turned = record(&[("a", &[("command", "p"), ("command", "q")])]);
        assert_eq!(compare(&turned, Some(&order), |_, _| false)[0].changes, ["command changed"]);
    }

    #[test]
    fn a_step_without_a_past_and_one_that_was_lost_are_told_apart() {
        let now = record(&[("a", &[]), ("b", &[])]);
        let last = record(&[("a", &[])]);
        let found = compare(&now, Some(&last), |_, _| false);
        assert!(found[0].to_string().contains("the store has lost it"));
        assert!(found[1].to_string().contains("no earlier build had it"));
        let cached = compare(&now, None, |_, _| true);
        assert_eq!(cached[0].to_string(), "cached  a");
    }
}
