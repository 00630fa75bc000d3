//! The small grammars: names, versions, paths, modes, sizes. Each check takes a text of
//! a file and gives it back, or says what is wrong with it and where.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use toml::Spanned;

use super::raw::{RawMode, RawSize, RawVariables, Text};
use super::source::{Source, quote};
use crate::digest::Digest;
use crate::error::UserError;

/// Unit types, systemd.unit(5); `slice` and `scope` included, `device` too.
const UNIT_TYPES: [&str; 11] = [
    "service",
    "socket",
    "device",
    "mount",
    "automount",
    "swap",
    "target",
    "path",
    "timer",
    "slice",
    "scope",
];

/// Directories that are symlinks into /usr in the image (the merged /usr of Debian 12 on).
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

pub(super) const NAME_HELP: &str = "a name has lower-case letters, digits and `-`, at most 60";

/// Names of layers, profiles and artifacts: they become parts of paths and file names.
pub(super) fn is_name(name: &str) -> bool {
    name.len() <= 60
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

pub(super) fn check_name(source: &Source, what: &str, name: &Text) -> Result<String> {
    if is_name(name.get_ref()) {
        return Ok(name.get_ref().clone());
    }
    let error = source.error(name.span(), format!("bad {what} name {}", quote(name.get_ref())));
    Err(error.help(NAME_HELP).into())
}

/// A text that says something.
pub(super) fn check_text(source: &Source, key: &str, text: &Text) -> Result<String> {
    if text.get_ref().trim().is_empty() {
        return Err(source.error(text.span(), format!("`{key}` is empty")).into());
    }
    Ok(text.get_ref().clone())
}

/// `name` or `name=version` (Debian policy 5.6.1 and 5.6.12).
pub(super) fn check_package(source: &Source, text: &Text) -> Result<(String, Option<String>)> {
    let (name, version) = match text.get_ref().split_once('=') {
        Some((name, version)) => (name, Some(version)),
        None => (text.get_ref().as_str(), None),
    };
    if !is_package_name(name) {
        let error = source.error(text.span(), format!("bad package name {}", quote(name)));
        let help = "a Debian package name has lower-case letters, digits, `+`, `-` and `.`; \
                    a version follows `=`, and there is no architecture";
        return Err(error.help(help).into());
    }
    match version {
        Some(version) if !is_package_version(version) => {
            let what = format!("bad version {} of the package `{name}`", quote(version));
            let help = "a Debian version begins with a digit, such as `17.4-1` or `1:9.0~rc1-2`";
            Err(source.error(text.span(), what).help(help).into())
        }
        version => Ok((name.to_string(), version.map(str::to_string))),
    }
}

/// `name` or `name (= version)`, as in a package's own Provides (Debian policy 7.5).
pub(super) fn check_provided(source: &Source, text: &Text) -> Result<String> {
    let provided = text.get_ref();
    let is_fine = match provided.split_once(' ') {
        Some((name, constraint)) => {
            let version = constraint.strip_prefix("(= ").and_then(|rest| rest.strip_suffix(')'));
            is_package_name(name) && version.is_some_and(is_package_version)
        }
        None => is_package_name(provided),
    };
    if is_fine {
        return Ok(provided.clone());
    }
    let error = source.error(text.span(), format!("bad provided package {}", quote(provided)));
    Err(error.help("write `name` or `name (= version)`, such as `locales (= 2.41-12)`").into())
}

fn is_package_name(name: &str) -> bool {
    let is_first = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    name.len() >= 2
        && name.bytes().next().is_some_and(is_first)
        && name.bytes().all(|b| is_first(b) || b"+-.".contains(&b))
}

/// `[epoch:]upstream[-revision]`, deb-version(7).
fn is_package_version(version: &str) -> bool {
    let (epoch, rest) = version.split_once(':').unwrap_or(("0", version));
    // dpkg keeps the epoch in a C int.
    matches!(epoch.len(), 1..=9)
        && epoch.bytes().all(|b| b.is_ascii_digit())
        && rest.starts_with(|c: char| c.is_ascii_digit())
        && rest.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.~".contains(&b))
        && !rest.ends_with('-')
}

/// A systemd unit name, systemd.unit(5).
pub(super) fn check_unit(source: &Source, text: &Text) -> Result<String> {
    let name = text.get_ref();
    let wrong = |help: String| {
        let error = source.error(text.span(), format!("bad unit name {}", quote(name)));
        Err(error.help(help).into())
    };
    let Some((stem, kind)) = name.rsplit_once('.') else {
        return wrong(format!("write its type too, such as `{name}.service`"));
    };
    if !UNIT_TYPES.contains(&kind) {
        return wrong(format!("the types are: {}", UNIT_TYPES.join(", ")));
    }
    let is_allowed = |b: u8| b.is_ascii_alphanumeric() || b":-_.\\@".contains(&b);
    if stem.is_empty() || name.len() > 255 || !stem.bytes().all(is_allowed) {
        return wrong("a unit name has letters, digits and `:-_.\\@`, at most 255".to_string());
    }
    Ok(name.clone())
}

/// The name of a user or group, as adduser(8) takes it.
pub(super) fn check_account(source: &Source, what: &str, text: &Text) -> Result<String> {
    let name = text.get_ref();
    let is_account = name.len() <= 32
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b));
    if is_account {
        return Ok(name.clone());
    }
    let error = source.error(text.span(), format!("bad {what} name {}", quote(name)));
    let help = "a name has lower-case letters, digits, `_` and `-`, begins with no digit, and has \
                at most 32";
    Err(error.help(help).into())
}

