use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, anyhow};

use super::{ArtifactArgs, Context, FetchArgs};
use crate::config::Format;
use crate::error::UserError;
use crate::pipeline;
use crate::progress::{format_bytes, print_line};
use crate::timings::{find_critical_path, show_timings};

/// Build images: all shipped profiles, or those that are named
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  stanchion build db                       out/db.raw, out/db.qcow2, out/db.manifest.json
  stanchion build db --format raw          only the raw disk
  stanchion build db --timings             which steps took how long
  stanchion build --locked --offline       exactly the lock, nothing from the network
  stanchion build web --artifact netbox=netbox.tar.gz
                                           with this file instead of a download")]
pub struct Args {
    /// Names of profiles
    #[arg(value_name = "PROFILE")]
    profiles: Vec<String>,
    /// Where the images go
    #[arg(long, value_name = "DIR", default_value = "out")]
    out: PathBuf,
    /// Formats to write (default: those of the profile)
    #[arg(long, value_name = "FORMAT", value_delimiter = ',')]
    format: Vec<Format>,
    /// Fail rather than change the lock
    #[arg(long)]
    locked: bool,
    /// Show what each step took, and which of them the build waited for
    #[arg(long)]
    timings: bool,
    /// Open a shell in the layer where a command fails
    #[arg(long)]
    debug_shell: bool,
    #[command(flatten)]
    artifact: ArtifactArgs,
    #[command(flatten)]
    fetch: FetchArgs,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let began = Instant::now();
    let project = context.find_project()?;
    let names = match args.profiles.is_empty() {
        true => project.list_profiles()?,
        false => args.profiles,
    };
    let options = pipeline::BuildOptions {
        out: args.out,
        formats: args.format,
        locked: args.locked,
        debug_shell: args.debug_shell,
        artifacts: args.artifact.artifacts,
        fetch: args.fetch.into(),
    };
    let built = pipeline::build(&project, &names, &options, &context.progress)?;

    if args.timings {
        show_steps(context, began.elapsed().as_secs_f64());
    }
    let all = built.len();
    let mut failed = Vec::new();
    for (name, outcome) in built {
        match outcome {
            Ok(built) => report(context, &built),
            Err(error) => failed.push((name, error)),
        }
    }
    match (failed.len(), all) {
        (0, _) => Ok(()),
        (1, 1) => Err(failed.remove(0).1),
        _ => {
            let ours = failed.iter().any(|(_, error)| crate::error::exit_code(error) == 1);
            let list: Vec<String> = failed
                .iter()
                .map(|(name, error)| format!("{name}: {}", super::describe(error)))
                .collect();
            let text = format!("{} of {all} profiles failed", failed.len());
            if ours {
                Err(anyhow!("{text}\n{}", list.join("\n")))
            } else {
                Err(UserError::new(text).why(list.join("\n")).into())
            }
        }
    }
}

fn show_steps(context: &Context, total: f64) {
    let steps = context.progress.step_times();
    match context.json {
        true => {
            let critical: Vec<&str> =
                find_critical_path(&steps).into_iter().map(|step| step.step.as_str()).collect();
            let event = serde_json::json!({
                "event": "timings", "seconds": total, "steps": steps, "critical": critical
            });
            print_line(&event.to_string());
        }
        false => print_line(&show_timings(&steps, total)),
    }
}

fn report(context: &Context, built: &pipeline::Built) {
    if context.json {
        let mut event = serde_json::to_value(built).unwrap_or_default();
        event["event"] = "built".into();
        print_line(&event.to_string());
        return;
    }
    for output in &built.outputs {
        let digest = match (output.sha256, output.tree) {
            (Some(sha256), _) => format!(", sha256 {}", sha256.short()),
            (None, Some(tree)) => format!(", hash tree {}", tree.short()),
            (None, None) => String::new(),
        };
        context.progress.note(&format!(
            "{}  {} on disk{digest}",
            output.path.display(),
            format_bytes(output.allocated),
        ));
    }
    let how = if built.cached { ", nothing had changed" } else { "" };
    context.progress.note(&format!(
        "{} {} in {:.1} s{how}; root hash {}",
        built.profile, built.version, built.seconds, built.root_hash
    ));
}
