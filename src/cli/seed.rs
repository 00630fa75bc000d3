use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::Context;
use super::cluster::{FILE, warn_if_single};
use crate::clock::read_clock;
use crate::cluster_dir::{ClusterDir, default_path};
use crate::config::Role;
use crate::config::cluster::{Cluster, Node, find_certificate, load_cluster};
use crate::error::{UserError, find_nearest};
use crate::files::{Existing, write_beside};
use crate::progress::print_line;
use crate::seed::{issue_seed, read_brought, volume};

/// Write what makes a machine a node: its name, certificate and secrets
#[derive(Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("nodes").required(true).args(["node", "all"]),
    after_help = "Examples:
  stanchion seed --all                       netbox/seeds/n1.seed.img and so on
  stanchion seed n2 --format file --out .    n2.seed.json, for credentials and cloud-init

Each run makes a fresh key and certificate, valid for two years."
)]
pub struct Args {
    /// Name of a node in the cluster file
    node: Option<String>,
    /// For every node
    #[arg(long)]
    all: bool,
    /// The cluster file
    #[arg(long, value_name = "FILE", default_value = FILE)]
    cluster: PathBuf,
    /// The cluster's directory (default: beside the cluster file, called like the cluster)
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Where the seeds go (default: `seeds` in the cluster's directory)
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// As what
    #[arg(long, value_enum, default_value_t = Form::Volume)]
    format: Form,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// A disk to attach to the machine, NODE.seed.img
    Volume,
    /// The seed's file itself, NODE.seed.json
    File,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let cluster = load_cluster(&args.cluster, &context.find_project()?)?;
    let nodes: Vec<&Node> = match &args.node {
        Some(name) => vec![find_node(&cluster, name)?],
        None => cluster.nodes.iter().collect(),
    };
    let dir = args.dir.unwrap_or_else(|| default_path(&args.cluster, &cluster));
    let directory = ClusterDir::open(&dir, &cluster)?;
    let out = args.out.unwrap_or_else(|| dir.join("seeds"));
    let now = read_clock()?;
    let files = find_certificate(&args.cluster)?;
    let brought = files.map(|files| read_brought(&files, &cluster, now)).transpose()?;
    make_folder(&out)?;
    warn_if_single(context, &cluster);
    for node in nodes {
        let seed = issue_seed(&cluster, node, &directory, brought.as_ref(), now)?;
        let path = write_seed(&out, node, &seed, args.format, now)?;
        if context.json {
            let event = serde_json::json!({
                "event": "seed", "node": node.name, "roles": node.roles, "path": path.display().to_string()
            });
            print_line(&event.to_string());
        } else {
            let roles: Vec<&str> = node.roles.iter().copied().map(Role::name).collect();
            context.progress.note(&format!("wrote {} ({})", path.display(), roles.join(", ")));
        }
    }
    Ok(())
}

pub fn find_node<'a>(cluster: &'a Cluster, name: &str) -> Result<&'a Node> {
    let names = || cluster.nodes.iter().map(|node| node.name.as_str());
    cluster.find_node(name).ok_or_else(|| {
        let error = UserError::new(format!("the cluster `{}` has no node `{name}`", cluster.name));
        match find_nearest(name, names()) {
            Some(nearest) => error.help(format!("did you mean `{nearest}`?")),
            None => {
                error.help(format!("the nodes are: {}", names().collect::<Vec<_>>().join(", ")))
            }
        }
        .into()
    })
}

/// A folder for seeds: nobody else's when it is made here.
pub fn make_folder(path: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.with_context(|| format!("making {}", path.display()))
}

/// A seed that was there before is replaced.
pub fn write_seed(
    folder: &Path,
    node: &Node,
    seed: &[u8],
    form: Form,
    now: u64,
) -> Result<PathBuf> {
    let ending = if form == Form::Volume { "img" } else { "json" };
    let path = folder.join(format!("{}.seed.{ending}", node.name));
    write_beside(&path, 0o600, Existing::Replace, |mut file: &File| match form {
        Form::Volume => volume::write_seed(file, seed, now),
        Form::File => file.write_all(seed).context("writing a seed"),
    })?;
    Ok(path)
}
