//! A TOML file with its path: parsing it, and telling where in it a mistake stands.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use toml::de::DeTable;

use super::explain::{explain_syntax, explain_type};
use crate::error::UserError;

/// Bytes that a layer's or a profile's file may have.
const MAX_BYTES: u64 = 1 << 20;

pub(super) struct Source {
    path: PathBuf,
    text: String,
    noun: &'static str,
}

impl Source {
    /// `path` is shown in errors; `noun` says what the file is ("a layer").
    pub fn new(path: impl Into<PathBuf>, noun: &'static str, text: String) -> Self {
        Source { path: path.into(), text, noun }
    }

    /// Read `root/path`; errors name `path`.
    pub fn read(root: &Path, path: &Path, noun: &'static str) -> Result<Self> {
        let mut bytes = Vec::new();
        File::open(root.join(path))
            .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
            .with_context(|| format!("reading {}", path.display()))?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(UserError::new(format!("{} is too long", path.display()))
                .in_file(path)
                .why(format!("{noun} may have {} KiB", MAX_BYTES >> 10))
                .into());
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            let valid = error.utf8_error().valid_up_to();
            let line = count_line(&error.as_bytes()[..valid]);
            UserError::new("the file is not UTF-8 text").at(path, line)
        })?;
        Ok(Source::new(path, noun, text))
    }

    /// Read the TOML as the raw form `T`; each mistake is a [`UserError`] with its line.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        let document = DeTable::parse(&self.text).map_err(|error| explain_syntax(self, &error))?;
        T::deserialize(toml::Deserializer::from(document.clone()))
            .map_err(|error| explain_type(self, document.get_ref(), &error).into())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn noun(&self) -> &'static str {
        self.noun
    }

    /// The text behind a span of bytes; empty when there is no such span.
    pub fn cut(&self, span: Range<usize>) -> &str {
        self.text.get(span).unwrap_or("")
    }

    /// The line, counted from 1, that holds the byte `offset`.
    pub fn line(&self, offset: usize) -> usize {
        count_line(&self.text.as_bytes()[..offset.min(self.text.len())])
    }

    /// A mistake at a span of bytes.
    pub fn error(&self, span: Range<usize>, what: impl Into<String>) -> UserError {
        UserError::new(what).at(&self.path, self.line(span.start))
    }
}

/// The text of a file of at most `limit` bytes; the error says why there is none.
pub(super) fn read_small(path: &Path, limit: u64) -> Result<String, String> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(limit + 1).read_to_end(&mut bytes))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    if bytes.len() as u64 > limit {
        return Err(format!("{} has more than {} KiB", path.display(), limit >> 10));
    }
    String::from_utf8(bytes).map_err(|_| format!("{} is not UTF-8 text", path.display()))
}

fn count_line(before: &[u8]) -> usize {
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

/// `text` between backticks on one line: control characters escaped, at most 60 shown.
pub(super) fn quote(text: &str) -> String {
    let mut quoted = String::from("`");
    for (i, c) in text.chars().enumerate() {
        match c {
            _ if i == 60 => {
                quoted.push('…');
                break;
            }
            c if c.is_control() => quoted.extend(c.escape_default()),
            c => quoted.push(c),
        }
    }
    quoted.push('`');
    quoted
}
