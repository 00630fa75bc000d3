//! What dpkg's database in a root says before packages are added: who owns which path,
//! what is diverted, who is interested in which trigger.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail};
use rustix::fs::{self, Mode, OFlags};

use super::place::{open_beneath, read_beneath};
use crate::debian::deb822;
use crate::debian::relation::Relations;

/// No status or trigger file of a Debian system comes near.
pub(super) const MAX_FILE: u64 = 256 << 20;

/// What decides between two packages that hold one file.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    pub name: String,
    pub version: String,
    pub replaces: Relations,
}

impl Facts {
    pub fn read(paragraph: &deb822::Paragraph<'_>) -> Result<Self> {
        Ok(Facts {
            name: paragraph.require("Package")?.to_string(),
            version: paragraph.get("Version").unwrap_or_default().to_string(),
            replaces: Relations::new(paragraph.get("Replaces").unwrap_or_default()),
        })
    }

    /// Whether this package may take files over from `other` (deb-control(5), Replaces).
    pub fn replaces(&self, other: &Facts) -> bool {
        let Ok(relations) = self.replaces.parse() else { return false };
        relations
            .iter()
            .flatten()
            .any(|relation| relation.name == other.name && relation.admits(Some(&other.version)))
    }
}

/// Where the files of other packages go instead of a path (dpkg-divert(1)).
#[derive(Debug, Clone)]
struct Diversion {
    to: Vec<u8>,
    /// The package that keeps the path itself; `None` for a local diversion.
    package: Option<String>,
}

/// See the module. Empty for a root without a database.
#[derive(Debug, Default)]
pub struct Installed {
    pub packages: Vec<Facts>,
    owners: HashMap<Vec<u8>, Vec<u32>>,
    diversions: HashMap<Vec<u8>, Diversion>,
    overrides: HashSet<Vec<u8>>,
}

impl Installed {
    pub fn read(root: &OwnedFd) -> Result<Self> {
        let mut installed = Installed::default();
        let status = read_text(root, "var/lib/dpkg/status")?;
        let mut by_file = HashMap::new();
        for paragraph in deb822::parse(&status) {
            let paragraph = paragraph.context("reading dpkg's status")?;
            let facts = Facts::read(&paragraph).context("reading dpkg's status")?;
            if let Some(architecture) = paragraph.get("Architecture") {
                by_file.insert(format!("{}:{architecture}", facts.name), installed.packages.len());
            }
            by_file.insert(facts.name.clone(), installed.packages.len());
            installed.packages.push(facts);
        }
        if !installed.packages.is_empty() {
            installed.read_lists(root, &by_file)?;
        }
        installed.read_diversions(root)?;
        installed.overrides = read_text(root, "var/lib/dpkg/statoverride")?
            .lines()
            .filter_map(|line| Some(line.splitn(4, ' ').nth(3)?.as_bytes().to_vec()))
            .collect();
        Ok(installed)
    }

    /// The installed packages that list `path` (beginning with `/`).
    pub fn owners(&self, path: &[u8]) -> impl Iterator<Item = &Facts> {
        let owners = self.owners.get(path).map_or(&[][..], Vec::as_slice);
        owners.iter().map(|owner| &self.packages[*owner as usize])
    }

    /// Where `path` of `package` goes when it is diverted.
    pub fn find_diversion(&self, path: &[u8], package: &str) -> Option<&[u8]> {
        let diversion = self.diversions.get(path)?;
        (diversion.package.as_deref() != Some(package)).then_some(&diversion.to)
    }

    /// Whether `package` keeps `path` for itself by a diversion.
    pub fn is_diverted_by(&self, path: &[u8], package: &str) -> bool {
        self.diversions
            .get(path)
            .is_some_and(|diversion| diversion.package.as_deref() == Some(package))
    }

    /// Whether the administrator set owner and mode of `path` (dpkg-statoverride(1)).
    pub fn has_override(&self, path: &[u8]) -> bool {
        self.overrides.contains(path)
    }

    fn read_lists(&mut self, root: &OwnedFd, by_file: &HashMap<String, usize>) -> Result<()> {
        let Some(info) = open_beneath(root, "var/lib/dpkg/info")? else { return Ok(()) };
        let listing = fs::Dir::read_from(&info).context("listing dpkg's info")?;
        for item in listing {
            let item = item.context("listing dpkg's info")?;
            let Ok(name) = item.file_name().to_str() else { continue };
            let owner = name.strip_suffix(".list").and_then(|name| by_file.get(name));
            let Some(owner) = owner else { continue };
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let mut list = Vec::new();
            let file = fs::openat(&info, name, flags, Mode::empty())
                .with_context(|| format!("opening info/{name}"))?;
            std::fs::File::from(file)
                .take(MAX_FILE)
                .read_to_end(&mut list)
                .with_context(|| format!("reading info/{name}"))?;
            for path in list.split(|byte| *byte == b'\n').filter(|path| !path.is_empty()) {
                let owner = u32::try_from(*owner).context("too many packages")?;
                self.owners.entry(path.to_vec()).or_default().push(owner);
            }
        }
        Ok(())
    }

    /// Three lines each: from, to, package or `:`.
    fn read_diversions(&mut self, root: &OwnedFd) -> Result<()> {
        let text = read_text(root, "var/lib/dpkg/diversions")?;
        let lines: Vec<&str> = text.lines().collect();
        for group in lines.chunks(3) {
            let [from, to, package] = group else { bail!("dpkg's diversions end in the middle") };
            let package = (*package != ":").then(|| package.to_string());
            let diversion = Diversion { to: to.as_bytes().to_vec(), package };
            self.diversions.insert(from.as_bytes().to_vec(), diversion);
        }
        Ok(())
    }
}

/// A text file of the database, empty when there is none.
pub(super) fn read_text(root: &OwnedFd, path: &str) -> Result<String> {
    String::from_utf8(read_beneath(root, path, MAX_FILE)?)
        .with_context(|| format!("{path} is not UTF-8"))
}
