//! SHA-256 digests: of files, of streams, and of the inputs that make a cache key.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Digest as _;

/// A SHA-256 digest; written as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Digest(bytes)
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub fn of(bytes: &[u8]) -> Self {
        Digest(sha2::Sha256::digest(bytes).into())
    }

    /// Digest of a whole file, read in pieces.
    pub fn of_file(path: &Path) -> Result<Self> {
        let mut file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let mut hasher = Hasher::new();
        io::copy(&mut file, &mut hasher).with_context(|| format!("reading {}", path.display()))?;
        Ok(hasher.finish())
    }

    /// The first 12 digits, enough to tell digests apart in a table.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not 64 hexadecimal digits.
#[derive(Debug, thiserror::Error)]
#[error("not a SHA-256 digest (64 hexadecimal digits): `{0}`")]
pub struct NotADigest(String);

impl FromStr for Digest {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Self, NotADigest> {
        let wrong = || NotADigest(text.chars().take(80).collect());
        let hex = |at: usize| -> Result<u8, NotADigest> {
            let digit = char::from(text.as_bytes()[at]).to_digit(16).ok_or_else(wrong)?;
            Ok(digit as u8)
        };
        if text.len() != 64 || !text.is_ascii() {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = (hex(2 * i)? << 4) | hex(2 * i + 1)?;
        }
        Ok(Digest(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Hashes what is written to it, and counts it.
#[derive(Default, Clone)]
pub struct Hasher {
    state: sha2::Sha256,
    written: u64,
}

impl Hasher {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.state.update(bytes);
        self.written += bytes.len() as u64;
    }

    /// Bytes hashed so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    pub fn finish(self) -> Digest {
        Digest(self.state.finalize().into())
    }
}

impl Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads through and hashes what passes.
pub struct HashingReader<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> HashingReader<R> {
    pub fn new(inner: R) -> Self {
        HashingReader { inner, hasher: Hasher::new() }
    }

    /// The digest and the number of the bytes that were read.
    pub fn finish(self) -> (Digest, u64) {
        let written = self.hasher.written();
        (self.hasher.finish(), written)
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        Ok(n)
    }
}

/// A cache key: named inputs, each with its digest, in the order they were added.
///
/// The names are kept so that a changed key can be explained input by input.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct Key {
    inputs: Vec<(String, Digest)>,
}

impl Key {
    /// `step` and `version` name the builder's step; raise the version when the step's
    /// output changes for the same inputs.
    pub fn new(step: &str, version: u32) -> Self {
        let mut key = Key::default();
        key.add("step", format!("{step} {version}"));
        key
    }

    pub fn add(&mut self, name: impl Into<String>, value: impl AsRef<[u8]>) -> &mut Self {
        self.inputs.push((name.into(), Digest::of(value.as_ref())));
        self
    }

    pub fn inputs(&self) -> &[(String, Digest)] {
        &self.inputs
    }

    pub fn digest(&self) -> Digest {
        let mut hasher = Hasher::new();
        for (name, digest) in &self.inputs {
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(name.as_bytes());
            hasher.update(digest.as_bytes());
        }
        hasher.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_survives_its_text() {
        let digest = Digest::of(b"abc");
        assert_eq!(
            digest.to_string(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert!("xyz".parse::<Digest>().is_err());
        assert!("é".repeat(32).parse::<Digest>().is_err());
        assert!("+a".repeat(32).parse::<Digest>().is_err());
    }

    #[test]
    fn a_key_changes_with_every_input_and_its_name() {
        let make = |name: &str, value: &str| {
            let mut key = Key::new("step", 1);
            key.add(name, value);
            key.digest()
        };
        assert_ne!(make("a", "b"), make("a", "c"));
        assert_ne!(make("a", "b"), make("ab", ""));
        assert_ne!(Key::new("step", 1).digest(), Key::new("step", 2).digest());
    }
}
