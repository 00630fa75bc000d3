use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::Context;
use super::backup::read_text;
use super::operate::{Asked, Consent, Place, is_leader, list_registered, show_result};
use super::seed::find_node;
use crate::agent::backup::{Planned, Target, format_utc, parse_time};
use crate::agent::operate::{RESTORE, START_DATABASE};
use crate::agent::table::Answer;
use crate::config::Role;
use crate::config::cluster::Node;
use crate::error::UserError;

/// Bring the database back as it was at a time
#[derive(Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("when").required(true).args(["to", "latest", "abort"]),
    after_help = "Examples:
  stanchion restore --to 2026-11-21T18:30:00Z
  stanchion restore --latest --yes
  stanchion restore --abort

All db nodes must answer. What was written after that time is lost. A restore that was
interrupted goes on when it is asked for again."
)]
pub struct Args {
    /// The time, with its zone
    #[arg(long, value_name = "TIME")]
    to: Option<String>,
    /// All that reached the repository
    #[arg(long)]
    latest: bool,
    /// Give up a restore that is under way, as long as its data do not lead
    #[arg(long)]
    abort: bool,
    /// Where to restore; the others copy from there (default: PostgreSQL's leader)
    #[arg(long, value_name = "NODE")]
    on: Option<String>,
    /// Delete the present data first, where there is no room to keep them until the end
    #[arg(long)]
    in_place: bool,
    #[command(flatten)]
    consent: Consent,
    #[command(flatten)]
    place: Place,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let target = match &args.to {
        Some(text) => {
            let (seconds, micros) = parse_time(text)?;
            Some(Target::Time(seconds, micros))
        }
        None => args.latest.then_some(Target::Latest),
    };
    let asked = args.place.open(context)?;
    let (nodes, leader) = find_databases(&asked, target.is_none())?;
    let wanted = args.on.as_deref().map(|name| find_node(&asked.cluster, name)).transpose()?;
    let first = nodes.first().copied().context("no db node answers")?;
    let mut on = wanted.or(leader).unwrap_or(first);
    let mut planned = plan(context, &asked, on, target.as_ref())?;
    if let Some(record) = &planned.record {
        on = find_node(&asked.cluster, &record.node)?;
        planned = plan(context, &asked, on, target.as_ref())?;
    }
    let Some(target) = target else {
        return abort(context, &asked, &nodes, on, &planned, &args.consent);
    };
    args.consent.ask(context, &describe(&asked, on, &target, &planned, args.in_place)?)?;
    let step = |node: &Node, wish: Value| asked.run(context, node, RESTORE, &wish);
    step(on, json!({ "step": "begin", "target": target, "in_place": args.in_place }))?;
    // The leader last: else the others would elect one.
    let is_last = |node: &&Node| leader.is_some_and(|leader| leader.name == node.name);
    let (last, early): (Vec<&Node>, Vec<&Node>) = nodes.iter().copied().partition(is_last);
    for node in early.into_iter().chain(last) {
        step(node, json!({ "step": "stop" }))?;
    }
    let found = step(on, json!({ "step": "fetch" }))?;
    step(on, json!({ "step": "lead" }))?;
    for node in nodes.iter().filter(|node| node.name != on.name) {
        step(node, json!({ "step": "follow" }))?;
    }
    let ended = step(on, json!({ "step": "end" }))?;
    let kept = read_text(&ended, "kept");
    let value = json!({ "node": on.name, "target": target, "found": found, "kept": kept });
    let mut sentence = format!(
        "the database is as it was at {}, on {} and its replicas",
        target.describe(),
        on.name
    );
    if let Some(kept) = &kept {
        sentence += &format!("; {} keeps what was there before at {kept}", on.name);
    }
    show_result(context, "restore", &value, &sentence);
    Ok(())
}

