//! Debian version numbers, ordered as dpkg orders them (deb-version(7)).

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// `[epoch:]upstream[-revision]`. Equal means equal to dpkg: `1.0`, `0:1.0-0` and
/// `1.00` are the same version, whatever they look like.
#[derive(Clone)]
pub struct Version(Box<str>);

/// The text is no version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a Debian version: `{text}`: {why}")]
pub struct NotAVersion {
    text: String,
    why: &'static str,
}

impl Version {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Version {
    type Err = NotAVersion;

    fn from_str(text: &str) -> Result<Self, NotAVersion> {
        match check(text) {
            Ok(()) => Ok(Version(text.into())),
            Err(why) => Err(NotAVersion { text: text.chars().take(80).collect(), why }),
        }
    }
}

fn check(text: &str) -> Result<(), &'static str> {
    let rest = match text.split_once(':') {
        Some((epoch, rest)) => {
            if epoch.is_empty() || !epoch.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err("the epoch is not a number");
            }
            // dpkg keeps the epoch in a C int.
            epoch.parse::<i32>().map_err(|_| "the epoch is too big")?;
            rest
        }
        None => text,
    };
    let (upstream, revision) = split_revision(rest);
    if upstream.is_empty() {
        return Err("the upstream version is empty");
    }
    if rest.ends_with('-') {
        return Err("the revision is empty");
    }
    let is_common = |byte: u8| byte.is_ascii_alphanumeric() || b".+~".contains(&byte);
    if !upstream.bytes().all(|byte| is_common(byte) || b"-:".contains(&byte)) {
        return Err("the upstream version has a forbidden character");
    }
    if !revision.bytes().all(is_common) {
        return Err("the revision has a forbidden character");
    }
    Ok(())
}

fn split_epoch(text: &str) -> (u32, &str) {
    match text.split_once(':') {
        Some((epoch, rest)) => (epoch.parse().unwrap_or(0), rest),
        None => (0, text),
    }
}

fn split_revision(text: &str) -> (&str, &str) {
    text.rsplit_once('-').unwrap_or((text, ""))
}

/// Compares two versions that [`Version::from_str`] accepts; other text gets some
/// order, never a panic.
pub fn compare(a: &str, b: &str) -> Ordering {
    let ((epoch_a, a), (epoch_b, b)) = (split_epoch(a), split_epoch(b));
    let ((upstream_a, revision_a), (upstream_b, revision_b)) =
        (split_revision(a), split_revision(b));
    epoch_a
        .cmp(&epoch_b)
        .then_with(|| compare_part(upstream_a.as_bytes(), upstream_b.as_bytes()))
        .then_with(|| compare_part(revision_a.as_bytes(), revision_b.as_bytes()))
}

/// By turns a run of non-digits, by [`weigh`], and a run of digits, by its value.
fn compare_part(mut a: &[u8], mut b: &[u8]) -> Ordering {
    while !a.is_empty() || !b.is_empty() {
        let (text_a, text_b) = (take_text(&mut a), take_text(&mut b));
        for i in 0..text_a.len().max(text_b.len()) {
            match weigh(text_a.get(i)).cmp(&weigh(text_b.get(i))) {
                Ordering::Equal => {}
                order => return order,
            }
        }
        let (number_a, number_b) = (take_number(&mut a), take_number(&mut b));
        match number_a.len().cmp(&number_b.len()).then_with(|| number_a.cmp(number_b)) {
            Ordering::Equal => {}
            order => return order,
        }
    }
    Ordering::Equal
}

/// `~` before the end, the end before letters, letters before everything else.
fn weigh(byte: Option<&u8>) -> i32 {
    match byte {
        Some(b'~') => -1,
        None => 0,
        Some(byte) if byte.is_ascii_alphabetic() => i32::from(*byte),
        Some(byte) => i32::from(*byte) + 256,
    }
}

fn take_text<'a>(part: &mut &'a [u8]) -> &'a [u8] {
    let end = part.iter().position(u8::is_ascii_digit).unwrap_or(part.len());
    let (text, rest) = part.split_at(end);
    *part = rest;
    text
}

