//! Release files: what an archive holds, signed. Their format is that of the page
//! DebianRepository/Format of the Debian wiki.

mod date;
mod signature;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};

use crate::digest::Digest;
use crate::error::UserError;

pub use date::{format_date, parse_date};
pub use signature::{Keyring, verify_in_release};

/// What a Release file says. Dates are seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    pub origin: String,
    pub suite: String,
    pub codename: String,
    pub date: u64,
    pub valid_until: Option<u64>,
    pub acquire_by_hash: bool,
    /// SHA-256 and size in bytes of each index, by its path below the suite.
    pub files: BTreeMap<String, (Digest, u64)>,
}

/// What a Release is held against. Dates are seconds since 1970.
#[derive(Debug, Clone)]
pub struct Expected<'a> {
    /// Where it came from, for messages.
    pub url: &'a str,
    pub codename: &'a str,
    pub now: u64,
    /// The newest Date that this machine has seen for the suite.
    pub seen: Option<u64>,
    /// The Date that the lock was made from.
    pub locked: Option<u64>,
}

impl Release {
    /// Parse a text that [`verify_in_release`] has given back.
    ///
    /// # Errors
    /// A missing or repeated field, a date or a digest that is none.
    pub fn parse(text: &str) -> Result<Self> {
        let mut fields: BTreeMap<String, (&str, Vec<&str>)> = BTreeMap::new();
        let mut last = None;
        for line in text.lines() {
            if line.starts_with([' ', '\t']) {
                let name = last.as_ref().context("a Release file begins with a continued line")?;
                let (_, more) = fields.get_mut(name).context("a continued line has no field")?;
                more.push(line.trim());
                continue;
            }
            let (name, value) = line
                .split_once(':')
                .with_context(|| format!("a line of the Release file is no field: `{line}`"))?;
            let name = name.to_ascii_lowercase();
            let twice = fields.insert(name.clone(), (value.trim(), Vec::new())).is_some();
            ensure!(!twice, "the Release file has the field `{name}` twice");
            last = Some(name);
        }
        let take = |name: &str| fields.get(name).map(|(value, _)| *value);
        let take_date = |name: &str| {
            take(name)
                .map(|value| {
                    parse_date(value).with_context(|| {
                        format!("the Release file's `{name}` is no date in UTC: `{value}`")
                    })
                })
                .transpose()
        };
        let lists = fields.get("sha256").context("the Release file has no SHA256 sums")?;
        Ok(Release {
            origin: take("origin").unwrap_or_default().to_string(),
            suite: take("suite").unwrap_or_default().to_string(),
            codename: take("codename").context("the Release file has no Codename")?.to_string(),
            date: take_date("date")?.context("the Release file has no Date")?,
            valid_until: take_date("valid-until")?,
            acquire_by_hash: take("acquire-by-hash").is_some_and(|v| v.eq_ignore_ascii_case("yes")),
            files: parse_sums(&lists.1)?,
        })
    }

    /// Whether it is the suite that was asked for, current, and not older than what was
    /// seen before.
    ///
    /// # Errors
    /// A [`UserError`] names where it came from, the dates, and what to do.
    pub fn check(&self, expected: &Expected<'_>) -> Result<()> {
        let Expected { url, codename, now, seen, locked } = *expected;
        let refuse = |what: &str| UserError::new(format!("{what}: {url}"));
        if self.codename != codename {
            return Err(refuse("the mirror gave another suite than was asked for")
                .why(format!("it is `{}`, not `{codename}`", self.codename))
                .help("give another mirror (--mirror URL)")
                .into());
        }
        if self.date > now + signature::CLOCK_SKEW.as_secs() {
            return Err(refuse("the archive's metadata is from the future")
                .why(format!(
                    "it is dated {}, and this machine's clock says {}",
                    format_date(self.date),
                    format_date(now)
                ))
                .help("set this machine's clock")
                .into());
        }
        if let Some(until) = self.valid_until.filter(|until| *until < now) {
            return Err(refuse("the archive's metadata has expired")
                .why(format!(
                    "it was made on {} and valid until {}; this machine's clock says {}",
                    format_date(self.date),
                    format_date(until),
                    format_date(now)
                ))
                .help("the mirror is no longer updated, or holds back updates: give another one (--mirror URL); or set this machine's clock")
                .into());
        }
        for (before, what) in
            [(seen, "what this machine has seen before"), (locked, "what the lock was made from")]
        {
            if let Some(before) = before.filter(|before| self.date < *before) {
                return Err(refuse(&format!("the archive's metadata is older than {what}"))
                    .why(format!(
                        "it is dated {}; the newer one was dated {}",
                        format_date(self.date),
                        format_date(before)
                    ))
                    .help("the mirror lags behind, or holds back updates: try again later, or give another one (--mirror URL)")
                    .into());
            }
        }
        Ok(())
    }

    /// SHA-256 and size of the index at this path.
    pub fn find_file(&self, path: &str) -> Result<(Digest, u64)> {
        match self.files.get(path) {
            Some(found) => Ok(*found),
            None => bail!("the Release file of `{}` does not list {path}", self.codename),
        }
    }
}

/// Lines of `<sha256> <size> <path>`.
fn parse_sums(lines: &[&str]) -> Result<BTreeMap<String, (Digest, u64)>> {
    let mut files = BTreeMap::new();
    for line in lines.iter().filter(|line| !line.is_empty()) {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [digest, size, path] = words[..] else {
            bail!("a line of the Release file's SHA256 sums has not three words: `{line}`");
        };
        let size = size.parse().with_context(|| format!("the size of {path} is no number"))?;
        let twice = files.insert(path.to_string(), (digest.parse()?, size)).is_some();
        ensure!(!twice, "the Release file lists {path} twice");
    }
    Ok(files)
}

/// Seconds since 1970; 0 before.
pub fn to_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
