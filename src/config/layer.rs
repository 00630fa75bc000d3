//! A layer: what `layers/<name>/` says, checked.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Serialize, Serializer};
use toml::Spanned;

use super::build::{Build, check_build};
use super::check::{
    check_account, check_argument, check_digest, check_mode, check_module, check_name,
    check_package, check_path, check_pattern, check_provided, check_text, check_unique, check_unit,
    check_url, check_variables,
};
use super::raw::{RawArtifact, RawGroup, RawInitrd, RawLayer, RawOwner, RawUnits, RawUser, Text};
use super::role::Role;
use super::source::{Source, quote};
use super::tree::{Owners, Ownership, Sections, TreeFile, read_trees};
use crate::digest::Digest;
use crate::error::find_nearest;

/// Ids that a layer may give: below lie Debian's own, above what systemd takes for
/// dynamic users and containers (systemd's UIDS-GIDS).
const IDS: RangeInclusive<u32> = 100..=59_999;

/// One step of an image, in the order of the profile.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Layer {
    pub name: String,
    pub description: String,
    /// What a machine whose image holds this layer is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// Layers that come before this one.
    pub requires: Vec<String>,
    pub packages: Vec<PackageWish>,
    /// Package names (`name` or `name (= version)`) that count as installed, because the
    /// layer does itself what the package would do or does without it.
    pub provides: Vec<String>,
    /// Whether recommended packages come too.
    pub recommends: bool,
    /// Patterns of package files that are not unpacked: those of the layers before, then
    /// this layer's own.
    pub exclude: Vec<String>,
    /// Shell command lines run inside the root once the files are laid.
    pub commands: Vec<String>,
    /// Whether the layer carries a copy of the running program as the node's agent.
    pub agent: bool,
    pub cmdline: Vec<String>,
    pub units: Units,
    pub remove: Vec<Removal>,
    pub artifacts: Vec<Artifact>,
    /// With it, the artifacts belong to the stage, not to the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub build: Option<Build>,
    pub users: Vec<User>,
    pub groups: Vec<Group>,
    pub variables: toml::Table,
    pub initrd: Option<Initrd>,
    /// What `skeleton/` lays over the root before packages are configured, sorted by target.
    pub skeleton: Vec<TreeFile>,
    /// What `tree/` lays over the root, sorted by target.
    pub files: Vec<TreeFile>,
    /// What `boot/` ships for the agent, unrendered, sorted by target; the targets lie
    /// under `/usr/share/stanchion/boot/<layer>/` and keep the suffix `.j2`. Owner, group
    /// and mode are those the agent's rendering gets.
    pub boot: Vec<TreeFile>,
}

/// A Debian binary package, in one version if the layer says so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PackageWish {
    pub name: String,
    pub version: Option<String>,
}

impl std::fmt::Display for PackageWish {
    /// `name` or `name=version`, as in a layer.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)?;
        self.version.as_ref().map_or(Ok(()), |version| write!(f, "={version}"))
    }
}

/// Files that are taken out of the finished layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Removal {
    /// A pattern (fnmatch(3)) of absolute paths.
    pub path: String,
    pub reason: String,
}

/// A file from outside the package repositories.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Artifact {
    pub name: String,
    pub url: String,
    pub sha256: Digest,
    /// Where it goes: the file itself, or the directory it is unpacked into.
    pub path: PathBuf,
    pub unpack: bool,
    /// Leading path parts that unpacking drops.
    pub strip: u32,
    /// Of the file itself; what is unpacked belongs to root and keeps the archive's modes.
    pub owner: String,
    pub group: String,
    #[serde(serialize_with = "write_mode")]
    pub mode: u32,
}

/// A system user with a group of the same name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct User {
    pub name: String,
    /// Both the user's and the group's.
    pub id: u32,
    pub home: PathBuf,
    pub shell: PathBuf,
    /// Further groups.
    pub groups: Vec<String>,
}

/// A group without a user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    pub name: String,
    pub id: u32,
}

/// systemd units by what becomes of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Units {
    pub enable: Vec<String>,
    pub disable: Vec<String>,
    pub mask: Vec<String>,
}

/// The initrd's own root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Initrd {
    pub packages: Vec<PackageWish>,
    /// Kernel modules, by name.
    pub modules: Vec<String>,
    /// What `initrd/` lays over it, sorted by target.
    pub files: Vec<TreeFile>,
}

/// A layer and the lines of its file that later checks may have to name.
pub(super) struct Loaded {
    pub layer: Layer,
    pub file: PathBuf,
    pub requires: Vec<usize>,
    pub users: Vec<usize>,
    pub groups: Vec<usize>,
    pub artifacts: Vec<usize>,
    /// Of `build.over`.
    pub over: usize,
    pub initrd: usize,
}

pub(super) fn write_mode<S: Serializer>(mode: &u32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{mode:04o}"))
}

