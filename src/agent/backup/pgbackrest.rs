//! Programs as `postgres`, each in a unit of systemd of its own: outside of the agent's
//! sandbox, and with its own end. What must not run twice has a fixed name; a question has
//! one of its own, since several may be asked at a time.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};

use super::info::Info;
use crate::agent::operate::Say;
use crate::command::Command;

/// Bytes of one line of a program, and of all that is read from one that answers.
const MAX_LINE: u64 = 16 << 10;
const MAX_ANSWER: usize = 8 << 20;
/// Lines that a failure shows.
const TAIL: usize = 12;

/// The name of a unit that nobody else has, since systemd refuses a name that is taken.
pub fn name_question() -> String {
    static ASKED: AtomicU64 = AtomicU64::new(0);
    let number = ASKED.fetch_add(1, Ordering::Relaxed);
    format!("stanchion-ask-{}-{number}", std::process::id())
}

fn describe_unit(unit: &str, program: &[&str]) -> Command {
    Command::new("systemd-run")
        .args(["--quiet", "--wait", "--pipe", "--collect"])
        .arg(format!("--unit={unit}"))
        .args(["--uid=postgres", "--gid=postgres", "--working-directory=/var/lib/postgresql"])
        .args(["--property=UMask=0077", "--property=OOMScoreAdjust=200", "--"])
        .args(program)
}

/// Run a program to its end; what it says goes to `say`.
///
/// # Errors
/// When it fails, with its last lines.
pub async fn run_unit(unit: &str, program: &[&str], say: &Say) -> Result<()> {
    let (command, say) = (describe_unit(unit, program), say.clone());
    let name = program.first().copied().unwrap_or_default().to_string();
    let run = move || -> Result<()> {
        let (reader, writer) = std::io::pipe().context("making a pipe")?;
        let mut child = command.output_to(writer.try_clone()?, writer).spawn()?;
        let (mut reader, mut tail) = (BufReader::new(reader), Vec::new());
        loop {
            let mut line = Vec::new();
            if reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
                break;
            }
            let line = String::from_utf8_lossy(&line).trim_end().to_string();
            if let Some(said) = shorten(&line) {
                say.say(said);
            }
            tail.push(line);
            if tail.len() > TAIL {
                tail.remove(0);
            }
        }
        let status = child.wait().context("waiting for a program")?;
        if !status.success() {
            let errors: Vec<&str> = tail.iter().map(|line| strip_time(line)).collect();
            bail!("{name} failed: {}", errors.join(" | "));
        }
        Ok(())
    };
    tokio::task::spawn_blocking(run).await.context("waiting for a program")?
}

/// The standard output of a program.
pub async fn ask_unit(program: &[&str]) -> Result<String> {
    run_question(describe_unit(&name_question(), program)).await
}

/// The same of one that reads a file, which it need not be able to open.
pub async fn feed_unit(program: &[&str], file: File) -> Result<String> {
    run_question(describe_unit(&name_question(), program).input_from(file)).await
}

async fn run_question(command: Command) -> Result<String> {
    let output = tokio::task::spawn_blocking(move || command.run()).await.context("waiting")??;
    anyhow::ensure!(output.stdout.len() <= MAX_ANSWER, "a program says too much");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `2026-11-21 17:35:16.344 P00   INFO: text` without what stands before the text.
fn strip_time(line: &str) -> &str {
    let parts = ["INFO: ", "WARN: ", "ERROR: "];
    parts.iter().find_map(|part| line.split_once(part)).map_or(line.trim(), |(_, text)| text)
}

/// What of a line is worth telling: not the list of options, nor each file.
fn shorten(line: &str) -> Option<String> {
    let text = strip_time(line);
    let is_noise = text.is_empty() || text.contains(" command begin ") || text.starts_with("HINT");
    (!is_noise).then(|| text.to_string())
}

/// What the repository has of a stanza.
pub async fn read_info(stanza: &str) -> Result<Info> {
    let stanza_option = format!("--stanza={stanza}");
    let program =
        ["pgbackrest", &stanza_option, "--log-level-console=off", "--output=json", "info"];
    let text = ask_unit(&program).await?;
    Info::read(&text, stanza)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_have_names_of_their_own() {
        let (one, two) = (name_question(), name_question());
        assert!(one.starts_with("stanchion-ask-") && one != two, "{one} {two}");
    }

    #[test]
    fn lines_of_pgbackrest_lose_their_time_and_noise_is_left_out() {
        let line = "2026-11-21 17:35:16.388 P00   INFO: new backup label = 20261121-173516F";
        assert_eq!(shorten(line).unwrap(), "new backup label = 20261121-173516F");
        let begin = "2026-11-21 17:35:16.344 P00   INFO: backup command begin 2.55.1: --a=b";
        assert_eq!(shorten(begin), None);
        assert_eq!(shorten(""), None);
        assert_eq!(strip_time("x P00  ERROR: [028]: no"), "[028]: no");
        assert_eq!(shorten("  plain words"), Some("plain words".to_string()));
    }
}
