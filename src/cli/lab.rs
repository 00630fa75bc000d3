use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::{Context, FetchArgs};
use crate::agent::ready;
use crate::config::cluster::{Cluster, Ipv4Network, Role};
use crate::config::profile::Profile;
use crate::config::{Format, Project};
use crate::error::UserError;
use crate::lab::{self, Lab, Nspawn, Places, Spec, Status, console};
use crate::pipeline::{self, FetchOptions, Source};
use crate::progress::print_line;
use crate::tools::set;

/// Of every lab: no two can meet.
const NETWORK: &str = "10.88.0.0/24";
const BOOT_LIMIT: Duration = Duration::from_secs(180);
const READY_LIMIT: Duration = Duration::from_secs(180);

/// Run a throw-away cluster of built images on this machine, and break it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  sudo stanchion lab up
  sudo stanchion lab exec n1 -- systemctl --failed
  sudo stanchion lab kill n1
  sudo stanchion lab down")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Args)]
struct Name {
    /// Name of the lab
    #[arg(long, value_name = "NAME", default_value = "lab")]
    name: String,
}

#[derive(Debug, clap::Args)]
struct NodeArgs {
    /// Name of the node
    node: String,
    #[command(flatten)]
    lab: Name,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Build what is missing, and start the nodes
    #[command(after_help = "Example: sudo stanchion lab up --nodes 3 --profile node")]
    Up(Up),
    /// Show how the nodes are
    #[command(after_help = "Example: sudo stanchion lab status")]
    Status(Name),
    /// Run a command in a node, as root there
    #[command(after_help = "Example: sudo stanchion lab exec n1 -- journalctl -b")]
    Exec {
        #[command(flatten)]
        node: NodeArgs,
        /// The command and its arguments
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<String>,
    },
    /// Show a node's console, and what it writes from now on
    #[command(after_help = "Example: sudo stanchion lab console n1")]
    Console(NodeArgs),
    /// Show the journal of a node's current boot
    #[command(after_help = "Example: sudo stanchion lab logs n1 --unit etcd")]
    Logs {
        #[command(flatten)]
        node: NodeArgs,
        /// Only of this unit
        #[arg(long, short, value_name = "UNIT")]
        unit: Option<String>,
        /// Go on with what comes
        #[arg(long, short)]
        follow: bool,
    },
    /// End a node at once, as if its power had gone
    #[command(after_help = "Example: sudo stanchion lab kill n1")]
    Kill(NodeArgs),
    /// Power a node off
    #[command(after_help = "Example: sudo stanchion lab stop n1")]
    Stop(NodeArgs),
    /// Start a node that is down
    #[command(after_help = "Example: sudo stanchion lab start n1")]
    Start(NodeArgs),
    /// Cut a node off the network
    #[command(after_help = "Example: sudo stanchion lab partition n1")]
    Partition(NodeArgs),
    /// Put a node back on the network, or all of them
    #[command(after_help = "Example: sudo stanchion lab heal")]
    Heal {
        /// Name of the node (default: all that are cut off)
        node: Option<String>,
        #[command(flatten)]
        lab: Name,
    },
    /// Stop all processes of a node where they are
    #[command(after_help = "Example: sudo stanchion lab freeze n1")]
    Freeze(NodeArgs),
    /// Let a frozen node go on
    #[command(after_help = "Example: sudo stanchion lab thaw n1")]
    Thaw(NodeArgs),
    /// Take the lab down and leave nothing of it
    #[command(after_help = "Example: sudo stanchion lab down")]
    Down(Name),
}

#[derive(Debug, clap::Args)]
struct Up {
    #[command(flatten)]
    lab: Name,
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=9))]
    nodes: u8,
    /// Profile that the nodes boot
    #[arg(long, value_name = "PROFILE", default_value = "node")]
    profile: String,
    /// Where the images are
    #[arg(long, value_name = "DIR", default_value = "out")]
    out: PathBuf,
    /// Give the nodes a shared directory, and let them make backups there
    #[arg(long)]
    backups: bool,
    #[command(flatten)]
    fetch: FetchArgs,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    // Of `--help` and mistakes in the arguments everybody may know.
    lab::check_host()?;
    let places = Places::find()?;
    let open = |name: &Name| Lab::open(&places, &name.name);
    let find = |args: &NodeArgs| open(&args.lab);
    match args.verb {
        Verb::Up(args) => up(context, &places, args),
        Verb::Status(name) => show_status(context, &open(&name)?),
        Verb::Exec { node, command } => {
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            end_like(find(&node)?.exec_attached(&node.node, &command)?)
        }
        Verb::Console(args) => follow_console(&find(&args)?, &args.node),
        Verb::Logs { node, unit, follow } => {
            let mut command = vec!["journalctl", "--no-pager", "--boot"];
            command.extend(unit.iter().flat_map(|unit| ["--unit", unit]));
            command.extend(follow.then_some("--follow"));
            end_like(find(&node)?.exec_attached(&node.node, &command)?)
        }
        Verb::Kill(args) => change(context, &find(&args)?, &args.node, "is killed", Lab::kill),
        Verb::Stop(args) => change(context, &find(&args)?, &args.node, "is stopped", Lab::stop),
        Verb::Start(args) => change(context, &find(&args)?, &args.node, "runs", Lab::start),
        Verb::Partition(args) => {
            change(context, &find(&args)?, &args.node, "is cut off", Lab::partition)
        }
        Verb::Freeze(args) => change(context, &find(&args)?, &args.node, "is frozen", Lab::freeze),
        Verb::Thaw(args) => change(context, &find(&args)?, &args.node, "goes on", Lab::thaw),
        Verb::Heal { node, lab } => heal(context, &open(&lab)?, node),
        Verb::Down(name) => down(context, &places, &name.name),
    }
}

