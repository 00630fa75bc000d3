//! A PostgreSQL that nobody but the agent can reach: it recovers what was restored, and is
//! looked at.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::drill::remove_folder;
use super::pgbackrest::{ask_unit, name_question, run_unit};
use crate::agent::files::{Access, find_account, make_folder_for, write_file};
use crate::agent::operate::{Desk, Say};
use crate::agent::psql::{run_psql, run_psql_in};
use crate::agent::systemd::{Active, forget_failure, query_unit, run_program, stop_unit};
use crate::error::UserError;

const UNIT: &str = "stanchion-scratch";
/// The unit that brings the files of a backup.
pub const FILES: &str = "stanchion-restore-files";
const BIN: &str = "/usr/lib/postgresql/17/bin";
/// A recovery replays what was written since its backup.
const RECOVERY: Duration = Duration::from_secs(12 * 3600);

/// What was found in a database cluster that recovered.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Found {
    pub system: String,
    pub timeline: u64,
    /// When the last transaction that was replayed had committed; empty when none was.
    pub last_commit: String,
    /// Databases, with the number of their tables.
    pub databases: Vec<(String, u64)>,
}

/// A running one; stop it with [`Scratch::stop`].
pub struct Scratch {
    socket: PathBuf,
    data: PathBuf,
}

/// Make a folder for `postgres` alone, where none is.
pub fn make_folder(desk: &Desk, path: &Path) -> Result<()> {
    let passwd = std::fs::read_to_string(desk.places.join("/etc/passwd"))
        .with_context(|| format!("making {}", path.display()))?;
    let owner = find_account(&passwd, "postgres").context("there is no postgres")?;
    if let Some(above) = path.parent().filter(|above| !above.exists()) {
        make_folder_for(above, owner)?;
    }
    make_folder_for(path, owner)
}

impl Scratch {
    /// Start PostgreSQL on a data folder, and wait until it has recovered and takes writes.
    pub async fn start(desk: &Desk, data: &Path, say: &Say) -> Result<Self> {
        end_unit(UNIT_SERVICE).await?;
        let socket = desk.places.join("/run/stanchion-scratch");
        remove_folder(&socket).await?;
        make_folder(desk, &socket)?;
        // Beside the socket's folder, which is postgres' own.
        let rules = desk.places.run().join("scratch");
        let write = |name: &str, text: &str| {
            let path = rules.join(name);
            let access = Access { mode: 0o644, owner: None };
            write_file(&path, text.as_bytes(), access, false)?;
            Ok::<_, anyhow::Error>(path.display().to_string())
        };
        // Its own rules: those of the backup may be another machine's.
        let hba = write("pg_hba.conf", "local all all peer map=local\n")?;
        let ident = write("pg_ident.conf", "local root postgres\nlocal postgres postgres\n")?;
        let folder = socket.display().to_string();
        let settings = [
            "listen_addresses=".to_string(),
            format!("unix_socket_directories={folder}"),
            format!("hba_file={hba}"),
            format!("ident_file={ident}"),
            "ssl=off".to_string(),
            // Nobody follows it who could acknowledge.
            "synchronous_standby_names=".to_string(),
            "hot_standby=off".to_string(),
            "logging_collector=off".to_string(),
            // It promotes: a timeline in the archive that is given up later would lead every
            // recovery after it astray.
            "archive_mode=off".to_string(),
        ];
        let data_text = data.display().to_string();
        let mut words = vec!["systemd-run", "--quiet", "--collect", "--uid=postgres"];
        let unit = format!("--unit={UNIT}");
        words.extend(["--gid=postgres", "--property=KillSignal=SIGINT", unit.as_str()]);
        let postgres = format!("{BIN}/postgres");
        words.extend(["--property=TimeoutStopSec=300", "--", &postgres, "-D", &data_text]);
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        for setting in &settings {
            words.extend(["-c", setting]);
        }
        run_program(&words).await?;
        let scratch = Scratch { socket, data: data.to_path_buf() };
        match scratch.wait_for_recovery(say).await {
            Ok(()) => Ok(scratch),
            Err(error) => {
                end_unit(UNIT_SERVICE).await?;
                Err(error)
            }
        }
    }

