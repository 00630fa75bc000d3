//! Clients that ask a service several times a second and remember when it answered.

use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use redis::aio::MultiplexedConnection;
use redis::{ClientTlsConfig, TlsCertificates};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::timeline::Timeline;

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(100);
/// Until an answer counts as none.
const PATIENCE: Duration = Duration::from_secs(1);

/// A running client. It ends when it is dropped.
pub struct Probe {
    timeline: Arc<Mutex<Timeline>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A Redis server that wants a password and a certificate, or what forwards to one.
#[derive(Clone)]
pub struct RedisTarget {
    pub address: Ipv4Addr,
    pub port: u16,
    pub password: String,
    /// PEM.
    pub ca: Vec<u8>,
    pub certificate: Vec<u8>,
    pub key: Vec<u8>,
}

impl Probe {
    /// Connect to a port, in the network of the calling thread.
    pub fn watch_port(address: Ipv4Addr, port: u16) -> Result<Self> {
        let address = SocketAddr::from((address, port));
        Self::start("port", move || async move { Ok(TcpStream::connect(address).await.map(drop)?) })
    }

    /// Write to Redis, in the network of the calling thread. What a new master lacks of
    /// it does not count: Redis acknowledges before it replicates.
    pub fn write_redis(target: RedisTarget) -> Result<Self> {
        let connection = Arc::new(tokio::sync::Mutex::new(None));
        Self::start("redis", move || {
            let (target, connection) = (target.clone(), connection.clone());
            async move {
                let mut held = connection.lock().await;
                // Dropped on the way out unless the write succeeds.
                let mut open = match held.take() {
                    Some(open) => open,
                    None => connect(&target).await?,
                };
                let () = redis::cmd("INCR").arg("probe").query_async(&mut open).await?;
                *held = Some(open);
                Ok(())
            }
        })
    }

    fn start<F, A>(name: &str, ask: F) -> Result<Self>
    where
        F: Fn() -> A + Send + 'static,
        A: Future<Output = Result<()>>,
    {
        let (timeline, stop) = (Arc::<Mutex<Timeline>>::default(), Arc::<AtomicBool>::default());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .with_context(|| format!("starting the probe `{name}`"))?;
        let (theirs, stopped) = (timeline.clone(), stop.clone());
        let work = move || async move {
            while !stopped.load(Ordering::Relaxed) {
                if let Ok(Ok(())) = timeout(PATIENCE, ask()).await {
                    theirs.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
                }
                sleep(PAUSE).await;
            }
        };
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || runtime.block_on(work()))
            .with_context(|| format!("starting the probe `{name}`"))?;
        Ok(Probe { timeline, stop, thread: Some(thread) })
    }

    pub fn timeline(&self) -> Timeline {
        self.timeline.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn connect(target: &RedisTarget) -> Result<MultiplexedConnection> {
    let url = format!("rediss://:{}@{}:{}/", target.password, target.address, target.port);
    let certificates = TlsCertificates {
        client_tls: Some(ClientTlsConfig {
            client_cert: target.certificate.clone(),
            client_key: target.key.clone(),
        }),
        root_cert: Some(target.ca.clone()),
    };
    let client = redis::Client::build_with_tls(url, certificates)?;
    Ok(client.get_multiplexed_async_connection().await?)
}