/// The name of a kernel module.
pub(super) fn check_module(source: &Source, text: &Text) -> Result<String> {
    let name = text.get_ref();
    let is_allowed = |b: u8| b.is_ascii_alphanumeric() || b"_-".contains(&b);
    if !name.is_empty() && name.len() < 56 && name.bytes().all(is_allowed) {
        return Ok(name.clone());
    }
    let error = source.error(text.span(), format!("bad kernel module name {}", quote(name)));
    Err(error.help("write it without folder and without `.ko`, such as `virtio_net`").into())
}

/// One argument of the kernel command line; blanks only between double quotes.
pub(super) fn check_argument(source: &Source, text: &Text) -> Result<String> {
    let argument = text.get_ref();
    let (mut is_quoted, mut has_blank) = (false, false);
    for c in argument.chars() {
        is_quoted ^= c == '"';
        has_blank |= c == ' ' && !is_quoted;
    }
    if !argument.is_empty() && !is_quoted && !has_blank && !argument.chars().any(char::is_control) {
        return Ok(argument.clone());
    }
    let error = source.error(text.span(), format!("bad kernel argument {}", quote(argument)));
    Err(error.help("one argument an item: [\"quiet\", \"console=ttyS0\"]").into())
}

/// An absolute path in the image, as short as it can be written.
pub(super) fn check_path(source: &Source, key: &str, text: &Text) -> Result<PathBuf> {
    let path = text.get_ref();
    let wrong = |help: &str| {
        let error = source.error(text.span(), format!("bad path {} in `{key}`", quote(path)));
        Err(error.help(help.to_string()).into())
    };
    let Some(inner) = path.strip_prefix('/') else {
        return wrong("write an absolute path, beginning with `/`");
    };
    if inner.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return wrong("write it without `.`, `..`, doubled `/` or a `/` at its end");
    }
    if path.chars().any(char::is_control) {
        return wrong("write it without control characters");
    }
    if let Some(target) = find_merged(inner) {
        return wrong(&format!("in the image this is a symlink: write `/usr/{target}`"));
    }
    Ok(PathBuf::from(path))
}

/// The first part of a path without its leading `/`, when the image has a symlink there.
pub(super) fn find_merged(inner: &str) -> Option<&str> {
    let first = inner.split('/').next().unwrap_or("");
    MERGED.contains(&first).then_some(first)
}

/// A pattern (fnmatch(3), as dpkg's path-exclude takes it) of absolute paths.
pub(super) fn check_pattern(source: &Source, key: &str, text: &Text) -> Result<String> {
    let pattern = text.get_ref();
    let help = if !pattern.starts_with('/') {
        "write an absolute pattern, beginning with `/`"
    } else if pattern.split('/').any(|part| matches!(part, "." | "..")) {
        "write it without `.` and `..`"
    } else if pattern.chars().any(char::is_control) {
        "write it without control characters"
    } else if pattern.trim_matches(&['/', '*'][..]).is_empty() {
        "this is every file of the image: write a longer pattern"
    } else {
        return Ok(pattern.clone());
    };
    let error = source.error(text.span(), format!("bad pattern {} in `{key}`", quote(pattern)));
    Err(error.help(help).into())
}

pub(super) fn check_url(source: &Source, text: &Text) -> Result<String> {
    let url = text.get_ref();
    let host = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
    let is_host =
        host.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '['));
    if is_host && url.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(url.clone());
    }
    let error = source.error(text.span(), format!("bad URL {}", quote(url)));
    Err(error.help("write `https://HOST/PATH` in ASCII, without blanks").into())
}

pub(super) fn check_digest(source: &Source, text: &Text) -> Result<Digest> {
    let digits = text.get_ref();
    // The digest's own parser is looser: it takes signs.
    let digest = digits.bytes().all(|b| b.is_ascii_hexdigit()).then(|| digits.parse().ok());
    digest.flatten().ok_or_else(|| {
        let error = source.error(text.span(), format!("bad SHA-256 digest {}", quote(digits)));
        error.help("write its 64 hexadecimal digits").into()
    })
}

