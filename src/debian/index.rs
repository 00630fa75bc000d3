//! The list of the packages of one suite: a `Packages` file.

use std::str::FromStr;

use anyhow::{Context, Result, bail};

use super::deb822::{self, Paragraph};
use super::relation::{self, Comparison, Relations};
use super::version::Version;
use crate::digest::Digest;

/// One package of one version, as a `Packages` file describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    pub name: String,
    pub version: Version,
    /// `amd64`, `all`, or one that is of no use to us.
    pub architecture: String,
    pub multi_arch: MultiArch,
    /// `Essential: yes`.
    pub essential: bool,
    /// `Protected: yes` or `Important: yes`: a provider that apt prefers.
    pub protected: bool,
    /// `required`, `important`, `standard`, `optional`, `extra`.
    pub priority: String,
    pub pre_depends: Relations,
    pub depends: Relations,
    pub recommends: Relations,
    pub conflicts: Relations,
    pub breaks: Relations,
    /// This and the next two matter only for the order in which names are first met.
    pub suggests: Relations,
    pub replaces: Relations,
    pub enhances: Relations,
    /// Names that it stands in for, some with the version that it stands in for.
    pub provides: Vec<(String, Option<Version>)>,
    /// Where the archive keeps it, relative to the repository's root.
    pub path: String,
    /// Bytes of the .deb.
    pub size: u64,
    pub sha256: Digest,
    /// What it takes unpacked, in kB, as its maker estimated.
    pub installed_size: u64,
    /// The suite whose list it stands in.
    pub suite: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MultiArch {
    No,
    Same,
    Foreign,
    Allowed,
}

/// Parse a `Packages` file. Errors name the line and the package.
pub fn parse_packages(text: &str, suite: &str) -> Result<Vec<Package>> {
    // A paragraph takes some 800 bytes.
    let mut packages = Vec::with_capacity(text.len() / 800);
    for paragraph in deb822::parse(text) {
        let paragraph = paragraph.with_context(|| describe_list(suite))?;
        let package = parse_package(&paragraph, suite).with_context(|| {
            let name: String = paragraph.get("Package").unwrap_or("?").chars().take(80).collect();
            format!("{}, line {}, package `{name}`", describe_list(suite), paragraph.line())
        })?;
        packages.push(package);
    }
    Ok(packages)
}

fn describe_list(suite: &str) -> String {
    format!("reading the list of packages of `{suite}`")
}

fn parse_package(paragraph: &Paragraph<'_>, suite: &str) -> Result<Package> {
    let relations = |name| Relations::new(paragraph.get(name).unwrap_or(""));
    let is_set = |name| paragraph.get(name).is_some_and(|value| value.eq_ignore_ascii_case("yes"));
    let name = paragraph.require("Package")?;
    if !relation::is_package_name(name) {
        bail!("not a package name");
    }
    Ok(Package {
        name: name.to_string(),
        version: paragraph.require("Version")?.parse()?,
        architecture: paragraph.require("Architecture")?.to_string(),
        multi_arch: parse_multi_arch(paragraph.get("Multi-Arch").unwrap_or("no"))?,
        essential: is_set("Essential"),
        protected: is_set("Protected") || is_set("Important"),
        priority: paragraph.get("Priority").unwrap_or("").to_string(),
        pre_depends: relations("Pre-Depends"),
        depends: relations("Depends"),
        recommends: relations("Recommends"),
        conflicts: relations("Conflicts"),
        breaks: relations("Breaks"),
        suggests: relations("Suggests"),
        replaces: relations("Replaces"),
        enhances: relations("Enhances"),
        provides: parse_provides(paragraph.get("Provides").unwrap_or(""))?,
        path: check_path(paragraph.require("Filename")?)?.to_string(),
        size: parse_number("Size", paragraph.require("Size")?)?,
        sha256: paragraph.require("SHA256")?.parse()?,
        installed_size: match paragraph.get("Installed-Size") {
            Some(text) => parse_number("Installed-Size", text)?,
            None => 0,
        },
        suite: suite.to_string(),
    })
}

fn parse_number(field: &str, text: &str) -> Result<u64> {
    u64::from_str(text).with_context(|| format!("the field `{field}` is not a number"))
}

fn parse_multi_arch(text: &str) -> Result<MultiArch> {
    Ok(match text {
        "no" => MultiArch::No,
        "same" => MultiArch::Same,
        "foreign" => MultiArch::Foreign,
        "allowed" => MultiArch::Allowed,
        _ => bail!("the field `Multi-Arch` is none of no, same, foreign, allowed"),
    })
}

