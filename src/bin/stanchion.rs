use std::process::ExitCode;

use anyhow::{Result, bail};
use serde_json::Value;
use stanchion::sandbox::{self, Inside};

fn main() -> ExitCode {
    // Before anything starts a thread: a process with threads cannot enter namespaces.
    if let Some(code) = sandbox::serve_if_asked(handle_job) {
        return code;
    }
    ExitCode::SUCCESS
}

fn handle_job(job: &str, _input: Value, _inside: &mut Inside) -> Result<Value> {
    bail!("this program has no job named `{job}`")
}