pub(super) fn check_mode(source: &Source, mode: &Spanned<RawMode>) -> Result<u32> {
    let digits = &mode.get_ref().0;
    let is_octal = digits.bytes().all(|b| (b'0'..=b'7').contains(&b));
    match u32::from_str_radix(digits, 8) {
        Ok(mode) if is_octal && matches!(digits.len(), 3 | 4) => Ok(mode),
        _ => {
            let error = source.error(mode.span(), format!("bad mode {}", quote(digits)));
            Err(error.help("write three or four octal digits, such as `0644`").into())
        }
    }
}

/// A size in bytes from `512MiB`, `8GiB` or `1TiB`.
pub(super) fn check_size(source: &Source, size: &Spanned<RawSize>) -> Result<u64> {
    let text = &size.get_ref().0;
    parse_size(text).ok_or_else(|| {
        let error = source.error(size.span(), format!("bad size {}", quote(text)));
        let help = "write a whole number with its unit: `512MiB`, `8GiB` or `1TiB`";
        error.help(help).into()
    })
}

fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = [("MiB", 20), ("GiB", 30), ("TiB", 40)]
        .into_iter()
        .find_map(|(unit, shift)| text.strip_suffix(unit).map(|digits| (digits, shift)))?;
    if digits.starts_with('0') || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    // 2^60 bytes are enough, and fit TOML's signed numbers.
    digits.parse::<u64>().ok()?.checked_mul(1 << shift).filter(|size| *size <= 1 << 60)
}

/// Variables of templates: names that a template can say, values that it can show.
pub(super) fn check_variables(source: &Source, raw: RawVariables) -> Result<toml::Table> {
    let mut variables = toml::Table::new();
    for (name, value) in raw {
        let text = name.get_ref();
        let is_identifier = !text.starts_with(|c: char| c.is_ascii_digit())
            && !text.is_empty()
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !is_identifier {
            let error = source.error(name.span(), format!("bad variable name {}", quote(text)));
            let error = match text.replace('-', "_") {
                // A template would read `a-b` as a subtraction.
                better if better != *text => error.help(format!("write {}", quote(&better))),
                _ => error.help("a variable's name has letters, digits and `_`"),
            };
            return Err(error.into());
        }
        if has_date(value.get_ref()) {
            let what = format!("the variable `{text}` holds a date");
            return Err(source.error(value.span(), what).help("put it in quotes").into());
        }
        variables.insert(name.into_inner(), value.into_inner());
    }
    Ok(variables)
}

fn has_date(value: &toml::Value) -> bool {
    match value {
        toml::Value::Datetime(_) => true,
        toml::Value::Array(items) => items.iter().any(has_date),
        toml::Value::Table(table) => table.values().any(has_date),
        _ => false,
    }
}

/// Refuse the second of two equal names; `what` is their noun.
pub(super) fn check_unique<'a>(
    source: &Source,
    what: &str,
    names: impl IntoIterator<Item = (&'a str, std::ops::Range<usize>)>,
) -> Result<()> {
    let mut seen = BTreeMap::new();
    for (name, span) in names {
        if let Some(first) = seen.insert(name.to_string(), span.start) {
            return Err(explain_twice(source, what, name, span, source.line(first)).into());
        }
    }
    Ok(())
}

fn explain_twice(
    source: &Source,
    what: &str,
    name: &str,
    span: std::ops::Range<usize>,
    first: usize,
) -> UserError {
    source
        .error(span, format!("the {what} {} is there twice", quote(name)))
        .why(format!("line {first} has it already"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_need_whole_numbers_and_binary_units() {
        assert_eq!(parse_size("8GiB"), Some(8 << 30));
        assert_eq!(parse_size("512MiB"), Some(512 << 20));
        assert_eq!(parse_size("1TiB"), Some(1 << 40));
        for bad in [
            "8",
            "",
            "GiB",
            "8GB",
            "8 GiB",
            "-1GiB",
            "+1GiB",
            "1.5GiB",
            "0GiB",
            "08GiB",
            "8gib",
            "99999999999999999999GiB",
            "99999999999TiB",
            "٣GiB",
        ] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_version_that_is_accepted_is_one_to_dpkg(text in "[0-9a-z.:~+-]{0,8}") {
            if is_package_version(&text) {
                prop_assert!(text.parse::<crate::debian::version::Version>().is_ok());
            }
        }

        #[test]
        fn every_size_that_is_read_was_written_so(text in "[0-9]{1,6}[KMGT]i?B?|.{0,9}") {
            if let Some(size) = parse_size(&text) {
                let written = |shift: u32, unit: &str| format!("{}{unit}", size >> shift);
                prop_assert!(
                    [written(20, "MiB"), written(30, "GiB"), written(40, "TiB")].contains(&text)
                );
            }
        }
    }
}
