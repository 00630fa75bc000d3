//! Tell dpkg's database in a root about packages that were unpacked by
//! [`super::extract::unpack_all`], so that `dpkg --configure -a` goes on as if
//! `dpkg --unpack` had put them there (dpkg's src/main/unpack.c and lib/dpkg/triglib.c).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write as _};
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use rustix::fs::{self, AtFlags, Mode, OFlags, RawMode};
use rustix::io::Errno;

use super::extract::Unpacked;
use super::installed::{MAX_FILE, read_text};
use super::place::{Folder, Walker, open_root};
use crate::debian::deb822::{self, Paragraph};
use crate::error::UserError;

/// Registers packages in `<root>/var/lib/dpkg`, which is made when it is missing. They
/// must not be there already, in whatever state but `not-installed`.
///
/// Their state becomes `install ok unpacked`, their conffiles `newconffile`. File and
/// explicit triggers that they activate in packages that were configured before are left
/// in `triggers/Unincorp`, where `dpkg-trigger` leaves them too: dpkg's next run takes
/// them in and runs each once.
///
/// Errors: a package that is installed already; names that no package has.
pub fn register(root: &Path, packages: &[Unpacked]) -> Result<()> {
    let root = open_root(root)?;
    let mut walker = Walker::new(&root, make_folder)?;
    let database = Database {
        base: walker.open(b"var/lib/dpkg")?,
        info: walker.open(b"var/lib/dpkg/info")?,
        triggers: walker.open(b"var/lib/dpkg/triggers")?,
    };
    walker.open(b"var/lib/dpkg/updates")?;

    let status = read_text(&root, "var/lib/dpkg/status")?;
    let (mut status, by_name) = read_status(&status)?;
    let file_interests = read_text(&root, "var/lib/dpkg/triggers/File")?;
    let known = file_interests.lines().filter_map(|line| line.split(' ').next());
    let known: HashSet<&[u8]> = known.map(str::as_bytes).collect();

    let mut triggers = Triggers::default();
    let mut taken: BTreeMap<&str, HashSet<&[u8]>> = BTreeMap::new();
    for package in packages {
        let mut register = || -> Result<()> {
            let paragraph = deb822::parse_one(package.control_text()?)?;
            let names = Names::read(&paragraph)?;
            if by_name.contains_key(&names.package) {
                bail!(
                    UserError::new(format!("{} is installed already", names.package))
                        .why("a layer adds packages to those below it; it does not change them")
                        .help("lock all layers of the profile together, so that each package is in one")
                );
            }
            database.write_info(package, &names.file)?;
            status.push_str(&make_status(package, &paragraph)?);
            triggers.add(package, &names.file, &known)?;
            for (path, owner) in &package.taken {
                taken.entry(owner).or_default().insert(path);
            }
            Ok(())
        };
        register().with_context(|| format!("registering the package {}", package.name))?;
    }
    for (owner, paths) in taken {
        let file = by_name.get(owner).with_context(|| format!("no package {owner}"))?;
        database.shorten_list(file, &paths)?;
    }
    triggers.write(&database, file_interests)?;
    for (name, text) in [("available", ""), ("diversions", ""), ("statoverride", "")] {
        database.base.write_missing(name, text)?;
    }
    database.info.write_missing("format", "1\n")?;
    database.base.replace("status", status.as_bytes())
}

/// The names that files of the database use for a package.
struct Names {
    package: String,
    /// `NAME`, or `NAME:ARCHITECTURE` for `Multi-Arch: same` (dpkg's `pnaw_same`).
    file: String,
}

impl Names {
    fn read(paragraph: &Paragraph<'_>) -> Result<Self> {
        let package = paragraph.require("Package")?;
        let architecture = paragraph.require("Architecture")?;
        let is_name = |name: &str| {
            name.starts_with(|c: char| c.is_ascii_alphanumeric())
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
        };
        if !is_name(package) || !is_name(architecture) {
            bail!("not the name of a package and an architecture");
        }
        let same = paragraph.get("Multi-Arch") == Some("same");
        let file = if same { format!("{package}:{architecture}") } else { package.to_string() };
        Ok(Names { package: package.to_string(), file })
    }
}

