//! The site CA: what the edges make the certificate with that they show to users. It can
//! certify the services' names and nothing else, and servers only.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rcgen::{
    BasicConstraints, CidrSubnet, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, NameConstraints, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::pki_types::PrivatePkcs8KeyDer;

use super::{Authority, Certificate, DAY, Issued, make_key, make_params};
use crate::config::cluster::{Cluster, Role};
use crate::error::UserError;

/// How long a site's certificate is valid.
const SITE_SECONDS: u64 = 90 * DAY;

/// The site CA, with its key.
pub struct SiteAuthority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    certificate: Certificate,
}

/// A new key for a site CA: PKCS #8 (DER) in base64.
pub fn make_site_key() -> Result<String> {
    Ok(BASE64_STANDARD.encode(make_key()?.serialize_der()))
}

/// The names and addresses under which users reach the edges.
pub fn list_site_names(cluster: &Cluster) -> (Vec<String>, Vec<IpAddr>) {
    let domain = &cluster.domain;
    let services = ["netbox", "db", "cache"].map(|service| format!("{service}.{domain}"));
    let names = std::iter::once(domain.clone()).chain(services).collect();
    let addresses = match cluster.vip {
        Some(vip) => vec![vip.into()],
        None => cluster.list_nodes(Role::Edge).map(|edge| edge.address.into()).collect(),
    };
    (names, addresses)
}

impl Authority {
    /// Certify the key of the site CA for this cluster, valid as long as the CA. What it
    /// issues is believed for the cluster's domain and the VIP (without one, the edges'
    /// addresses), and of servers alone: whoever has its key has neither the short names and
    /// addresses under which nodes know each other, nor anything to be let in with.
    ///
    /// # Errors
    /// A [`UserError`] when the CA is of a kind that can certify no other.
    pub fn certify_site_authority(&self, cluster: &Cluster, key: &str, now: u64) -> Result<String> {
        if self.certificate.depth == Some(0) {
            return Err(UserError::new("the cluster's CA cannot certify the edges' own CA")
                .why("an early version made it, for nodes alone")
                .help("bring a certificate for users in `[certificate]`, or make a new cluster")
                .into());
        }
        let key = read_site_key(key)?;
        let name = format!("{} site CA", cluster.name);
        let mut params = self.make_params(&name, now, self.certificate.not_after)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let (_, addresses) = list_site_names(cluster);
        let names = std::iter::once(GeneralSubtree::DnsName(cluster.domain.clone()));
        let addresses = addresses.into_iter().filter_map(|address| match address {
            IpAddr::V4(address) => Some(CidrSubnet::V4(address.octets(), [255; 4])),
            IpAddr::V6(_) => None,
        });
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: names.chain(addresses.map(GeneralSubtree::IpAddress)).collect(),
            excluded_subtrees: Vec::new(),
        });
        let signed = params.signed_by(&key, &self.issuer).context("certifying the site CA")?;
        Ok(signed.pem())
    }
}

fn read_site_key(text: &str) -> Result<KeyPair> {
    let der = BASE64_STANDARD.decode(text).ok().context("the site CA's key is no base64")?;
    KeyPair::from_pkcs8_der_and_sign_algo(
        &PrivatePkcs8KeyDer::from(der.as_slice()),
        &PKCS_ECDSA_P256_SHA256,
    )
    .ok()
    .context("the site CA's key is no key for ECDSA on P-256")
}

impl SiteAuthority {
    /// Read the site CA's certificate, PEM, and its key as [`make_site_key`] made it.
    pub fn read(certificate: &str, key: &str) -> Result<Self> {
        let read = Certificate::read(certificate).context("reading the site CA's certificate")?;
        let key = read_site_key(key)?;
        ensure!(read.key == key.public_key_raw(), "the site CA's key is not its certificate's");
        ensure!(read.is_ca, "the site CA's certificate is not that of a CA");
        let issuer = Issuer::from_ca_cert_pem(certificate, key)
            .context("reading the site CA's certificate")?;
        Ok(SiteAuthority { issuer, pem: certificate.to_string(), certificate: read })
    }

    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// When a certificate ends that is made now.
    pub fn find_end(&self, now: u64) -> u64 {
        (now + SITE_SECONDS).min(self.certificate.not_after)
    }

    /// A server's certificate for the services' names, with a new key; valid for 90 days, or
    /// until the site CA's own end. The certificate is followed by the site CA's.
    pub fn certify(&self, cluster: &Cluster, now: u64) -> Result<Issued> {
        let mut params = make_params(&cluster.domain, &cluster.name, now, self.find_end(now))?;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let (names, addresses) = list_site_names(cluster);
        let names = names.into_iter().map(|name| Ok(SanType::DnsName(name.try_into()?)));
        params.subject_alt_names = names
            .chain(addresses.into_iter().map(|address| Ok(SanType::IpAddress(address))))
            .collect::<Result<_>>()?;
        let key = make_key()?;
        let signed = params.signed_by(&key, &self.issuer).context("certifying the site")?;
        Ok(Issued { certificate: signed.pem() + &self.pem, key: key.serialize_pem() })
    }
}
