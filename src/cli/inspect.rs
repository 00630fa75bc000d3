use std::path::{Path, PathBuf};

use anyhow::Result;

use super::Context;
use crate::error::UserError;
use crate::lock::Lock;
use crate::output::inspect;
use crate::output::raw_image::{Unpacker, needs_unpacker};
use crate::pipeline::{self, FetchOptions, Source};
use crate::progress::print_line;
use crate::store::Scratch;
use crate::tools::{Tools, set};

/// Show what an image is, from the image itself
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  stanchion inspect out/db.raw
  stanchion inspect out/db.qcow2       unpacked with tools that the project's lock names")]
pub struct Args {
    image: PathBuf,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let report = match needs_unpacker(&args.image)? {
        true => {
            let Toolbox { tools, scratch } = open_toolbox(context, &args.image)?;
            let unpacker = Unpacker { tools: &tools, folder: scratch.path() };
            inspect::inspect(&args.image, Some(unpacker))?
        }
        false => inspect::inspect(&args.image, None)?,
    };
    match context.json {
        true => print_line(&serde_json::to_string(&report)?),
        false => print_line(report.to_string().trim_end()),
    }
    match report.problems.len() {
        0 => Ok(()),
        n => Err(UserError::new(format!("the image has {n} problems"))
            .in_file(args.image)
            .why(report.problems.join("\n"))
            .into()),
    }
}

/// What unpacks images, and room for it.
pub struct Toolbox {
    pub tools: Tools,
    pub scratch: Scratch,
}

/// The tools that the project's lock names, for an image that has to be unpacked.
pub fn open_toolbox(context: &Context, image: &Path) -> Result<Toolbox> {
    let missing = |why: String| {
        UserError::new("the tools that unpack this image are not known here")
            .in_file(image)
            .why(why)
            .help("run this in a project that has a lock, or name it with --project DIR; or give the raw image")
    };
    let project = context.find_project().map_err(|error| {
        missing(error.to_string().lines().next().unwrap_or_default().to_string())
    })?;
    let path = pipeline::lock_path(&project);
    let lock = Lock::load(&path)?
        .filter(|lock| lock.sets.iter().any(|locked| locked.name == set::BUILD))
        .ok_or_else(|| missing(format!("{} holds no tools", path.display())))?;
    let source = Source::open(&FetchOptions::default(), &context.progress)?;
    let tools = pipeline::provide_tools(&source, &lock, set::BUILD)?;
    let scratch = source.store.make_scratch("inspect")?;
    Ok(Toolbox { tools, scratch })
}
