use anyhow::Result;
use serde::Serialize;

use super::Context;
use crate::debian::mirror::{Mirror, Places};
use crate::error::UserError;
use crate::fetch::Fetcher;
use crate::progress::{format_bytes, print_line};
use crate::repository;
use crate::sandbox::{Check, Sandbox};
use crate::store::Store;

/// Disk space that a first build of one profile takes in the store and for its outputs.
const ROOM: u64 = 6_000_000_000;

/// Check whether this machine can build: sandbox, ids, disk space, mirror
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: stanchion doctor")]
pub struct Args {
    /// Debian mirror to check
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
}

#[derive(Serialize)]
struct Report {
    event: &'static str,
    checks: Vec<Check>,
}

pub fn run(context: &Context, args: Args) -> Result<()> {
    let mut checks = Vec::new();
    match Store::default_root().and_then(|root| Store::open(&root)) {
        Ok(store) => {
            checks.push(check_room(&store));
            checks.extend(Sandbox::default().probe(store.root()));
        }
        Err(error) => checks.push(describe("store", Err(error))),
    }
    let mirror =
        Mirror::find(&Places::of_this_machine(args.mirror.as_deref())).and_then(|mirror| {
            repository::check_reachable(&Fetcher::new(1, false)?, &mirror)?;
            Ok(mirror)
        });
    checks.push(describe(
        "mirror",
        mirror.map(|mirror| format!("{} and {}", mirror.main, mirror.security)),
    ));

    let failed = checks.iter().filter(|check| !check.ok).count();
    if context.json {
        print_line(&serde_json::to_string(&Report { event: "doctor", checks })?);
    } else {
        for check in &checks {
            let mark = if check.ok { "ok  " } else { "FAIL" };
            print_line(&format!("{mark}  {:<16} {}", check.name, check.detail));
            if !check.ok && !check.mend.is_empty() {
                print_line(&format!(
                    "      {:<16} mend: {}",
                    "",
                    check.mend.replace('\n', "\n                             ")
                ));
            }
        }
    }
    match failed {
        0 => Ok(()),
        n => Err(UserError::new(format!(
            "{n} of these checks failed: this machine cannot build yet"
        ))
        .into()),
    }
}

fn check_room(store: &Store) -> Check {
    let room = store.measure_room();
    let detail = room.map(|room| {
        (room >= ROOM, format!("{} free at {}", format_bytes(room), store.root().display()))
    });
    let (ok, detail) = match detail {
        Ok(found) => found,
        Err(error) => (false, format!("{error:#}")),
    };
    let mend = format!("free {}, or set XDG_CACHE_HOME to a larger disk", format_bytes(ROOM));
    Check { name: "disk space".into(), ok, detail, mend }
}

fn describe(name: &str, found: Result<String>) -> Check {
    match found {
        Ok(detail) => Check { name: name.into(), ok: true, detail, mend: String::new() },
        Err(error) => {
            let mend =
                error.downcast_ref::<UserError>().and_then(UserError::advice).unwrap_or_default();
            Check {
                name: name.into(),
                ok: false,
                detail: error.to_string().lines().next().unwrap_or_default().to_string(),
                mend: mend.to_string(),
            }
        }
    }
}
