//! A machine on the nodes' network that is no part of the cluster: it has no certificate of
//! its CA and no password, and knocks everywhere.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, getrlimit, setrlimit};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use stanchion::agent::postgres_tls::Connector;
use stanchion::config::cluster::Cluster;
use stanchion::config::cluster::ports::{Protocol, Side, list_ports};
use stanchion::lab::ledger::Target;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::ha::Ha;

/// Doors that are tried at the same time.
const HANDS: usize = 2000;
/// On a bridge of this machine even a busy one opens far sooner.
const PATIENCE: Duration = Duration::from_millis(700);
const LISTEN: Duration = Duration::from_secs(3);
const HTTP: &[u8] = b"GET /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

/// Every port of every node and of the VIP.
pub fn knock_everywhere(ha: &Ha) {
    let mut addresses: Vec<Ipv4Addr> =
        ha.nodes().iter().map(|node| ha.lab.address(node).unwrap()).collect();
    addresses.push(ha.vip());
    let ca = std::fs::read(ha.lab.secrets().join("ca.pem")).unwrap();
    let roots =
        ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
    let mut store = RootCertStore::empty();
    store.add(CertificateDer::from_pem_slice(&ca).unwrap()).unwrap();
    let config = Arc::new(
        roots
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(store)
            .with_no_client_auth(),
    );
    let expected = list_open(&ha.cluster);
    let heard = ha.lab.enter_network(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            for address in &addresses {
                let open = scan(*address).await;
                let mut expected = expected.clone();
                if *address == ha.vip() {
                    // The nodes' own addresses, not the cluster's.
                    expected.retain(|port| ![2379, 7443, 8404].contains(port));
                }
                assert_eq!(open, expected, "open on {address}");
            }
            let mut heard = Vec::new();
            for address in &addresses {
                heard.extend(talk(*address, &config).await);
            }
            heard
        })
    });
    let heard = heard.unwrap();
    let text = String::from_utf8_lossy(&heard);
    assert!(text.contains("HTTP/1.1 503"), "the VIP did not answer on 443");
    let secrets = std::fs::read_to_string(ha.lab.secrets().join("secrets.toml")).unwrap();
    let secrets: Vec<&str> = secrets.split('"').filter(|word| word.len() >= 32).collect();
    assert!(secrets.len() > 5, "there are secrets to look for");
    for secret in secrets.into_iter().filter(|word| !word.contains(' ')) {
        assert!(!text.contains(secret), "a secret was told to a stranger");
    }
    for words in ["PRIVATE KEY", "\"reasons\"", "redis_version", "stanchion_ready"] {
        assert!(!text.contains(words), "`{words}` was told to a stranger");
    }
    expect_logged(ha);
}

/// Ports that are open to those who are no nodes.
fn list_open(cluster: &Cluster) -> BTreeSet<u16> {
    let ways = list_ports(cluster);
    let for_all = |from: &[Side]| {
        from.iter().any(|side| matches!(side, Side::Clients | Side::Network | Side::Operator))
    };
    ways.iter()
        .filter(|way| way.protocol == Protocol::Tcp && for_all(&way.from))
        .filter_map(|way| way.port)
        .collect()
}

async fn scan(address: Ipv4Addr) -> BTreeSet<u16> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
    let mut open = BTreeSet::new();
    let mut knocks = JoinSet::new();
    for port in 1..=u16::MAX {
        if knocks.len() >= HANDS {
            open.extend(knocks.join_next().await.unwrap().unwrap());
        }
        knocks.spawn(async move {
            let connect = TcpStream::connect((address, port));
            matches!(timeout(PATIENCE, connect).await, Ok(Ok(_))).then_some(port)
        });
    }
    while let Some(knocked) = knocks.join_next().await {
        open.extend(knocked.unwrap());
    }
    open
}

