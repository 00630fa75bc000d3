//! The Debian archives among the sources of a machine's apt: both styles of
//! sources.list(5), and the lists of the `mirror+file` method (apt-transport-mirror(1)).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Mirror, check_url, derive_security};
use crate::error::UserError;

/// Releases that a Debian archive may be configured for.
const CODENAMES: [&str; 8] =
    ["buster", "bullseye", "bookworm", "trixie", "forky", "duke", "sid", "experimental"];
const ALIASES: [&str; 5] = ["oldoldstable", "oldstable", "stable", "testing", "unstable"];

/// One enabled source of binary packages.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Source {
    uri: String,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: String,
}

/// The mirror that the apt below `root` uses for Debian, if it uses one.
pub(super) fn find_mirror(root: &Path) -> Result<Option<Mirror>> {
    let mut sources = Vec::new();
    for path in list_files(root)? {
        // What this user may not read (a vendor's password) is not ours to use.
        let Ok(bytes) = fs::read(&path) else { continue };
        let text = String::from_utf8_lossy(&bytes);
        match path.extension().is_some_and(|extension| extension == "sources") {
            true => sources.extend(parse_stanzas(&text)),
            false => sources.extend(text.lines().filter_map(parse_line)),
        }
    }
    for source in &mut sources {
        resolve_list(source, root);
    }
    let usable = |source: &&Source| check_url(&source.uri).is_ok();
    let find = |rank: fn(&Source) -> u32| {
        // The first among the best.
        sources.iter().filter(usable).rev().max_by_key(|s| rank(s)).filter(|s| rank(s) > 0)
    };
    let Some(main) = find(rank_main).and_then(|source| check_url(&source.uri).ok()) else {
        return Ok(None);
    };
    let security = find(rank_security)
        .and_then(|source| check_url(&source.uri).ok())
        .or_else(|| derive_security(&main))
        .ok_or_else(|| {
            UserError::new(format!("no security archive is known that belongs to {main}"))
                .why("this machine's apt uses that mirror, but no security archive")
                .help("name both: --mirror URL,SECURITY-URL")
        })?;
    Ok(Some(Mirror { main, security }))
}

/// `sources.list`, then the files of `sources.list.d` that apt would read, by name.
fn list_files(root: &Path) -> Result<Vec<PathBuf>> {
    let apt = root.join("etc/apt");
    let mut files: Vec<PathBuf> =
        Some(apt.join("sources.list")).filter(|path| path.is_file()).into_iter().collect();
    let folder = apt.join("sources.list.d");
    let mut more = Vec::new();
    if folder.is_dir() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?;
        for entry in entries {
            let path = entry.with_context(|| format!("reading {}", folder.display()))?.path();
            let known = path.extension().is_some_and(|e| e == "list" || e == "sources");
            if known && path.is_file() {
                more.push(path);
            }
        }
    }
    more.sort();
    files.extend(more);
    Ok(files)
}

/// `deb [option=value ...] uri suite component...`
fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim();
    let rest = line.strip_prefix("deb").filter(|rest| rest.starts_with([' ', '\t', '[']))?.trim();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_ascii_whitespace().map(str::to_string);
    let (uri, suite) = (words.next()?, words.next()?);
    let signed_by = options
        .split_ascii_whitespace()
        .find_map(|option| option.strip_prefix("signed-by="))
        .unwrap_or_default();
    Some(Source {
        uri,
        suites: vec![suite],
        components: words.collect(),
        signed_by: signed_by.to_string(),
    })
}

/// Stanzas of fields; a source for each URI of each.
fn parse_stanzas(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            sources.extend(read_stanza(&std::mem::take(&mut fields)));
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.to_ascii_lowercase(), value.trim().to_string()));
        }
    }
    sources
}

fn read_stanza(fields: &[(String, String)]) -> Vec<Source> {
    let take = |name: &str| {
        fields.iter().find(|(field, _)| field == name).map_or("", |(_, value)| value.as_str())
    };
    let split = |name: &str| -> Vec<String> {
        take(name).split_ascii_whitespace().map(str::to_string).collect()
    };
    // What apt takes for "no" (apt-pkg/contrib/strutl.cc, StringToBool).
    let off = ["no", "false", "without", "off", "disable", "0"];
    let enabled = !off.iter().any(|word| take("enabled").eq_ignore_ascii_case(word));
    if !enabled || !split("types").iter().any(|kind| kind == "deb") {
        return Vec::new();
    }
    let source = |uri| Source {
        uri,
        suites: split("suites"),
        components: split("components"),
        signed_by: take("signed-by").to_string(),
    };
    split("uris").into_iter().map(source).collect()
}

/// Put the first URI of a `mirror+file` list in the place of the list.
fn resolve_list(source: &mut Source, root: &Path) {
    let Some(path) = source.uri.strip_prefix("mirror+file:") else { return };
    let path = root.join(path.trim_start_matches('/'));
    let Ok(text) = fs::read_to_string(path) else { return };
    let first = text
        .lines()
        .filter_map(|line| line.split_ascii_whitespace().next())
        .find(|uri| check_url(uri).is_ok());
    if let Some(uri) = first {
        source.uri = uri.to_string();
    }
}

/// How much a source looks like Debian's main archive; 0 when it does not. Vendors give
/// their own repositories Debian's names of suites and components, and end their paths
/// in `/debian`, so the likeliest is taken.
fn rank_main(source: &Source) -> u32 {
    let has_main = source.components.iter().any(|component| component == "main");
    let by_path = ends_in(&source.uri, "debian");
    let names = |releases: &[&str]| {
        source.suites.iter().any(|suite| {
            releases
                .contains(&suite.strip_suffix("-updates").unwrap_or(suite).trim_end_matches('/'))
        })
    };
    if !has_main || !(names(&CODENAMES) || by_path && names(&ALIASES)) {
        return 0;
    }
    1 + 8 * u32::from(source.signed_by.contains("debian-archive"))
        + 4 * u32::from(source.suites.iter().any(|suite| suite.ends_with("-updates")))
        + 2 * u32::from(by_path)
}

