//! Measuring for how long writes stand still: small transactions, one after the other, on
//! whichever node takes them. They leave nothing behind but a few bytes of log.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustls::ClientConfig;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_postgres::{Client, Config};

use super::super::node::lock;
use super::super::postgres_tls::Connector;
use crate::secrets::Secret;

const PAUSE: Duration = Duration::from_millis(20);
/// Until a server is given up.
const PATIENCE: Duration = Duration::from_secs(1);
/// It is logged, and its commit waits for the synchronous standby as any other.
const WRITE: &str = "select pg_logical_emit_message(true, 'stanchion', '')";

/// Acknowledgements: the last, and the longest time between two.
#[derive(Debug, Clone, Copy, Default)]
pub struct Gaps {
    last: Option<Instant>,
    longest: Duration,
}

impl Gaps {
    fn note(&mut self, at: Instant) {
        if let Some(last) = self.last {
            self.longest = self.longest.max(at.saturating_duration_since(last));
        }
        self.last = Some(at);
    }

    /// The longest time without an acknowledgement, one that lasts still among them. `None`
    /// when none was ever had.
    pub fn find_longest(&self, now: Instant) -> Option<Duration> {
        let last = self.last?;
        Some(self.longest.max(now.saturating_duration_since(last)))
    }
}

/// A running measurement. It ends when it is dropped.
pub struct WriteProbe {
    gaps: Arc<Mutex<Gaps>>,
    task: JoinHandle<()>,
}

impl WriteProbe {
    /// Write to the leader among `servers`, as NetBox's user.
    pub fn start(servers: Vec<Ipv4Addr>, password: Secret, tls: Arc<ClientConfig>) -> Self {
        let gaps = Arc::<Mutex<Gaps>>::default();
        let noting = gaps.clone();
        let task = tokio::spawn(async move {
            loop {
                for server in &servers {
                    if let Ok(Ok(client)) =
                        timeout(PATIENCE, connect(*server, &password, &tls)).await
                    {
                        write_on(&client, &noting).await;
                    }
                }
                sleep(PAUSE).await;
            }
        });
        WriteProbe { gaps, task }
    }

    pub fn read(&self) -> Gaps {
        *lock(&self.gaps)
    }

    /// Wait until a write that began after now has been acknowledged.
    pub async fn wait_for_write(&self, patience: Duration) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < patience {
            if self.read().last.is_some_and(|last| last > begun + PAUSE) {
                return true;
            }
            sleep(PAUSE).await;
        }
        false
    }
}

impl Drop for WriteProbe {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Write until the server does not take it.
async fn write_on(client: &Client, gaps: &Mutex<Gaps>) {
    while let Ok(Ok(_)) = timeout(PATIENCE, client.simple_query(WRITE)).await {
        lock(gaps).note(Instant::now());
        sleep(PAUSE).await;
    }
}

async fn connect(server: Ipv4Addr, password: &Secret, tls: &Arc<ClientConfig>) -> Result<Client> {
    let mut config = Config::new();
    config
        .host(server.to_string())
        .port(5432)
        .user("netbox")
        .password(password.reveal())
        .dbname("netbox")
        .connect_timeout(PATIENCE)
        .ssl_mode(tokio_postgres::config::SslMode::Require)
        .application_name("stanchion");
    let (client, connection) =
        config.connect(Connector::new(tls.clone())).await.context("connecting to PostgreSQL")?;
    tokio::spawn(connection);
    Ok(client)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_may_be_the_last() {
        let begun = Instant::now();
        let at = |ms: u64| begun + Duration::from_millis(ms);
        let mut gaps = Gaps::default();
        assert_eq!(gaps.find_longest(at(5)), None);
        for ms in [10, 30, 900, 920] {
            gaps.note(at(ms));
        }
        assert_eq!(gaps.find_longest(at(930)), Some(Duration::from_millis(870)));
        assert_eq!(gaps.find_longest(at(5000)), Some(Duration::from_millis(4080)));
    }
}