/// Say something to every service; all that was answered.
async fn talk(address: Ipv4Addr, config: &Arc<ClientConfig>) -> Vec<u8> {
    let mut heard = Vec::new();
    for port in [2379, 7443, 8404, 6379, 10001] {
        for words in [HTTP, b"PING\r\nINFO\r\nCONFIG GET *\r\n"] {
            let inside = ask_tls(address, port, config, words).await.unwrap_or_default();
            assert!(inside.is_empty(), "{address}:{port}: {}", String::from_utf8_lossy(&inside));
            let plain = ask(address, port, words).await.unwrap_or_default();
            let text = String::from_utf8_lossy(&plain);
            assert!(!text.contains("200 OK") && !text.contains("PONG"), "{address}:{port}: {text}");
            heard.extend(plain);
        }
    }
    let sent_on = ask(address, 80, HTTP).await.unwrap_or_default();
    assert!(sent_on.starts_with(b"HTTP/1.1 301"), "{}", String::from_utf8_lossy(&sent_on));
    heard.extend(sent_on);
    // The certificate that users see names the VIP, and no node.
    heard.extend(ask_tls(address, 443, config, HTTP).await.unwrap_or_default());
    for port in [5433, 5434, 5435] {
        heard.extend(try_database(address, port, config).await);
    }
    heard
}

/// With right names and wrong passwords, and without TLS.
async fn try_database(address: Ipv4Addr, port: u16, config: &Arc<ClientConfig>) -> Vec<u8> {
    let mut heard = Vec::new();
    for user in ["netbox", "postgres", "replicator", "rewind", "nobody"] {
        let target = Target {
            address,
            port,
            user: user.into(),
            password: "wrong".into(),
            database: "netbox".into(),
            tls: config.clone(),
        };
        for mode in
            [tokio_postgres::config::SslMode::Disable, tokio_postgres::config::SslMode::Require]
        {
            let mut login = tokio_postgres::Config::new();
            login
                .host(target.address.to_string())
                .port(target.port)
                .user(&target.user)
                .password(&target.password)
                .dbname(&target.database)
                .ssl_mode(mode)
                .connect_timeout(LISTEN);
            let connect = login.connect(Connector::new(target.tls.clone()));
            match timeout(2 * LISTEN, connect).await {
                Ok(Ok(_)) => panic!("{user} was let in on {address}:{port} ({mode:?})"),
                Ok(Err(error)) => {
                    heard.extend(format!("{error} {:?}\n", error.as_db_error()).into_bytes());
                }
                Err(_) => {}
            }
        }
    }
    heard
}

async fn ask(address: Ipv4Addr, port: u16, words: &[u8]) -> io::Result<Vec<u8>> {
    let stream = timeout(PATIENCE, TcpStream::connect((address, port))).await??;
    listen(stream, words).await
}

async fn ask_tls(
    address: Ipv4Addr,
    port: u16,
    config: &Arc<ClientConfig>,
    words: &[u8],
) -> io::Result<Vec<u8>> {
    let stream = timeout(PATIENCE, TcpStream::connect(SocketAddr::from((address, port)))).await??;
    let name = ServerName::IpAddress(IpAddr::from(address).into());
    let connect = TlsConnector::from(config.clone()).connect(name, stream);
    listen(timeout(LISTEN, connect).await??, words).await
}

/// What comes back before the other side ends it, or until nothing more comes.
async fn listen(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    words: &[u8],
) -> io::Result<Vec<u8>> {
    // Who is refused may find the line cut.
    let _ = stream.write_all(words).await;
    let mut heard = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(Ok(n @ 1..)) = timeout(LISTEN, stream.read(&mut buffer)).await {
        heard.extend_from_slice(&buffer[..n]);
        if heard.len() > 1 << 20 {
            break;
        }
    }
    Ok(heard)
}

/// Whoever looks after the nodes can see who was refused.
fn expect_logged(ha: &Ha) {
    let stranger = ha.lab.operator().to_string();
    let journal =
        |node: &str, unit: &str| ha.run(node, &["journalctl", "-b", "-u", unit, "-o", "cat"]);
    let mut databases = String::new();
    for node in ha.nodes() {
        let agent = journal(node, "stanchion-agent");
        assert!(agent.contains(&format!("refused {stranger}")), "{node}:\n{agent}");
        let proxy = journal(node, "haproxy");
        let is_told = |words: &str| {
            proxy.lines().any(|line| line.contains(&stranger) && line.contains(words))
        };
        for words in ["statistics", "redis"] {
            assert!(is_told(words), "{node}: {words}:\n{proxy}");
        }
        databases += &journal(node, "patroni");
    }
    assert!(databases.contains("password authentication failed for user \"netbox\""));
    assert!(databases.contains("no encryption"), "who came without TLS is not told");
}
