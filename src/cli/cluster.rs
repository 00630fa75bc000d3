use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::Context;
use crate::clock::read_clock;
use crate::cluster_dir::{add_missing, default_path, make_directory, read_brought_secrets};
use crate::config::cluster::checklist::{Check, State, list_checks};
use crate::config::cluster::ports::{Port, list_ports};
use crate::config::cluster::{Cluster, find_certificate, load_cluster};
use crate::config::{Project, Role};
use crate::error::UserError;
use crate::files::{Existing, is_occupied, write_beside};
use crate::pki::Chain;
use crate::progress::print_line;
use crate::secrets::{POSTGRES, REDIS, S3_ACCESS_KEY, S3_SECRET_KEY, Secret};
use crate::seed::{Brought, read_brought};

/// The cluster file that is meant when none is named.
pub const FILE: &str = "cluster.toml";
const TEMPLATE: &str = include_str!("../config/cluster/cluster.toml.in");
/// Web nodes need it; others do without.
const STORAGE: &str = "[storage]
endpoint = \"https://s3.example.org\"
bucket = \"netbox\"
region = \"us-east-1\"";

/// Describe a cluster, check it, and make its keys
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  stanchion cluster new
  stanchion cluster check
  stanchion cluster init --s3-key-file s3.keys")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Write a cluster file to fill in, with a word on every key
    #[command(after_help = "Example: stanchion cluster new berlin.toml")]
    New {
        #[arg(default_value = FILE)]
        file: PathBuf,
    },
    /// Check a cluster file, and list what to look at before the machines start
    #[command(after_help = "Example: stanchion cluster check berlin.toml")]
    Check {
        #[arg(default_value = FILE)]
        file: PathBuf,
    },
    /// Make the cluster's CA and all its secrets, once
    #[command(after_help = "Example: stanchion cluster init --dir ~/keys/berlin")]
    Init {
        #[arg(default_value = FILE)]
        file: PathBuf,
        /// Where they go (default: beside the cluster file, called like the cluster)
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// Add the secrets that this version needs to a directory that lacks them; all others
        /// stay as they are
        #[arg(long)]
        missing: bool,
        #[command(flatten)]
        brought: BroughtArgs,
    },
}

/// Secrets that somebody else has made
#[derive(Debug, clap::Args)]
struct BroughtArgs {
    /// A file with the keys of the object storage: the access key on the first line, the
    /// secret key on the second
    #[arg(long, value_name = "FILE")]
    s3_key_file: Option<PathBuf>,
    /// A file with the password of `[external.postgres]`
    #[arg(long, value_name = "FILE")]
    postgres_password_file: Option<PathBuf>,
    /// A file with the password of `[external.redis]`
    #[arg(long, value_name = "FILE")]
    redis_password_file: Option<PathBuf>,
}

impl BroughtArgs {
    fn read(&self) -> Result<BTreeMap<String, Secret>> {
        let mut given = BTreeMap::new();
        for (file, names) in [
            (&self.s3_key_file, &[S3_ACCESS_KEY, S3_SECRET_KEY][..]),
            (&self.postgres_password_file, &[POSTGRES]),
            (&self.redis_password_file, &[REDIS]),
        ] {
            let Some(file) = file else { continue };
            let secrets = read_brought_secrets(file, names.len())?;
            given.extend(names.iter().map(|name| name.to_string()).zip(secrets));
        }
        Ok(given)
    }
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    match args.verb {
        Verb::New { file } => write_new(context, &file),
        Verb::Check { file } => check(context, &file),
        Verb::Init { file, dir, missing: false, brought } => {
            init(context, &file, dir, &brought.read()?)
        }
        Verb::Init { file, dir, missing: true, brought } => {
            add(context, &file, dir, &brought.read()?)
        }
    }
}

/// Say on standard error what nobody may overlook.
pub fn warn_if_single(context: &Context, cluster: &Cluster) {
    if cluster.is_single() {
        context.progress.warn(&format!(
            "`{}` has one node: a development cluster, NOT highly available",
            cluster.name
        ));
    }
}

fn write_new(context: &Context, file: &Path) -> Result<()> {
    let (profile, roles) = choose_profile(context)?;
    let vip = match roles.contains(&Role::Edge) {
        true => {
            "# The address that clients talk to; whichever edge lives has it.\nvip = \"192.0.2.10\""
        }
        false => "# With the role edge: the address that clients talk to.\n# vip = \"192.0.2.10\"",
    };
    let storage = match roles.contains(&Role::Web) {
        true => STORAGE.to_string(),
        false => STORAGE.lines().map(|line| format!("# {line}")).collect::<Vec<_>>().join("\n"),
    };
    let text = TEMPLATE
        .replace("@VIP@", vip)
        .replace("@STORAGE@", &storage)
        .replace("@PROFILE@", &profile);
    let written = write_beside(file, 0o644, Existing::Keep, |mut file| {
        file.write_all(text.as_bytes()).context("writing a cluster file")
    });
    match written {
        Err(error) if is_occupied(&error) => {
            let what = format!("{} exists already", file.display());
            return Err(UserError::new(what).help("edit it, or name another file").into());
        }
        written => written?,
    }
    if context.json {
        let event =
            serde_json::json!({ "event": "cluster_new", "path": file.display().to_string() });
        print_line(&event.to_string());
    } else {
        context
            .progress
            .note(&format!("wrote {}: fill it in, then `stanchion cluster check`", file.display()));
    }
    Ok(())
}

