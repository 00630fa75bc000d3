//! Clients that write to the cluster all the time and remember what was acknowledged, to
//! compare it at the end with what is there.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use rustls::ClientConfig;
use tokio::time::{sleep, timeout};
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client, Config};

use super::timeline::Timeline;
use crate::agent::postgres_tls::Connector;

/// Between two writes.
const PAUSE: Duration = Duration::from_millis(50);
/// Until a client gives a connection up.
const PATIENCE: Duration = Duration::from_secs(2);

/// A PostgreSQL server, or what forwards to one.
#[derive(Clone)]
pub struct Target {
    pub address: Ipv4Addr,
    pub port: u16,
    pub user: String,
    pub password: String,
    pub database: String,
    /// Trusts the cluster's CA.
    pub tls: Arc<ClientConfig>,
}

/// A write that was acknowledged.
#[derive(Debug, Clone)]
pub struct Write {
    pub id: i64,
    pub at: Instant,
    /// The server that took it.
    pub server: String,
}

/// What the client knows so far.
#[derive(Debug, Clone, Default)]
pub struct Record {
    pub acknowledged: Vec<Write>,
    pub timeline: Timeline,
    /// The latest reason for a failed write.
    pub failure: Option<String>,
}

/// A running client. It ends when it is dropped.
pub struct Ledger {
    record: Arc<Mutex<Record>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ledger {
    /// Write rows to the target, one after the other, in the network of the calling thread.
    /// The table is made when it is not there.
    pub fn start(target: Target) -> Result<Self> {
        let (record, stop) = (Arc::<Mutex<Record>>::default(), Arc::<AtomicBool>::default());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting the ledger")?;
        let (theirs, stopped) = (record.clone(), stop.clone());
        let thread = std::thread::Builder::new()
            .name("ledger".into())
            .spawn(move || runtime.block_on(write_on(&target, &theirs, &stopped)))
            .context("starting the ledger")?;
        Ok(Ledger { record, stop, thread: Some(thread) })
    }

    pub fn record(&self) -> Record {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Wait until a write that began after now is acknowledged.
    pub fn wait_for_write(&self, limit: Duration) -> Result<Duration> {
        let began = Instant::now();
        loop {
            let record = self.record();
            if record.timeline.last().is_some_and(|last| last > began + PATIENCE.min(PAUSE)) {
                return Ok(began.elapsed());
            }
            if began.elapsed() > limit {
                let why = record.failure.unwrap_or_else(|| "no answer".into());
                bail!("no write for {} s: {why}", limit.as_secs());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// End the client; what it knows.
    pub fn stop(mut self) -> Record {
        self.end();
        self.record()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.end();
    }
}

impl Record {
    /// Ids that were acknowledged and are not among those that are there.
    pub fn find_lost(&self, there: &BTreeSet<i64>) -> Vec<i64> {
        let ids = self.acknowledged.iter().map(|write| write.id);
        ids.filter(|id| !there.contains(id)).collect()
    }

    /// The servers that acknowledged, one entry for each change: a server that comes again
    /// after another, without an event that would explain it, is a second primary.
    pub fn list_servers(&self) -> Vec<String> {
        let mut servers: Vec<String> = Vec::new();
        for write in &self.acknowledged {
            if servers.last() != Some(&write.server) {
                servers.push(write.server.clone());
            }
        }
        servers
    }
}

/// All rows that are there, asked for in the network of the calling thread.
pub fn read_ledger(target: &Target) -> Result<BTreeSet<i64>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let read = async {
        let (client, _) = connect(target).await?;
        let rows = client.query("select id from ledger", &[]).await?;
        Ok::<_, anyhow::Error>(rows.iter().map(|row| row.get(0)).collect())
    };
    runtime.block_on(read).context("reading the ledger")
}

async fn write_on(target: &Target, record: &Mutex<Record>, stop: &AtomicBool) {
    // Ids of earlier clients are smaller.
    let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut id = i64::try_from(started.as_micros()).unwrap_or_default();
    let mut connected: Option<(Client, Arc<AtomicBool>)> = None;
    while !stop.load(Ordering::Relaxed) {
        let Some((client, doubted)) = &connected else {
            match timeout(PATIENCE, prepare(target)).await {
                Ok(Ok(client)) => connected = Some(client),
                Ok(Err(error)) => note(record, format!("{error:#}")),
                Err(_) => note(record, "connecting takes too long".into()),
            }
            if connected.is_none() {
                sleep(PAUSE).await;
            }
            continue;
        };
        id += 1;
        match timeout(PATIENCE, insert(client, id)).await {
            // "Committed locally" is said in a warning, and is no acknowledgement.
            Ok(Ok(server)) if !doubted.load(Ordering::Relaxed) => {
                let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
                let at = Instant::now();
                record.timeline.push(at);
                record.acknowledged.push(Write { id, at, server });
            }
            Ok(Ok(_)) => {
                note(record, "a write was committed on one server only".into());
                connected = None;
            }
            Ok(Err(error)) => {
                note(record, describe(&error));
                connected = None;
            }
            Err(_) => {
                note(record, "a write takes too long".into());
                connected = None;
            }
        }
        sleep(PAUSE).await;
    }
}

async fn insert(client: &Client, id: i64) -> Result<String, tokio_postgres::Error> {
    let insert = "insert into ledger (id) values ($1) returning host(inet_server_addr())";
    Ok(client.query_one(insert, &[&id]).await?.get(0))
}

async fn prepare(target: &Target) -> Result<(Client, Arc<AtomicBool>)> {
    let (client, doubted) = connect(target).await?;
    let make = "create table if not exists ledger (id bigint primary key, at timestamptz not null default now())";
    match client.execute(make, &[]).await {
        // Two that make it at once.
        Err(error) if error.code() != Some(&SqlState::UNIQUE_VIOLATION) => {
            bail!("making the table: {}", describe(&error))
        }
        _ => Ok((client, doubted)),
    }
}

/// A connection, and whether it was warned.
async fn connect(target: &Target) -> Result<(Client, Arc<AtomicBool>)> {
    let address = target.address.to_string();
    let mut config = Config::new();
    config
        .host(&address)
        .port(target.port)
        .user(&target.user)
        .password(&target.password)
        .dbname(&target.database)
        .connect_timeout(PATIENCE)
        .ssl_mode(tokio_postgres::config::SslMode::Require)
        .application_name("ledger");
    let connector = Connector::new(target.tls.clone());
    let (client, mut connection) = match config.connect(connector).await {
        Ok(both) => both,
        Err(error) => bail!("connecting: {}", describe(&error)),
    };
    let doubted = Arc::<AtomicBool>::default();
    let warned = doubted.clone();
    tokio::spawn(async move {
        loop {
            match std::future::poll_fn(|context| connection.poll_message(context)).await {
                Some(Ok(AsyncMessage::Notice(notice))) if notice.severity() == "WARNING" => {
                    warned.store(true, Ordering::Relaxed);
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => break,
            }
        }
    });
    Ok((client, doubted))
}

/// What the server said, which the error alone does not show.
fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(said) => said.message().to_string(),
        None => {
            let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
            format!("{error}{}", cause.unwrap_or_default())
        }
    }
}

fn note(record: &Mutex<Record>, failure: String) {
    record.lock().unwrap_or_else(PoisonError::into_inner).failure = Some(failure);
}
