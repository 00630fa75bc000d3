use std::process::ExitCode;

use stanchion::{cli, lab, pipeline, sandbox};

fn main() -> ExitCode {
    // Before anything starts a thread: a process with threads cannot enter namespaces.
    match sandbox::serve_if_asked(pipeline::handle_job).or_else(lab::serve_if_asked) {
        Some(code) => code,
        None => cli::run(),
    }
}
