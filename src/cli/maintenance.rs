use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::Context;
use super::operate::{Asked, Consent, Place, show_result};
use crate::agent::backup::format_utc;
use crate::agent::operate::MAINTENANCE;
use crate::agent::registry::Maintenance;
use crate::config::Role;
use crate::error::UserError;

/// Ask users to wait while something is done that they would notice
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  stanchion maintenance
  stanchion maintenance on --reason 'moving racks' --for 2h
  stanchion maintenance off")]
pub struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// From now on edges answer that users are to wait, and workers take no jobs
    #[command(after_help = "Example: stanchion maintenance on --reason 'moving racks' --for 2h")]
    On {
        /// Why, for whoever looks at the status
        #[arg(long, value_name = "TEXT", default_value = "")]
        reason: String,
        /// When it ends by itself: 90s, 30m, 2h, 1d (default: never)
        #[arg(long = "for", value_name = "DURATION", value_parser = parse_duration)]
        duration: Option<Duration>,
        #[command(flatten)]
        consent: Consent,
        #[command(flatten)]
        place: Place,
    },
    /// Let users in again
    #[command(after_help = "Example: stanchion maintenance off")]
    Off(Place),
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let ask = |asked: &Asked, wish: Value| -> Result<Option<Maintenance>> {
        let node = asked.choose(Role::Db, |_| false)?;
        let value = asked.run(context, node, MAINTENANCE, &wish)?;
        serde_json::from_value(value["maintenance"].clone()).context("reading the agent's answer")
    };
    let held = match args.verb {
        None => ask(&args.place.open(context)?, json!({ "do": "show" }))?,
        Some(Verb::Off(place)) => ask(&place.open(context)?, json!({ "do": "off" }))?,
        Some(Verb::On { reason, duration, consent, place }) => {
            let asked = place.open(context)?;
            consent.ask(context, "Users are asked to wait, and jobs are not worked on.")?;
            let seconds = duration.map(|duration| duration.as_secs());
            ask(&asked, json!({ "do": "on", "reason": reason, "seconds": seconds }))?
        }
    };
    let sentence = describe(held.as_ref());
    show_result(context, "maintenance", &json!({ "maintenance": held }), &sentence);
    Ok(())
}

fn describe(held: Option<&Maintenance>) -> String {
    let Some(held) = held else { return "there is no maintenance: users are served".to_string() };
    let mut text = format!("maintenance since {}", format_utc(held.since));
    match held.until {
        Some(until) => text += &format!(", until {}", format_utc(until)),
        None => text += ", until `stanchion maintenance off`",
    }
    if !held.reason.is_empty() {
        text += &format!(": {}", held.reason);
    }
    text
}

/// `90s`, `30m`, `2h`, `1d`.
fn parse_duration(text: &str) -> Result<Duration, UserError> {
    let fault = || UserError::new("it is no duration").help("write it like 90s, 30m, 2h or 1d");
    let unit = match text.bytes().last() {
        Some(b's') => 1,
        Some(b'm') => 60,
        Some(b'h') => 3600,
        Some(b'd') => 86_400,
        _ => return Err(fault()),
    };
    let number = &text[..text.len() - 1];
    let is_number =
        !number.is_empty() && number.len() <= 6 && number.bytes().all(|b| b.is_ascii_digit());
    let number: u64 = is_number.then(|| number.parse().ok()).flatten().ok_or_else(fault)?;
    if number == 0 {
        return Err(fault());
    }
    Ok(Duration::from_secs(number * unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(parse_duration("90s").unwrap(), Duration::from_secs(90));
        assert_eq!(parse_duration("2h").unwrap(), Duration::from_secs(7200));
        for text in ["", "h", "90", "-1h", "0m", "1.5h", "9999999d", "2hours", "１h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