/// Read and check `layers/<name>/` below the project's root; it must exist.
pub(super) fn load_layer(root: &Path, name: &str) -> Result<Loaded> {
    let folder = Path::new("layers").join(name);
    let source = Source::read(root, &folder.join("layer.toml"), "a layer")?;
    let raw: RawLayer = source.parse()?;
    let lines = |spans: Vec<usize>| spans.into_iter().map(|at| source.line(at)).collect();
    Ok(Loaded {
        file: source.path().to_owned(),
        requires: lines(raw.requires.iter().map(|text| text.span().start).collect()),
        users: lines(raw.user.iter().map(|user| user.name.span().start).collect()),
        groups: lines(raw.group.iter().map(|group| group.name.span().start).collect()),
        artifacts: lines(raw.artifact.iter().map(|item| item.name.span().start).collect()),
        over: raw
            .build
            .as_ref()
            .and_then(|build| build.get_ref().over.as_ref())
            .map_or(1, |over| source.line(over.span().start)),
        initrd: raw.initrd.as_ref().map_or(1, |initrd| source.line(initrd.span().start)),
        layer: check_layer(&source, name, raw, root, &folder)?,
    })
}

fn check_layer(
    source: &Source,
    name: &str,
    raw: RawLayer,
    root: &Path,
    folder: &Path,
) -> Result<Layer> {
    let check_all = |texts: &[Text], check: &dyn Fn(&Text) -> Result<String>| {
        texts.iter().map(check).collect::<Result<Vec<String>>>()
    };
    let requires = check_all(&raw.requires, &|text| check_name(source, "layer", text))?;
    check_unique(source, "layer", pair(&raw.requires))?;
    let artifacts = check_artifacts(source, &raw.artifact)?;
    let mut owners = check_owners(source, &raw.owners)?;
    let initrd = raw.initrd.as_ref().map(|initrd| check_initrd(source, initrd)).transpose()?;
    let build = check_build(source, raw.build.as_ref().map(Spanned::get_ref), &raw.python)?;
    let has = Sections { initrd: initrd.is_some(), build: build.is_some() };
    let trees = read_trees(source, root, folder, name, &mut owners, has)?;
    let mut layer = Layer {
        name: name.to_string(),
        description: check_text(source, "description", &raw.description)?,
        role: raw.role.as_ref().map(|role| check_role(source, role)).transpose()?,
        requires,
        packages: check_packages(source, &raw.packages)?,
        provides: check_provides(source, &raw.provides)?,
        recommends: raw.recommends,
        exclude: check_all(&raw.exclude, &|text| check_pattern(source, "exclude", text))?,
        commands: check_all(&raw.commands, &|text| check_text(source, "commands", text))?,
        agent: raw.agent,
        cmdline: check_all(&raw.kernel.cmdline, &|text| check_argument(source, text))?,
        units: check_units(source, &raw.units)?,
        remove: raw
            .remove
            .iter()
            .map(|item| {
                let path = check_pattern(source, "remove.path", &item.path)?;
                Ok(Removal { path, reason: check_text(source, "remove.reason", &item.reason)? })
            })
            .collect::<Result<_>>()?,
        artifacts,
        build: build.map(|build| Build { files: trees.build, ..build }),
        users: check_users(source, &raw.user)?,
        groups: check_groups(source, &raw.group)?,
        variables: check_variables(source, raw.variables)?,
        initrd: initrd.map(|initrd| Initrd { files: trees.initrd, ..initrd }),
        skeleton: trees.skeleton,
        files: trees.tree,
        boot: trees.boot,
    };
    for artifact in layer.artifacts.iter_mut().filter(|artifact| !artifact.unpack) {
        if let Some(ownership) = owners.take(&artifact.path) {
            artifact.owner = ownership.owner;
            artifact.group = ownership.group;
            artifact.mode = ownership.mode.unwrap_or(artifact.mode);
        }
    }
    owners.check_all_taken(source, &layer.files)?;
    Ok(layer)
}

fn pair(texts: &[Text]) -> impl Iterator<Item = (&str, std::ops::Range<usize>)> {
    texts.iter().map(|text| (text.get_ref().as_str(), text.span()))
}

fn check_role(source: &Source, text: &Text) -> Result<Role> {
    let name = text.get_ref();
    if let Some(role) = Role::ALL.into_iter().find(|role| role.name() == name) {
        return Ok(role);
    }
    let names = Role::ALL.map(Role::name);
    let error = source.error(text.span(), format!("there is no role {}", quote(name)));
    Err(match find_nearest(name, names) {
        Some(nearest) => error.help(format!("did you mean `{nearest}`?")),
        None => error.help(format!("the roles are: {}", names.join(", "))),
    }
    .into())
}

