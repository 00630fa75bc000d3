//! The node's certificate: files for the services, and the agent's own TLS.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::files::{Access, find_account, make_private_folder, write_file};
use super::places::Places;
use crate::config::cluster::External;
use crate::seed::Seed;

/// Accounts of services that read the node's key, each from a folder of its own.
const ACCOUNTS: [&str; 5] = ["etcd", "postgres", "redis", "haproxy", "www-data"];

/// Files beside the node's, without their ending.
pub const POSTGRES_CA: &str = "external-postgres";
pub const REDIS_CA: &str = "external-redis";

/// Write the certificate and key where the services look for them.
pub fn write_files(places: &Places, seed: &Seed) -> Result<()> {
    let folder = places.tls();
    make_private_folder(&places.run())?;
    // Services of other users pass through to their own folders.
    set_mode(&places.run(), 0o755)?;
    make_private_folder(&folder)?;
    set_mode(&folder, 0o755)?;
    let public = Access { mode: 0o444, owner: None };
    write_file(&folder.join("ca.pem"), seed.ca.as_bytes(), public, false)?;
    write_file(&folder.join("node.pem"), seed.certificate.as_bytes(), public, false)?;
    let private = Access { mode: 0o400, owner: None };
    write_file(&folder.join("node.key"), seed.key.as_bytes(), private, false)?;
    for (name, ca) in list_external(&seed.cluster.external) {
        write_file(&folder.join(format!("{name}.pem")), ca.as_bytes(), public, false)?;
    }
    let passwd = std::fs::read_to_string(places.join("/etc/passwd")).unwrap_or_default();
    for account in ACCOUNTS {
        let Some((user, group)) = find_account(&passwd, account) else { continue };
        let folder = folder.join(account);
        make_private_folder(&folder)?;
        let access = Access { mode: 0o400, owner: Some((user, group)) };
        let both = format!("{}{}", end_line(&seed.certificate), seed.key);
        let files = [
            ("ca.pem", &seed.ca),
            ("node.pem", &seed.certificate),
            ("node.key", &seed.key),
            ("both.pem", &both),
        ];
        for (name, text) in files {
            write_file(&folder.join(name), text.as_bytes(), access, false)?;
        }
        let site = folder.join("site.pem");
        if account == "haproxy" && !site.exists() {
            // HAProxy wants a file there; this is what it shows until etcd has answered.
            write_file(&site, both.as_bytes(), access, false)?;
        }
        std::os::unix::fs::chown(&folder, Some(user), Some(group))
            .with_context(|| format!("giving {} to {account}", folder.display()))?;
    }
    Ok(())
}

/// Who certifies the services that are not the cluster's own.
fn list_external(external: &External) -> Vec<(&'static str, &str)> {
    let postgres = external.postgres.iter().map(|postgres| (POSTGRES_CA, postgres.ca.as_str()));
    postgres.chain(external.redis.iter().map(|redis| (REDIS_CA, redis.ca.as_str()))).collect()
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .with_context(|| format!("setting the mode of {}", path.display()))
}

fn end_line(text: &str) -> String {
    format!("{}\n", text.trim_end())
}

/// What the agent speaks with: as client and as server, always with both certificates.
#[derive(Clone)]
pub struct Tls {
    pub client: Arc<ClientConfig>,
    pub server: Arc<ServerConfig>,
}

impl Tls {
    pub fn from_pem(ca: &str, certificate: &str, key: &str) -> Result<Self> {
        let chain = || read_certificates(certificate).context("reading the node's certificate");
        let key = || {
            PrivateKeyDer::from_pem_slice(key.as_bytes())
                .map_err(|_| anyhow::anyhow!("the node's key is no PEM"))
        };
        let mut roots = RootCertStore::empty();
        for certificate in read_certificates(ca).context("reading the CA")? {
            roots.add(certificate).context("trusting the cluster's CA")?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(chain()?, key()?)
            .context("using the node's certificate")?;
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build()?;
        let server = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain()?, key()?)
            .context("using the node's certificate")?;
        Ok(Tls { client: Arc::new(client), server: Arc::new(server) })
    }

    /// A client that trusts another CA and shows no certificate.
    pub fn make_stranger(ca: &str) -> Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        for certificate in read_certificates(ca).context("reading the CA")? {
            roots.add(certificate).context("trusting the CA")?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Arc::new(config))
    }

    pub fn from_seed(seed: &Seed) -> Result<Self> {
        Tls::from_pem(&seed.ca, &seed.certificate, &seed.key)
    }

    /// A client of the cluster's own HTTPS services; no proxy, no names to look up.
    pub fn make_http_client(&self) -> Result<reqwest::Client> {
        reqwest::Client::builder()
            .tls_backend_preconfigured((*self.client).clone())
            .no_proxy()
            .no_hickory_dns()
            .connect_timeout(Duration::from_secs(1))
            .tcp_nodelay(true)
            .pool_idle_timeout(Duration::from_secs(20))
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .context("making an HTTP client")
    }
}

fn read_certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let all = all.map_err(|_| anyhow::anyhow!("it is no PEM"))?;
    anyhow::ensure!(!all.is_empty(), "it holds no certificate");
    Ok(all)
}
