//! `stanchion-agent`: this program under its other name, in every image.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use super::report;
use super::status::print_table;
use crate::agent::board::{StepOutcome, show};
use crate::agent::places::Places;
use crate::agent::server::{Page, RENEW, STATUS, ask_socket};
use crate::agent::site::Renewal;
use crate::agent::table::{Answer, make_table};
use crate::error::{self, UserError};

/// Make a node of this machine: find its seed, join the cluster, run its services.
#[derive(Debug, Parser)]
#[command(name = "stanchion-agent", version, propagate_version = true)]
struct Agent {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run until stopped; systemd starts this
    Run(Root),
    /// Show phase, steps and failed checks of this machine's agent
    Status {
        /// Show the whole cluster as this node sees it; exit code 3 when a node is not ready
        #[arg(long)]
        cluster: bool,
        /// Write JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        root: Root,
    },
    /// Renew the certificate that users see, on all edges, now
    RenewCertificate {
        /// Write JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        root: Root,
    },
}

#[derive(Debug, clap::Args)]
struct Root {
    /// Folder that stands for `/`
    #[arg(long, value_name = "DIR", default_value = "/", hide = true)]
    root: PathBuf,
}

/// Run the agent's command line.
pub fn run() -> ExitCode {
    let agent = Agent::parse();
    let (done, json) = match agent.verb {
        Verb::Run(root) => {
            let ran = crate::agent::run(Places::under(root.root));
            (ran.map(|()| ExitCode::SUCCESS), false)
        }
        Verb::Status { cluster, json, root } => {
            let places = Places::under(root.root);
            let shown = match cluster {
                true => show_cluster(&places, json),
                false => show_status(&places, json).map(|()| ExitCode::SUCCESS),
            };
            (shown, json)
        }
        Verb::RenewCertificate { json, root } => {
            let renewed = renew_certificate(&Places::under(root.root), json);
            (renewed.map(|()| ExitCode::SUCCESS), json)
        }
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            report(&error, json);
            ExitCode::from(error::exit_code(&error))
        }
    }
}

fn show_status(places: &Places, json: bool) -> Result<()> {
    let value = ask_socket(places, STATUS, Duration::from_secs(5))?;
    if json {
        crate::progress::print_line(&value.to_string());
        return Ok(());
    }
    let page: Page = serde_json::from_value(value).context("reading the agent's status")?;
    crate::progress::print_line(show(&page.status).trim_end());
    Ok(())
}

fn renew_certificate(places: &Places, json: bool) -> Result<()> {
    let value = ask_socket(places, RENEW, Duration::from_secs(60))?;
    if json {
        crate::progress::print_line(&value.to_string());
        return Ok(());
    }
    let renewal: Renewal = serde_json::from_value(value).context("reading the agent's answer")?;
    let who = if renewal.made { "this edge" } else { "another edge, at the same time," };
    crate::progress::print_line(&format!(
        "{who} has made a new certificate: SHA-256 {}",
        renewal.fingerprint
    ));
    Ok(())
}

/// Of the others this node knows what they registered.
fn show_cluster(places: &Places, json: bool) -> Result<ExitCode> {
    let page: Page = serde_json::from_value(ask_socket(places, STATUS, Duration::from_secs(5))?)
        .context("reading the agent's status")?;
    let (name, members) = (page.status.node.clone(), page.status.members.clone());
    if name.is_empty() {
        return Err(UserError::new("this machine is in no cluster yet")
            .why(find_wait(&page).unwrap_or("it is starting"))
            .help("see `stanchion-agent status`")
            .into());
    }
    let cluster = page.status.cluster.clone();
    let answers = [(name, Answer::Page(Box::new(page)))].into();
    Ok(print_table(&make_table(&cluster, &members, &answers), json))
}

/// What the node waits for.
fn find_wait(page: &Page) -> Option<&str> {
    page.status.steps.iter().rev().find_map(|step| match &step.outcome {
        StepOutcome::Waiting(reason) => Some(reason.as_str()),
        _ => None,
    })
}
