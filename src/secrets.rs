//! The cluster's shared secrets: which there are, and who gets them.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result, anyhow};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Deserializer, Serialize};

use crate::config::cluster::{Cluster, Role};
use crate::pki::make_site_key;

/// All shared secrets by name, with the roles that need them; `fingerprint` is the key of
/// the fingerprints by which nodes compare the others without showing them, `site_key` the
/// key of the site CA, and `site_seal` that under which etcd holds the site's certificate.
pub const SECRETS: [(&str, &[Role]); 18] = [
    ("postgres_superuser", &[Role::Db]),
    ("postgres_replication", &[Role::Db]),
    ("postgres_rewind", &[Role::Db]),
    ("postgres_netbox", &[Role::Db, Role::Web]),
    ("patroni_rest", &[Role::Db]),
    ("redis", &[Role::Cache, Role::Web, Role::Edge]),
    ("sentinel", &[Role::Cache]),
    ("keepalived", &[Role::Edge]),
    ("haproxy_stats", &[Role::Edge]),
    ("fingerprint", &Role::ALL),
    (SITE_KEY, &[Role::Edge]),
    (SITE_SEAL, &[Role::Edge]),
    // Whatever is lost with the cluster, this must not be: it opens the backups.
    (BACKUP_CIPHER, &[Role::Db]),
    ("netbox_secret_key", &[Role::Web]),
    ("netbox_pepper", &[Role::Web]),
    ("netbox_admin", &[Role::Web]),
    (S3_ACCESS_KEY, &[Role::Db, Role::Web]),
    (S3_SECRET_KEY, &[Role::Db, Role::Web]),
];

pub const SITE_KEY: &str = "site_key";
pub const SITE_SEAL: &str = "site_seal";
const BACKUP_CIPHER: &str = "backup_cipher";
pub const S3_ACCESS_KEY: &str = "s3_access_key";
pub const S3_SECRET_KEY: &str = "s3_secret_key";
pub const POSTGRES: &str = "postgres_netbox";
pub const REDIS: &str = "redis";

