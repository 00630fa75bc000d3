//! An IPv4 network.

use std::net::Ipv4Addr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An address whose host bits are zero, and the length of its prefix. Written `10.0.0.0/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4Network {
    address: Ipv4Addr,
    prefix: u8,
}

impl Ipv4Network {
    /// `None` when the prefix is longer than 32 or a host bit is set.
    pub fn new(address: Ipv4Addr, prefix: u8) -> Option<Self> {
        let mask = make_mask(prefix)?;
        (address.to_bits() & !mask == 0).then_some(Ipv4Network { address, prefix })
    }

    pub fn address(self) -> Ipv4Addr {
        self.address
    }

    /// Bits, 0 to 32.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask() == self.address.to_bits()
    }

    /// Whether a machine may have this address: it is inside, and neither the network's
    /// own nor, where there is one, that of the broadcast.
    pub fn has_host(self, address: Ipv4Addr) -> bool {
        let is_edge = address == self.address || address == self.broadcast();
        self.contains(address) && (self.prefix >= 31 || !is_edge)
    }

    /// The last address.
    pub fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() | !self.mask())
    }

    fn mask(self) -> u32 {
        make_mask(self.prefix).unwrap_or(u32::MAX)
    }
}

fn make_mask(prefix: u8) -> Option<u32> {
    let shift = 32u32.checked_sub(u32::from(prefix))?;
    Some(u32::MAX.checked_shl(shift).unwrap_or(0))
}

impl std::fmt::Display for Ipv4Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl std::str::FromStr for Ipv4Network {
    type Err = String;

    /// # Errors
    /// How to write it instead.
    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "write an address and the length of its prefix, such as 10.0.0.0/24";
        let (address, digits) = text.split_once('/').ok_or(FORM)?;
        let address: Ipv4Addr = address.parse().map_err(|_| FORM)?;
        let is_plain = matches!(digits.len(), 1 | 2)
            && digits.bytes().all(|b| b.is_ascii_digit())
            && (digits.len() == 1 || !digits.starts_with('0'));
        let prefix: u8 = digits.parse().ok().filter(|_| is_plain).ok_or(FORM)?;
        let mask = make_mask(prefix).ok_or(FORM)?;
        Ipv4Network::new(address, prefix).ok_or_else(|| {
            let network = Ipv4Addr::from_bits(address.to_bits() & mask);
            format!("this is an address inside a network: write {network}/{prefix}")
        })
    }
}

impl Serialize for Ipv4Network {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Ipv4Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_network_knows_its_hosts() {
        let network: Ipv4Network = "10.1.2.0/24".parse().unwrap();
        for (address, inside, host) in [
            ("10.1.2.0", true, false),
            ("10.1.2.1", true, true),
            ("10.1.2.255", true, false),
            ("10.1.3.1", false, false),
        ] {
            let address = address.parse().unwrap();
            assert_eq!((network.contains(address), network.has_host(address)), (inside, host));
        }
        let all: Ipv4Network = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains(Ipv4Addr::new(9, 9, 9, 9)));
        let pair: Ipv4Network = "10.0.0.0/31".parse().unwrap();
        assert!(pair.has_host(Ipv4Addr::new(10, 0, 0, 0)));
    }

    #[test]
    fn what_is_no_network_is_told_how_to_write_one() {
        for bad in ["", "10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/+8", "10.0.0.0/08", "x/8"]
        {
            let why = bad.parse::<Ipv4Network>().unwrap_err();
            assert!(why.ends_with("such as 10.0.0.0/24"), "{bad}: {why}");
        }
        let why = "10.0.0.7/24".parse::<Ipv4Network>().unwrap_err();
        assert!(why.ends_with("write 10.0.0.0/24"), "{why}");
    }

    proptest! {
        #[test]
        fn every_network_reads_as_it_is_written(bits: u32, prefix in 0u8..=32) {
            let mask = make_mask(prefix).unwrap();
            let network = Ipv4Network::new(Ipv4Addr::from_bits(bits & mask), prefix).unwrap();
            prop_assert_eq!(network.to_string().parse::<Ipv4Network>(), Ok(network));
            prop_assert!(network.contains(Ipv4Addr::from_bits(bits)));
        }
    }
}
