//! The cluster's shared secrets: which there are, and who gets them.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

/// Bytes that a secret may have.
const MAX_BYTES: usize = 256;

/// A secret text. It shows itself to nobody by accident: not in `{:?}`, and it has no
/// `Display`.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// `None` when it is empty, longer than 256 bytes, or has anything but letters, digits
    /// and `+/=_.-`: secrets are laid into the configs of many programs, each with its own
    /// idea of quotes.
    pub fn new(text: impl Into<String>) -> Option<Self> {
        let text = text.into();
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"+/=_.-".contains(&b);
        let is_fine = matches!(text.len(), 1..=MAX_BYTES) && text.bytes().all(is_plain);
        is_fine.then_some(Secret(text))
    }

    /// The text itself, for where it is needed.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(hidden)")
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // The error must not hold the text, so that of another type is not passed on.
        let text = String::deserialize(deserializer)
            .map_err(|_| serde::de::Error::custom("a secret that is no text"))?;
        Secret::new(text).ok_or_else(|| serde::de::Error::custom("a secret with bad characters"))
    }
}