/// The db nodes that answer, and PostgreSQL's leader among them.
///
/// # Errors
/// A [`UserError`] when one is silent, which could come back with what must be gone; one that
/// comes back after a restore was given up finds all as it was.
fn find_databases(asked: &Asked, gives_up: bool) -> Result<(Vec<&Node>, Option<&Node>)> {
    let answers = asked.ask_all()?;
    let is_there = |node: &&Node| matches!(answers.get(&node.name), Some(Answer::Page(_)));
    let (nodes, silent): (Vec<&Node>, Vec<&Node>) =
        asked.cluster.list_nodes(Role::Db).partition(is_there);
    if !gives_up && !silent.is_empty() {
        let silent: Vec<&str> = silent.iter().map(|node| node.name.as_str()).collect();
        return Err(UserError::new("nothing was done: not all db nodes answer")
            .why(format!("{} could come back with data that must be gone", silent.join(", ")))
            .help(
                "start them; for one that is lost boot a fresh machine with a seed of `stanchion \
                 seed NODE`, which joins while a restore is under way, too",
            )
            .into());
    }
    let registered = list_registered(&answers);
    let leads = |node: &&Node| registered.get(&node.name).is_some_and(is_leader);
    let leader = nodes.iter().copied().find(leads);
    Ok((nodes, leader))
}

fn plan(context: &Context, asked: &Asked, on: &Node, target: Option<&Target>) -> Result<Planned> {
    let value = asked.run(context, on, RESTORE, &json!({ "step": "plan", "target": target }))?;
    serde_json::from_value(value).context("reading the agent's answer")
}

/// What would be done, for whoever has to mean it.
fn describe(
    asked: &Asked,
    on: &Node,
    target: &Target,
    planned: &Planned,
    in_place: bool,
) -> Result<String> {
    let name = &asked.cluster.name;
    if let Some(record) = &planned.record {
        if record.target != *target {
            return Err(UserError::new("another restore is under way")
                .why(format!("to {}, on {}", record.target.describe(), record.node))
                .help("ask for the same time to go on with it, or give it up with --abort")
                .into());
        }
        return Ok(format!(
            "The restore of `{name}` to {} on {} goes on where it was interrupted.",
            target.describe(),
            on.name
        ));
    }
    let backup = planned.backup.as_ref().context("the agent names no backup")?;
    if !planned.has_room && !in_place {
        return Err(UserError::new(format!("{} has no room to keep the present data", on.name))
            .why(format!("the backup {} needs it", backup.label))
            .help("take another node with --on, or delete the present data first with --in-place")
            .into());
    }
    let mut text = format!(
        "The database of `{name}` goes back to {}, from the backup {} of {}, on {}.\n\
         It is stopped on all nodes meanwhile. WHAT WAS WRITTEN AFTER THAT TIME IS LOST.",
        target.describe(),
        backup.label,
        format_utc(backup.stop),
        on.name
    );
    text += match in_place {
        true => "\nThe present data are deleted before it is known that the backup is good.",
        false => "\nThe present data of that node are kept beside it until the next restore.",
    };
    if planned.other_database {
        text += "\nThe cluster's present database is another one than that of the backups: one \
                 that was formed on empty disks.";
    }
    Ok(text)
}

fn abort(
    context: &Context,
    asked: &Asked,
    nodes: &[&Node],
    on: &Node,
    planned: &Planned,
    consent: &Consent,
) -> Result<()> {
    if let Some(record) = &planned.record {
        let what = format!(
            "The restore to {} is given up, and the database starts with the data from before.",
            record.target.describe()
        );
        consent.ask(context, &what)?;
        asked.run(context, on, RESTORE, &json!({ "step": "abort" }))?;
    } else {
        consent.ask(context, "No restore is under way; the database is started everywhere.")?;
    }
    for node in nodes {
        asked.run(context, node, START_DATABASE, &json!({}))?;
    }
    show_result(context, "restore_abort", &json!({}), "the database starts with its old data");
    Ok(())
}
