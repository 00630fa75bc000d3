//! Where Debian's packages come from: the mirror that was named, else the one that this
//! machine's own apt uses. No mirror is known here.

mod sources;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use reqwest::Url;
use serde::Deserialize;

use crate::error::UserError;

/// The two archives that Debian is made of, as URLs without a slash at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    pub main: String,
    pub security: String,
}

/// Which of a mirror's archives a suite lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Archive {
    Main,
    Security,
}

/// Where a mirror may be named, the first place first.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// `--mirror`.
    pub flag: Option<String>,
    /// `STANCHION_MIRROR`.
    pub environment: Option<String>,
    /// `$XDG_CONFIG_HOME/stanchion/config.toml`.
    pub config: Option<PathBuf>,
    /// The root directory below which apt's configuration lies.
    pub root: PathBuf,
}

impl Places {
    /// This process's environment and this machine's apt.
    pub fn of_this_machine(flag: Option<&str>) -> Self {
        let absolute = |name: &str| {
            std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
        };
        let config = absolute("XDG_CONFIG_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".config")))
            .map(|config| config.join("stanchion/config.toml"));
        Places {
            flag: flag.map(str::to_string),
            environment: std::env::var("STANCHION_MIRROR").ok().filter(|value| !value.is_empty()),
            config,
            root: PathBuf::from("/"),
        }
    }
}

impl Mirror {
    /// The mirror to use.
    ///
    /// # Errors
    /// A [`UserError`] when none is named anywhere, or what is named is no mirror.
    pub fn find(places: &Places) -> Result<Self> {
        if let Some(named) = &places.flag {
            return Self::parse(named, "--mirror");
        }
        if let Some(named) = &places.environment {
            return Self::parse(named, "STANCHION_MIRROR");
        }
        if let Some(path) = &places.config
            && let Some(named) = read_config(path)?
        {
            return Self::parse(&named, &path.display().to_string());
        }
        sources::find_mirror(&places.root)?.ok_or_else(|| {
            UserError::new("no Debian mirror is known")
                .why("none was named, and this machine's apt has no Debian archive among its sources")
                .help("name one: --mirror URL, the variable STANCHION_MIRROR, or `mirror = \"URL\"` in stanchion/config.toml of your configuration folder; the URL of a Debian archive ends in /debian")
                .into()
        })
    }

    /// One URL (the security archive is then `debian-security` beside `debian`), or two,
    /// main and security, with a comma or blanks between them.
    fn parse(named: &str, place: &str) -> Result<Self> {
        let wrong = |why: String| {
            UserError::new(format!("`{named}` is not a mirror")).why(format!("{place}: {why}")).help(
                "give the URL of a Debian archive (it ends in /debian), or two with a comma: the archive's and its security archive's",
            )
        };
        let urls: Vec<&str> =
            named.split([',', ' ', '\t', '\n']).filter(|word| !word.is_empty()).collect();
        let (main, security) = match urls[..] {
            [main] => (main, None),
            [main, security] => (main, Some(security)),
            _ => return Err(wrong("one URL or two are wanted".to_string()).into()),
        };
        let main = check_url(main).map_err(wrong)?;
        let security = match security {
            Some(security) => check_url(security).map_err(wrong)?,
            None => derive_security(&main).ok_or_else(|| {
                wrong(
                    "it does not end in /debian, so its security archive is not known".to_string(),
                )
            })?,
        };
        Ok(Mirror { main, security })
    }