fn parse_provides(text: &str) -> Result<Vec<(String, Option<Version>)>> {
    let mut provides = Vec::new();
    for item in relation::parse_relations(text)? {
        for provided in item {
            // As apt does, pass over what says anything but `=`.
            let version = match provided.constraint {
                None => None,
                Some((Comparison::Equal, version)) => Some(version.parse()?),
                Some(_) => continue,
            };
            let name = match provided.qualifier {
                Some(qualifier) => format!("{}:{qualifier}", provided.name),
                None => provided.name.to_string(),
            };
            provides.push((name, version));
        }
    }
    Ok(provides)
}

/// A path that stays in the repository and is no URL of its own.
fn check_path(path: &str) -> Result<&str> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._+~%:@=,-".contains(&byte);
    let first = path.split('/').next().unwrap_or(path);
    let is_fine = path.bytes().all(is_plain)
        && !path.starts_with('/')
        && !first.contains(':')
        && path.split('/').all(|part| !part.is_empty() && part != "..");
    if !is_fine {
        bail!("the field `Filename` is not a relative path within the repository");
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "704dae7df79a35ed1bd3a0a8d5d1b9ce7a4ecdef74ddff72114d9523d63710eb";

    fn paragraph(changes: &[(&str, &str)]) -> String {
        let mut fields = vec![
            ("Package", "bash"),
            ("Version", "5.2-1"),
            ("Architecture", "amd64"),
            ("Filename", "pool/main/b/bash/bash_5.2-1_amd64.deb"),
            ("Size", "1400"),
            ("SHA256", DIGEST),
        ];
        fields.retain(|(name, _)| changes.iter().all(|(changed, _)| changed != name));
        fields.extend(changes.iter().filter(|(_, value)| !value.is_empty()));
        fields.iter().map(|(name, value)| format!("{name}: {value}\n")).collect::<String>() + "\n"
    }

    #[test]
    fn every_field_of_a_package_is_read() {
        let text = paragraph(&[
            ("Essential", "yes"),
            ("Multi-Arch", "foreign"),
            ("Priority", "required"),
            ("Pre-Depends", "libc6 (>= 2.36)"),
            ("Depends", "base-files (>= 2.1.12),\n debianutils"),
            ("Provides", "shell, posix-sh (= 5), odd (>= 1), q:any"),
            ("Installed-Size", "7164"),
        ]);
        let packages = parse_packages(&(text + &paragraph(&[])), "trixie").unwrap();
        assert_eq!(packages.len(), 2);
        let bash = &packages[0];
        assert_eq!((bash.name.as_str(), bash.version.as_str()), ("bash", "5.2-1"));
        assert!(bash.essential && !bash.protected);
        assert_eq!(bash.multi_arch, MultiArch::Foreign);
        assert_eq!(bash.depends.parse().unwrap().len(), 2);
        assert_eq!(bash.pre_depends.as_str(), "libc6 (>= 2.36)");
        assert_eq!(
            bash.provides,
            [
                ("shell".to_string(), None),
                ("posix-sh".to_string(), Some("5".parse().unwrap())),
                ("q:any".to_string(), None)
            ]
        );
        assert_eq!((bash.size, bash.installed_size), (1400, 7164));
        assert_eq!(bash.sha256.to_string(), DIGEST);
        assert_eq!(bash.suite, "trixie");
        assert_eq!(packages[1].multi_arch, MultiArch::No);
        assert!(packages[1].conflicts.is_empty());
    }

    #[test]
    fn a_package_that_is_wrong_is_named_with_its_line() {
        for (field, value) in [
            ("Package", "../bash"),
            ("Package", ""),
            ("Version", "1 2"),
            ("Architecture", ""),
            ("Multi-Arch", "maybe"),
            ("Filename", "/etc/passwd"),
            ("Filename", "pool/../../etc/passwd"),
            ("Filename", "pool//x.deb"),
            ("Filename", "http://127.0.0.1/x.deb"),
            ("Filename", "pool/x.deb?y"),
            ("Size", "-1"),
            ("Size", "many"),
            ("SHA256", "704d"),
            ("SHA256", ""),
            ("Installed-Size", "x"),
            ("Provides", "a b"),
        ] {
            let text = paragraph(&[]) + &paragraph(&[(field, value)]);
            let error = format!("{:#}", parse_packages(&text, "trixie").unwrap_err());
            assert!(error.contains("`trixie`, line 8"), "{field}: {value}: {error}");
        }
        let error = parse_packages("nonsense\n", "trixie").unwrap_err();
        assert!(format!("{error:#}").contains("line 1"), "{error:#}");
    }

    #[test]
    fn a_path_with_an_epoch_in_the_file_name_is_fine() {
        let text = paragraph(&[("Filename", "./pool/a_1:2+b~c%3a_all.deb")]);
        assert!(parse_packages(&text, "x").is_ok());
    }
}