pub(super) fn check_packages(source: &Source, texts: &[Text]) -> Result<Vec<PackageWish>> {
    let wishes = texts
        .iter()
        .map(|text| check_package(source, text))
        .map(|wish| wish.map(|(name, version)| PackageWish { name, version }))
        .collect::<Result<Vec<_>>>()?;
    let names = wishes.iter().zip(texts).map(|(wish, text)| (wish.name.as_str(), text.span()));
    check_unique(source, "package", names)?;
    Ok(wishes)
}

fn check_provides(source: &Source, texts: &[Text]) -> Result<Vec<String>> {
    let provides =
        texts.iter().map(|text| check_provided(source, text)).collect::<Result<Vec<_>>>()?;
    let name = |provided: &'_ String| provided.split(' ').next().unwrap_or_default().to_string();
    let names: Vec<String> = provides.iter().map(name).collect();
    let pairs = names.iter().zip(texts).map(|(name, text)| (name.as_str(), text.span()));
    check_unique(source, "provided package", pairs)?;
    Ok(provides)
}

fn check_artifacts(source: &Source, raw: &[RawArtifact]) -> Result<Vec<Artifact>> {
    raw.iter()
        .map(|raw| {
            if let (Some(strip), false) = (&raw.strip, raw.unpack) {
                let error = source.error(strip.span(), "`artifact.strip` without `unpack = true`");
                return Err(error.why("only what is unpacked has path parts to drop").into());
            }
            Ok(Artifact {
                name: check_name(source, "artifact", &raw.name)?,
                url: check_url(source, &raw.url)?,
                sha256: check_digest(source, &raw.sha256)?,
                path: check_path(source, "artifact.path", &raw.path)?,
                unpack: raw.unpack,
                strip: raw.strip.as_ref().map_or(0, |strip| *strip.get_ref()),
                owner: "root".to_string(),
                group: "root".to_string(),
                mode: 0o644,
            })
        })
        .collect()
}

fn check_users(source: &Source, raw: &[RawUser]) -> Result<Vec<User>> {
    raw.iter()
        .map(|raw| {
            let id = check_id(source, "user", &raw.id)?;
            let path = |key: &str, text: &Option<Text>, default: &str| match text {
                Some(text) => check_path(source, key, text),
                None => Ok(PathBuf::from(default)),
            };
            check_unique(source, "group", pair(&raw.groups))?;
            Ok(User {
                name: check_account(source, "user", &raw.name)?,
                id,
                home: path("user.home", &raw.home, "/nonexistent")?,
                shell: path("user.shell", &raw.shell, "/usr/sbin/nologin")?,
                groups: raw
                    .groups
                    .iter()
                    .map(|group| check_account(source, "group", group))
                    .collect::<Result<_>>()?,
            })
        })
        .collect()
}

fn check_groups(source: &Source, raw: &[RawGroup]) -> Result<Vec<Group>> {
    raw.iter()
        .map(|raw| {
            let name = check_account(source, "group", &raw.name)?;
            Ok(Group { name, id: check_id(source, "group", &raw.id)? })
        })
        .collect()
}

fn check_id(source: &Source, what: &str, id: &Spanned<u32>) -> Result<u32> {
    if IDS.contains(id.get_ref()) {
        return Ok(*id.get_ref());
    }
    let error = source.error(id.span(), format!("bad {what} id `{}`", id.get_ref()));
    Err(error.help(format!("take one from {} to {}", IDS.start(), IDS.end())).into())
}

fn check_units(source: &Source, raw: &RawUnits) -> Result<Units> {
    let check = |texts: &[Text]| -> Result<Vec<String>> {
        texts.iter().map(|text| check_unit(source, text)).collect()
    };
    let units = Units {
        enable: check(&raw.enable)?,
        disable: check(&raw.disable)?,
        mask: check(&raw.mask)?,
    };
    let all = pair(&raw.enable).chain(pair(&raw.disable)).chain(pair(&raw.mask));
    check_unique(source, "unit", all)?;
    Ok(units)
}

fn check_initrd(source: &Source, raw: &Spanned<RawInitrd>) -> Result<Initrd> {
    let raw = raw.get_ref();
    let modules =
        raw.modules.iter().map(|text| check_module(source, text)).collect::<Result<_>>()?;
    check_unique(source, "module", pair(&raw.modules))?;
    Ok(Initrd { packages: check_packages(source, &raw.packages)?, modules, files: Vec::new() })
}

fn check_owners(source: &Source, raw: &BTreeMap<Text, RawOwner>) -> Result<Owners> {
    let mut owners = Owners::default();
    for (path, raw) in raw {
        let account = |what: &str, text: &Option<Text>| match text {
            Some(text) => check_account(source, what, text),
            None => Ok("root".to_string()),
        };
        let ownership = Ownership {
            owner: account("user", &raw.owner)?,
            group: account("group", &raw.group)?,
            mode: raw.mode.as_ref().map(|mode| check_mode(source, mode)).transpose()?,
            span: path.span(),
        };
        owners.insert(check_path(source, "owners", path)?, ownership);
    }
    Ok(owners)
}
