//! A profile: what one image is made of, with its layers in order and its variables
//! merged.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;

use super::check::{check_size, check_text, check_unique, check_variables};
use super::format::Format;
use super::layer::Layer;
use super::raw::{RawDisk, RawProfile, Text};
use super::resolve::resolve_layers;
use super::role::Role;
use super::source::{Source, quote};
use crate::error::find_nearest;

/// One image, resolved: nothing is left to look up in the project but the files' bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Profile {
    /// The project's root; the sources of the layers' files are relative to it.
    #[serde(skip)]
    pub root: PathBuf,
    pub name: String,
    pub description: String,
    /// What a build makes when it is not told otherwise.
    pub formats: Vec<Format>,
    /// The kernel's arguments of all layers, in order.
    pub cmdline: Vec<String>,
    pub disk: Disk,
    /// What templates see: the layers' variables in order, then the profile's; of two
    /// tables the keys are merged, of all else the later one stays.
    pub variables: toml::Table,
    /// In the order in which they are laid.
    #[serde(rename = "layer")]
    pub layers: Vec<Layer>,
}

impl Profile {
    /// What its machines are for: the roles of its layers, each once, in the order of
    /// [`Role`].
    pub fn roles(&self) -> Vec<Role> {
        let has = |role: &Role| self.layers.iter().any(|layer| layer.role == Some(*role));
        Role::ALL.into_iter().filter(has).collect()
    }
}

/// Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// The whole disk as it is shipped.
    pub size: u64,
    /// Each of the two root slots.
    pub slot: u64,
    /// The EFI system partition.
    pub esp: u64,
}

/// Read, check and resolve `profiles/<name>.toml`; it must exist.
pub(super) fn read_profile(root: &Path, name: &str) -> Result<Profile> {
    let path = Path::new("profiles").join(format!("{name}.toml"));
    let source = Source::read(root, &path, "a profile")?;
    let raw: RawProfile = source.parse()?;
    let description = check_text(&source, "description", &raw.description)?;
    let formats = match &raw.formats {
        Some(formats) if formats.get_ref().is_empty() => {
            return Err(source.error(formats.span(), "`formats` is empty").into());
        }
        Some(formats) => check_formats(&source, formats.get_ref())?,
        None => vec![Format::Qcow2],
    };
    let disk = check_disk(&source, &raw.disk)?;
    let own = check_variables(&source, raw.variables)?;
    let layers = resolve_layers(root, &source, &raw.layers)?;
    let mut variables = toml::Table::new();
    for table in layers.iter().map(|layer| &layer.variables).chain([&own]) {
        merge(&mut variables, table);
    }
    let cmdline = layers.iter().flat_map(|layer| layer.cmdline.clone()).collect();
    let root = root.to_owned();
    let name = name.to_string();
    Ok(Profile { root, name, description, formats, cmdline, disk, variables, layers })
}

fn check_formats(source: &Source, texts: &[Text]) -> Result<Vec<Format>> {
    let names = || Format::ALL.iter().map(|format| format.name());
    check_unique(
        source,
        "format",
        texts.iter().map(|text| (text.get_ref().as_str(), text.span())),
    )?;
    texts
        .iter()
        .map(|text| {
            let name = text.get_ref();
            if let Some(format) = Format::ALL.into_iter().find(|format| format.name() == name) {
                return Ok(format);
            }
            let error = source.error(text.span(), format!("there is no format {}", quote(name)));
            Err(match find_nearest(name, names()) {
                Some(nearest) => error.help(format!("did you mean `{nearest}`?")),
                None => error
                    .help(format!("the formats are: {}", names().collect::<Vec<_>>().join(", "))),
            }
            .into())
        })
        .collect()
}

fn check_disk(source: &Source, raw: &RawDisk) -> Result<Disk> {
    let read = |size: &Option<_>, default: u64| match size {
        Some(size) => check_size(source, size),
        None => Ok(default),
    };
    let disk = Disk {
        size: read(&raw.size, 8 << 30)?,
        slot: read(&raw.slot, 2 << 30)?,
        esp: read(&raw.esp, 256 << 20)?,
    };
    // 2^60 is the largest size, so this does not overflow.
    let needed = disk.esp + 2 * disk.slot;
    if disk.size <= needed {
        let span = [&raw.size, &raw.slot, &raw.esp].into_iter().flatten().map(|size| size.span());
        let error = source
            .error(span.min_by_key(|span| span.start).unwrap_or(0..0), "the disk is too small")
            .why(format!(
                "two slots and the ESP take {} MiB of {} MiB, and `/var` needs room too",
                needed >> 20,
                disk.size >> 20
            ));
        return Err(error.help("raise `disk.size`, or lower `disk.slot`").into());
    }
    Ok(disk)
}

/// Lay `over` over `table`. The depth is bounded by that of the TOML reader.
fn merge(table: &mut toml::Table, over: &toml::Table) {
    for (key, value) in over {
        match (table.get_mut(key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => merge(below, above),
            _ => {
                table.insert(key.clone(), value.clone());
            }
        }
    }
}