    async fn wait_for_recovery(&self, say: &Say) -> Result<()> {
        let (begun, mut told) = (Instant::now(), Instant::now());
        let folder = self.socket.display().to_string();
        loop {
            if let Ok(answer) = run_psql(&folder, "select pg_is_in_recovery()").await
                && answer == "f"
            {
                return Ok(());
            }
            match query_unit(UNIT_SERVICE).await? {
                Active::Running | Active::Starting => {}
                _ => return Err(explain_end().await),
            }
            if begun.elapsed() > RECOVERY {
                bail!("PostgreSQL has not recovered within {} h", RECOVERY.as_secs() / 3600);
            }
            if told.elapsed() > Duration::from_secs(15) {
                told = Instant::now();
                say.say(format!("replaying the log for {} s", begun.elapsed().as_secs()));
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    pub async fn ask(&self, statements: &str) -> Result<String> {
        run_psql(&self.socket.display().to_string(), statements).await
    }

    /// Look at what is in it.
    pub async fn look(&self) -> Result<Found> {
        let facts = self
            .ask(
                "select (select system_identifier from pg_control_system()), \
                 (select timeline_id from pg_control_checkpoint()), \
                 coalesce(pg_last_xact_replay_timestamp() at time zone 'UTC' || '+00', '')",
            )
            .await?;
        let fields: Vec<&str> = facts.splitn(3, '|').collect();
        let [system, timeline, last] = fields.as_slice() else {
            bail!("PostgreSQL says nothing of itself");
        };
        let mut found = Found {
            system: system.to_string(),
            timeline: timeline.parse().unwrap_or(0),
            last_commit: last.to_string(),
            databases: Vec::new(),
        };
        let folder = self.socket.display().to_string();
        let names =
            self.ask("select datname from pg_database where datallowconn order by 1").await?;
        for name in names.lines() {
            let count = "select count(*) from pg_class where relkind in ('r', 'p')";
            let count = run_psql_in(&folder, name, count).await?;
            found.databases.push((name.to_string(), count.parse().unwrap_or(0)));
        }
        Ok(found)
    }

    /// Stop it, then look at every page's checksum.
    pub async fn stop(self, say: &Say) -> Result<()> {
        stop_unit(UNIT_SERVICE).await?;
        let control = format!("{BIN}/pg_controldata");
        let data = self.data.display().to_string();
        let text = ask_unit(&[&control, "-D", &data]).await?;
        if !text.lines().any(|line| line.contains("cluster state") && line.ends_with("shut down")) {
            bail!("PostgreSQL did not stop in good order");
        }
        let checksums = format!("{BIN}/pg_checksums");
        run_unit(&name_question(), &[&checksums, "--check", "-D", &data], say)
            .await
            .context("looking at the checksums of all pages")
    }
}

const UNIT_SERVICE: &str = "stanchion-scratch.service";

/// What an agent that was restarted meanwhile has left: it writes into the folder still.
pub async fn end_leftovers() -> Result<()> {
    end_unit(&format!("{FILES}.service")).await?;
    end_unit(UNIT_SERVICE).await
}

/// One that an earlier run left behind.
async fn end_unit(unit: &str) -> Result<()> {
    if query_unit(unit).await? != Active::Missing {
        stop_unit(unit).await?;
    }
    if query_unit(unit).await? == Active::Failed {
        forget_failure(unit).await?;
    }
    Ok(())
}

/// PostgreSQL has ended by itself; why, in words.
async fn explain_end() -> anyhow::Error {
    let words = ["journalctl", "--no-pager", "-o", "cat", "-n", "12", "-u", UNIT_SERVICE];
    let said = run_program(&words).await.unwrap_or_default();
    if said.contains("recovery ended before configured recovery target was reached") {
        return UserError::new("the archived log ends before that time")
            .why("what was written last before the loss had not reached the repository")
            .help("restore what there is with --latest, or take an earlier time")
            .into();
    }
    let lines: Vec<&str> = said.lines().collect();
    anyhow::anyhow!("PostgreSQL does not start: {}", lines.join(" | "))
}