/// The status file without packages that are not installed, ending in an empty line; and
/// the installed packages with their names in `info`.
fn read_status(text: &str) -> Result<(String, HashMap<String, String>)> {
    let mut status = String::with_capacity(text.len() + (1 << 20));
    let mut by_name = HashMap::new();
    for text in text.split("\n\n").map(|text| text.trim_matches('\n')) {
        if text.is_empty() {
            continue;
        }
        let paragraph = deb822::parse_one(text).context("reading dpkg's status")?;
        if paragraph.get("Status").is_some_and(|status| status.ends_with(" not-installed")) {
            continue;
        }
        let names = Names::read(&paragraph).context("reading dpkg's status")?;
        by_name.insert(names.package, names.file);
        status.push_str(text);
        status.push_str("\n\n");
    }
    Ok((status, by_name))
}

/// Fields that are written first or belong to the database; a package cannot bring them.
const STATE_FIELDS: [&str; 6] =
    ["Package", "Status", "Conffiles", "Config-Version", "Triggers-Pending", "Triggers-Awaited"];

fn make_status(package: &Unpacked, paragraph: &Paragraph<'_>) -> Result<String> {
    let mut entry = String::new();
    writeln!(entry, "Package: {}", paragraph.require("Package")?)?;
    entry.push_str("Status: install ok unpacked\n");
    for field in paragraph.fields() {
        let ours = STATE_FIELDS.iter().any(|state| field.name.eq_ignore_ascii_case(state));
        if !ours {
            writeln!(entry, "{}: {}", field.name, field.value)?;
        }
    }
    if !package.conffiles.is_empty() {
        entry.push_str("Conffiles:\n");
        for conffile in &package.conffiles {
            let flag = if conffile.remove_on_upgrade { " remove-on-upgrade" } else { "" };
            writeln!(entry, " {} newconffile{flag}", conffile.path)?;
        }
    }
    entry.push('\n');
    Ok(entry)
}

/// What packages are interested in and what they activate (deb-triggers(5)).
#[derive(Default)]
struct Triggers {
    /// Lines for `triggers/File`.
    files: String,
    /// Lines for `triggers/NAME`.
    explicit: BTreeMap<String, String>,
    /// For `triggers/Unincorp`: trigger, and the packages that wait for it or `-`.
    activated: BTreeMap<String, Vec<String>>,
}

impl Triggers {
    /// `known`: paths in which packages that were installed before are interested.
    fn add(&mut self, package: &Unpacked, name: &str, known: &HashSet<&[u8]>) -> Result<()> {
        for path in package.list.iter().filter(|path| known.contains(&path[..])) {
            let trigger = std::str::from_utf8(path).context("a trigger's path")?;
            self.activate(trigger, name);
        }
        let Some((_, bytes)) = package.control.get("triggers") else { return Ok(()) };
        let text = std::str::from_utf8(bytes).context("its triggers are not UTF-8")?;
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = || format!("a wrong line in its triggers: {}", line.escape_debug());
            let (directive, trigger) = line.split_once([' ', '\t']).with_context(wrong)?;
            let trigger = trigger.trim_start();
            if !is_trigger(trigger) {
                bail!(wrong());
            }
            match directive {
                "interest" | "interest-await" => self.add_interest(trigger, name, ""),
                "interest-noawait" => self.add_interest(trigger, name, "/noawait"),
                "activate" | "activate-await" => self.activate(trigger, name),
                "activate-noawait" => self.activate(trigger, "-"),
                _ => bail!(wrong()),
            }
        }
        Ok(())
    }

    fn add_interest(&mut self, trigger: &str, name: &str, options: &str) {
        if trigger.starts_with('/') {
            self.files.push_str(&format!("{trigger} {name}{options}\n"));
        } else {
            let lines = self.explicit.entry(trigger.to_string()).or_default();
            lines.push_str(&format!("{name}{options}\n"));
        }
    }

    fn activate(&mut self, trigger: &str, awaiting: &str) {
        let packages = self.activated.entry(trigger.to_string()).or_default();
        if !packages.iter().any(|package| package == awaiting) {
            packages.push(awaiting.to_string());
        }
    }

    /// `files`: what `triggers/File` holds.
    fn write(self, database: &Database, mut files: String) -> Result<()> {
        let folder = &database.triggers;
        // Before the interests of these packages are there: they are not configured yet,
        // and their postinst does what a trigger would ask for.
        let mut waiting = folder.read("Unincorp")?;
        for (trigger, packages) in &self.activated {
            let known = trigger.starts_with('/') || folder.has(trigger)?;
            if known {
                writeln!(waiting, "{trigger} {}", packages.join(" "))?;
            }
        }
        if !waiting.is_empty() {
            folder.replace("Unincorp", waiting.as_bytes())?;
        }
        if !self.files.is_empty() {
            files.push_str(&self.files);
            folder.replace("File", files.as_bytes())?;
        }
        for (trigger, lines) in &self.explicit {
            let before = folder.read(trigger)?;
            folder.replace(trigger, (before + lines).as_bytes())?;
        }
        Ok(())
    }
}

