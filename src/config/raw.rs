//! The TOML as it is typed. Nothing here is checked beyond keys and types.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, Visitor};
use toml::Spanned;

pub(super) type Text = Spanned<String>;
pub(super) type RawVariables = BTreeMap<Text, Spanned<toml::Value>>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawLayer {
    pub description: Text,
    pub role: Option<Text>,
    #[serde(default)]
    pub requires: Vec<Text>,
    #[serde(default)]
    pub packages: Vec<Text>,
    #[serde(default)]
    pub provides: Vec<Text>,
    #[serde(default)]
    pub recommends: bool,
    #[serde(default)]
    pub exclude: Vec<Text>,
    #[serde(default)]
    pub remove: Vec<RawRemoval>,
    #[serde(default)]
    pub commands: Vec<Text>,
    #[serde(default)]
    pub agent: bool,
    #[serde(default)]
    pub artifact: Vec<RawArtifact>,
    pub build: Option<Spanned<RawBuild>>,
    #[serde(default)]
    pub python: Vec<RawPython>,
    #[serde(default)]
    pub user: Vec<RawUser>,
    #[serde(default)]
    pub group: Vec<RawGroup>,
    #[serde(default)]
    pub units: RawUnits,
    #[serde(default)]
    pub variables: RawVariables,
    #[serde(default)]
    pub owners: BTreeMap<Text, RawOwner>,
    pub initrd: Option<Spanned<RawInitrd>>,
    #[serde(default)]
    pub kernel: RawKernel,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table with `path` and `reason`")]
pub(super) struct RawRemoval {
    pub path: Text,
    pub reason: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table with `name`, `url`, `sha256` and `path`")]
pub(super) struct RawArtifact {
    pub name: Text,
    pub url: Text,
    pub sha256: Text,
    pub path: Text,
    #[serde(default)]
    pub unpack: bool,
    pub strip: Option<Spanned<u32>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default, expecting = "a table with `packages`, `commands` and `keep`")]
pub(super) struct RawBuild {
    pub over: Option<Text>,
    pub packages: Vec<Text>,
    pub commands: Vec<Text>,
    pub keep: Vec<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table with `path` and `requirements`")]
pub(super) struct RawPython {
    pub path: Text,
    pub requirements: Vec<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table with `name` and `id`")]
pub(super) struct RawUser {
    pub name: Text,
    pub id: Spanned<u32>,
    pub home: Option<Text>,
    pub shell: Option<Text>,
    #[serde(default)]
    pub groups: Vec<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table with `name` and `id`")]
pub(super) struct RawGroup {
    pub name: Text,
    pub id: Spanned<u32>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default, expecting = "a table with `enable`, `disable` or `mask`")]
pub(super) struct RawUnits {
    pub enable: Vec<Text>,
    pub disable: Vec<Text>,
    pub mask: Vec<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table with `owner`, `group` or `mode`")]
pub(super) struct RawOwner {
    pub owner: Option<Text>,
    pub group: Option<Text>,
    pub mode: Option<Spanned<RawMode>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default, expecting = "a table with `packages` or `modules`")]
pub(super) struct RawInitrd {
    pub packages: Vec<Text>,
    pub modules: Vec<Text>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default, expecting = "a table with `cmdline`")]
pub(super) struct RawKernel {
    pub cmdline: Vec<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawProfile {
    pub description: Text,
    pub layers: Spanned<Vec<Text>>,
    pub formats: Option<Spanned<Vec<Text>>>,
    #[serde(default)]
    pub variables: RawVariables,
    #[serde(default)]
    pub disk: RawDisk,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default, expecting = "a table with `size`, `slot` or `esp`")]
pub(super) struct RawDisk {
    pub size: Option<Spanned<RawSize>>,
    pub slot: Option<Spanned<RawSize>>,
    pub esp: Option<Spanned<RawSize>>,
}

/// A mode in quotes: TOML would read the bare `0644` as a mistake, and `644` as decimal.
pub(super) struct RawMode(pub String);

/// A size in quotes.
pub(super) struct RawSize(pub String);

impl<'de> Deserialize<'de> for RawMode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = "an octal mode in quotes such as \"0644\"";
        deserializer.deserialize_str(QuotedVisitor(expected)).map(RawMode)
    }
}

impl<'de> Deserialize<'de> for RawSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = "a size in quotes with its unit such as \"8GiB\"";
        deserializer.deserialize_str(QuotedVisitor(expected)).map(RawSize)
    }
}

struct QuotedVisitor(&'static str);

impl Visitor<'_> for QuotedVisitor {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_string())
    }
}
