use anyhow::{Context as _, Result};

use super::Context;
use crate::progress::print_line;

/// List profiles, or show one as it is resolved
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  stanchion profile list
  stanchion profile show db")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// List the profiles of the project
    #[command(after_help = "Example: stanchion profile list")]
    List,
    /// Show a profile with its layers, files and variables, as a build sees it
    #[command(after_help = "Example: stanchion profile show db")]
    Show { name: String },
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let project = context.find_project()?;
    match args.verb {
        Verb::List => {
            for name in project.list_profiles()? {
                let description = project.load_profile(&name)?.description;
                match context.json {
                    true => print_line(
                        &serde_json::json!({
                            "event": "profile", "name": name, "description": description
                        })
                        .to_string(),
                    ),
                    false => print_line(&format!("{name:<12} {description}")),
                }
            }
        }
        Verb::Show { name } => {
            let profile = project.load_profile(&name)?;
            match context.json {
                true => print_line(&serde_json::to_string(&profile)?),
                false => print_line(toml::to_string(&profile).context("writing TOML")?.trim_end()),
            }
        }
    }
    Ok(())
}