/// A path without empty components, or a name like a package's that is none of dpkg's own
/// files (`trig_classify_byname`).
fn is_trigger(name: &str) -> bool {
    if !name.bytes().all(|byte| (0x21..=0x7e).contains(&byte)) {
        return false;
    }
    match name.strip_prefix('/') {
        Some(path) => path.split('/').all(|part| !part.is_empty() && part != ".."),
        None => {
            name.starts_with(|c: char| c.is_ascii_alphanumeric())
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
                && !["File", "Lock", "Unincorp"].contains(&name)
        }
    }
}

/// Folders of the database.
struct Database {
    base: Rc<Folder>,
    info: Rc<Folder>,
    triggers: Rc<Folder>,
}

impl Database {
    /// `list`, `md5sums` and the control members but `control` itself.
    fn write_info(&self, package: &Unpacked, name: &str) -> Result<()> {
        let mut list = package.list.join(&b'\n');
        list.push(b'\n');
        self.info.write(&format!("{name}.list"), &list, 0o644)?;
        if let Some(sums) = &package.md5sums {
            self.info.write(&format!("{name}.md5sums"), sums, 0o644)?;
        }
        for (member, (mode, bytes)) in &package.control {
            // As dpkg: what has a dot is not for it.
            if member == "control" || member == "list" || member.contains('.') {
                continue;
            }
            // dpkg unpacks them under its umask of 022.
            self.info.write(&format!("{name}.{member}"), bytes, mode & 0o755)?;
        }
        Ok(())
    }

    fn shorten_list(&self, name: &str, without: &HashSet<&[u8]>) -> Result<()> {
        let file = format!("{name}.list");
        let list = self.info.read(&file)?;
        let mut left = Vec::with_capacity(list.len());
        for line in list.as_bytes().split_inclusive(|byte| *byte == b'\n') {
            if !without.contains(line.strip_suffix(b"\n").unwrap_or(line)) {
                left.extend_from_slice(line);
            }
        }
        self.info.replace(&file, &left)
    }
}

impl Folder {
    /// A new file, or new content for one.
    fn write(&self, name: &str, bytes: &[u8], mode: u32) -> Result<()> {
        let write = || -> Result<()> {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW;
            let mode = Mode::from_raw_mode(mode as RawMode);
            let fd = fs::openat(&self.fd, name, flags | OFlags::CLOEXEC, mode)?;
            fs::fchmod(&fd, mode)?;
            Ok(File::from(fd).write_all(bytes)?)
        };
        write().with_context(|| format!("writing {name}"))
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let beside = format!("{name}-new");
        self.write(&beside, bytes, 0o644)?;
        fs::renameat(&self.fd, &beside, &self.fd, name).with_context(|| format!("writing {name}"))
    }

    fn has(&self, name: &str) -> Result<bool> {
        match fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("looking for {name}")),
        }
    }

    fn write_missing(&self, name: &str, text: &str) -> Result<()> {
        if self.has(name)? { Ok(()) } else { self.write(name, text.as_bytes(), 0o644) }
    }

    /// A text file, empty when there is none.
    fn read(&self, name: &str) -> Result<String> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut text = String::new();
        match fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => {
                File::from(fd)
                    .take(MAX_FILE)
                    .read_to_string(&mut text)
                    .with_context(|| format!("reading {name}"))?;
                Ok(text)
            }
            Err(Errno::NOENT) => Ok(text),
            Err(error) => Err(error).with_context(|| format!("reading {name}")),
        }
    }
}

/// Make a folder as dpkg's own are: root's, 0755.
pub(super) fn make_folder(above: &Folder, name: &[u8]) -> Result<()> {
    fs::mkdirat(&above.fd, name, Mode::from_raw_mode(0o755)).context("making a folder")?;
    // The umask of whoever runs this must not show.
    fs::chmodat(&above.fd, name, Mode::from_raw_mode(0o755), AtFlags::empty())
        .context("making a folder")
}

#[cfg(test)]
mod tests;
