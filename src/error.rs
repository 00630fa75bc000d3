//! What went wrong, where, why, and what to do next.
//!
//! A [`UserError`] is something that the user can mend (exit code 2); every other
//! error is ours (exit code 1).

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A mistake that the user can mend. Displayed on several lines:
///
/// ```text
/// unknown key `pacakges`
///   at: layers/base/layer.toml:3
///   why: a layer has no such key
///   help: did you mean `packages`?
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserError {
    what: String,
    at: Option<(PathBuf, Option<usize>)>,
    why: Option<String>,
    help: Option<String>,
}

impl UserError {
    pub fn new(what: impl Into<String>) -> Self {
        UserError { what: what.into(), at: None, why: None, help: None }
    }

    /// The file the mistake stands in.
    pub fn in_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.at = Some((path.into(), None));
        self
    }

    /// The file and the line, counted from 1.
    pub fn at(mut self, path: impl Into<PathBuf>, line: usize) -> Self {
        self.at = Some((path.into(), Some(line)));
        self
    }

    pub fn why(mut self, why: impl Into<String>) -> Self {
        self.why = Some(why.into());
        self
    }

    /// What to do next.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// What and why, on one line, without the help.
    pub fn summary(&self) -> String {
        match &self.why {
            Some(why) => format!("{}: {why}", self.what),
            None => self.what.clone(),
        }
    }

    /// What to do next, where it is known.
    pub fn advice(&self) -> Option<&str> {
        self.help.as_deref()
    }
}

impl fmt::Display for UserError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        match &self.at {
            Some((path, Some(line))) => write!(f, "\n  at: {}:{line}", path.display())?,
            Some((path, None)) => write!(f, "\n  at: {}", path.display())?,
            None => {}
        }
        if let Some(why) = &self.why {
            write!(f, "\n  why: {}", why.replace('\n', "\n       "))?;
        }
        if let Some(help) = &self.help {
            write!(f, "\n  help: {}", help.replace('\n', "\n        "))?;
        }
        Ok(())
    }
}

impl std::error::Error for UserError {}

/// 2 when the user can mend it, 1 when it is ours.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if is_user_error(error) { 2 } else { 1 }
}

fn is_user_error(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<UserError>().is_some()
            || cause.downcast_ref::<std::io::Error>().is_some_and(|io| {
                matches!(
                    io.kind(),
                    std::io::ErrorKind::StorageFull
                        | std::io::ErrorKind::ReadOnlyFilesystem
                        | std::io::ErrorKind::PermissionDenied
                        | std::io::ErrorKind::QuotaExceeded
                )
            })
    })
}

/// The known name nearest to `name`, for "did you mean".
pub fn find_nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|candidate| (measure_distance(name, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= 1 + name.len().max(candidate.len()) / 3)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Edits between two names: insertions, deletions, substitutions, and swaps of
/// neighbours (optimal string alignment).
fn measure_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<_>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let substitution = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = substitution.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_user_error_says_what_where_why_and_what_next() {
        let error = UserError::new("unknown key `pacakges`")
            .at("layers/base/layer.toml", 3)
            .why("a layer has no such key")
            .help("did you mean `packages`?");
        assert_eq!(
            error.to_string(),
            "unknown key `pacakges`\n  at: layers/base/layer.toml:3\n  why: a layer has no such key\n  help: did you mean `packages`?"
        );
    }

    #[test]
    fn the_exit_code_tells_whose_mistake_it_is() {
        let theirs = anyhow::Error::new(UserError::new("no")).context("building db");
        assert_eq!(exit_code(&theirs), 2);
        let full: anyhow::Result<()> =
            Err(std::io::Error::from(std::io::ErrorKind::StorageFull)).context("writing");
        assert_eq!(exit_code(&full.unwrap_err()), 2);
        assert_eq!(exit_code(&anyhow::anyhow!("a bug")), 1);
    }

    #[test]
    fn the_nearest_name_is_found_and_a_far_one_is_not_offered() {
        assert_eq!(find_nearest("pacakges", ["packages", "path"]), Some("packages"));
        assert_eq!(find_nearest("bd", ["db", "web"]), Some("db"));
        assert_eq!(find_nearest("quux", ["packages", "units"]), None);
    }
}
