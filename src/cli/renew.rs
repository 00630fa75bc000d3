use anyhow::{Context as _, Result};
use serde_json::json;

use super::Context;
use super::operate::{Place, show_result};
use crate::agent::operate::RENEW_CERTIFICATE;
use crate::agent::site::Renewal;
use crate::config::Role;

/// Renew the certificate that users see, on all edges, now
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: stanchion renew-certificate

The cluster renews it by itself in time; no connection ends with it.")]
pub struct Args {
    #[command(flatten)]
    place: Place,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let asked = args.place.open(context)?;
    let node = asked.choose(Role::Edge, |_| false)?;
    let value = asked.run(context, node, RENEW_CERTIFICATE, &json!({}))?;
    let renewal: Renewal =
        serde_json::from_value(value.clone()).context("reading the agent's answer")?;
    let who = if renewal.made { node.name.as_str() } else { "another edge, at the same time," };
    let sentence = format!("{who} has made a new certificate: SHA-256 {}", renewal.fingerprint);
    show_result(context, "renew_certificate", &value, &sentence);
    Ok(())
}
