//! Diversions that preinst scripts add (dpkg-divert(1)).
//!
//! dpkg would have known them when it unpacked; here everything is unpacked before the
//! first script runs, so files are moved afterwards to where dpkg would have put them.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::extract::Unpacked;

/// From where to where, and for whose sake: the package that keeps the path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diversion {
    from: String,
    to: String,
    package: String,
}

/// The root's diversions: three lines each in `/var/lib/dpkg/diversions`.
pub fn read(root: &Path) -> Result<Vec<Diversion>> {
    let text = match fs::read_to_string(root.join("var/lib/dpkg/diversions")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.context("reading dpkg's diversions")?,
    };
    let lines: Vec<&str> = text.lines().collect();
    let (triples, rest) = lines.as_chunks::<3>();
    if !rest.is_empty() {
        bail!("dpkg's list of diversions ends in the middle of one");
    }
    Ok(triples
        .iter()
        .map(|[from, to, package]| Diversion {
            from: from.to_string(),
            to: to.to_string(),
            package: package.to_string(),
        })
        .collect())
}

/// Move what `unpacked` brought to where the diversions added since `before` want it.
pub fn settle(root: &Path, before: &[Diversion], unpacked: &[Unpacked]) -> Result<()> {
    for diversion in read(root)?.iter().filter(|diversion| !before.contains(diversion)) {
        let brings =
            |package: &&Unpacked| package.list.iter().any(|path| path == diversion.from.as_bytes());
        let Some(owner) = unpacked.iter().find(brings) else { continue };
        let (from, to) = (root.join(&diversion.from[1..]), root.join(&diversion.to[1..]));
        // `--rename` has moved the file whoever brought it; without it nothing moved.
        let moved = from.symlink_metadata().is_err() && to.symlink_metadata().is_ok();
        let keeps = owner.name == diversion.package;
        let done = match (keeps, moved) {
            (true, true) => fs::rename(&to, &from),
            (false, false) => fs::rename(&from, &to),
            _ => Ok(()),
        };
        done.with_context(|| format!("diverting {} to {}", diversion.from, diversion.to))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(name: &str, path: &str) -> Unpacked {
        Unpacked {
            name: name.into(),
            control: Default::default(),
            list: vec![path.into()],
            conffiles: Vec::new(),
            md5sums: None,
            taken: Vec::new(),
        }
    }

    /// A root with one diversion of /usr/bin/x by `keeper`, and where the file is then.
    fn settle_one(owner: &str, present: &str) -> String {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        fs::create_dir_all(path("var/lib/dpkg")).unwrap();
        fs::create_dir_all(path("usr/bin")).unwrap();
        fs::write(path("var/lib/dpkg/diversions"), "/usr/bin/x\n/usr/bin/x.other\nkeeper\n")
            .unwrap();
        fs::write(path(present), "").unwrap();
        settle(root.path(), &[], &[unpacked(owner, "/usr/bin/x")]).unwrap();
        let name = fs::read_dir(path("usr/bin")).unwrap().next().unwrap().unwrap().file_name();
        name.into_string().unwrap()
    }

    #[test]
    fn the_package_that_diverts_keeps_its_path() {
        assert_eq!(settle_one("keeper", "usr/bin/x.other"), "x");
        assert_eq!(settle_one("keeper", "usr/bin/x"), "x");
    }

    #[test]
    fn the_file_of_another_package_moves_away() {
        assert_eq!(settle_one("other", "usr/bin/x"), "x.other");
        assert_eq!(settle_one("other", "usr/bin/x.other"), "x.other");
    }
}
