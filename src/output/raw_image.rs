//! An image of any format, opened as the raw disk that it holds.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use super::qcow2;
use crate::error::UserError;
use crate::store::remove_tree;
use crate::tools::Tools;

/// What is needed to look into images that are not raw: the tools, and a folder with room
/// for the unpacked disk.
#[derive(Debug, Clone, Copy)]
pub struct Unpacker<'a> {
    pub tools: &'a Tools,
    pub folder: &'a Path,
}

/// A disk, and what has to go with it in the end.
pub struct RawImage {
    pub file: File,
    /// `raw` or `qcow2`.
    pub format: &'static str,
    unpacked: Option<PathBuf>,
}

impl RawImage {
    /// Open an image. A qcow2 image needs an unpacker.
    ///
    /// # Errors
    /// A [`UserError`] for what cannot be read or unpacked.
    pub fn open(path: &Path, unpacker: Option<Unpacker>) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let explain = |error| explain_unreadable(path, &error);
        if !needs_unpacker(path)? {
            let file = File::open(path).map_err(|error| explain(error.into()))?;
            return Ok(RawImage { file, format: "raw", unpacked: None });
        }
        let Unpacker { tools, folder } = unpacker.context("a qcow2 image has to be unpacked")?;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let raw = folder.join(format!("unpacked-{}-{number}.raw", std::process::id()));
        let opened = qcow2::unpack(tools, path, &raw).and_then(|()| Ok(File::open(&raw)?));
        match opened {
            Ok(file) => Ok(RawImage { file, format: "qcow2", unpacked: Some(raw) }),
            Err(error) => {
                remove_tree(&raw)?;
                Err(explain(error).into())
            }
        }
    }
}

impl Drop for RawImage {
    fn drop(&mut self) {
        if let Some(raw) = &self.unpacked {
            // The folder is for scratch: what stays there goes with it.
            let _ = remove_tree(raw);
        }
    }
}

/// Whether [`RawImage::open`] needs an unpacker for this image.
pub fn needs_unpacker(path: &Path) -> Result<bool> {
    File::open(path)
        .map_err(Into::into)
        .and_then(|file| is_qcow2(&file))
        .map_err(|error| explain_unreadable(path, &error).into())
}

/// What is said of a file that is no image.
pub fn explain_unreadable(path: &Path, error: &anyhow::Error) -> UserError {
    UserError::new("this is no image that can be read")
        .in_file(path)
        .why(format!("{error:#}"))
        .help("give a whole raw or qcow2 image, as `stanchion build` makes them")
}

fn is_qcow2(mut file: &File) -> Result<bool> {
    let mut magic = [0; 4];
    match file.read_exact(&mut magic) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        result => Ok(result.map(|()| &magic == qcow2::MAGIC)?),
    }
}
