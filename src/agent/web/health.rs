//! Whether NetBox on this node serves: looked at every few seconds, remembered in between.
//! The edges take a node out that does not.
//!
//! What all nodes share, such as the database, is given some time: during a failover every
//! node would be taken out at once, and users would get an error where they now wait.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_postgres::Client;
use tokio_rustls::TlsConnector;

use super::Web;
use super::database::{check_writable, find_address};
use crate::agent::node::lock;
use crate::agent::redis::Session;
use crate::agent::tls::Tls;

const PAUSE: Duration = Duration::from_secs(2);
const LIMIT: Duration = Duration::from_secs(2);
/// NetBox itself may have to load first.
const ANSWER: Duration = Duration::from_secs(5);
/// Longer than a failover of the database or of Redis takes.
const SHARED: Duration = Duration::from_secs(15);
/// A worker that starts registers within this.
const WORKERS: Duration = Duration::from_secs(60);
pub const SOCKET: &str = "/run/netbox/gunicorn.sock";
/// Where this node's HAProxy has Redis' master.
const PROXY_PORT: u16 = 16379;
/// Bytes of an answer that are read.
const MAX_ANSWER: u64 = 8 << 20;
/// The part that users can do without.
const JOBS: &str = "workers";
/// Workers that are looked for; one that lives is enough.
const MAX_WORKERS: usize = 200;

/// What NetBox needs, each with what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    pub name: &'static str,
    /// What is wrong, and for how long it has been.
    pub problem: Option<(String, Duration)>,
    /// For how long that is no reason to complain.
    pub patience: Duration,
}

/// Why the edges should not send users to this node; empty when they should. That jobs wait
/// is no reason: users would have nothing instead.
pub fn judge_service(prepared: bool, parts: &[Part]) -> Vec<String> {
    let vital: Vec<Part> = parts.iter().filter(|part| part.name != JOBS).cloned().collect();
    judge(prepared, &vital)
}

/// What is wrong with NetBox on this node; empty when nothing is.
pub fn judge(prepared: bool, parts: &[Part]) -> Vec<String> {
    if !prepared {
        return vec!["NetBox waits for its database".to_string()];
    }
    if parts.is_empty() {
        return vec!["NetBox has not been looked at yet".to_string()];
    }
    let wrong = parts.iter().filter_map(|part| {
        let (problem, lasted) = part.problem.as_ref()?;
        (*lasted >= part.patience).then(|| format!("{}: {problem}", part.name))
    });
    wrong.collect()
}

#[derive(Default)]
struct Seen {
    prepared: bool,
    parts: Vec<Finding>,
}

/// A part as it was found.
struct Finding {
    name: &'static str,
    patience: Duration,
    /// What is wrong, and since when.
    problem: Option<(String, Instant)>,
}

/// What was seen last.
#[derive(Clone, Default)]
pub struct Health {
    seen: Arc<Mutex<Seen>>,
}

impl Health {
    /// What is wrong with NetBox on this node; empty when nothing is.
    pub fn list_reasons(&self) -> Vec<String> {
        let (prepared, parts) = self.list_parts();
        judge(prepared, &parts)
    }

    /// Why the edges should not send users to this node; empty when they should.
    pub fn list_faults(&self) -> Vec<String> {
        let (prepared, parts) = self.list_parts();
        judge_service(prepared, &parts)
    }

    fn list_parts(&self) -> (bool, Vec<Part>) {
        let seen = lock(&self.seen);
        let part = |found: &Finding| {
            let problem = found.problem.as_ref();
            let problem = problem.map(|(text, since)| (text.clone(), since.elapsed()));
            Part { name: found.name, problem, patience: found.patience }
        };
        (seen.prepared, seen.parts.iter().map(part).collect())
    }

    /// Whether NetBox's database is there.
    pub fn is_prepared(&self) -> bool {
        lock(&self.seen).prepared
    }

