//! A server's chain of certificates with its key, of any kind that TLS servers use: what
//! the edges show to users, made here or brought.

use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::Issued;
use crate::digest::Digest;

/// Bytes of a chain, PEM: five certificates of the large kind.
pub const MAX_CHAIN: usize = 16 << 10;
/// Bytes of a key, PEM.
pub const MAX_KEY: usize = 8 << 10;
const MAX_LENGTH: usize = 6;

/// A chain, the server's own certificate first, and its key, both in plain PEM without
/// anything between.
pub struct Chain {
    pub pem: Issued,
    /// Of the server's certificate.
    pub fingerprint: Digest,
    /// DER of the server's certificate.
    pub leaf: Vec<u8>,
    pub dns_names: Vec<String>,
    pub addresses: Vec<IpAddr>,
    /// Seconds since 1970, UTC, in which all of the chain is valid.
    pub not_before: u64,
    pub not_after: u64,
}

impl Chain {
    /// Read a chain and its key, PEM, and check that they belong together: the key is that of
    /// the first certificate, and each certificate names the next as its issuer.
    ///
    /// # Errors
    /// What does not fit, in words; nothing of the key is in them.
    pub fn read(chain: &str, key: &str) -> Result<Self> {
        ensure!(chain.len() <= MAX_CHAIN, "the chain has more than {} KiB", MAX_CHAIN >> 10);
        ensure!(key.len() <= MAX_KEY, "the key has more than {} KiB", MAX_KEY >> 10);
        let ders: Result<Vec<CertificateDer<'static>>, _> =
            CertificateDer::pem_slice_iter(chain.as_bytes()).collect();
        let ders = ders.ok().context("the chain is no PEM")?;
        ensure!(!ders.is_empty(), "the chain holds no certificate");
        ensure!(ders.len() <= MAX_LENGTH, "the chain has more than {MAX_LENGTH} certificates");
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
            .ok()
            .context("the key's file holds no private key in PEM, or one with a passphrase")?;
        let label = match &key {
            PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
            PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
            PrivateKeyDer::Pkcs8(_) => "PRIVATE KEY",
            _ => bail!("the key is of an unknown kind"),
        };
        let text: String = ders.iter().map(|der| write_pem("CERTIFICATE", der)).collect();
        let pem = Issued { certificate: text, key: write_pem(label, key.secret_der()) };
        let leaf = ders[0].to_vec();
        let mut read = read_parts(&ders, pem)?;
        read.leaf = leaf;
        let provider = rustls::crypto::ring::default_provider();
        match CertifiedKey::from_der(ders, key, &provider) {
            Ok(pair) if pair.keys_match().is_ok() => Ok(read),
            Err(rustls::Error::General(_)) => bail!("the key is of a kind that cannot be used"),
            _ => bail!("the key is not that of the first certificate"),
        }
    }

    /// Whether the name is in the server's certificate, or matches a wildcard of it.
    pub fn covers(&self, name: &str) -> bool {
        let parent = name.split_once('.').map_or("", |(_, parent)| parent);
        self.dns_names.iter().any(|known| {
            let known = known.to_ascii_lowercase();
            known == name || known.strip_prefix("*.").is_some_and(|rest| rest == parent)
        })
    }
}

fn read_parts(ders: &[CertificateDer<'_>], pem: Issued) -> Result<Chain> {
    let mut certificates = Vec::new();
    for der in ders {
        let (rest, certificate) =
            X509Certificate::from_der(der).ok().context("a certificate is damaged")?;
        ensure!(rest.is_empty(), "a certificate is damaged");
        certificates.push(certificate);
    }
    for (i, pair) in certificates.windows(2).enumerate() {
        let (below, above) = (&pair[0], &pair[1]);
        let is_next = below.issuer().as_raw() == above.subject().as_raw() && above.is_ca();
        ensure!(
            is_next,
            "the certificates are not in their order: number {} is not of the CA behind it",
            i + 1
        );
    }
    let leaf = &certificates[0];
    let second = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    let starts = certificates.iter().map(|one| second(one.validity().not_before));
    let ends = certificates.iter().map(|one| second(one.validity().not_after));
    let mut chain = Chain {
        fingerprint: Digest::of(&ders[0]),
        leaf: Vec::new(),
        pem,
        dns_names: Vec::new(),
        addresses: Vec::new(),
        not_before: starts.max().unwrap_or(0),
        not_after: ends.min().unwrap_or(0),
    };
    let names = leaf.subject_alternative_name().ok().context("doubled alternative names")?;
    for name in names.map(|names| &names.value.general_names).into_iter().flatten() {
        match name {
            GeneralName::DNSName(name) => chain.dns_names.push(name.to_string()),
            GeneralName::IPAddress(bytes) => {
                chain.addresses.extend(<[u8; 4]>::try_from(*bytes).map(IpAddr::from));
                chain.addresses.extend(<[u8; 16]>::try_from(*bytes).map(IpAddr::from));
            }
            _ => {}
        }
    }
    Ok(chain)
}

fn write_pem(label: &str, der: &[u8]) -> String {
    let text = BASE64_STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.extend(line.iter().map(|byte| char::from(*byte)));
        pem.push('\n');
    }
    pem + &format!("-----END {label}-----\n")
}
