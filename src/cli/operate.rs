//! What all of the operator's verbs share: which cluster, how its agents are asked, what is
//! shown of their work, and the question before it.

use std::collections::BTreeMap;
use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::Context;
use super::cluster::FILE;
use super::status::expect_answer;
use crate::agent::ask::{ask_nodes, operate};
use crate::agent::registry::Registration;
use crate::agent::table::Answer;
use crate::agent::tls::Tls;
use crate::cluster_dir::{Operator, default_path};
use crate::config::Role;
use crate::config::cluster::{Cluster, Node, load_cluster};
use crate::error::UserError;
use crate::progress::print_line;

/// Which cluster is meant.
#[derive(Debug, clap::Args)]
pub struct Place {
    /// The cluster file
    #[arg(long, value_name = "FILE", default_value = FILE)]
    pub cluster: PathBuf,
    /// The cluster's directory (default: beside the cluster file, called like the cluster)
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// A cluster that can be asked.
pub struct Asked {
    pub cluster: Cluster,
    /// The cluster's directory.
    pub dir: PathBuf,
    pub tls: Tls,
}

impl Place {
    pub fn open(&self, context: &Context) -> Result<Asked> {
        let cluster = load_cluster(&self.cluster, &context.find_project()?)?;
        let dir = self.dir.clone().unwrap_or_else(|| default_path(&self.cluster, &cluster));
        let operator = Operator::read(&dir, &cluster)?;
        let tls =
            Tls::from_pem(&operator.ca, &operator.certificate, &operator.key).map_err(|_| {
                UserError::new("the operator's certificate cannot be used")
                    .in_file(&dir)
                    .why("its key is not that of its certificate")
                    .help("bring operator.pem and operator.key back from one copy")
            })?;
        Ok(Asked { cluster, dir, tls })
    }
}

impl Asked {
    /// The status pages of all nodes; somebody answers.
    pub fn ask_all(&self) -> Result<BTreeMap<String, Answer>> {
        let nodes: Vec<&Node> = self.cluster.nodes.iter().collect();
        let answers = ask_nodes(&self.tls, &nodes)?;
        expect_answer(&self.cluster, &answers)?;
        Ok(answers)
    }

    /// A node with a role whose agent answers; the one that `prefer` says, if it does.
    pub fn choose(&self, role: Role, prefer: impl Fn(&Registration) -> bool) -> Result<&Node> {
        let answers = self.ask_all()?;
        let answering = |node: &&Node| {
            node.has(role) && matches!(answers.get(&node.name), Some(Answer::Page(_)))
        };
        let nodes: Vec<&Node> = self.cluster.nodes.iter().filter(answering).collect();
        let registered = list_registered(&answers);
        let is_preferred = |node: &&&Node| registered.get(&node.name).is_some_and(|r| prefer(r));
        nodes.iter().find(is_preferred).or(nodes.first()).copied().ok_or_else(|| {
            UserError::new(format!("no node with the role {} answers", role.name()))
                .help("see `stanchion status`")
                .into()
        })
    }

    /// Have a node do what a verb says; its progress is shown.
    pub fn run(&self, context: &Context, node: &Node, verb: &str, wish: &Value) -> Result<Value> {
        operate(&self.tls, node, verb, wish, &mut |line| show_progress(context, &node.name, line))
    }
}

/// The nodes as they registered, from all pages that there are.
pub fn list_registered(answers: &BTreeMap<String, Answer>) -> BTreeMap<String, Registration> {
    let pages = answers.values().filter_map(|answer| match answer {
        Answer::Page(page) => Some(page),
        Answer::Silent(_) => None,
    });
    let nodes = pages.flat_map(|page| page.nodes.iter());
    nodes.map(|node| (node.node.name.clone(), node.clone())).collect()
}

/// Whether it is PostgreSQL's leader.
pub fn is_leader(node: &Registration) -> bool {
    node.postgres.starts_with("leader ")
}

/// One step of a node's work.
pub fn show_progress(context: &Context, node: &str, line: &str) {
    if context.json {
        let event = serde_json::json!({ "event": "progress", "node": node, "text": line });
        print_line(&event.to_string());
    } else {
        context.progress.note(&format!("{node}: {line}"));
    }
}

/// What came of a verb: a JSON object as an event of this name, or the sentence.
pub fn show_result(context: &Context, event: &str, value: &Value, sentence: &str) {
    if context.json {
        let mut shown = serde_json::json!({ "event": event });
        if let (Some(shown), Some(value)) = (shown.as_object_mut(), value.as_object()) {
            shown.extend(value.clone());
        }
        print_line(&shown.to_string());
    } else {
        print_line(sentence);
    }
}

/// Whether the operator means it.
#[derive(Debug, Clone, clap::Args)]
pub struct Consent {
    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
}

impl Consent {
    /// Ask on the terminal, after saying what would be done.
    ///
    /// # Errors
    /// A [`UserError`] when the answer is no, or when there is nobody to ask.
    pub fn ask(&self, context: &Context, what: &str) -> Result<()> {
        if self.yes {
            return Ok(());
        }
        let has_terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
        if context.json || !has_terminal {
            return Err(UserError::new("nothing was done: nobody has confirmed it")
                .why(what)
                .help("say --yes where there is no terminal to ask on")
                .into());
        }
        let mut errors = std::io::stderr().lock();
        write!(errors, "{what}\nGo on? [y/N] ").and_then(|()| errors.flush())?;
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer).context("reading the answer")?;
        match answer.trim().to_ascii_lowercase().as_str() {
            "y" | "yes" => Ok(()),
            _ => Err(UserError::new("nothing was done").into()),
        }
    }
}
