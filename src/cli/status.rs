use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::Result;

use super::Context;
use super::operate::Place;
use super::seed::find_node;
use crate::agent::ask::ask_nodes;
use crate::agent::table::{Answer, Table, make_table, show_table};
use crate::config::cluster::{Cluster, Node};
use crate::error::UserError;
use crate::progress::print_line;

/// When a node is not ready: what is wrong is neither the user's mistake nor ours.
const NOT_READY: u8 = 3;

/// Show how the nodes of a cluster are, with the operator's certificate
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  stanchion status
  stanchion status --cluster berlin.toml --node n1 --node n2

Exit code 0 when every node that is shown is ready, 3 when one is not.")]
pub struct Args {
    #[command(flatten)]
    place: Place,
    /// Ask and show this node only; may be given several times
    #[arg(long, value_name = "NAME")]
    node: Vec<String>,
}

pub fn run(context: &Context, args: Args) -> Result<ExitCode> {
    let asked = args.place.open(context)?;
    let cluster = &asked.cluster;
    let nodes: Vec<&Node> = match args.node.is_empty() {
        true => cluster.nodes.iter().collect(),
        false => args.node.iter().map(|name| find_node(cluster, name)).collect::<Result<_>>()?,
    };
    let answers = ask_nodes(&asked.tls, &nodes)?;
    expect_answer(cluster, &answers)?;
    let mut table = make_table(&cluster.name, &cluster.nodes, &answers);
    if !args.node.is_empty() {
        table.nodes.retain(|row| answers.contains_key(&row.name));
        table.ready = table.nodes.iter().all(|row| row.ready);
    }
    Ok(print_table(&table, context.json))
}

/// # Errors
/// A [`UserError`] when nobody answers: then there is nothing to show.
pub fn expect_answer(cluster: &Cluster, answers: &BTreeMap<String, Answer>) -> Result<()> {
    let mut silent = Vec::new();
    for (name, answer) in answers {
        match answer {
            Answer::Page(_) => return Ok(()),
            Answer::Silent(why) => silent.push(format!("{name}: {why}")),
        }
    }
    Err(UserError::new(format!("no node of `{}` answers", cluster.name))
        .why(silent.join("\n"))
        .help(
            "do the machines run, with the seeds of this cluster's directory, and does this \
             machine reach their port 7443? What a node waits for is on its console",
        )
        .into())
}

/// Print the table, and tell the exit code that goes with it.
pub fn print_table(table: &Table, json: bool) -> ExitCode {
    if json {
        let mut event = serde_json::json!({ "event": "status" });
        if let (Some(event), Ok(serde_json::Value::Object(table))) =
            (event.as_object_mut(), serde_json::to_value(table))
        {
            event.extend(table);
        }
        print_line(&event.to_string());
    } else {
        print_line(show_table(table).trim_end());
    }
    if table.ready { ExitCode::SUCCESS } else { ExitCode::from(NOT_READY) }
}
