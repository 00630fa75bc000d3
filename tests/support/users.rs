//! Users of the edges: who look at the certificate, hold connections, and send requests.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use stanchion::digest::Digest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::ha::Ha;

const PATIENCE: Duration = Duration::from_secs(3);

/// Somebody who believes some CAs, and asks for the cluster's domain.
pub struct Users<'h> {
    ha: &'h Ha,
    config: Arc<ClientConfig>,
}

impl<'h> Users<'h> {
    pub fn new(ha: &'h Ha, cas: &[&str]) -> Self {
        let mut roots = RootCertStore::empty();
        for ca in cas {
            roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Users { ha, config: Arc::new(config) }
    }

    /// A connection whose certificate is good for the domain.
    pub fn open(&self, address: Ipv4Addr) -> Result<User, String> {
        let (config, domain) = (self.config.clone(), self.ha.cluster.domain.clone());
        self.ha.lab.enter_network(|| User::open(config, domain, address)).unwrap()
    }

    /// SHA-256 of the certificate that is shown at an address.
    pub fn look(&self, address: Ipv4Addr) -> Result<String, String> {
        let user = self.open(address)?;
        let shown = user.stream.get_ref().1.peer_certificates().unwrap();
        Ok(Digest::of(&shown[0]).to_string())
    }

    /// The code of the answer to one request on a connection of its own.
    pub fn ask(&self, address: Ipv4Addr) -> Result<u16, String> {
        self.open(address)?.ask()
    }

    /// Three who ask on a connection of their own for each request, one who keeps his.
    pub fn load(&self, address: Ipv4Addr) -> Load {
        let load = Load::default();
        let start = || {
            (0..4).map(|i| {
                let (config, domain) = (self.config.clone(), self.ha.cluster.domain.clone());
                let (stop, answered, failed) =
                    (load.stop.clone(), load.answered.clone(), load.failed.clone());
                std::thread::spawn(move || {
                    let mut kept = None;
                    while !stop.load(Ordering::Relaxed) {
                        let asked = match kept.take() {
                            Some(user) => Ok(user),
                            None => User::open(config.clone(), domain.clone(), address),
                        };
                        let asked = asked.and_then(|mut user: User| {
                            let code = user.ask()?;
                            Ok((user, code))
                        });
                        match asked {
                            Ok((user, 503)) => {
                                answered.fetch_add(1, Ordering::Relaxed);
                                kept = (i == 0).then_some(user);
                            }
                            Ok((_, code)) => failed.lock().unwrap().push(format!("code {code}")),
                            Err(error) => failed.lock().unwrap().push(format!("{i}: {error}")),
                        }
                        std::thread::sleep(Duration::from_millis(40));
                    }
                })
            })
        };
        let threads = self.ha.lab.enter_network(|| start().collect()).unwrap();
        Load { threads, ..load }
    }
}

#[derive(Default)]
pub struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    failed: Arc<Mutex<Vec<String>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// How many requests were answered, and what failed.
    pub fn stop(self) -> (usize, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        (self.answered.load(Ordering::Relaxed), self.failed.lock().unwrap().clone())
    }
}

/// One connection.
pub struct User {
    runtime: tokio::runtime::Runtime,
    stream: TlsStream<TcpStream>,
    domain: String,
}

impl User {
    fn open(config: Arc<ClientConfig>, domain: String, address: Ipv4Addr) -> Result<Self, String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let name = ServerName::try_from(domain.clone()).unwrap();
        let open = async {
            let stream = TcpStream::connect((address, 443)).await?;
            TlsConnector::from(config).connect(name, stream).await
        };
        let opened = runtime.block_on(async { tokio::time::timeout(PATIENCE, open).await });
        let opened = opened.map_err(|_| "no answer in time".to_string())?;
        let stream = opened.map_err(|error| format!("connecting: {error}"))?;
        Ok(User { runtime, stream, domain })
    }

    /// Send a request and read the whole answer: its code.
    pub fn ask(&mut self) -> Result<u16, String> {
        let request = format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", self.domain);
        let stream = &mut self.stream;
        let ask = async {
            stream.write_all(request.as_bytes()).await?;
            let mut answer = Vec::new();
            loop {
                if stream.read_buf(&mut answer).await? == 0 {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                if let Some(code) = read_answer(&answer) {
                    return Ok::<_, std::io::Error>(code);
                }
            }
        };
        let asked = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, ask).await });
        asked
            .map_err(|_| "no answer in time".to_string())?
            .map_err(|error| format!("asking: {error}"))
    }
}

/// The code of an answer that is there with all of its body.
fn read_answer(bytes: &[u8]) -> Option<u16> {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text.split_once("\r\n\r\n")?;
    let header = |name: &str| {
        head.lines()
            .filter_map(|line| line.split_once(": "))
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
    };
    let length: usize = header("content-length")?.1.parse().ok()?;
    (body.len() >= length).then(|| head.get(9..12)?.parse().ok())?
}