    /// The URL of a file by its path below one of the archives.
    pub fn locate(&self, archive: Archive, path: &str) -> String {
        let base = match archive {
            Archive::Main => &self.main,
            Archive::Security => &self.security,
        };
        format!("{base}/{}", quote_path(path))
    }
}

/// Quote what a URL's path does not take; `+` too, since object stores read it as a blank.
fn quote_path(path: &str) -> String {
    path.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

/// The URL without a slash at its end, or what is wrong with it.
fn check_url(text: &str) -> Result<String, String> {
    let url = Url::parse(text).map_err(|error| format!("`{text}` is no URL: {error}"))?;
    if !["http", "https", "file"].contains(&url.scheme()) {
        return Err(format!("`{text}` is neither http, https nor file"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(format!("`{text}` has more than a path"));
    }
    if url.scheme() == "file" && url.to_file_path().is_err() {
        return Err(format!("`{text}` names no file of this machine"));
    }
    Ok(url.as_str().trim_end_matches('/').to_string())
}

fn derive_security(main: &str) -> Option<String> {
    main.strip_suffix("/debian").map(|parent| format!("{parent}/debian-security"))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    mirror: Option<String>,
}

fn read_config(path: &Path) -> Result<Option<String>> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        text => text.with_context(|| format!("reading {}", path.display()))?,
    };
    let config: Config = toml::from_str(&text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        let line = text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1;
        UserError::new("the configuration is not readable")
            .at(path, line)
            .why(error.message())
            .help("it knows one key: `mirror = \"URL\"`")
    })?;
    Ok(config.mirror)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::exit_code;
    use proptest::prelude::*;

    fn name(flag: &str) -> Result<Mirror> {
        Mirror::find(&Places { flag: Some(flag.to_string()), ..Places::default() })
    }

    fn make(main: &str, security: &str) -> Mirror {
        Mirror { main: main.to_string(), security: security.to_string() }
    }

    #[test]
    fn one_url_brings_its_sibling_and_two_stand_for_themselves() {
        let (main, security) =
            ("http://a.example.org/debian", "http://a.example.org/debian-security");
        for text in [main, &format!("{main}/"), &format!(" {main}// ")] {
            assert_eq!(name(text).unwrap(), make(main, security), "{text}");
        }
        let other = "https://b.example.org/sec";
        for text in
            [format!("{main},{other}/"), format!("{main} {other}"), format!("{main}, {other}")]
        {
            assert_eq!(name(&text).unwrap(), make(main, other), "{text}");
        }
        assert_eq!(
            name("file:/srv/debian").unwrap(),
            make("file:///srv/debian", "file:///srv/debian-security")
        );
    }

    #[test]
    fn what_is_no_mirror_is_refused_with_its_place() {
        for text in [
            "",
            "debian",
            "ftp://a.example.org/debian",
            "http:///",
            "http://a.example.org/other",
            "http://a.example.org/debian?x",
            "file://host/debian",
            "a b c",
            "http://a.example.org/debian,http://b.example.org/s,http://c.example.org/t",
        ] {
            let error = name(text).unwrap_err();
            assert_eq!(exit_code(&error), 2, "{text}");
            assert!(error.to_string().contains("--mirror"), "{text}: {error}");
        }
    }

    #[test]
    fn the_first_place_that_names_a_mirror_wins() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.toml");
        std::fs::write(&config, "mirror = \"http://config.example.org/debian\"\n").unwrap();
        std::fs::create_dir_all(dir.path().join("etc/apt")).unwrap();
        std::fs::write(
            dir.path().join("etc/apt/sources.list"),
            "deb http://apt.example.org/debian trixie main\n",
        )
        .unwrap();
        let mut places = Places {
            flag: Some("http://flag.example.org/debian".to_string()),
            environment: Some("http://variable.example.org/debian".to_string()),
            config: Some(config.clone()),
            root: dir.path().to_path_buf(),
        };
        assert_eq!(Mirror::find(&places).unwrap().main, "http://flag.example.org/debian");
        places.flag = None;
        assert_eq!(Mirror::find(&places).unwrap().main, "http://variable.example.org/debian");
        places.environment = None;
        assert_eq!(Mirror::find(&places).unwrap().main, "http://config.example.org/debian");
        std::fs::write(&config, "\n").unwrap();
        assert_eq!(Mirror::find(&places).unwrap().main, "http://apt.example.org/debian");
        places.root = dir.path().join("empty");
        let error = Mirror::find(&places).unwrap_err();
        assert_eq!(exit_code(&error), 2);
        assert!(error.to_string().contains("STANCHION_MIRROR"), "{error}");
        std::fs::write(&config, "\nmirrors = 1\n").unwrap();
        let error = Mirror::find(&places).unwrap_err().to_string();
        assert!(error.contains("config.toml:2"), "{error}");
    }

    #[test]
    fn a_path_is_quoted_in_its_url() {
        let mirror = make("http://a.example.org/debian", "http://a.example.org/debian-security");
        assert_eq!(
            mirror.locate(Archive::Security, "pool/main/g/g++/g++_1%3a2~rc1_amd64.deb"),
            "http://a.example.org/debian-security/pool/main/g/g%2B%2B/g%2B%2B_1%253a2~rc1_amd64.deb"
        );
    }

    proptest! {
        #[test]
        fn no_text_makes_the_search_panic(text in "\\PC{0,60}") {
            let _ = name(&text);
        }
    }
}
