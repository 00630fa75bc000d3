//! The cluster file as it is typed. Nothing here is checked beyond keys and types.

use serde::Deserialize;
use toml::Spanned;

use crate::config::raw::Text;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawCluster {
    pub name: Text,
    pub domain: Text,
    pub vip: Option<Text>,
    pub network: Text,
    pub gateway: Option<Text>,
    #[serde(default)]
    pub dns: Vec<Text>,
    #[serde(default)]
    pub ntp: Vec<Text>,
    #[serde(default)]
    pub node: Vec<RawNode>,
    pub storage: Option<RawStorage>,
    pub backup: Option<Spanned<RawBackup>>,
    #[serde(default)]
    pub external: RawExternal,
    pub certificate: Option<RawCertificate>,
    #[serde(default)]
    pub tuning: RawTuning,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table with `name`, `address`, `zone` and `profile`")]
pub(super) struct RawNode {
    pub name: Text,
    pub address: Text,
    pub zone: Text,
    pub profile: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table with `endpoint`, `bucket` and `region`")]
pub(super) struct RawStorage {
    pub endpoint: Text,
    pub bucket: Text,
    pub region: Text,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default, expecting = "tables such as [external.postgres]")]
pub(super) struct RawExternal {
    pub postgres: Option<RawPostgres>,
    pub redis: Option<RawRedis>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table with `host` and `ca`")]
pub(super) struct RawPostgres {
    pub host: Text,
    pub port: Option<Spanned<u32>>,
    pub database: Option<Text>,
    pub user: Option<Text>,
    pub ca: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table with `host` and `ca`")]
pub(super) struct RawRedis {
    pub host: Text,
    pub port: Option<Spanned<u32>>,
    pub ca: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table such as [backup]")]
pub(super) struct RawBackup {
    pub directory: Option<Text>,
    pub keep: Option<Spanned<u32>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table with `chain` and `key`")]
pub(super) struct RawCertificate {
    pub chain: Text,
    pub key: Text,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default, expecting = "a table such as [tuning]")]
pub(super) struct RawTuning {
    pub early_failover: Option<bool>,
    pub patroni_ttl: Option<Spanned<u32>>,
    pub patroni_loop_wait: Option<Spanned<u32>>,
    pub patroni_retry_timeout: Option<Spanned<u32>>,
    pub vrrp_router_id: Option<Spanned<u32>>,
}
