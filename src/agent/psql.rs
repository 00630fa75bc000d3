//! Statements to a PostgreSQL of this machine, as `postgres`, over its socket.

use anyhow::{Context, Result};

use crate::command::Command;

/// Where the node's own PostgreSQL has its socket.
pub const SOCKET: &str = "/run/postgresql";

/// Run statements in the database `postgres` behind the socket in a folder; what they give,
/// fields parted by `|`. They go by standard input: they may hold secrets.
pub async fn run_psql(folder: &str, statements: &str) -> Result<String> {
    run_psql_in(folder, "postgres", statements).await
}

/// The same in another database.
pub async fn run_psql_in(folder: &str, database: &str, statements: &str) -> Result<String> {
    let command = Command::new("psql")
        .args(["--no-psqlrc", "--no-password", "--quiet", "--tuples-only", "--no-align"])
        .arg("--set=ON_ERROR_STOP=1")
        .arg(format!("--host={folder}"))
        .args(["--username=postgres", &format!("--dbname={database}"), "--file=-"])
        .env("PGCONNECT_TIMEOUT", "5")
        .input(statements);
    let output = tokio::task::spawn_blocking(move || command.run())
        .await
        .context("waiting for a program")??;
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_string())
}
