//! A layer's build stage: `[build]` and `[[python]]`, checked.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;

use super::check::{check_name, check_path, check_text, check_unique};
use super::layer::{PackageWish, check_packages};
use super::raw::{RawBuild, RawPython, Text};
use super::source::{Source, quote};
use super::tree::TreeFile;

/// Where an image is empty, or belongs to each machine.
const NOT_KEPT: [&str; 8] = ["dev", "etc", "proc", "root", "run", "sys", "tmp", "var"];
/// Characters of a requirement that a layer may write.
const REQUIREMENT_LENGTH: usize = 200;

/// What is made beside the image, with programs that the image does not hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Build {
    /// The layer on which the stage begins; without it, the one before this layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over: Option<String>,
    /// What is installed beside the layer's own packages.
    pub packages: Vec<PackageWish>,
    /// Shell command lines run in the stage.
    pub commands: Vec<String>,
    /// What goes into the layer; the virtualenvs are among them.
    pub keep: Vec<PathBuf>,
    pub pythons: Vec<Python>,
    /// What `build/` lays over the stage, sorted by target.
    pub files: Vec<TreeFile>,
}

/// A virtualenv of Debian's Python.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Python {
    pub path: PathBuf,
    /// `name==version`, with extras and other comparisons as pip takes them.
    pub requirements: Vec<String>,
}

/// The stage of a layer, without its files; none when the layer asks for none.
pub(super) fn check_build(
    source: &Source,
    raw: Option<&RawBuild>,
    pythons: &[RawPython],
) -> Result<Option<Build>> {
    if raw.is_none() && pythons.is_empty() {
        return Ok(None);
    }
    let nothing = RawBuild::default();
    let raw = raw.unwrap_or(&nothing);
    let pythons_checked =
        pythons.iter().map(|python| check_python(source, python)).collect::<Result<Vec<_>>>()?;
    let kept = raw.keep.iter().map(|text| ("build.keep", text));
    let kept = kept.chain(pythons.iter().map(|python| ("python.path", &python.path)));
    let keep = check_keep(source, kept)?;
    if keep.is_empty() {
        let error = raw.commands.first().or(raw.packages.first());
        let span = error.map_or(0..0, |text: &Text| text.span());
        return Err(source
            .error(span, "`[build]` keeps nothing")
            .why("only the paths of `build.keep` and virtualenvs go into the layer")
            .help("name what it makes: `keep = [\"/opt/x\"]`")
            .into());
    }
    Ok(Some(Build {
        over: raw.over.as_ref().map(|text| check_name(source, "layer", text)).transpose()?,
        packages: check_packages(source, &raw.packages)?,
        commands: raw
            .commands
            .iter()
            .map(|text| check_text(source, "build.commands", text))
            .collect::<Result<_>>()?,
        keep,
        pythons: pythons_checked,
        files: Vec::new(),
    }))
}

/// The kept paths, none inside another, none where an image is empty.
fn check_keep<'a>(
    source: &Source,
    texts: impl Iterator<Item = (&'static str, &'a Text)>,
) -> Result<Vec<PathBuf>> {
    let mut keep: Vec<PathBuf> = Vec::new();
    for (key, text) in texts {
        let path = check_path(source, key, text)?;
        let first = path.iter().nth(1).and_then(|part| part.to_str()).unwrap_or_default();
        if NOT_KEPT.contains(&first) {
            let what = format!("nothing below `/{first}` can be kept of a build stage");
            let error = source.error(text.span(), what);
            return Err(error.help("let the stage make it below /usr or /opt").into());
        }
        // A virtualenv inside a kept folder is kept with it.
        if key == "python.path" && keep.iter().any(|kept| path.starts_with(kept)) {
            continue;
        }
        if let Some(other) = keep.iter().find(|kept| overlap(kept, &path)) {
            let what = format!("{} and {} overlap", quote(&text_of(other)), quote(&text_of(&path)));
            return Err(source.error(text.span(), what).help("name the outer one only").into());
        }
        keep.push(path);
    }
    Ok(keep)
}

fn overlap(a: &Path, b: &Path) -> bool {
    a.starts_with(b) || b.starts_with(a)
}

