//! `stanchion-agent`: this program under its other name, in every image.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use super::report;
use crate::agent::board::show;
use crate::agent::places::Places;
use crate::agent::server::{Page, RENEW, STATUS, ask_socket};
use crate::agent::site::Renewal;
use crate::error;

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
        Verb::Run(root) => (crate::agent::run(Places::under(root.root)), false),
        Verb::Status { json, root } => (show_status(&Places::under(root.root), json), json),
        Verb::RenewCertificate { json, root } => {
            (renew_certificate(&Places::under(root.root), json), json)
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
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
