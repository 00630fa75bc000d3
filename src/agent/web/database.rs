//! NetBox's database as the agent sees it, over TLS as NetBox does.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustls::ClientConfig;
use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, Config};

use super::decide::{Schema, Version};
use crate::agent::postgres_tls::Connector;
use crate::agent::systemd::run_program;
use crate::agent::tls::Tls;
use crate::secrets::Secret;
use crate::seed::Seed;

/// Where this node's HAProxy has PostgreSQL's leader.
const PROXY_PORT: u16 = 15432;
const CONNECT: Duration = Duration::from_secs(3);
/// Bytes of the schema, once it is unpacked.
const MAX_SCHEMA: u64 = 64 << 20;
/// Held in the database by the one who changes its schema; "netbox" in ASCII.
const CHANGE_LOCK: i64 = 0x6e65_7462_6f78;

/// How to get to the database.
#[derive(Clone)]
pub struct Access {
    host: String,
    /// Where the host is, when names have no say in it.
    address: Option<IpAddr>,
    port: u16,
    user: String,
    database: String,
    password: Secret,
    tls: Arc<ClientConfig>,
}

impl Access {
    pub fn new(seed: &Seed, tls: &Tls, password: Secret) -> Result<Self> {
        Ok(match &seed.cluster.external.postgres {
            Some(external) => Access {
                host: external.host.clone(),
                address: external.host.parse().ok(),
                port: external.port,
                user: external.user.clone(),
                database: external.database.clone(),
                password,
                tls: Tls::make_stranger(&external.ca).context("trusting PostgreSQL's CA")?,
            },
            None => Access {
                host: format!("db.{}", seed.cluster.domain),
                address: Some(Ipv4Addr::LOCALHOST.into()),
                port: PROXY_PORT,
                user: "netbox".to_string(),
                database: "netbox".to_string(),
                password,
                tls: tls.client.clone(),
            },
        })
    }

    /// Connect; the connection works in the background until the client is dropped.
    pub async fn connect(&self) -> Result<Client> {
        let address = match self.address {
            Some(address) => address,
            None => find_address(&self.host).await?,
        };
        let mut config = Config::new();
        config
            .host(&self.host)
            .hostaddr(address)
            .port(self.port)
            .user(&self.user)
            .password(self.password.reveal())
            .dbname(&self.database)
            .connect_timeout(CONNECT)
            .keepalives_idle(Duration::from_secs(5))
            .tcp_user_timeout(Duration::from_secs(10))
            .ssl_mode(SslMode::Require)
            .application_name("stanchion-agent");
        let connecting = config.connect(Connector::new(self.tls.clone()));
        let (client, connection) = match tokio::time::timeout(2 * CONNECT, connecting).await {
            Ok(Ok(both)) => both,
            Ok(Err(error)) => bail!("the database cannot be reached: {}", describe(&error)),
            Err(_) => bail!("the database cannot be reached: no answer"),
        };
        tokio::spawn(async move {
            // What ends it is told to whoever asks next.
            let _ = connection.await;
        });
        Ok(client)
    }
}

/// This program is linked for machines without the libraries that names need there.
pub async fn find_address(host: &str) -> Result<IpAddr> {
    let text = run_program(&["getent", "ahostsv4", "--", host])
        .await
        .with_context(|| format!("looking for the address of {host}"))?;
    let first = text.split_whitespace().next().and_then(|word| word.parse().ok());
    first.with_context(|| format!("{host} has no address"))
}

/// What the server said, which the error alone does not show.
pub fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(said) => said.message().to_string(),
        None => {
            let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
            format!("{error}{}", cause.unwrap_or_default())
        }
    }
}

fn explain(what: &'static str) -> impl Fn(tokio_postgres::Error) -> anyhow::Error {
    move |error| anyhow::anyhow!("{what}: {}", describe(&error))
}