/// How much a source looks like Debian's security archive; 0 when it does not.
fn rank_security(source: &Source) -> u32 {
    let by_path = ends_in(&source.uri, "debian-security");
    let by_suite = source.suites.iter().any(|suite| {
        let release = suite.strip_suffix("-security").or(suite.strip_suffix("/updates"));
        release.is_some_and(|name| CODENAMES.contains(&name) || ALIASES.contains(&name))
    });
    let has_main = source.components.iter().any(|name| name == "main" || name == "updates/main");
    match has_main {
        true => u32::from(by_suite) + 2 * u32::from(by_path),
        false => 0,
    }
}

fn ends_in(uri: &str, name: &str) -> bool {
    uri.trim_end_matches('/').rsplit('/').next() == Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Lay out files below a root and search there.
    fn find_in(files: &[(&str, &str)]) -> Option<(String, String)> {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        find_mirror(dir.path()).unwrap().map(|mirror| (mirror.main, mirror.security))
    }

    fn pair(main: &str, security: &str) -> Option<(String, String)> {
        Some((main.to_string(), security.to_string()))
    }

    const LIST: &str = "etc/apt/sources.list";
    const STANZAS: &str = "etc/apt/sources.list.d/debian.sources";

    #[test]
    fn the_one_line_style_is_read() {
        let text = "\
# deb http://old.example.org/debian trixie main
deb-src http://src.example.org/debian trixie main
deb cdrom:[Debian GNU/Linux 13 _Trixie_]/ trixie main
deb [ arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg ] http://m.example.org/debian/ trixie main non-free # comment
deb http://s.example.org/debian-security trixie-security main
";
        assert_eq!(
            find_in(&[(LIST, text)]),
            pair("http://m.example.org/debian", "http://s.example.org/debian-security")
        );
        assert_eq!(
            find_in(&[("etc/apt/sources.list.d/x.list", text)]),
            pair("http://m.example.org/debian", "http://s.example.org/debian-security")
        );
        assert_eq!(find_in(&[("etc/apt/sources.list.d/x.list.bak", text)]), None);
    }

    #[test]
    fn the_stanza_style_is_read() {
        let text = "\
# a comment
Types: deb
URIs: http://off.example.org/debian
Suites: trixie
Components: main
Enabled: no

Types: deb deb-src
URIs: https://m.example.org/debian/
 https://n.example.org/debian
Suites: bookworm
# within
 bookworm-updates
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 AAAA

Types: deb
URIs: https://s.example.org/other
Suites: bookworm-security
Components: main
";
        assert_eq!(
            find_in(&[(STANZAS, text)]),
            pair("https://m.example.org/debian", "https://s.example.org/other")
        );
    }

    #[test]
    fn without_a_security_source_its_sibling_is_taken() {
        assert_eq!(
            find_in(&[(LIST, "deb file:/srv/debian stable main\n")]),
            pair("file:///srv/debian", "file:///srv/debian-security")
        );
    }

    #[test]
    fn a_mirror_without_a_known_security_archive_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("etc/apt")).unwrap();
        let text = "deb http://m.example.org/archive/debian/20250101T000000Z trixie main\n";
        fs::write(dir.path().join(LIST), text).unwrap();
        let error = find_mirror(dir.path()).unwrap_err().to_string();
        assert!(error.contains("20250101T000000Z") && error.contains("name both"), "{error}");
    }

    #[test]
    fn repositories_of_vendors_are_not_taken_for_debian() {
        let vendors = "\
deb https://a.example.org/linux/debian bookworm stable
deb https://b.example.org stable main
deb https://c.example.org/apt bookworm-pgdg main
deb http://d.example.org/ubuntu noble main
deb http://e.example.org/debian noble main
";
        let without_path = |found: Option<(String, String)>| found.map(|(main, _)| main);
        assert_eq!(without_path(find_in(&[(LIST, vendors)])), None);
        let likely = "\
deb https://v.example.org/product/debian bookworm main
deb http://m.example.org/debian bookworm main
deb http://m.example.org/debian bookworm-updates main
";
        assert_eq!(
            without_path(find_in(&[(LIST, likely)])).as_deref(),
            Some("http://m.example.org/debian")
        );
    }

    #[test]
    fn a_list_of_mirrors_gives_its_first() {
        let stanza = |name: &str, suite: &str| {
            format!(
                "Types: deb\nURIs: mirror+file:///etc/apt/mirrors/{name}.list\nSuites: {suite}\nComponents: main\n\n"
            )
        };
        let text =
            stanza("debian", "trixie trixie-updates") + &stanza("security", "trixie-security");
        assert_eq!(
            find_in(&[
                (STANZAS, &text),
                (
                    "etc/apt/mirrors/debian.list",
                    "# ours\nhttps://m.example.org/debian priority:1\n"
                ),
                ("etc/apt/mirrors/security.list", "https://m.example.org/debian-security\n"),
            ]),
            pair("https://m.example.org/debian", "https://m.example.org/debian-security")
        );
        assert_eq!(find_in(&[(STANZAS, &text)]), None);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parsers_panic(
            text in "((deb|deb-src|Types:|URIs:|Enabled:)?[ \\[\\]]?\\PC{0,30}\n){0,8}"
        ) {
            let _ = parse_stanzas(&text);
            let _ = text.lines().filter_map(parse_line).count();
        }
    }
}
