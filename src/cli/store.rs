use anyhow::Result;

use super::Context;
use crate::progress::{format_bytes, print_line};
use crate::sandbox::Sandbox;
use crate::store::Store;

/// Look after the cache of downloads and layers
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  stanchion store gc --keep 20G
  du -sh $(stanchion store path)")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Remove what was not used for longest, until the store fits
    #[command(after_help = "Example: stanchion store gc --keep 20G")]
    Gc {
        /// Size to keep: a number with K, M, G or T
        #[arg(long, value_name = "SIZE", default_value = "20G", value_parser = parse_size)]
        keep: u64,
    },
    /// Print the store's directory
    #[command(after_help = "Example: du -sh $(stanchion store path)")]
    Path,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let store = Store::open(&Store::default_root()?)?;
    match args.verb {
        Verb::Gc { keep } => {
            let sandbox = Sandbox::default();
            let freed = store.collect_garbage(keep, &|path| sandbox.remove_tree(path))?;
            if context.json {
                let event = serde_json::json!({
                    "event": "gc", "freed": freed.bytes, "entries": freed.entries
                });
                print_line(&event.to_string());
            } else {
                context.progress.note(&format!(
                    "removed {} entries, {}",
                    freed.entries,
                    format_bytes(freed.bytes)
                ));
            }
        }
        Verb::Path if context.json => {
            let path = store.root().display().to_string();
            print_line(&serde_json::json!({ "event": "store", "path": path }).to_string());
        }
        Verb::Path => print_line(&store.root().display().to_string()),
    }
    Ok(())
}

fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor: u64 = match text[digits.len()..].to_ascii_uppercase().as_str() {
        // Nothing is nothing in any unit.
        "" if digits == "0" => 1,
        "K" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        _ => return Err("write a number and K, M, G or T, as in 20G".into()),
    };
    let number: u64 =
        digits.parse().map_err(|_| "write a number and K, M, G or T, as in 20G".to_string())?;
    number.checked_mul(factor).ok_or_else(|| "this size is beyond counting".into())
}