fn up(context: &Context, places: &Places, args: Up) -> Result<()> {
    let project = context.find_project()?;
    let name = &args.lab.name;
    // Before minutes of building.
    if places.list_names()?.contains(name) {
        return Err(UserError::new(format!("there is a lab `{name}` already"))
            .help(format!("stanchion lab down --name {name}, or name another with --name"))
            .into());
    }
    let profile = project.load_profile(&args.profile)?;
    let network: Ipv4Network = NETWORK.parse().map_err(anyhow::Error::msg)?;
    let roles = profile.roles();
    let mut cluster = lab::plan_cluster(name, network, args.nodes, &args.profile, &roles)?;
    if args.backups {
        cluster.backup = Some(lab::plan_backup());
    }
    let options = pipeline::BuildOptions {
        out: args.out.clone(),
        formats: vec![Format::Raw],
        locked: false,
        debug_shell: false,
        // A file that was given to `build` or `lock` is in the store.
        artifacts: Vec::new(),
        fetch: args.fetch.clone().into(),
    };
    let profiles = [args.profile.clone()];
    for (_, built) in pipeline::build(&project, &profiles, &options, &context.progress)? {
        built?;
    }
    let nspawn = match Nspawn::find_on_host() {
        Some(nspawn) => nspawn,
        None => provide_nspawn(context, &project, &profile, &options.fetch)?,
    };
    let find_image = |profile: &str| args.out.join(format!("{profile}.raw"));
    let mut spec = Spec::of_cluster(name, nspawn, cluster, find_image);
    if !profile.layers.iter().any(|layer| layer.agent) {
        context.progress.warn("the profile has no agent: its nodes start without a seed");
        spec.cluster = None;
    }
    let lab = Lab::create(places, &spec)?;
    start_all(context, &lab)?;
    if let Some(cluster) = lab.cluster() {
        wait_until_ready(context, &lab)?;
        show_services(context, &lab, cluster);
    }
    show_status(context, &lab)?;
    if !context.json {
        let option = if name == "lab" { String::new() } else { format!(" --name {name}") };
        context.progress.note(&format!(
            "next: stanchion lab exec{option} n1 -- stanchion-agent status, stanchion lab kill{option} n1, stanchion lab down{option}"
        ));
    }
    Ok(())
}

fn provide_nspawn(
    context: &Context,
    project: &Project,
    profile: &Profile,
    fetch: &FetchOptions,
) -> Result<Nspawn> {
    let source = Source::open(fetch, &context.progress)?;
    let profiles = [profile.clone()];
    let (lock, mut failures) = pipeline::prepare_lock(project, &source, &profiles, false)?;
    if let Some(error) = failures.remove(&profile.name) {
        return Err(error);
    }
    let lock = lock.context("a profile without failures has a lock")?;
    let tools = pipeline::provide_tools(&source, &lock, set::LAB)?;
    Ok(Nspawn::Tools(tools.root().to_owned()))
}

fn start_all(context: &Context, lab: &Lab) -> Result<()> {
    let nodes = lab.list_nodes();
    for node in &nodes {
        lab.start(node)?;
    }
    for node in &nodes {
        let step = context.progress.begin(format!("node {node}"));
        let state = lab.wait_for_boot(node, BOOT_LIMIT)?;
        step.finish(state);
    }
    Ok(())
}

