use anyhow::Result;

use super::{ArtifactArgs, Context, FetchArgs};
use crate::lock::Update;
use crate::pipeline;
use crate::progress::print_line;

/// Lock every package and artifact of every profile by version and SHA-256
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  stanchion lock                       lock what is new in the profiles, keep the rest
  stanchion lock --update              take the newest version of everything
  stanchion lock --update openssl      take the newest openssl, keep the rest
  stanchion lock --artifact netbox=netbox.tar.gz
                                       lock this file for the artifact `netbox`")]
pub struct Args {
    /// Leave the locked versions: of these packages, or of all when none is named
    #[arg(long, value_name = "PACKAGE", num_args = 0..)]
    update: Option<Vec<String>>,
    #[command(flatten)]
    artifact: ArtifactArgs,
    #[command(flatten)]
    fetch: FetchArgs,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let project = context.find_project()?;
    let update = match args.update {
        None => Update::Nothing,
        Some(names) if names.is_empty() => Update::Everything,
        Some(names) => Update::Named(names.into_iter().collect()),
    };
    let source = pipeline::Source::open(&args.fetch.into(), &context.progress)?;
    let changes = pipeline::relock(&project, &source, &update, &args.artifact.artifacts)?;
    if context.json {
        print_line(&serde_json::json!({ "event": "locked", "changes": changes }).to_string());
        return Ok(());
    }
    for change in &changes {
        context.progress.note(&change.to_string());
    }
    if changes.is_empty() {
        context.progress.note("the lock holds what the profiles ask for");
    }
    Ok(())
}

impl From<FetchArgs> for pipeline::FetchOptions {
    fn from(args: FetchArgs) -> Self {
        pipeline::FetchOptions { mirror: args.mirror, offline: args.offline, jobs: args.jobs }
    }
}
