use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;

use super::Context;
use super::operate::{Asked, Consent, Place, list_registered, show_progress, show_result};
use super::seed::{Form, find_node, make_folder, write_seed};
use crate::agent::operate::{FORCE_QUORUM, REINIT, judge_replace};
use crate::agent::registry::Registration;
use crate::agent::table::Answer;
use crate::clock::read_clock;
use crate::cluster_dir::ClusterDir;
use crate::config::Role;
use crate::config::cluster::{Node, find_certificate};
use crate::error::UserError;
use crate::seed::{issue_seed, read_brought};

/// How long a fresh machine may take to be bought, booted and filled.
const PATIENCE: Duration = Duration::from_secs(24 * 3600);

/// Replace a node that is lost, or let one take its data anew
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  stanchion node replace n2 --wait
  stanchion node reinit n3")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Make a new seed for a node that is lost, and say what to boot with it
    #[command(after_help = "Example: stanchion node replace n2 --wait

Refused while the node runs, while it leads PostgreSQL, and where the others have no majority.")]
    Replace(Replace),
    /// Let etcd go on from this node alone, when its majority is lost for ever
    #[command(after_help = "Example: stanchion node force-quorum n1

Refused while there is a majority, and while another db node lives that has etcd's data.")]
    ForceQuorum {
        /// A db node that has its disk: best PostgreSQL's leader
        node: String,
        #[command(flatten)]
        consent: Consent,
        #[command(flatten)]
        place: Place,
    },
    /// Delete a replica's data, and copy the leader's
    #[command(after_help = "Example: stanchion node reinit n3 --yes")]
    Reinit {
        /// Name of a db node
        node: String,
        #[command(flatten)]
        consent: Consent,
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Debug, clap::Args)]
struct Replace {
    /// Name of a node in the cluster file
    node: String,
    /// Wait until the new machine is a whole member
    #[arg(long)]
    wait: bool,
    /// Where the seed goes (default: `seeds` in the cluster's directory)
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// As what
    #[arg(long, value_enum, default_value_t = Form::Volume)]
    format: Form,
    #[command(flatten)]
    consent: Consent,
    #[command(flatten)]
    place: Place,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    match args.verb {
        Verb::Replace(args) => replace(context, args),
        Verb::ForceQuorum { node, consent, place } => {
            let asked = place.open(context)?;
            let node = find_node(&asked.cluster, &node)?;
            let what = format!(
                "etcd goes on from {} alone; all its other members must be gone FOR EVER.",
                node.name
            );
            consent.ask(context, &what)?;
            let value = asked.run(context, node, FORCE_QUORUM, &json!({}))?;
            let sentence = format!(
                "etcd has {} as its only member; boot fresh machines with seeds of \
                 `stanchion seed` for the others",
                node.name
            );
            show_result(context, "node_force_quorum", &value, &sentence);
            Ok(())
        }
        Verb::Reinit { node, consent, place } => {
            let asked = place.open(context)?;
            let node = find_node(&asked.cluster, &node)?;
            if !node.has(Role::Db) {
                return Err(UserError::new(format!("{} has no database", node.name)).into());
            }
            let what = format!("{} deletes its data and copies the leader's.", node.name);
            consent.ask(context, &what)?;
            let value = asked.run(context, node, REINIT, &json!({}))?;
            let seconds = value["seconds"].as_f64().unwrap_or_default();
            let sentence = format!("{} follows the leader again, after {seconds:.1} s", node.name);
            show_result(context, "node_reinit", &value, &sentence);
            Ok(())
        }
    }
}

fn replace(context: &Context, args: Replace) -> Result<()> {
    let asked = args.place.open(context)?;
    let node = find_node(&asked.cluster, &args.node)?;
    let answers = asked.ask_all()?;
    let is_answer = |answer: &Answer| matches!(answer, Answer::Page(_));
    let answering: BTreeSet<String> =
        answers.iter().filter(|(_, a)| is_answer(a)).map(|(name, _)| name.clone()).collect();
    judge_replace(&asked.cluster, &node.name, &list_registered(&answers), &answering)?;
    let what = format!(
        "{} gets a new key and seed; a machine with its old seed must not come back.",
        node.name
    );
    args.consent.ask(context, &what)?;
    let directory = ClusterDir::open(&asked.dir, &asked.cluster)?;
    let now = read_clock()?;
    let files = find_certificate(&args.place.cluster)?;
    let brought = files.map(|files| read_brought(&files, &asked.cluster, now)).transpose()?;
    let out = args.out.unwrap_or_else(|| asked.dir.join("seeds"));
    make_folder(&out)?;
    let seed = issue_seed(&asked.cluster, node, &directory, brought.as_ref(), now)?;
    let path = write_seed(&out, node, &seed, args.format, now)?;
    context.progress.note(&format!("wrote {}", path.display()));
    context.progress.note(&format!(
        "now boot a fresh machine: the image of profile `{}`, an empty disk, address {}, and \
         this seed. It removes its predecessor from etcd itself, and copies the database",
        node.profile, node.address
    ));
    let mut value = json!({ "node": node.name, "seed": path.display().to_string() });
    if !args.wait {
        let sentence = "`stanchion status` shows when it is a whole member";
        show_result(context, "node_replace", &value, sentence);
        return Ok(());
    }
    let seconds = wait_for_member(context, &asked, node)?;
    value["seconds"] = json!(seconds);
    let sentence = format!("{} is a whole member after {seconds:.0} s", node.name);
    show_result(context, "node_replace", &value, &sentence);
    Ok(())
}

/// Seconds until the node is there with all its roles at work.
fn wait_for_member(context: &Context, asked: &Asked, node: &Node) -> Result<f64> {
    let (begun, mut last) = (Instant::now(), String::new());
    while begun.elapsed() < PATIENCE {
        // The others may be away for a moment, too.
        let state = match asked.ask_all() {
            Ok(answers) => describe(list_registered(&answers).get(&node.name)),
            Err(_) => "nobody answers".to_string(),
        };
        if state.is_empty() {
            return Ok(begun.elapsed().as_secs_f64());
        }
        if state != last {
            show_progress(context, &node.name, &state);
            last = state;
        }
        std::thread::sleep(Duration::from_secs(2));
    }
    Err(UserError::new(format!("{} is no whole member yet: {last}", node.name))
        .help("see its console, and `stanchion status`")
        .into())
}

/// What a node still lacks; empty when nothing.
fn describe(found: Option<&Registration>) -> String {
    let Some(found) = found else { return "not there yet".to_string() };
    let mut lacks = Vec::new();
    if found.node.roles.contains(&Role::Db) {
        if !matches!(found.etcd.as_str(), "leader" | "follower") {
            lacks.push(format!("etcd: {}", found.etcd));
        }
        if !found.postgres.ends_with(" streaming") && found.postgres != "leader running" {
            lacks.push(format!("PostgreSQL: {}", found.postgres));
        }
    }
    if lacks.is_empty() && !found.ready {
        lacks.extend(found.reasons.iter().take(2).cloned());
        if lacks.is_empty() {
            lacks.push("not ready".to_string());
        }
    }
    lacks.join("; ")
}
