//! qcow2 with zstd-compressed clusters, by qemu-img (docs/interop/qcow2.rst of QEMU).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::tools::Tools;

/// The first bytes of every qcow2 image.
pub const MAGIC: &[u8; 4] = b"QFI\xfb";

/// Convert a raw image; `out` appears when it is whole. The same image gives the same
/// bytes: clusters are written in order.
pub fn convert(tools: &Tools, raw: &Path, out: &Path) -> Result<()> {
    let mut beside = out.as_os_str().to_owned();
    beside.push(format!(".{}.tmp", std::process::id()));
    let beside = PathBuf::from(beside);
    run_convert(tools, &["-f", "raw", "-O", "qcow2", "-c", "-o", OPTIONS], raw, &beside)
        .and_then(|()| Ok(fs::File::open(&beside)?.sync_all()?))
        .and_then(|()| Ok(fs::rename(&beside, out)?))
        .inspect_err(|_| drop(fs::remove_file(&beside)))
        .with_context(|| format!("writing {}", out.display()))
}

/// Unpack a qcow2 image into a sparse raw file.
pub fn unpack(tools: &Tools, qcow2: &Path, raw: &Path) -> Result<()> {
    run_convert(tools, &["-f", "qcow2", "-O", "raw"], qcow2, raw)
}

const OPTIONS: &str = "compression_type=zstd,compat=1.1,lazy_refcounts=off";

fn run_convert(tools: &Tools, how: &[&str], from: &Path, to: &Path) -> Result<()> {
    tools.command("qemu-img")?.arg("convert").args(how).arg(from).arg(to).run().map(drop)
}
