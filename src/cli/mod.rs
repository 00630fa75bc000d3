//! The command line: clap's types, and one function for each verb.

mod agent;
mod backup;
mod build;
mod cluster;
mod diff;
mod doctor;
mod explain;
mod inspect;
mod lab;
mod lock;
mod maintenance;
mod node;
mod operate;
mod profile;
mod renew;
mod restore;
mod seed;
mod status;
mod store;
mod support_bundle;
mod switchover;
mod why;

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};

use crate::config::Project;
use crate::error;
use crate::pipeline::GivenArtifact;
use crate::progress::{Mode, Progress, print_line};

/// Build immutable appliance images that form a highly available NetBox by themselves.
#[derive(Debug, Parser)]
#[command(
    name = "stanchion",
    version,
    propagate_version = true,
    after_help = "Example: stanchion build db"
)]
pub struct Cli {
    /// Directory with `profiles/` and `layers/` (default: this one, or the nearest above)
    #[arg(long, global = true, value_name = "DIR")]
    project: Option<PathBuf>,
    /// Show errors and warnings only
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Write JSON to standard output, one object a line
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Build(build::Args),
    Lock(lock::Args),
    Inspect(inspect::Args),
    Diff(diff::Args),
    Profile(profile::Args),
    Why(why::Args),
    Explain(explain::Args),
    Cluster(cluster::Args),
    Seed(seed::Args),
    Status(status::Args),
    Switchover(switchover::Args),
    RenewCertificate(renew::Args),
    Backup(backup::Args),
    Restore(restore::Args),
    Maintenance(maintenance::Args),
    Node(node::Args),
    SupportBundle(support_bundle::Args),
    Doctor(doctor::Args),
    Lab(lab::Args),
    Store(store::Args),
    /// Print a completion script for a shell
    #[command(
        after_help = "Example: stanchion completions bash > /etc/bash_completion.d/stanchion"
    )]
    Completions {
        shell: clap_complete::Shell,
    },
}

/// What every verb may use.
pub struct Context {
    project: Option<PathBuf>,
    pub progress: Progress,
    pub json: bool,
}

impl Context {
    /// The project that `--project` names, or the one this directory lies in.
    pub fn find_project(&self) -> Result<Project> {
        Project::find(self.project.as_deref().unwrap_or(Path::new(".")))
    }
}

/// Where packages come from and go to; shared by the verbs that fetch.
#[derive(Debug, Clone, clap::Args)]
pub struct FetchArgs {
    /// Debian mirror: one URL, or main and security separated by a comma
    #[arg(long, value_name = "URL")]
    pub mirror: Option<String>,
    /// Use only what is in the store
    #[arg(long)]
    pub offline: bool,
    /// Downloads and threads at the same time (default: by the number of processors)
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub jobs: Option<u16>,
}

/// Files in the place of artifacts; shared by the verbs that need them.
#[derive(Debug, Clone, clap::Args)]
pub struct ArtifactArgs {
    /// Take this file for a layer's artifact, instead of fetching it (repeatable)
    #[arg(long = "artifact", value_name = "NAME=FILE", value_parser = parse_artifact)]
    artifacts: Vec<GivenArtifact>,
}

fn parse_artifact(text: &str) -> Result<GivenArtifact, String> {
    match text.split_once('=') {
        Some((name, file)) if !name.is_empty() && !file.is_empty() => {
            Ok(GivenArtifact { name: name.to_string(), file: file.into() })
        }
        _ => Err("write NAME=FILE, such as netbox=netbox-4.6.9.tar.gz".to_string()),
    }
}

/// Run the command line of this process: the agent's when that is its name.
pub fn run() -> ExitCode {
    let name = std::env::args_os().next().map(PathBuf::from);
    if name.is_some_and(|name| name.file_name() == Some(OsStr::new("stanchion-agent"))) {
        return agent::run();
    }
    let cli = Cli::parse();
    let mode = Mode::choose(cli.quiet, cli.json);
    let context = Context { project: cli.project, progress: Progress::new(mode), json: cli.json };
    let done = match cli.verb {
        Verb::Build(args) => build::run(&context, args),
        Verb::Lock(args) => lock::run(&context, args),
        Verb::Inspect(args) => inspect::run(&context, args),
        Verb::Diff(args) => diff::run(&context, args),
        Verb::Profile(args) => profile::run(&context, args),
        Verb::Why(args) => why::run(&context, args),
        Verb::Explain(args) => explain::run(&context, args),
        Verb::Cluster(args) => cluster::run(&context, args),
        Verb::Seed(args) => seed::run(&context, args),
        Verb::Status(args) => match status::run(&context, args) {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Verb::Switchover(args) => switchover::run(&context, args),
        Verb::RenewCertificate(args) => renew::run(&context, args),
        Verb::Backup(args) => backup::run(&context, args),
        Verb::Restore(args) => restore::run(&context, args),
        Verb::Maintenance(args) => maintenance::run(&context, args),
        Verb::Node(args) => node::run(&context, args),
        Verb::SupportBundle(args) => support_bundle::run(&context, args),
        Verb::Doctor(args) => doctor::run(&context, args),
        Verb::Lab(args) => lab::run(&context, args),
        Verb::Store(args) => store::run(&context, args),
        Verb::Completions { shell } => {
            print_completions(shell);
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error, cli.json);
            ExitCode::from(error::exit_code(&error))
        }
    }
}

fn print_completions(shell: clap_complete::Shell) {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "stanchion", &mut script);
    // A pager that was closed is no error of ours.
    let _ = std::io::stdout().write_all(&script);
}

fn report(error: &anyhow::Error, json: bool) {
    let text = describe(error);
    if json {
        let event = serde_json::json!({
            "event": "error", "text": text, "exit_code": error::exit_code(error)
        });
        print_line(&event.to_string());
    } else {
        eprintln!("error: {text}");
    }
}

/// The chain of causes; each says what was being done, the last what went wrong.
pub fn describe(error: &anyhow::Error) -> String {
    let mut causes: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string();
        // Some libraries repeat their cause in their own text.
        if causes.last().is_none_or(|last| !last.ends_with(&text)) {
            causes.push(text);
        }
    }
    causes.join(":\n  ")
}