    fn note(&self, prepared: bool, found: [(&'static str, Duration, Result<()>); 4]) {
        let mut seen = lock(&self.seen);
        let before = std::mem::take(&mut seen.parts);
        seen.prepared = prepared;
        seen.parts = found
            .into_iter()
            .map(|(name, patience, result)| {
                let old = before.iter().find(|known| known.name == name);
                let since = old.and_then(|known| known.problem.as_ref().map(|(_, at)| *at));
                let problem = result
                    .err()
                    .map(|error| (format!("{error:#}"), since.unwrap_or_else(Instant::now)));
                Finding { name, patience, problem }
            })
            .collect();
    }
}

/// Look for ever.
pub async fn watch(web: Web) {
    let mut client: Option<Client> = None;
    loop {
        if web.is_prepared() {
            let (netbox, database, (redis, workers)) = tokio::join!(
                limit(ANSWER, look_at_netbox(&web)),
                limit(2 * LIMIT, look_at_database(&web, &mut client)),
                look_at_redis(&web),
            );
            web.inner.health.note(
                true,
                [
                    ("NetBox", choose_patience(&netbox), netbox),
                    ("PostgreSQL", SHARED, database),
                    ("Redis", SHARED, redis),
                    (JOBS, WORKERS, workers),
                ],
            );
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Nothing came in time.
#[derive(Debug, thiserror::Error)]
#[error("no answer within {0} s")]
struct Silent(u64);

/// A NetBox that is gone is of no use now; one that is slow would only make the others slower
/// by its absence.
fn choose_patience(netbox: &Result<()>) -> Duration {
    match netbox {
        Err(error) if error.is::<Silent>() => SHARED,
        _ => Duration::ZERO,
    }
}

async fn limit<T>(limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => bail!(Silent(limit.as_secs())),
    }
}

async fn look_at_netbox(web: &Web) -> Result<()> {
    let inner = &web.inner;
    let (socket, host) = (inner.places.join(SOCKET), &inner.seed.cluster.domain);
    let (status, _) = ask_socket(&socket, "/login/", host).await.context("it does not answer")?;
    ensure!(status < 500, "it answers {status}");
    Ok(())
}

/// Ask NetBox on this node, without nginx: the status and the body.
pub async fn ask_socket(
    socket: &std::path::Path,
    path: &str,
    host: &str,
) -> Result<(u16, Vec<u8>)> {
    let mut stream = UnixStream::connect(socket).await.context("connecting")?;
    // HTTP/1.0: the answer ends with the connection.
    let request = format!(
        "GET {path} HTTP/1.0\r\nHost: {host}\r\nX-Forwarded-Proto: https\r\n\
         X-Real-IP: 127.0.0.1\r\nUser-Agent: stanchion-agent\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.context("asking")?;
    let mut answer = Vec::new();
    (&mut stream).take(MAX_ANSWER).read_to_end(&mut answer).await.context("reading")?;
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").context("no HTTP")?;
    let line = String::from_utf8_lossy(&answer[..end.min(64)]).into_owned();
    let status = line.split(' ').nth(1).and_then(|word| word.get(..3)?.parse().ok());
    Ok((status.context("no HTTP")?, answer.split_off(end + 4)))
}

async fn look_at_database(web: &Web, client: &mut Option<Client>) -> Result<()> {
    // Taken out: one that does not answer in time is not used again.
    let used = match client.take() {
        Some(client) if !client.is_closed() => client,
        _ => web.inner.database.connect().await?,
    };
    check_writable(&used).await?;
    *client = Some(used);
    Ok(())
}

/// The master, and its workers.
async fn look_at_redis(web: &Web) -> (Result<()>, Result<()>) {
    let looked = limit(LIMIT, async {
        let secret = web.inner.seed.secrets.get("redis").context("no password")?;
        match &web.inner.seed.cluster.external.redis {
            None => {
                let stream = TcpStream::connect(("127.0.0.1", PROXY_PORT)).await?;
                look_through(Session::begin(stream, secret).await?).await
            }
            Some(external) => {
                let address = match external.host.parse() {
                    Ok(address) => address,
                    Err(_) => find_address(&external.host).await?,
                };
                let stream = TcpStream::connect((address, external.port)).await?;
                let name = rustls::pki_types::ServerName::try_from(external.host.clone())?;
                let connector = TlsConnector::from(Tls::make_stranger(&external.ca)?);
                let stream = connector.connect(name, stream).await?;
                look_through(Session::begin(stream, secret).await?).await
            }
        }
    });
    match looked.await {
        Ok(workers) => {
            let lacking = || anyhow::anyhow!("none of them lives: jobs wait");
            (Ok(()), if workers { Ok(()) } else { Err(lacking()) })
        }
        // Nothing is known of them.
        Err(error) => (Err(error), Ok(())),
    }
}

/// Whether a worker lives, as rq has it: its key runs out unless the worker renews it.
async fn look_through<S>(mut session: Session<S>) -> Result<bool>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let info = session.ask(&["INFO", "replication"]).await?;
    let is_master = info.text().is_some_and(|text| text.contains("role:master"));
    ensure!(is_master, "it is no master");
    let listed = session.ask(&["SMEMBERS", "rq:workers"]).await?;
    let mut words = vec!["EXISTS"];
    words.extend(listed.list().iter().filter_map(|reply| reply.text()).take(MAX_WORKERS));
    if words.len() == 1 {
        return Ok(false);
    }
    let living = session.ask(&words).await?;
    Ok(living.text().is_some_and(|number| number != "0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(name: &'static str, lasted: Option<u64>, patience: Duration) -> Part {
        let problem = lasted.map(|seconds| ("gone".to_string(), Duration::from_secs(seconds)));
        Part { name, problem, patience }
    }

    #[test]
    fn what_is_shared_is_given_time_and_netbox_itself_is_not() {
        let parts = |netbox, database, workers| {
            [
                part("NetBox", netbox, Duration::ZERO),
                part("PostgreSQL", database, SHARED),
                part("workers", workers, WORKERS),
            ]
        };
        assert!(judge(true, &parts(None, None, None)).is_empty());
        assert!(judge(true, &parts(None, Some(6), Some(6))).is_empty());
        assert_eq!(judge(true, &parts(Some(0), None, None)), ["NetBox: gone"]);
        assert_eq!(judge(true, &parts(None, Some(15), Some(15))), ["PostgreSQL: gone"]);
        assert_eq!(judge(true, &parts(None, None, Some(60))), ["workers: gone"]);
        assert!(judge_service(true, &parts(None, None, Some(60))).is_empty());
        assert_eq!(judge_service(true, &parts(None, Some(15), None)), ["PostgreSQL: gone"]);
        let slow: Result<()> = Err(Silent(5).into());
        assert_eq!(choose_patience(&slow), SHARED);
        assert_eq!(choose_patience(&Err(anyhow::anyhow!("refused"))), Duration::ZERO);
        assert!(!judge(false, &parts(None, None, None)).is_empty());
        assert!(!judge(true, &[]).is_empty());
    }

    #[test]
    fn a_problem_is_as_old_as_its_beginning() {
        let health = Health::default();
        assert!(!health.list_reasons().is_empty());
        let note = |problem: bool| {
            let result = || if problem { Err(anyhow::anyhow!("no")) } else { Ok(()) };
            let zero = Duration::ZERO;
            let late = Duration::from_millis(30);
            health.note(
                true,
                [
                    ("a", late, result()),
                    ("b", zero, Ok(())),
                    ("c", zero, Ok(())),
                    ("d", zero, Ok(())),
                ],
            );
        };
        note(true);
        assert!(health.list_reasons().is_empty());
        std::thread::sleep(Duration::from_millis(40));
        note(true);
        assert_eq!(health.list_reasons(), ["a: no"]);
        note(false);
        note(true);
        assert!(health.list_reasons().is_empty());
    }

    #[tokio::test]
    async fn netbox_is_asked_on_its_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 4096];
            let n = stream.read(&mut asked).await.unwrap();
            assert!(asked[..n].starts_with(b"GET /login/ HTTP/1.0\r\nHost: nb.test\r\n"));
            stream.write_all(b"HTTP/1.1 200 OK\r\nX: y\r\n\r\nbody").await.unwrap();
        });
        let (status, body) = ask_socket(&path, "/login/", "nb.test").await.unwrap();
        assert_eq!((status, &body[..]), (200, &b"body"[..]));
    }
}