/// The profile for the nodes of a new file: `node` where the project has it, else the first
/// that can be a member; and whether it has the role edge.
fn choose_profile(context: &Context) -> Result<(String, Vec<Role>)> {
    let project = context.find_project()?;
    let mut names = project.list_profiles()?;
    names.sort_by_key(|name| name != "node");
    for name in names {
        let roles = project.load_profile(&name)?.roles();
        if roles.contains(&Role::Db) {
            return Ok((name, roles));
        }
    }
    Err(UserError::new("the project has no profile with the role db")
        .why("every cluster needs one")
        .help("give a layer of a profile `role = \"db\"`")
        .into())
}

fn check(context: &Context, file: &Path) -> Result<()> {
    let project: Project = context.find_project()?;
    let cluster = load_cluster(file, &project)?;
    let now = read_clock()?;
    let brought = find_certificate(file)?.map(|files| read_brought(&files, &cluster, now));
    let brought = brought.transpose()?;
    let (mut checks, ports) = (list_checks(&cluster), list_ports(&cluster));
    checks.extend(brought.map(|brought| check_certificate(&brought, now)).transpose()?);
    if context.json {
        let event = serde_json::json!({
            "event": "cluster_check",
            "cluster": cluster,
            "highly_available": !checks.iter().any(|check| check.state == State::Warning),
            "checks": checks,
            "ports": ports,
        });
        print_line(&event.to_string());
        return Ok(());
    }
    print_checks(&checks);
    if !cluster.is_single() {
        print_ports(&ports);
    }
    warn_if_single(context, &cluster);
    Ok(())
}

/// What there is to say of a certificate that is good now.
fn check_certificate(brought: &Brought, now: u64) -> Result<Check> {
    let chain = Chain::read(&brought.chain, &brought.key)?;
    let days = chain.not_after.saturating_sub(now) / 86_400;
    let text = format!("for {}, valid for {days} more days", chain.dns_names.join(", "));
    let state = if days < 21 { State::Warning } else { State::Verified };
    Ok(Check { state, subject: "certificate", text })
}

fn print_checks(checks: &[Check]) {
    for Check { state, subject, text } in checks {
        let mark = match state {
            State::Verified => "ok  ",
            State::Warning => "WARN",
            State::Open => "look",
        };
        print_line(&format!("{mark}  {subject:<11} {text}"));
    }
}

fn print_ports(ports: &[Port]) {
    print_line(&format!("\n{:>5}  {:<5} {:<11} {:<22} what", "port", "", "to", "from"));
    for Port { port, protocol, to, from, purpose } in ports {
        let port = port.map_or("-".to_string(), |port| port.to_string());
        let from: Vec<String> = from.iter().map(|side| side.to_string()).collect();
        let (protocol, to, from) = (protocol.to_string(), to.to_string(), from.join(", "));
        print_line(&format!("{port:>5}  {protocol:<5} {to:<11} {from:<22} {purpose}"));
    }
}

fn init(
    context: &Context,
    file: &Path,
    dir: Option<PathBuf>,
    given: &BTreeMap<String, Secret>,
) -> Result<()> {
    let cluster = load_cluster(file, &context.find_project()?)?;
    let dir = dir.unwrap_or_else(|| default_path(file, &cluster));
    make_directory(&dir, &cluster, given, read_clock()?)?;
    if context.json {
        let event = serde_json::json!({
            "event": "cluster_init", "cluster": cluster.name, "path": dir.display().to_string()
        });
        print_line(&event.to_string());
    } else {
        context.progress.note(&format!(
            "made {}: keep a copy in a safe place, then `stanchion seed --all`",
            dir.display()
        ));
    }
    warn_if_single(context, &cluster);
    Ok(())
}

fn add(
    context: &Context,
    file: &Path,
    dir: Option<PathBuf>,
    given: &BTreeMap<String, Secret>,
) -> Result<()> {
    let cluster = load_cluster(file, &context.find_project()?)?;
    let dir = dir.unwrap_or_else(|| default_path(file, &cluster));
    let added = add_missing(&dir, &cluster, given)?;
    if context.json {
        let event = serde_json::json!({
            "event": "cluster_init", "cluster": cluster.name, "path": dir.display().to_string(),
            "added": added,
        });
        print_line(&event.to_string());
    } else if added.is_empty() {
        context.progress.note(&format!("{} has all secrets", dir.display()));
    } else {
        context.progress.note(&format!(
            "added {} to {}: keep a new copy, then `stanchion seed --all`",
            added.join(", "),
            dir.display()
        ));
    }
    Ok(())
}