/// A run of digits without its leading zeros.
fn take_number<'a>(part: &mut &'a [u8]) -> &'a [u8] {
    let end = part.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(part.len());
    let (digits, rest) = part.split_at(end);
    *part = rest;
    &digits[digits.iter().take_while(|digit| **digit == b'0').count()..]
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> Ordering {
        compare(&self.0, &other.0)
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Version {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Version {}

impl Hash for Version {
    /// Hashes what [`compare`] sees, so that equal versions hash alike.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let (epoch, rest) = split_epoch(&self.0);
        epoch.hash(state);
        let (upstream, revision) = split_revision(rest);
        for mut part in [upstream.as_bytes(), revision.as_bytes()] {
            while !part.is_empty() {
                let pair = (take_text(&mut part), take_number(&mut part));
                if pair != (&b""[..], &b""[..]) {
                    pair.hash(state);
                }
            }
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Version {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Command;
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use std::hash::DefaultHasher;

    fn parse(text: &str) -> Version {
        text.parse().unwrap()
    }

    fn hash(version: &Version) -> u64 {
        let mut hasher = DefaultHasher::new();
        version.hash(&mut hasher);
        hasher.finish()
    }

    /// Versions from few characters, so that they are often nearly alike.
    fn version() -> impl Strategy<Value = String> {
        let part = "[0-9][01a~+.:-]{0,6}";
        (prop::option::of(0..3u8), part, prop::option::of("[01az~+.]{1,4}")).prop_filter_map(
            "a version",
            |(epoch, upstream, revision)| {
                let mut text = match epoch {
                    Some(epoch) => format!("{epoch}:{upstream}"),
                    None => upstream.replace(':', ""),
                };
                if let Some(revision) = revision {
                    text = format!("{text}-{revision}");
                }
                text.parse::<Version>().is_ok().then_some(text)
            },
        )
    }

    #[test]
    fn versions_are_ordered_as_the_manual_page_says() {
        let sorted = [
            "0~~", "0~~a", "0~", "0", "1.0~rc1", "1.0", "1.0-0.1", "1.0-1", "1.0-1+b1", "1.0-1.1",
            "1.0a", "1.0+dfsg", "1.0.1", "1.2", "1.10", "2024", "1:0.1",
        ];
        for pair in sorted.windows(2) {
            assert!(parse(pair[0]) < parse(pair[1]), "{pair:?}");
        }
        for (a, b) in [("1.0", "1.00"), ("1", "0:1-0"), ("1a", "1a0")] {
            let (a, b) = (parse(a), parse(b));
            assert_eq!(a, b);
            assert_eq!(hash(&a), hash(&b));
        }
    }

    #[test]
    fn what_is_no_version_is_refused() {
        for text in
            ["", "1_0", "a:1", ":1", "1:", "-1", "1-", "1 0", "1/0", "99999999999:1", "1-1:1", "é"]
        {
            assert!(text.parse::<Version>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_version_survives_serde() {
        let version = parse("1:2.3~rc1-4+deb13u1");
        let json = serde_json::to_string(&version).unwrap();
        assert_eq!(json, "\"1:2.3~rc1-4+deb13u1\"");
        assert_eq!(serde_json::from_str::<Version>(&json).unwrap().as_str(), version.as_str());
        assert!(serde_json::from_str::<Version>("\"1 2\"").is_err());
    }

    #[test]
    fn dpkg_agrees() {
        if Command::new("dpkg").arg("--version").run().is_err() {
            eprintln!("skipped: this machine has no dpkg to compare versions with");
            return;
        }
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        for _ in 0..300 {
            let mut draw = || version().new_tree(&mut runner).unwrap().current();
            let (a, b) = (draw(), draw());
            let is = |relation: &str| {
                let command = Command::new("dpkg").args(["--compare-versions", &a, relation, &b]);
                command.run_any().unwrap().0.success()
            };
            let order = match (is("lt"), is("gt")) {
                (true, false) => Ordering::Less,
                (false, true) => Ordering::Greater,
                _ => Ordering::Equal,
            };
            assert_eq!(parse(&a).cmp(&parse(&b)), order, "{a} against {b}");
        }
    }

    proptest! {
        #[test]
        fn the_order_is_total_and_hashes_follow_it(a in version(), b in version(), c in version()) {
            let (a, b, c) = (parse(&a), parse(&b), parse(&c));
            prop_assert_eq!(a.cmp(&b), b.cmp(&a).reverse());
            prop_assert_eq!(a.cmp(&a), Ordering::Equal);
            if a <= b && b <= c {
                prop_assert!(a <= c, "{} {} {}", a, b, c);
            }
            if a == b {
                prop_assert_eq!(hash(&a), hash(&b));
                prop_assert_eq!(a.cmp(&c), b.cmp(&c));
            }
        }

        #[test]
        fn no_text_makes_it_panic(a in ".{0,12}", b in ".{0,12}") {
            let _ = a.parse::<Version>();
            compare(&a, &b);
        }
    }
}