/// What the database holds.
pub async fn read_schema(client: &Client) -> Result<Schema> {
    let failed = explain("looking at NetBox's tables");
    const TABLES: &str = "SELECT to_regclass('public.django_migrations') IS NOT NULL, \
                          to_regclass('stanchion.netbox') IS NOT NULL";
    let row = client.query_one(TABLES, &[]).await.map_err(&failed)?;
    let (has_tables, has_record): (bool, bool) = (row.get(0), row.get(1));
    if !has_tables {
        return Ok(Schema::Empty);
    }
    if !has_record {
        return Ok(Schema::Foreign);
    }
    let rows = client.query("SELECT version FROM stanchion.netbox", &[]).await.map_err(&failed)?;
    let Some(row) = rows.first() else { return Ok(Schema::Foreign) };
    let text: String = row.get(0);
    let version = Version::read(&text).context("the database names no version of NetBox")?;
    Ok(Schema::Of(version))
}

/// Whether NetBox has somebody who may do everything.
pub async fn has_superuser(client: &Client) -> Result<bool> {
    const ASK: &str = "SELECT EXISTS (SELECT FROM public.users_user WHERE is_superuser)";
    let row = client.query_one(ASK, &[]).await.map_err(explain("looking for a superuser"))?;
    Ok(row.get(0))
}

/// Take the lock that goes with this connection; `false` when another has it.
pub async fn try_lock(client: &Client) -> Result<bool> {
    const TAKE: &str = "SELECT pg_try_advisory_lock($1)";
    let row = client.query_one(TAKE, &[&CHANGE_LOCK]).await;
    Ok(row.map_err(explain("taking the lock"))?.get(0))
}

/// Unpack the schema that the image brings.
pub fn unpack_schema(bytes: &[u8]) -> Result<String> {
    let mut text = String::new();
    let mut unpacked = flate2::read::GzDecoder::new(bytes).take(MAX_SCHEMA + 1);
    unpacked.read_to_string(&mut text).context("unpacking NetBox's schema")?;
    ensure!(text.len() as u64 <= MAX_SCHEMA, "NetBox's schema is too long");
    Ok(text)
}

/// Lay the schema down in one transaction: it is there wholly or not at all.
pub async fn restore(client: &mut Client, schema: &str, version: &Version) -> Result<()> {
    let failed = explain("restoring NetBox's schema");
    let transaction = client.transaction().await.map_err(&failed)?;
    transaction.batch_execute(schema).await.map_err(&failed)?;
    transaction.batch_execute(&write_record(version)).await.map_err(&failed)?;
    transaction.commit().await.map_err(&failed)
}

/// Write down which version the database has been brought to.
pub async fn record_version(client: &Client, version: &Version) -> Result<()> {
    let failed = explain("writing down NetBox's version");
    client.batch_execute(&write_record(version)).await.map_err(failed)
}

/// A version has digits and dots only.
fn write_record(version: &Version) -> String {
    format!(
        "CREATE SCHEMA IF NOT EXISTS stanchion;\n\
         CREATE TABLE IF NOT EXISTS stanchion.netbox (\
             one boolean PRIMARY KEY DEFAULT true CHECK (one), version text NOT NULL);\n\
         INSERT INTO stanchion.netbox (version) VALUES ('{version}') \
             ON CONFLICT (one) DO UPDATE SET version = excluded.version;\n"
    )
}

/// Whether the database takes writes.
pub async fn check_writable(client: &Client) -> Result<()> {
    const ASK: &str = "SELECT pg_is_in_recovery() OR \
                       current_setting('default_transaction_read_only')::boolean";
    let row = client.query_one(ASK, &[]).await.map_err(explain("asking the database"))?;
    let read_only: bool = row.get(0);
    ensure!(!read_only, "the database takes no writes");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_schema_is_unpacked_and_nonsense_refused() {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(b"-- NetBox 4.6.8\nSELECT 1;\n").unwrap();
        let text = unpack_schema(&packer.finish().unwrap()).unwrap();
        assert!(text.ends_with("SELECT 1;\n"));
        assert!(unpack_schema(b"no gzip").is_err());
    }
}
