use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::Context;
use super::operate::{Asked, Place, is_leader, show_result};
use crate::agent::backup::{Backup, Drilled, Taken, format_utc};
use crate::agent::operate::{BACKUP, BACKUP_DRILL, BACKUP_LIST};
use crate::config::Role;
use crate::progress::{format_bytes, print_line};

/// Take a backup now, list those that there are, or prove that they can be restored
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  stanchion backup
  stanchion backup list
  stanchion backup verify

The cluster takes one by itself: in full each week, differential each day."
)]
pub struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// Of everything (default: what has changed since the last full one)
    #[arg(long, conflicts_with = "differential")]
    full: bool,
    /// Of what has changed since the last full one, even if a full one is due
    #[arg(long)]
    differential: bool,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Show what the repository has
    #[command(after_help = "Example: stanchion backup list --json")]
    List(Place),
    /// Restore the last backup into a scratch folder of a node, look at it, delete it
    #[command(after_help = "Example: stanchion backup verify --on n3")]
    Verify {
        /// The node (default: one that is not PostgreSQL's leader)
        #[arg(long, value_name = "NODE")]
        on: Option<String>,
        #[command(flatten)]
        place: Place,
    },
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    match args.verb {
        Some(Verb::List(place)) => list(context, &place.open(context)?),
        Some(Verb::Verify { on, place }) => verify(context, &place.open(context)?, on),
        None => {
            let kind = match (args.full, args.differential) {
                (true, _) => Some("full"),
                (_, true) => Some("differential"),
                _ => None,
            };
            take(context, &args.place.open(context)?, kind)
        }
    }
}

fn take(context: &Context, asked: &Asked, kind: Option<&str>) -> Result<()> {
    let node = asked.choose(Role::Db, is_leader)?;
    let value = asked.run(context, node, BACKUP, &json!({ "kind": kind }))?;
    let taken: Taken =
        serde_json::from_value(value.clone()).context("reading the agent's answer")?;
    let sentence = format!(
        "{} of {} takes {} in the repository, after {:.1} s",
        taken.backup.label,
        format_bytes(taken.backup.size),
        format_bytes(taken.backup.stored),
        taken.seconds
    );
    show_result(context, "backup", &value, &sentence);
    Ok(())
}

fn list(context: &Context, asked: &Asked) -> Result<()> {
    let node = asked.choose(Role::Db, is_leader)?;
    let value = asked.run(context, node, BACKUP_LIST, &json!({}))?;
    if context.json {
        show_result(context, "backup_list", &value, "");
        return Ok(());
    }
    let backups: Vec<Backup> =
        serde_json::from_value(value["backups"].clone()).context("reading the agent's answer")?;
    if backups.is_empty() {
        print_line("there are no backups yet");
        return Ok(());
    }
    print_line(&format!(
        "{:<34} {:<5} {:<22} {:>10} {:>10}",
        "backup", "kind", "ended", "database", "stored"
    ));
    for backup in &backups {
        let damaged = if backup.damaged { "  WRONG CHECKSUMS" } else { "" };
        print_line(&format!(
            "{:<34} {:<5} {:<22} {:>10} {:>10}{damaged}",
            backup.label,
            backup.kind,
            format_utc(backup.stop),
            format_bytes(backup.size),
            format_bytes(backup.stored)
        ));
    }
    let snapshots = value["etcd_snapshots"].as_array().map_or(0, Vec::len);
    print_line(&format!("{snapshots} snapshots of etcd lie beside them"));
    Ok(())
}

fn verify(context: &Context, asked: &Asked, on: Option<String>) -> Result<()> {
    let node = match &on {
        Some(name) => super::seed::find_node(&asked.cluster, name)?,
        None => asked.choose(Role::Db, |node| !is_leader(node))?,
    };
    let value = asked.run(context, node, BACKUP_DRILL, &json!({}))?;
    let done: Drilled =
        serde_json::from_value(value.clone()).context("reading the agent's answer")?;
    let databases: Vec<String> =
        done.found.databases.iter().map(|(name, tables)| format!("{name} {tables}")).collect();
    let sentence = format!(
        "{} was restored on {} in {:.1} s, with the log up to {}; tables: {}; all checksums are right",
        done.backup.label,
        done.node,
        done.seconds,
        if done.found.last_commit.is_empty() { "its end" } else { &done.found.last_commit },
        databases.join(", ")
    );
    show_result(context, "backup_verify", &value, &sentence);
    Ok(())
}

/// What a value has under a name, as text.
pub fn read_text(value: &Value, name: &str) -> Option<String> {
    value[name].as_str().map(str::to_string)
}
