use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::Context;
use super::operate::{Consent, Place, show_result};
use crate::agent::operate::{SWITCHOVER, Switched};
use crate::config::Role;

/// Let PostgreSQL's leader hand over to its synchronous standby
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  stanchion switchover
  stanchion switchover --to n2 --yes

Refused while Patroni is paused, and without a synchronous standby that follows.")]
pub struct Args {
    /// Who takes over (default: the synchronous standby)
    #[arg(long, value_name = "NODE")]
    to: Option<String>,
    #[command(flatten)]
    consent: Consent,
    #[command(flatten)]
    place: Place,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let asked = args.place.open(context)?;
    let node = asked.choose(Role::Db, |_| false)?;
    let read = |value: Value| -> Result<Switched> {
        serde_json::from_value(value).context("reading the agent's answer")
    };
    let wish = json!({ "to": args.to, "dry": true });
    let planned = read(asked.run(context, node, SWITCHOVER, &wish)?)?;
    let what = format!(
        "{} will hand over to {}; writes stand still for a few seconds.",
        planned.from, planned.to
    );
    args.consent.ask(context, &what)?;
    let value = asked.run(context, node, SWITCHOVER, &json!({ "to": planned.to }))?;
    let done = read(value.clone())?;
    let still = match done.writes_stood_still {
        Some(seconds) => format!("writes stood still for {seconds:.1} s"),
        None => "how long writes stood still was not measured".to_string(),
    };
    let sentence = format!(
        "{} leads, {} follows: {still}; whole again after {:.1} s",
        done.to, done.from, done.seconds
    );
    show_result(context, "switchover", &value, &sentence);
    Ok(())
}
