//! qcow2 with zstd-compressed clusters, by qemu-img (docs/interop/qcow2.rst of QEMU).

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf, absolute};

use anyhow::{Context, Result, ensure};

use crate::tools::Tools;

/// The first bytes of every qcow2 image.
pub const MAGIC: &[u8; 4] = b"QFI\xfb";

/// Incompatible features that concern only the file itself: dirty, corrupt, compression
/// type. An external data file is not among them.
const HARMLESS: u64 = 0b1011;

/// Convert a raw image; `out` appears when it is whole. The same image gives the same
/// bytes, because clusters are compressed side by side but written in order.
pub fn convert(tools: &Tools, raw: &Path, out: &Path) -> Result<()> {
    let mut beside = out.as_os_str().to_owned();
    beside.push(format!(".{}.tmp", std::process::id()));
    let beside = PathBuf::from(beside);
    let how = ["-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd"];
    run_convert(tools, &how, raw, &beside)
        .and_then(|()| Ok(File::open(&beside)?.sync_all()?))
        .and_then(|()| Ok(fs::rename(&beside, out)?))
        .inspect_err(|_| drop(fs::remove_file(&beside)))
        .with_context(|| format!("writing {}", out.display()))
}

/// Unpack a qcow2 image into a sparse raw file. An image that refers to other files is
/// refused: they would be read, too.
pub fn unpack(tools: &Tools, qcow2: &Path, raw: &Path) -> Result<()> {
    let read = || -> Result<()> {
        let mut header = [0; 80];
        File::open(qcow2)?.read_exact(&mut header)?;
        check_alone(&header)
    };
    read().with_context(|| format!("reading {}", qcow2.display()))?;
    run_convert(tools, &["-f", "qcow2", "-O", "raw"], qcow2, raw)
}

fn check_alone(header: &[u8; 80]) -> Result<()> {
    let number = |at: usize| header[at..at + 8].iter().fold(0, |n, byte| n << 8 | u64::from(*byte));
    let version = number(0) & 0xffff_ffff;
    ensure!(header.starts_with(MAGIC) && (2..=3).contains(&version), "no qcow2 image");
    ensure!(number(8) == 0, "the image is a difference to another one");
    ensure!(version == 2 || number(72) & !HARMLESS == 0, "the image's data is in another file");
    Ok(())
}

fn run_convert(tools: &Tools, how: &[&str], from: &Path, to: &Path) -> Result<()> {
    // An absolute path cannot be taken for an option or a protocol.
    let convert = tools.command("qemu-img")?.arg("convert").args(how);
    convert.arg(absolute(from)?).arg(absolute(to)?).run().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_refers_to_other_files_is_refused() {
        let mut header = [0; 80];
        header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        check_alone(&header).unwrap();
        header[79] = 8;
        check_alone(&header).unwrap();
        header[79] = 4;
        assert!(check_alone(&header).is_err());
        header[79] = 0;
        header[15] = 1;
        assert!(check_alone(&header).is_err());
        assert!(check_alone(&[0; 80]).is_err());
    }
}
