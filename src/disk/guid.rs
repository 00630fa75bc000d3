//! GUIDs: of partitions, disks, file systems; always derived, never random.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::digest::{Digest, Key};

/// A GUID in the order of its text (RFC 9562), as UUIDs on Linux are stored.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Guid([u8; 16]);

impl Guid {
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Guid(bytes)
    }

    /// The constant `0xAAAAAAAABBBBCCCCDDDDEEEEEEEEEEEE`, for tables of known GUIDs.
    pub const fn from_number(number: u128) -> Self {
        Guid(number.to_be_bytes())
    }

    /// A version 8 GUID (RFC 9562, 5.8) that depends on `seed` and `name` only.
    pub fn derive(seed: &Digest, name: &str) -> Self {
        let mut key = Key::new("guid", 1);
        key.add("seed", seed.as_bytes()).add("name", name);
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&key.digest().as_bytes()[..16]);
        bytes[6] = bytes[6] & 0x0f | 0x80;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Guid(bytes)
    }

    /// First and last 128 bits of a root hash: the GUIDs of the root partition and of its
    /// verity partition (systemd-gpt-auto-generator(8), Discoverable Partitions).
    pub fn split_root_hash(root_hash: &Digest) -> (Self, Self) {
        let (mut first, mut last) = ([0; 16], [0; 16]);
        first.copy_from_slice(&root_hash.as_bytes()[..16]);
        last.copy_from_slice(&root_hash.as_bytes()[16..]);
        (Guid(first), Guid(last))
    }

    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The mixed-endian order in which UEFI stores it.
    pub fn to_disk(self) -> [u8; 16] {
        swap_ends(self.0)
    }

    pub fn from_disk(bytes: [u8; 16]) -> Self {
        Guid(swap_ends(bytes))
    }
}

/// Turns the first three fields round; its own inverse.
fn swap_ends(mut bytes: [u8; 16]) -> [u8; 16] {
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Guid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The text is not 8-4-4-4-12 hexadecimal digits.
#[derive(Debug, thiserror::Error)]
#[error("not a GUID: `{0}`")]
pub struct NotAGuid(String);

impl FromStr for Guid {
    type Err = NotAGuid;

    fn from_str(text: &str) -> Result<Self, NotAGuid> {
        let wrong = || NotAGuid(text.chars().take(40).collect());
        let groups: Vec<&str> = text.split('-').collect();
        if !groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12]) {
            return Err(wrong());
        }
        let digits = groups.concat();
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        u128::from_str_radix(&digits, 16).map(Guid::from_number).map_err(|_| wrong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guid_survives_its_text_and_its_disk_order() {
        let text = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
        let guid: Guid = text.parse().unwrap();
        assert_eq!(guid.to_string(), text);
        // As in the UEFI specification's own example of an ESP entry.
        assert_eq!(guid.to_disk()[..8], [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11]);
        assert_eq!(Guid::from_disk(guid.to_disk()), guid);
        for wrong in ["", "c12a7328", "+12a7328-f81f-11d2-ba4b-00a0c93ec93b", &text[1..]] {
            assert!(wrong.parse::<Guid>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_derived_guid_depends_on_seed_and_name() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        assert_eq!(Guid::derive(&a, "disk"), Guid::derive(&a, "disk"));
        assert_ne!(Guid::derive(&a, "disk"), Guid::derive(&b, "disk"));
        assert_ne!(Guid::derive(&a, "disk"), Guid::derive(&a, "esp"));
        assert_eq!(&Guid::derive(&a, "disk").to_string()[14..15], "8");
    }
}
