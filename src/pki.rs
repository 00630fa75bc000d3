//! The cluster's certificate authority and what it certifies: nodes, the operator, and
//! the seeds it signs. All keys are ECDSA on P-256, all signatures use SHA-256.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SigningKey,
};
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ECDSA_WITH_SHA256,
};
use x509_parser::pem::Pem;
use x509_parser::prelude::FromDer;

use crate::config::cluster::{Cluster, Node};
use crate::digest::Digest;
use crate::error::UserError;

mod chain;
mod site;

pub use chain::{Chain, MAX_CHAIN, MAX_KEY};
pub use site::{SiteAuthority, list_site_names, make_site_key};

const DAY: u64 = 86_400;
const YEAR: u64 = 365 * DAY;
const CA_SECONDS: u64 = 10 * YEAR;
const NODE_SECONDS: u64 = 2 * YEAR;
/// Certificates are valid from this long ago, for machines whose clocks are behind.
const SLACK: u64 = DAY;
/// Bytes of a certificate or a key, PEM.
const MAX_PEM: usize = 16 << 10;
/// Common name of the operator's certificate.
const OPERATOR: &str = "operator";

/// The certificate authority, with its key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: Certificate,
}

/// A certificate and its key, both PEM.
pub struct Issued {
    pub certificate: String,
    /// PKCS #8.
    pub key: String,
}

impl Authority {
    /// Make a new one for a cluster. `now` is in seconds since 1970, UTC.
    ///
    /// # Errors
    /// None that the user can mend.
    pub fn make(cluster: &str, now: u64) -> Result<(Self, Issued)> {
        let mut params = make_params(&format!("{cluster} CA"), cluster, now, now + CA_SECONDS)?;
        // Below it stands the site CA alone.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            // Of seeds.
            KeyUsagePurpose::DigitalSignature,
        ];
        let key = make_key()?;
        let certificate = params.self_signed(&key).context("making the CA's certificate")?.pem();
        let issued = Issued { certificate, key: key.serialize_pem() };
        Ok((Authority::read(&issued.certificate, &issued.key)?, issued))
    }

    /// Read the CA's certificate and its key, both PEM.
    pub fn read(certificate: &str, key: &str) -> Result<Self> {
        let read = Certificate::read(certificate).context("reading the CA's certificate")?;
        let key = read_key(key).context("reading the CA's key")?;
        ensure!(read.key == key.public_key_raw(), "the CA's key is not that of its certificate");
        ensure!(read.is_ca, "the CA's certificate is not that of a CA");
        let issuer =
            Issuer::from_ca_cert_pem(certificate, key).context("reading the CA's certificate")?;
        Ok(Authority { issuer, certificate: read })
    }

    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// A node's certificate for both sides of a connection, with a new key; valid for two
    /// years, or until the CA's own end.
    pub fn certify_node(&self, cluster: &Cluster, node: &Node, now: u64) -> Result<Issued> {
        let mut params = self.make_params(&node.name, now, now + NODE_SECONDS)?;
        params.subject_alt_names = list_names(cluster, node)?;
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.certify(&params).with_context(|| format!("certifying the node {}", node.name))
    }

    /// The operator's certificate, for clients only; valid as long as the CA's, beside
    /// whose key it lies.
    pub fn certify_operator(&self, now: u64) -> Result<Issued> {
        let mut params = self.make_params(OPERATOR, now, self.certificate.not_after)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.certify(&params).context("certifying the operator")
    }

    /// A signature of the CA: ASN.1, as X.509 has it.
    pub fn sign(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        self.issuer.key().sign(bytes).context("signing with the CA's key")
    }

    fn make_params(&self, name: &str, now: u64, end: u64) -> Result<CertificateParams> {
        let ca = &self.certificate;
        if now >= ca.not_after || now < ca.not_before {
            return Err(UserError::new("the cluster's CA is not valid now")
                .why("its certificate has expired, or this machine's clock is wrong")
                .into());
        }
        let mut params = make_params(name, &ca.organization, now, end.min(ca.not_after))?;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        Ok(params)
    }

    fn certify(&self, params: &CertificateParams) -> Result<Issued> {
        let key = make_key()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Issued { certificate, key: key.serialize_pem() })
    }
}

fn make_key() -> Result<KeyPair> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).context("making a key")
}

fn make_params(name: &str, organization: &str, now: u64, end: u64) -> Result<CertificateParams> {
    // Year 9999 is the last that a certificate can say.
    ensure!(now <= end && end < 253_402_300_800, "the clock is wrong: {now} s since 1970");
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let mut params = CertificateParams::default();
    params.not_before = epoch + Duration::from_secs(now.saturating_sub(SLACK));
    params.not_after = epoch + Duration::from_secs(end);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, organization);
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(params)
}

/// What a node may be called by: its own names and those of the services it takes part in.
fn list_names(cluster: &Cluster, node: &Node) -> Result<Vec<SanType>> {
    let domain = &cluster.domain;
    let mut names = vec![node.name.clone(), format!("{}.{domain}", node.name)];
    names.extend(["db", "cache", "netbox"].map(|service| format!("{service}.{domain}")));
    names.extend([domain.clone(), "localhost".to_string()]);
    let names = names.into_iter().map(|name| Ok(SanType::DnsName(name.try_into()?)));
    let addresses = [Some(node.address), cluster.vip, Some(Ipv4Addr::LOCALHOST)];
    let addresses = addresses.into_iter().flatten();
    names.chain(addresses.map(|address| Ok(SanType::IpAddress(address.into())))).collect()
}

