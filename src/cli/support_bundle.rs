use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;

use super::Context;
use super::operate::{Asked, Place, show_result};
use crate::agent::operate::{BundlePage, Redactor, SUPPORT_BUNDLE};
use crate::agent::table::{Answer, make_table, show_table};
use crate::clock::read_clock;
use crate::cluster_dir::ClusterDir;
use crate::error::UserError;
use crate::files::{Existing, is_occupied, write_beside};
use crate::progress::format_bytes;

/// Gather what helpers want to see of all nodes, with every secret left out
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: stanchion support-bundle --out /tmp/netbox.tar.gz

States, configuration, versions and journals. Names, addresses and what the journal tells of
users are in it: look into it before you pass it on.")]
pub struct Args {
    /// Where it goes (default: support-CLUSTER-TIME.tar.gz in this directory)
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let asked = args.place.open(context)?;
    let now = read_clock()?;
    let name = format!("support-{}-{now}", asked.cluster.name);
    let out = args.out.unwrap_or_else(|| PathBuf::from(format!("{name}.tar.gz")));
    if out.exists() {
        return Err(refuse_second(&out).into());
    }
    let redactor = make_redactor(&asked);
    let answers = asked.ask_all()?;
    let table = make_table(&asked.cluster.name, &asked.cluster.nodes, &answers);
    let mut files = vec![("status.txt".to_string(), show_table(&table))];
    let (mut there, mut silent) = (Vec::new(), Vec::new());
    for node in &asked.cluster.nodes {
        let gathered = match answers.get(&node.name) {
            Some(Answer::Page(_)) => gather(context, &asked, node),
            Some(Answer::Silent(why)) => Err(anyhow::anyhow!(why.clone())),
            None => continue,
        };
        match gathered {
            Ok(pages) => {
                there.push(node.name.as_str());
                let pages = pages.into_iter().filter(|page| is_plain(&page.name));
                files.extend(pages.map(|page| (format!("{}/{}", node.name, page.name), page.text)));
            }
            Err(error) => {
                files.push((format!("{}/SILENT.txt", node.name), format!("{error:#}\n")));
                silent.push(node.name.as_str());
            }
        }
    }
    // What a node did not know to be secret: it has those of its own roles only.
    for (_, text) in &mut files {
        *text = redactor.redact(text);
    }
    let size = write_archive(&out, &name, &files, now)?;
    let value = json!({
        "path": out.display().to_string(), "bytes": size, "nodes": there, "silent": silent
    });
    let mut sentence =
        format!("{} holds {} files, {}", out.display(), files.len(), format_bytes(size));
    if !silent.is_empty() {
        sentence += &format!("; without {}, which did not answer", silent.join(", "));
    }
    show_result(context, "support_bundle", &value, &sentence);
    Ok(())
}

/// All secrets of the cluster, where this machine has its whole directory.
fn make_redactor(asked: &Asked) -> Redactor {
    let mut secrets: Vec<String> = Vec::new();
    if let Ok(directory) = ClusterDir::open(&asked.dir, &asked.cluster) {
        secrets.extend(directory.secrets.values().map(|secret| secret.reveal().to_string()));
    }
    for name in ["ca.key", "operator.key"] {
        let mut key = String::new();
        // An operator without the CA has no key of it to leave out.
        if let Ok(file) = File::open(asked.dir.join(name))
            && file.take(64 << 10).read_to_string(&mut key).is_ok()
        {
            secrets.push(key);
        }
    }
    Redactor::new(secrets.iter().map(String::as_str))
}

fn gather(
    context: &Context,
    asked: &Asked,
    node: &crate::config::cluster::Node,
) -> Result<Vec<BundlePage>> {
    let value = asked.run(context, node, SUPPORT_BUNDLE, &json!({}))?;
    serde_json::from_value(value).context("reading the agent's answer")
}

/// A relative path without tricks.
fn is_plain(name: &str) -> bool {
    let is_fine = |part: &str| !matches!(part, "" | "." | "..");
    name.len() <= 200 && name.split('/').all(is_fine) && !name.chars().any(char::is_control)
}

/// For nobody's eyes but the owner's until it is passed on; its bytes.
fn write_archive(out: &Path, folder: &str, files: &[(String, String)], now: u64) -> Result<u64> {
    let written = write_beside(out, 0o600, Existing::Keep, |file: &File| {
        let mut archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
        for (name, text) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o600);
            header.set_mtime(now);
            let path = format!("{folder}/{name}");
            archive.append_data(&mut header, path, text.as_bytes()).context("writing a bundle")?;
        }
        let packed = archive.into_inner().context("writing a bundle")?;
        packed.finish().map(drop).context("writing a bundle")
    });
    match written {
        Err(error) if is_occupied(&error) => {
            return Err(refuse_second(out).into());
        }
        written => written?,
    }
    Ok(std::fs::metadata(out).context("looking at the bundle")?.len())
}

fn refuse_second(out: &Path) -> UserError {
    UserError::new(format!("{} exists already", out.display())).help("name another file with --out")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_a_node_stay_below_their_folder() {
        assert!(is_plain("etc/patroni/config.yml"));
        for name in ["", "/etc/passwd", "../x", "a/../b", "a//b", "a\nb", "."] {
            assert!(!is_plain(name), "{name}");
        }
    }
}
