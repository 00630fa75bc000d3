use std::path::{Path, PathBuf};

use anyhow::Result;

use super::Context;
use super::inspect::open_toolbox;
use crate::output::compare::compare;
use crate::output::raw_image::{RawImage, Unpacker, needs_unpacker};
use crate::progress::print_line;

/// Show in which packages and files two images differ
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: stanchion diff old/db.qcow2 out/db.raw")]
pub struct Args {
    old: PathBuf,
    new: PathBuf,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let paths: [&Path; 2] = [&args.old, &args.new];
    let mut packed = None;
    for path in paths {
        if needs_unpacker(path)? {
            packed = Some(path);
        }
    }
    let toolbox = packed.map(|path| open_toolbox(context, path)).transpose()?;
    let unpacker = toolbox
        .as_ref()
        .map(|toolbox| Unpacker { tools: &toolbox.tools, folder: toolbox.scratch.path() });
    let step = context.progress.begin("comparing");
    let (old, new) = (RawImage::open(paths[0], unpacker)?, RawImage::open(paths[1], unpacker)?);
    let comparison = compare((paths[0], &old), (paths[1], &new))?;
    step.finish("");
    match context.json {
        true => print_line(&serde_json::to_string(&comparison)?),
        false => print_line(comparison.to_string().trim_end()),
    }
    Ok(())
}