/// Read a private key: PKCS #8 in PEM, ECDSA on P-256. Its text is in no error.
pub fn read_key(pem: &str) -> Result<KeyPair> {
    ensure!(pem.len() <= MAX_PEM, "the key is too long");
    KeyPair::from_pkcs8_pem_and_sign_algo(pem, &PKCS_ECDSA_P256_SHA256)
        .ok()
        .context("this is no key for ECDSA on P-256")
}

/// What matters of a certificate. Reading it verifies nothing but its form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Common name of the subject.
    pub name: String,
    /// Organization of the subject: the cluster's name.
    pub organization: String,
    pub dns_names: Vec<String>,
    pub addresses: Vec<IpAddr>,
    /// Seconds since 1970, UTC; the first and the last of its validity.
    pub not_before: u64,
    pub not_after: u64,
    pub is_ca: bool,
    /// How many CAs may stand below it; `None` when nothing is said.
    pub depth: Option<u32>,
    /// Of the whole certificate.
    pub fingerprint: Digest,
    /// An uncompressed point on P-256.
    key: Vec<u8>,
    issuer: Vec<u8>,
    subject: Vec<u8>,
    signed: Vec<u8>,
    signature: Vec<u8>,
}

impl Certificate {
    /// Read one certificate, PEM, of a key on P-256 and signed with ECDSA and SHA-256.
    pub fn read(pem: &str) -> Result<Self> {
        ensure!(pem.len() <= MAX_PEM, "the certificate is too long");
        let mut blocks = Pem::iter_from_buffer(pem.as_bytes());
        let (Some(Ok(block)), None) = (blocks.next(), blocks.next()) else {
            anyhow::bail!("this is not one certificate in PEM");
        };
        ensure!(block.label == "CERTIFICATE", "this is no certificate in PEM");
        Certificate::read_der(&block.contents)
    }

    /// The same in DER, as TLS has it.
    pub fn read_der(bytes: &[u8]) -> Result<Self> {
        ensure!(bytes.len() <= MAX_PEM, "the certificate is too long");
        let (rest, certificate) =
            X509Certificate::from_der(bytes).ok().context("the certificate is damaged")?;
        ensure!(rest.is_empty(), "the certificate is damaged");
        read_fields(&certificate, Digest::of(bytes))
    }

    /// Whether it is the operator's: of that name, and from the CA's own hand. A node that
    /// bears the name has names and addresses to be found under; the operator has none.
    pub fn is_operator(&self, ca: &Certificate) -> bool {
        self.name == OPERATOR
            && !self.is_ca
            && self.dns_names.is_empty()
            && self.addresses.is_empty()
            && ca.has_issued(self)
    }

    /// Whether this one's key made the signature over the bytes.
    pub fn has_signed(&self, bytes: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &self.key).verify(bytes, signature).is_ok()
    }

    /// Whether this one's key has signed the other certificate, which names it as issuer.
    pub fn has_issued(&self, other: &Certificate) -> bool {
        self.is_ca
            && other.issuer == self.subject
            && self.has_signed(&other.signed, &other.signature)
    }

    /// Whether the key, PKCS #8 in PEM, is this certificate's.
    pub fn fits(&self, key: &str) -> bool {
        read_key(key).is_ok_and(|key| key.public_key_raw() == self.key)
    }
}

fn read_fields(certificate: &X509Certificate<'_>, fingerprint: Digest) -> Result<Certificate> {
    let public = &certificate.tbs_certificate.subject_pki;
    let is_p256 = public.algorithm.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY
        && public
            .algorithm
            .parameters
            .as_ref()
            .and_then(|curve| curve.as_oid().ok())
            .is_some_and(|curve| curve == OID_EC_P256);
    let is_sha256 = certificate.signature_algorithm.algorithm == OID_SIG_ECDSA_WITH_SHA256
        && certificate.tbs_certificate.signature.algorithm == OID_SIG_ECDSA_WITH_SHA256;
    ensure!(is_p256 && is_sha256, "the certificate is not of ECDSA on P-256 with SHA-256");
    let subject = certificate.subject();
    let take = |text: Option<&x509_parser::x509::AttributeTypeAndValue<'_>>| {
        text.and_then(|text| text.as_str().ok()).unwrap_or_default().to_string()
    };
    let mut read = Certificate {
        name: take(subject.iter_common_name().next()),
        organization: take(subject.iter_organization().next()),
        dns_names: Vec::new(),
        addresses: Vec::new(),
        not_before: u64::try_from(certificate.validity().not_before.timestamp()).unwrap_or(0),
        not_after: u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0),
        is_ca: certificate.is_ca(),
        depth: certificate
            .basic_constraints()
            .ok()
            .flatten()
            .and_then(|found| found.value.path_len_constraint),
        fingerprint,
        key: public.subject_public_key.data.to_vec(),
        issuer: certificate.issuer().as_raw().to_vec(),
        subject: subject.as_raw().to_vec(),
        signed: certificate.tbs_certificate.as_ref().to_vec(),
        signature: certificate.signature_value.data.to_vec(),
    };
    let names = certificate.subject_alternative_name().ok().context("doubled alternative names")?;
    for name in names.map(|names| &names.value.general_names).into_iter().flatten() {
        match name {
            GeneralName::DNSName(name) => read.dns_names.push(name.to_string()),
            GeneralName::IPAddress(bytes) => {
                read.addresses.extend(<[u8; 4]>::try_from(*bytes).map(IpAddr::from));
                read.addresses.extend(<[u8; 16]>::try_from(*bytes).map(IpAddr::from));
            }
            _ => {}
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests;
