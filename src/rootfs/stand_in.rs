//! A package that exists only by name, so that what a layer provides itself counts as
//! installed for dpkg.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

/// Register `name` as installed, with these `Provides`. It has no files and no scripts.
pub fn register(root: &Path, name: &str, provides: &[String]) -> Result<()> {
    let base = root.join("var/lib/dpkg");
    let paragraph = format!(
        "Package: {name}\nStatus: install ok installed\nPriority: optional\nSection: misc\n\
         Maintainer: Stanchion\nArchitecture: all\nVersion: 1\nProvides: {}\n\
         Description: what a layer provides itself\n\n",
        provides.join(", ")
    );
    let write = || -> std::io::Result<()> {
        let mut status = File::options().append(true).create(true).open(base.join("status"))?;
        status.write_all(paragraph.as_bytes())?;
        fs::write(base.join(format!("info/{name}.list")), "/.\n")?;
        fs::write(base.join(format!("info/{name}.md5sums")), "")
    };
    write().with_context(|| format!("registering {name}"))
}
