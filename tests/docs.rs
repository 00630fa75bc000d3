//! What the documents say of other files, of their own headings and of the command line
//! is so.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

struct Document {
    path: PathBuf,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All documents of the repository.
fn read_documents() -> Vec<Document> {
    let mut paths: Vec<PathBuf> = Vec::new();
    let mut folders = vec![root().join("docs")];
    let here = fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().path());
    paths.extend(here.filter(|path| path.is_file()));
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => paths.push(path),
            }
        }
    }
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    paths.sort();
    let read = |path: PathBuf| Document { text: fs::read_to_string(&path).unwrap(), path };
    paths.into_iter().map(read).collect()
}

/// Lines with whether they stand in a fenced block.
fn list_lines(text: &str) -> impl Iterator<Item = (bool, &str)> {
    let mut inside = false;
    text.lines().map(move |line| {
        let fence = line.trim_start().starts_with("```");
        let was = inside;
        inside ^= fence;
        (was || fence, line)
    })
}

/// The anchors that GitHub and its like make of headings.
fn list_anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    let headings = list_lines(text)
        .filter(|(inside, line)| !inside && line.starts_with('#'))
        .map(|(_, line)| line.trim_start_matches('#').trim());
    for heading in headings {
        let slug: String = heading
            .to_lowercase()
            .chars()
            .filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c))
            .map(|c| if c == ' ' { '-' } else { c })
            .collect();
        let mut anchor = slug.clone();
        let mut number = 0;
        while !anchors.insert(anchor.clone()) {
            number += 1;
            anchor = format!("{slug}-{number}");
        }
    }
    anchors
}

/// The text outside of blocks, for links.
fn drop_blocks(text: &str) -> String {
    let lines = list_lines(text).filter(|(inside, _)| !inside).map(|(_, line)| line);
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    for Document { path, text } in read_documents() {
        let shown = path.strip_prefix(root()).unwrap().display();
        let outside = drop_blocks(&text);
        for link in outside.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file.is_empty() {
                true => path.clone(),
                false => path.parent().unwrap().join(file),
            };
            assert!(target.exists(), "{shown}: `{link}` leads nowhere");
            if !anchor.is_empty() {
                let anchors = list_anchors(&fs::read_to_string(&target).unwrap());
                assert!(anchors.contains(anchor), "{shown}: `{link}`: no such heading");
            }
        }
        // Paths of sources that the documents name.
        for word in text.split('`').filter(|word| word.starts_with("src/")) {
            assert!(root().join(word).exists(), "{shown}: there is no {word}");
        }
    }
}

/// Targets of a document's links to other files, and the blocks of its commands.
fn list_content(name: &str) -> (Vec<String>, Vec<String>) {
    let text = fs::read_to_string(root().join(name)).unwrap();
    let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let links = links.filter(|link| !link.starts_with('#') && !link.starts_with("README"));
    let blocks = text.split("```").skip(1).step_by(2);
    (links.map(str::to_string).collect(), blocks.map(str::to_string).collect())
}

#[test]
fn the_readme_says_the_same_in_both_languages() {
    let (english, russian) = (list_content("README.md"), list_content("README.ru.md"));
    assert_eq!(english, russian);
    let headings = |name: &str| {
        let text = fs::read_to_string(root().join(name)).unwrap();
        list_lines(&text).filter(|(inside, line)| !inside && line.starts_with('#')).count()
    };
    assert_eq!(headings("README.md"), headings("README.ru.md"));
}

/// Words of a command as a document shows it, without what explains it: a remark after `#`
/// or two blanks, a pipe, a redirection.
fn split_command(line: &str) -> Vec<String> {
    let line = line.trim().trim_start_matches("# ").trim_start_matches("$ ");
    let end = [" #", "  ", " | ", " > ", " && "].iter().filter_map(|mark| line.find(mark)).min();
    split_quoted(&line[..end.unwrap_or(line.len())])
}

/// Words as a shell splits them, of texts without backslashes.
fn split_quoted(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut quote, mut begun) = (String::new(), None, false);
    for c in text.chars() {
        match quote {
            Some(open) if c == open => quote = None,
            Some(_) => word.push(c),
            None if c == '"' || c == '\'' => (quote, begun) = (Some(c), true),
            None if c.is_whitespace() => {
                if begun {
                    words.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            None => {
                word.push(c);
                begun = true;
            }
        }
    }
    if begun {
        words.push(word);
    }
    words
}

/// Commands of this program that stand in a block or, between `, in a line.
fn list_commands(text: &str) -> Vec<Vec<String>> {
    const BY_CARGO: [&str; 4] = ["cargo", "run", "--release", "--"];
    let mut commands = Vec::new();
    for (inside, line) in list_lines(text) {
        let candidates: Vec<&str> = match inside {
            true => vec![line],
            // Every second piece is between backquotes.
            false => line.split('`').skip(1).step_by(2).collect(),
        };
        for candidate in candidates {
            let mut words = split_command(candidate);
            if words.first().is_some_and(|word| word == "sudo") {
                words.remove(0);
            }
            if words.len() > BY_CARGO.len() && words.iter().zip(BY_CARGO).all(|(a, b)| a == b) {
                words.splice(..BY_CARGO.len(), ["stanchion".to_string()]);
            }
            let is_ours =
                matches!(words.first().map(String::as_str), Some("stanchion" | "stanchion-agent"));
            // A name alone is no command, and what is left open is for the reader.
            let is_open = |word: &String| word.contains('…') || word.contains("...");
            if is_ours && words.len() > 1 && !words.iter().any(is_open) {
                commands.push(words);
            }
        }
    }
    commands
}

#[test]
fn every_command_of_the_documents_is_one_that_the_program_takes() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["stanchion", "stanchion-agent"] {
        symlink(env!("CARGO_BIN_EXE_stanchion"), folder.path().join(name)).unwrap();
    }
    let mut tried = BTreeSet::new();
    for Document { path, text } in read_documents() {
        let shown = path.strip_prefix(root()).unwrap().display();
        for words in list_commands(&text) {
            if !tried.insert(words.join(" ")) {
                continue;
            }
            // Wrong words are found before the help that is asked for at the end.
            let mut arguments = words[1..].to_vec();
            let end = arguments.iter().position(|word| word == "--").unwrap_or(arguments.len());
            arguments.insert(end, "--help".to_string());
            let program = folder.path().join(&words[0]);
            let output = Command::new(program).args(&arguments).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{shown}: `{}`: {said}", words.join(" "));
        }
    }
    assert!(tried.len() > 20, "{tried:?}");
}

#[test]
fn commands_are_found_where_they_stand() {
    let text = "Say `stanchion status` or\n\n```text\nsudo stanchion lab up --name \"two words\"   makes it\n\
                stanchion seed n1 && true\n```\n`stanchion` alone is a name.\n";
    assert_eq!(
        list_commands(text),
        [
            vec!["stanchion", "status"],
            vec!["stanchion", "lab", "up", "--name", "two words"],
            vec!["stanchion", "seed", "n1"],
        ]
    );
    assert!(list_anchors("## A b-c `d`\n## A b-c `d`\n").contains("a-b-c-d-1"));
}