fn text_of(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn check_python(source: &Source, raw: &RawPython) -> Result<Python> {
    let path = check_path(source, "python.path", &raw.path)?;
    let requirements = raw
        .requirements
        .iter()
        .map(|text| check_requirement(source, text))
        .collect::<Result<Vec<_>>>()?;
    if requirements.is_empty() {
        let error = source.error(raw.path.span(), "`python.requirements` is empty");
        return Err(error
            .help("write what it installs: `requirements = [\"Django==6.0.8\"]`")
            .into());
    }
    let names: Vec<String> = requirements.iter().map(|text| normalize_name(text)).collect();
    let pairs = names.iter().zip(&raw.requirements);
    let pairs = pairs.map(|(name, text)| (name.as_str(), text.span()));
    check_unique(source, "requirement", pairs)?;
    Ok(Python { path, requirements })
}

/// The name of a requirement as indexes compare it: lower case, one `-` for any of `-_.`.
pub fn normalize_name(requirement: &str) -> String {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let name = &requirement[..requirement.find(|c| !is_part(c)).unwrap_or(requirement.len())];
    let parts: Vec<&str> = name.split(['-', '_', '.']).filter(|part| !part.is_empty()).collect();
    parts.join("-").to_ascii_lowercase()
}

fn check_requirement(source: &Source, text: &Text) -> Result<String> {
    let requirement = text.get_ref();
    if is_requirement(requirement) {
        return Ok(requirement.clone());
    }
    let error = source.error(text.span(), format!("bad requirement {}", quote(requirement)));
    Err(error
        .help("write `name==1.2`, `name[extra]==1.2` or `name>=1.2,<2`, without blanks")
        .into())
}

/// A part of what pip takes: no options, no URLs, no files, no markers.
fn is_requirement(text: &str) -> bool {
    let is_part = |text: &str| {
        let is_plain = |b: u8| b.is_ascii_alphanumeric();
        text.bytes().next().is_some_and(is_plain)
            && text.bytes().last().is_some_and(is_plain)
            && text.bytes().all(|b| is_plain(b) || b"._-".contains(&b))
    };
    let end = text.find(['[', '=', '<', '>', '!', '~']).unwrap_or(text.len());
    let (name, mut rest) = text.split_at(end);
    if let Some(extras) = rest.strip_prefix('[') {
        let Some((extras, after)) = extras.split_once(']') else { return false };
        if !extras.split(',').all(is_part) {
            return false;
        }
        rest = after;
    }
    let is_version = |text: &str| {
        let operator = ["==", ">=", "<=", "!=", "~=", "<", ">"]
            .iter()
            .find_map(|operator| text.strip_prefix(operator));
        operator.is_some_and(|version| {
            version.starts_with(|c: char| c.is_ascii_digit())
                && version.bytes().all(|b| b.is_ascii_alphanumeric() || b".*+!-".contains(&b))
        })
    };
    text.len() <= REQUIREMENT_LENGTH
        && is_part(name)
        && (rest.is_empty() || rest.split(',').all(is_version))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requirements_are_names_extras_and_versions() {
        for good in ["Django==6.0.8", "psycopg[binary,pool]==3.3.4", "a", "a>=1,<2,!=1.5", "a==6.*"]
        {
            assert!(is_requirement(good), "{good}");
        }
        for bad in [
            "",
            "-r file",
            "--index-url=x",
            "a @ https://example.org/a.whl",
            "a; python_version < '3'",
            "a==1 --hash=x",
            "./a",
            "a/b",
            "a[",
            "a[]",
            "a[b]c",
            "a==",
            "a=1",
            "a==1,",
            "a\n--pre",
            "a==1\nb",
        ] {
            assert!(!is_requirement(bad), "{bad:?}");
        }
    }

    #[test]
    fn one_distribution_has_many_spellings() {
        for text in ["Foo_Bar==1", "foo-bar", "foo.bar[x]", "FOO--bar>=2"] {
            assert_eq!(normalize_name(text), "foo-bar", "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_that_pip_takes_for_an_option_or_a_place_gets_through(text in ".{0,40}") {
            if is_requirement(&text) {
                prop_assert!(!text.starts_with('-'));
                prop_assert!(!text.contains([' ', '/', '@', ';', '\n', ':', '\\']));
                prop_assert!(!normalize_name(&text).is_empty());
            }
        }
    }
}
