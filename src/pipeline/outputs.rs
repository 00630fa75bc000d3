//! The files that a build leaves in its output folder.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

use super::manifest::{Manifest, OutputEntry};
use super::source::Source;
use crate::config::Format;
use crate::config::profile::Profile;
use crate::digest::Digest;
use crate::disk::region::hash_sparse;
use crate::disk::verity;
use crate::error::UserError;
use crate::output::qcow2;
use crate::progress::Progress;
use crate::store::{self, Scratch};
use crate::tools::Tools;

/// Before the name of the folder in which outputs grow.
const GROWING: &str = ".stanchion-";

/// Make the output folder, and find out now whether it can be written to. What is returned
/// is a folder in it for outputs that are not finished; what dead builds left is removed.
pub fn prepare_folder(out: &Path) -> Result<Scratch> {
    let prepare = || {
        fs::create_dir_all(out)?;
        store::sweep_scratch(out, GROWING);
        store::make_scratch(out, GROWING, "growing")
    };
    prepare().map_err(|error| {
        UserError::new("the output folder cannot be written to")
            .in_file(out)
            .why(error.root_cause().to_string())
            .help("name another with --out, or mend its permissions")
            .into()
    })
}

/// Move finished outputs and their manifest from `growing` to `out`. Until now `out` has
/// held those of the last good build. The manifest comes last: one that is there describes
/// what is there.
pub fn publish(
    growing: &Scratch,
    manifest: &Manifest,
    out: &Path,
    progress: &Progress,
) -> Result<()> {
    manifest.save(growing.path())?;
    let name = Manifest::name(&manifest.profile);
    let earlier = Manifest::load(out, &manifest.profile);
    match fs::remove_file(out.join(&name)) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing {}", out.join(&name).display()));
        }
        _ => {}
    }
    let files = manifest.outputs.iter().map(|output| output.file.clone());
    for file in files.chain([name]) {
        let to = out.join(&file);
        fs::rename(growing.path().join(&file), &to)
            .with_context(|| format!("writing {}", to.display()))?;
    }
    let is_new = |file: &Path| manifest.outputs.iter().any(|output| output.file == file);
    for output in earlier.map(|earlier| earlier.outputs).unwrap_or_default() {
        let path = out.join(&output.file);
        if !is_new(&output.file) && path.exists() {
            progress.warn(&format!(
                "{} is of an earlier build: this one did not write {}",
                path.display(),
                output.format
            ));
        }
    }
    Ok(())
}

/// The manifest of an earlier build, when its outputs are those that `key` would give.
pub fn find_current(
    out: &Path,
    profile: &Profile,
    key: &Digest,
    formats: &[Format],
) -> Option<Manifest> {
    let manifest = Manifest::load(out, &profile.name)?;
    let has = |format: &Format| manifest.outputs.iter().any(|output| output.format == *format);
    let whole = manifest.outputs.iter().all(|output| {
        fs::metadata(out.join(&output.file)).is_ok_and(|metadata| {
            metadata.len() == output.bytes && take_modified(&metadata) == output.modified
        })
    });
    (manifest.key == *key && formats.iter().all(has) && whole).then_some(manifest)
}

/// Write the other formats from the raw disk, and describe them all.
///
/// Every output has a digest of its own. For the raw disk that is the root hash of a hash
/// tree over it: 0.2 s, where SHA-256 over gigabytes of zeros takes five, far longer than the
/// rest of a build after an edit. Beside a format that is shipped it has its SHA-256, too.
pub fn write(
    source: &Source,
    tools: &Tools,
    profile: &Profile,
    formats: &[Format],
    raw: &Path,
) -> Result<Vec<OutputEntry>> {
    let step = source.progress.begin(format!("{} outputs", profile.name));
    let disk = File::open(raw).with_context(|| format!("opening {}", raw.display()))?;
    let others: Vec<Format> =
        formats.iter().copied().filter(|format| *format != Format::Raw).collect();
    let (sha256, written) = std::thread::scope(|scope| {
        let sha256 = (!others.is_empty()).then(|| scope.spawn(|| hash_sparse(&disk)));
        let written: Result<Vec<OutputEntry>> = others
            .iter()
            .map(|format| {
                let path = raw.with_extension(format.name());
                match format {
                    Format::Raw => {}
                    Format::Qcow2 => qcow2::convert(tools, raw, &path)?,
                }
                let sha256 = Digest::of_file(&path)?;
                describe(*format, &path, Some(sha256), None)
            })
            .collect();
        (sha256.map(|thread| thread.join().expect("hashing does not panic")).transpose(), written)
    });
    let tree = verity::hash_file(&File::open(raw)?, source.threads)
        .with_context(|| format!("hashing {}", raw.display()))?;
    let mut outputs = vec![describe(Format::Raw, raw, sha256?, Some(tree))?];
    outputs.extend(written?);
    step.finish(
        outputs
            .iter()
            .map(|output| {
                format!("{} {}", output.format, crate::progress::format_bytes(output.allocated))
            })
            .collect::<Vec<_>>()
            .join(", "),
    );
    Ok(outputs)
}

fn describe(
    format: Format,
    path: &Path,
    sha256: Option<Digest>,
    tree: Option<Digest>,
) -> Result<OutputEntry> {
    let metadata = fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
    Ok(OutputEntry {
        format,
        file: path.file_name().context("an output has a name")?.into(),
        sha256,
        tree,
        bytes: metadata.len(),
        allocated: metadata.blocks() * 512,
        modified: take_modified(&metadata),
    })
}

fn take_modified(metadata: &fs::Metadata) -> u64 {
    (metadata.mtime() as u64).wrapping_mul(1_000_000_000).wrapping_add(metadata.mtime_nsec() as u64)
}
