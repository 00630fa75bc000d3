use std::path::PathBuf;

use anyhow::Result;

use super::{Context, FetchArgs};
use crate::pipeline;
use crate::progress::print_line;

/// Show for each step of a build whether it would be done again, and which input changed
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: stanchion explain db")]
pub struct Args {
    profile: String,
    /// Where the images of the last build are
    #[arg(long, value_name = "DIR", default_value = "out")]
    out: PathBuf,
    #[command(flatten)]
    fetch: FetchArgs,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let project = context.find_project()?;
    let fetch = args.fetch.into();
    let steps = pipeline::explain(&project, &args.profile, &args.out, &fetch, &context.progress)?;
    for step in &steps {
        match context.json {
            true => print_line(&serde_json::to_string(step)?),
            false => print_line(&step.to_string()),
        }
    }
    Ok(())
}