/// Wait until every node says that it is ready, or that it lacks nothing but others, and show
/// meanwhile what each is at.
fn wait_until_ready(context: &Context, lab: &Lab) -> Result<()> {
    let step = context.progress.begin("cluster");
    let began = Instant::now();
    loop {
        let mut waits = Vec::new();
        for node in lab.list_nodes() {
            match lab.ask_agent(node)? {
                Some(page) if page.status.ready || page.status.reasons == [ready::SINGLE] => {}
                Some(page) => {
                    let reason = page.status.reasons.first().cloned().unwrap_or_default();
                    waits.push(format!("{node} ({}): {reason}", page.status.phase.name()));
                }
                None => waits.push(format!("{node}: the agent does not answer yet")),
            }
        }
        if waits.is_empty() {
            step.finish("ready");
            return Ok(());
        }
        if began.elapsed() > READY_LIMIT {
            let seconds = READY_LIMIT.as_secs();
            return Err(UserError::new(format!("the cluster is not ready after {seconds} s"))
                .why(waits.join("; "))
                .help("the lab is still up: look at `stanchion lab exec NODE -- stanchion-agent status` and `stanchion lab logs NODE`")
                .into());
        }
        step.update(&waits.join("; "));
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// Where clients of this machine find the cluster.
fn show_services(context: &Context, lab: &Lab, cluster: &Cluster) {
    let Some(vip) = cluster.vip else { return };
    if cluster.list_nodes(Role::Web).next().is_some() {
        context.progress.note(&format!(
            "NetBox: https://{vip}/ for the user admin, whose password is netbox_admin in secrets.toml"
        ));
    }
    context.progress.note(&format!(
        "VIP {vip}: PostgreSQL 5433 (leader), 5434 (replicas), 5435 (all); Redis 6379; names 53; web 443\n\
         passwords, CA and the operator's certificate: {}",
        lab.secrets().display()
    ));
}

fn show_status(context: &Context, lab: &Lab) -> Result<()> {
    let nodes = lab.list_nodes();
    let all = nodes.iter().map(|node| lab.status(node)).collect::<Result<Vec<_>>>()?;
    if context.json {
        let event = serde_json::json!({
            "event": "lab", "name": lab.name(), "network": lab.network(),
            "operator": lab.operator(), "nodes": all,
        });
        print_line(&event.to_string());
        return Ok(());
    }
    print_line(&format!(
        "{:<12} {:<16} {:<12} {:>8} {:>6}  image",
        "node", "address", "state", "init", "boots"
    ));
    for status in &all {
        print_line(&format!(
            "{:<12} {:<16} {:<12} {:>8} {:>6}  {}",
            status.node,
            status.address.to_string(),
            describe(status),
            status.init.map_or_else(|| "-".to_string(), |pid| pid.to_string()),
            status.boots,
            status.image.display(),
        ));
    }
    Ok(())
}

fn describe(status: &Status) -> &'static str {
    match (status.running, status.frozen, status.partitioned) {
        (false, ..) => "down",
        (true, true, _) => "frozen",
        (true, false, true) => "cut off",
        (true, false, false) => "running",
    }
}

fn change(
    context: &Context,
    lab: &Lab,
    node: &str,
    done: &str,
    verb: fn(&Lab, &str) -> Result<()>,
) -> Result<()> {
    verb(lab, node)?;
    match context.json {
        true => {
            let event = serde_json::json!({ "event": "node", "status": lab.status(node)? });
            print_line(&event.to_string());
        }
        false => context.progress.note(&format!("node {node} {done}")),
    }
    Ok(())
}

fn heal(context: &Context, lab: &Lab, node: Option<String>) -> Result<()> {
    let nodes = match node {
        Some(node) => vec![node],
        None => lab.list_nodes().into_iter().map(str::to_string).collect(),
    };
    let cut_off = |node: &String| lab.status(node).map(|status| status.partitioned);
    for node in nodes {
        if cut_off(&node)? {
            change(context, lab, &node, "is back on the network", Lab::heal)?;
        }
    }
    Ok(())
}

fn follow_console(lab: &Lab, node: &str) -> Result<()> {
    let path = lab.console_path(node)?;
    let mut out = std::io::stdout().lock();
    let mut show = |bytes: &[u8]| out.write_all(bytes).and_then(|()| out.flush());
    let is_over = || !lab.is_running(node).unwrap_or(false);
    match console::follow(&path, &mut show, &is_over) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        followed => followed.with_context(|| format!("reading {}", path.display())),
    }
}

fn down(context: &Context, places: &Places, name: &str) -> Result<()> {
    let was_there = places.list_names()?.iter().any(|known| known == name);
    Lab::remove(places, name)?;
    let text = if was_there { "is down" } else { "was not there" };
    match context.json {
        true => print_line(&serde_json::json!({ "event": "down", "name": name }).to_string()),
        false => context.progress.note(&format!("the lab `{name}` {text}")),
    }
    Ok(())
}

/// End this process as the command did.
fn end_like(status: std::process::ExitStatus) -> Result<()> {
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    match code {
        Some(0) => Ok(()),
        code => std::process::exit(code.unwrap_or(1)),
    }
}
