//! Every command of the README runs.

#[allow(dead_code, reason = "other tests copy other parts")]
#[path = "support/copy.rs"]
mod copy;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::SystemTime;

use copy::{copy_project, leave_web_out};

const STANCHION: &str = "cargo run --release -- ";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Lines of the `sh` blocks of a document.
fn list_commands(text: &str) -> Vec<&str> {
    let mut commands = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        match line {
            "```sh" => inside = true,
            _ if line.starts_with("```") => inside = false,
            _ if inside && !line.trim().is_empty() => commands.push(line),
            _ => {}
        }
    }
    commands
}

/// The program in a project, as the README's reader has it.
fn run(project: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_stanchion"))
        .args(args)
        .current_dir(project)
        .env("XDG_STATE_HOME", project.join("state"))
        .output()
        .unwrap()
}

/// Takes down what `lab up` has left, however the test ends.
struct LabGuard<'a>(&'a Path);

impl Drop for LabGuard<'_> {
    fn drop(&mut self) {
        run(self.0, &["lab", "down"]);
        let _ = fs::remove_dir_all(self.0);
    }
}

#[test]
fn every_command_of_the_readme_runs() {
    let text = fs::read_to_string(root().join("README.md")).unwrap();
    let commands = list_commands(&text);
    assert_eq!(commands[0], "cargo run --release -- build db");
    assert_eq!(commands[1], "cargo test");

    let project = Path::new(env!("CARGO_TARGET_TMPDIR")).join("readme");
    copy_project(&project);
    let _guard = LabGuard(&project);
    for command in commands.iter().filter(|command| **command != "cargo test") {
        let args = command.strip_prefix(STANCHION).expect("a command that this test knows");
        let args: Vec<&str> = args.split(' ').collect();
        let mut output = run(&project, &args);
        if String::from_utf8_lossy(&output.stderr).contains("the artifact `netbox` of layer") {
            println!("skipped NetBox in `{command}`: its source cannot be fetched here");
            leave_web_out(&project);
            output = run(&project, &args);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        if said.contains("a lab needs root") || said.contains("this machine cannot") {
            println!("skipped `{command}`: {}", said.lines().next().unwrap_or_default());
            continue;
        }
        if said.contains("no Debian mirror") || said.contains("the sandbox cannot") {
            println!("skipped `{command}`: {}", said.lines().next().unwrap_or_default());
            return;
        }
        assert!(output.status.success(), "`{command}` failed:\n{said}");
    }
}

/// The newest time of writing of a file below a folder.
fn find_newest(folder: &Path) -> SystemTime {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let newest = entries.map(|entry| match entry.file_type().unwrap().is_dir() {
        true => find_newest(&entry.path()),
        false => entry.metadata().unwrap().modified().unwrap(),
    });
    newest.max().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// What the first command of the README has left here, and images carry as their agent.
#[test]
fn the_program_that_is_shipped_is_small() {
    const LIMIT: u64 = 15_000_000;
    let program = Path::new(env!("CARGO_BIN_EXE_stanchion"));
    let shipped = program.parent().unwrap().with_file_name("release").join("stanchion");
    let Ok(found) = fs::metadata(&shipped) else {
        return println!("skipped: there is no {}", shipped.display());
    };
    if found.modified().unwrap() < find_newest(&root().join("src")) {
        return println!("skipped: {} is older than its sources", shipped.display());
    }
    assert!(found.len() <= LIMIT, "{} has {} bytes", shipped.display(), found.len());
}