/// So many of [`SECRETS`] every cluster's directory has had from its beginning: one that
/// lacks such a secret has lost it. Those behind came with later versions.
pub const FIRST: usize = 10;

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

    /// A new one: 256 random bits as 64 hexadecimal digits.
    pub fn make() -> Result<Self> {
        let mut bytes = [0; 32];
        let filled = SystemRandom::new().fill(&mut bytes);
        filled.map_err(|_| anyhow!("the kernel gives no random bytes"))?;
        Ok(Secret(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
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

/// A secret of each name that the cluster needs: those that are given, the others new.
pub fn make_secrets(
    cluster: &Cluster,
    given: &BTreeMap<String, Secret>,
) -> Result<BTreeMap<String, Secret>> {
    let names = SECRETS.iter().map(|(name, _)| *name).filter(|name| is_needed(cluster, name));
    let make = |name: &str| match given.get(name) {
        Some(secret) => Ok(secret.clone()),
        None => make_secret(name),
    };
    names.map(|name| Ok((name.to_string(), make(name)?))).collect()
}

/// Whether a cluster like this has a use for the secret.
pub fn is_needed(cluster: &Cluster, name: &str) -> bool {
    match name {
        S3_ACCESS_KEY | S3_SECRET_KEY => cluster.storage.is_some(),
        _ => true,
    }
}

/// The secrets that somebody else has made, and the operator brings.
pub fn list_brought(cluster: &Cluster) -> Vec<&'static str> {
    let mut names = Vec::new();
    if cluster.storage.is_some() {
        names.extend([S3_ACCESS_KEY, S3_SECRET_KEY]);
    }
    names.extend(cluster.external.postgres.is_some().then_some(POSTGRES));
    names.extend(cluster.external.redis.is_some().then_some(REDIS));
    names
}

/// A new secret of this name.
pub fn make_secret(name: &str) -> Result<Secret> {
    match name {
        SITE_KEY => Secret::new(make_site_key()?).context("making the site CA's key"),
        // For labs; in the form that S3 servers like.
        S3_ACCESS_KEY => {
            let random = Secret::make()?;
            let digits = random.reveal().get(..24).unwrap_or_default();
            Secret::new(format!("GK{digits}")).context("making an access key")
        }
        _ => Secret::make(),
    }
}

/// The names of the secrets that a node of this cluster with these roles gets.
pub fn list_needed(cluster: &Cluster, roles: &[Role]) -> impl Iterator<Item = &'static str> {
    let is_read = move |name: &str, role: &Role| match (name, role) {
        (S3_ACCESS_KEY | S3_SECRET_KEY, Role::Db) | (BACKUP_CIPHER, _) => {
            cluster.backup.as_ref().is_some_and(|backup| backup.directory.is_none())
        }
        _ => true,
    };
    let is_for = move |name: &str, readers: &[Role]| {
        readers.iter().any(|role| roles.contains(role) && is_read(name, role))
    };
    let names = SECRETS.iter().filter(move |(name, readers)| is_for(name, readers));
    names.map(|(name, _)| *name).filter(|name| is_needed(cluster, name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::cluster::Backup;

    #[test]
    fn a_secret_shows_itself_to_nobody() {
        let secret = Secret::new("hunter2").unwrap();
        assert_eq!(format!("{secret:?}"), "Secret(hidden)");
        for text in ["[\"hunter 2\"]", "[7272]", "[true]", "[{\"hunter\":2}]"] {
            let error = serde_json::from_str::<Vec<Secret>>(text).unwrap_err().to_string();
            assert!(!error.contains("hunter") && !error.contains("72"), "{error}");
        }
    }

    fn cluster(storage: bool) -> Cluster {
        let text = serde_json::json!({
            "name": "c", "domain": "c.test", "vip": null, "network": "10.0.0.0/24",
            "gateway": null, "dns": [], "ntp": [], "nodes": [], "tuning": {},
            "storage": storage.then(|| serde_json::json!({
                "endpoint": "https://s3.test", "bucket": "netbox", "region": "r"
            })),
        });
        serde_json::from_value(text).unwrap()
    }

    #[test]
    fn secrets_are_long_and_unlike_each_other() {
        let secrets = make_secrets(&cluster(true), &BTreeMap::new()).unwrap();
        let texts: std::collections::BTreeSet<&str> =
            secrets.values().map(Secret::reveal).collect();
        assert_eq!(texts.len(), SECRETS.len());
        assert!(texts.iter().all(|text| text.len() >= 26));
        let without = make_secrets(&cluster(false), &BTreeMap::new()).unwrap();
        assert_eq!(without.len(), SECRETS.len() - 2);
    }

    #[test]
    fn what_is_given_is_not_made() {
        let given = BTreeMap::from([(REDIS.to_string(), Secret::new("theirs").unwrap())]);
        assert_eq!(make_secrets(&cluster(false), &given).unwrap()[REDIS].reveal(), "theirs");
    }

    #[test]
    fn a_role_gets_its_secrets_and_no_others() {
        let without = cluster(false);
        let list = |roles: &[Role]| list_needed(&without, roles).collect::<Vec<_>>().join(" ");
        assert_eq!(list(&[Role::Cache]), "redis sentinel fingerprint");
        assert_eq!(
            list(&[Role::Web]),
            "postgres_netbox redis fingerprint netbox_secret_key netbox_pepper netbox_admin"
        );
        assert_eq!(
            list(&[Role::Edge]),
            "redis keepalived haproxy_stats fingerprint site_key site_seal"
        );
        assert!(list(&[Role::Db]).starts_with("postgres_superuser postgres_replication"));
        assert!(!list(&[Role::Db]).contains("redis"));
        let mut with = cluster(true);
        let list =
            |cluster: &Cluster, role| list_needed(cluster, &[role]).collect::<Vec<_>>().join(" ");
        assert!(list(&with, Role::Web).ends_with(" netbox_admin s3_access_key s3_secret_key"));
        // A db node has them for backups alone.
        assert!(
            !list(&with, Role::Db).contains("s3_") && !list(&with, Role::Db).contains("cipher")
        );
        with.backup = Some(Backup { directory: None, keep: 4 });
        assert!(list(&with, Role::Db).ends_with(" backup_cipher s3_access_key s3_secret_key"));
    }
}
