use std::path::PathBuf;

use anyhow::Result;

use super::Context;
use crate::output::inspect;
use crate::progress::print_line;

/// Show what an image is, from the image itself
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: stanchion inspect out/db.raw")]
pub struct Args {
    image: PathBuf,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let report = inspect::inspect(&args.image, None)?;
    match context.json {
        true => print_line(&serde_json::to_string(&report)?),
        false => print_line(report.to_string().trim_end()),
    }
    Ok(())
}
