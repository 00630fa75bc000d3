use anyhow::Result;

use super::{Context, FetchArgs};
use crate::pipeline::{Source, explain_presence};
use crate::progress::print_line;

/// Show why a package is in a profile's images
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: stanchion why db libpq5")]
pub struct Args {
    profile: String,
    package: String,
    #[command(flatten)]
    fetch: FetchArgs,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let project = context.find_project()?;
    let profile = project.load_profile(&args.profile)?;
    let source = Source::open(&args.fetch.into(), &context.progress)?;
    for presence in explain_presence(&project, &source, &profile, &args.package)? {
        match context.json {
            true => print_line(&serde_json::to_string(&presence)?),
            false => print_line(presence.to_string().trim_end()),
        }
    }
    Ok(())
}
