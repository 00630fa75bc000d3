//! Redis and Sentinel, asked over TLS; and who starts as master, as a pure function.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::tls::Tls;
use crate::secrets::Secret;

pub const REDIS_PORT: u16 = 6380;
pub const SENTINEL_PORT: u16 = 26379;
const TIMEOUT: Duration = Duration::from_secs(1);
/// Bounds of an answer: items of all levels together, and bytes of one text.
const MAX_ITEMS: usize = 4096;
const MAX_TEXT: usize = 256 << 10;

/// An answer; numbers are kept as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Text(String),
    List(Vec<Reply>),
    Nothing,
}

impl Reply {
    pub fn text(&self) -> Option<&str> {
        match self {
            Reply::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn list(&self) -> &[Reply] {
        match self {
            Reply::List(items) => items,
            _ => &[],
        }
    }

    /// The value after a name in a flat list of names and values.
    fn find(&self, name: &str) -> Option<&str> {
        let pair = self.list().chunks_exact(2).find(|pair| pair[0].text() == Some(name))?;
        pair[1].text()
    }
}

/// What one Sentinel knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentinelView {
    pub master: Ipv4Addr,
    /// Other Sentinels that it knows of.
    pub others: u64,
    /// `master`, or with `s_down`, `o_down` and the like.
    pub flags: String,
}

/// What one Redis says about its replication.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RedisView {
    pub is_master: bool,
    pub master: Option<Ipv4Addr>,
    pub link_up: bool,
    /// It is taking over the master's data.
    pub syncing: bool,
}

/// Ask a Sentinel for the one master it watches.
pub async fn ask_sentinel(tls: &Tls, address: Ipv4Addr, secret: &Secret) -> Result<SentinelView> {
    let reply = ask(tls, address, SENTINEL_PORT, secret, &["SENTINEL", "MASTERS"]).await?;
    let master = reply.list().first().context("the Sentinel watches no master")?;
    let number = |name| master.find(name).and_then(|text| text.parse().ok()).unwrap_or(0);
    Ok(SentinelView {
        master: master
            .find("ip")
            .and_then(|text| text.parse().ok())
            .context("the Sentinel names no address")?,
        others: number("num-other-sentinels"),
        flags: master.find("flags").unwrap_or("").to_string(),
    })
}

/// Ask a Redis for its replication.
pub async fn ask_redis(tls: &Tls, address: Ipv4Addr, secret: &Secret) -> Result<RedisView> {
    let reply = ask(tls, address, REDIS_PORT, secret, &["INFO", "replication"]).await?;
    Ok(read_replication(reply.text().context("Redis answers without text")?))
}

fn read_replication(text: &str) -> RedisView {
    let find = |name: &str| {
        text.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':'))
    };
    RedisView {
        is_master: find("role") == Some("master"),
        master: find("master_host").and_then(|host| host.parse().ok()),
        link_up: find("master_link_status") == Some("up"),
        syncing: find("master_sync_in_progress") == Some("1"),
    }
}

async fn ask(
    tls: &Tls,
    address: Ipv4Addr,
    port: u16,
    secret: &Secret,
    words: &[&str],
) -> Result<Reply> {
    let asked = async {
        let stream = TcpStream::connect((address, port)).await?;
        let connector = TlsConnector::from(tls.client.clone());
        let stream = connector.connect(std::net::IpAddr::from(address).into(), stream).await?;
        Session::begin(stream, secret).await?.ask(words).await
    };
    match tokio::time::timeout(TIMEOUT, asked).await {
        Ok(reply) => reply.with_context(|| format!("asking {address}:{port}")),
        Err(_) => bail!("{address}:{port} has not answered for {} s", TIMEOUT.as_secs()),
    }
}

/// A connection on which several things are asked. Its owner bounds the time.
pub struct Session<S> {
    stream: BufReader<S>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Session<S> {
    /// Give the password.
    pub async fn begin(mut stream: S, secret: &Secret) -> Result<Self> {
        stream.write_all(&encode(&["AUTH", secret.reveal()])).await?;
        let mut stream = BufReader::new(stream);
        read_reply(&mut stream).await.context("giving the password")?;
        Ok(Session { stream })
    }

    pub async fn ask(&mut self, words: &[&str]) -> Result<Reply> {
        self.stream.get_mut().write_all(&encode(words)).await?;
        read_reply(&mut self.stream).await
    }
}

fn encode(words: &[&str]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend(format!("${}\r\n{word}\r\n", word.len()).bytes());
    }
    bytes
}

/// Read one answer of RESP2, without recursion.
async fn read_reply(stream: &mut (impl AsyncBufReadExt + AsyncRead + Unpin)) -> Result<Reply> {
    // Lists that are not yet full, with what they still lack.
    let mut open: Vec<(usize, Vec<Reply>)> = Vec::new();
    let mut items = 0;
    loop {
        items += 1;
        anyhow::ensure!(items <= MAX_ITEMS, "the answer has too many parts");
        let mut line = Vec::new();
        (&mut *stream).take(1024).read_until(b'\n', &mut line).await?;
        let line = String::from_utf8_lossy(&line);
        let line = line.strip_suffix("\r\n").context("the answer is cut short")?;
        let (kind, rest) = line.split_at_checked(1).context("the answer is empty")?;
        let length = || rest.parse::<i64>().context("a length that is no number");
        let mut done = match kind {
            "+" | ":" => Reply::Text(rest.to_string()),
            "-" => bail!("it refuses: {}", rest.chars().take(200).collect::<String>()),
            "$" => match usize::try_from(length()?) {
                Err(_) => Reply::Nothing,
                Ok(length) => {
                    anyhow::ensure!(length <= MAX_TEXT, "a text of {length} bytes");
                    let mut text = vec![0; length + 2];
                    stream.read_exact(&mut text).await?;
                    text.truncate(length);
                    Reply::Text(String::from_utf8_lossy(&text).into_owned())
                }
            },
            "*" => match usize::try_from(length()?) {
                Err(_) => Reply::Nothing,
                Ok(0) => Reply::List(Vec::new()),
                Ok(length) => {
                    anyhow::ensure!(length <= MAX_ITEMS, "a list of {length} parts");
                    open.push((length, Vec::new()));
                    continue;
                }
            },
            _ => bail!("the answer is no RESP"),
        };
        loop {
            let Some((length, list)) = open.last_mut() else { return Ok(done) };
            list.push(done);
            if list.len() < *length {
                break;
            }
            done = Reply::List(open.pop().map(|(_, list)| list).unwrap_or_default());
        }
    }
}

/// What is known before this node's Redis starts.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    pub address: Option<Ipv4Addr>,
    /// Masters that the Sentinels of other nodes name.
    pub named: Vec<Ipv4Addr>,
    /// Other nodes whose Redis says that it is master.
    pub masters: Vec<Ipv4Addr>,
    /// Other nodes whose Redis follows somebody.
    pub followers: usize,
    /// The master that was written down in etcd last.
    pub recorded: Option<Ipv4Addr>,
    /// This is the first cache node of the cluster file.
    pub first: bool,
    /// Redis has written here before.
    pub has_data: bool,
    /// This agent itself has just written the first record: nobody else has data either.
    pub claimed: bool,
    /// For how long this node has been looking.
    pub looked: Duration,
}

/// As what this node's Redis starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    ReplicaOf(Ipv4Addr),
    /// The recorded master is this node.
    Master,
    /// Nobody has ever been master: whoever writes it down first is.
    Claim,
    Wait(String),
}

/// So long do Sentinels need to replace a master that has gone.
const REPLACED: Duration = Duration::from_secs(20);
/// So long does a node without data wait for another master before it becomes one: two
/// rounds of a failover that failed. A replica would copy its emptiness.
const GIVEN_UP: Duration = Duration::from_secs(60);

/// Decide as what to start. Never as master while another node answers for one.
pub fn decide_start(seen: &Observed) -> Start {
    let Some(own) = seen.address else { return Start::Wait("no address".into()) };
    let mut count = std::collections::BTreeMap::new();
    for master in &seen.named {
        *count.entry(*master).or_insert(0) += 1;
    }
    let named = count.into_iter().max_by_key(|(_, times)| *times).map(|(master, _)| master);
    let lacks_data = !seen.has_data && !seen.claimed;
    match named {
        Some(master) if master != own => return Start::ReplicaOf(master),
        Some(_) if seen.followers > 0 && seen.looked < REPLACED => {
            return Start::Wait(
                "the Sentinels still name this node as master, though it has just started: they \
                 choose another one now"
                    .into(),
            );
        }
        Some(_) if lacks_data && seen.looked < GIVEN_UP => {
            return Start::Wait(
                "the Sentinels name this node as master, but it has no data: one that has some is \
                 waited for"
                    .into(),
            );
        }
        // There is no replica that could take over: this node has the data.
        Some(_) => return Start::Master,
        None => {}
    }
    if let Some(master) = seen.masters.iter().find(|master| **master != own) {
        return Start::ReplicaOf(*master);
    }
    match seen.recorded {
        Some(master) if master == own && lacks_data && seen.looked < GIVEN_UP => Start::Wait(
            "this node was the last master, but it has no data: one that has some is waited for"
                .into(),
        ),
        Some(master) if master == own => Start::Master,
        Some(master) => Start::ReplicaOf(master),
        None if seen.first || seen.looked > REPLACED => Start::Claim,
        None => Start::Wait("the first cache node decides who is the first master".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const OTHER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    fn observed() -> Observed {
        Observed { address: Some(OWN), ..Observed::default() }
    }

    #[test]
    fn a_node_never_starts_as_master_when_another_answers_for_one() {
        let named = Observed { named: vec![OTHER], recorded: Some(OWN), first: true, ..observed() };
        assert_eq!(decide_start(&named), Start::ReplicaOf(OTHER));
        let found = Observed { masters: vec![OTHER], recorded: Some(OWN), ..observed() };
        assert_eq!(decide_start(&found), Start::ReplicaOf(OTHER));
        let recorded = Observed { recorded: Some(OTHER), first: true, ..observed() };
        assert_eq!(decide_start(&recorded), Start::ReplicaOf(OTHER));
    }

    #[test]
    fn a_rebooted_master_waits_until_the_sentinels_have_another() {
        let back = Observed { named: vec![OWN, OWN], followers: 2, ..observed() };
        assert!(matches!(decide_start(&back), Start::Wait(_)));
        let late = Observed { looked: Duration::from_secs(60), ..back.clone() };
        assert_eq!(decide_start(&late), Start::Master);
        let alone = Observed { followers: 0, has_data: true, ..back };
        assert_eq!(decide_start(&alone), Start::Master);
        // A fresh disk under the old name: whoever copied it would lose everything.
        let empty = Observed { has_data: false, ..alone };
        assert!(matches!(decide_start(&empty), Start::Wait(_)));
    }

    #[test]
    fn the_first_master_is_claimed_by_the_first_node_or_by_anyone_later() {
        assert!(matches!(decide_start(&observed()), Start::Wait(_)));
        assert_eq!(decide_start(&Observed { first: true, ..observed() }), Start::Claim);
        let late = Observed { looked: Duration::from_secs(60), ..observed() };
        assert_eq!(decide_start(&late), Start::Claim);
        let own = Observed { recorded: Some(OWN), claimed: true, ..observed() };
        assert_eq!(decide_start(&own), Start::Master);
    }

    #[test]
    fn a_recorded_master_with_an_empty_disk_waits_for_another_to_be_named() {
        let empty = Observed { recorded: Some(OWN), first: true, ..observed() };
        assert!(matches!(decide_start(&empty), Start::Wait(_)));
        let chosen = Observed { named: vec![OTHER], ..empty.clone() };
        assert_eq!(decide_start(&chosen), Start::ReplicaOf(OTHER));
        let whole = Observed { has_data: true, ..empty.clone() };
        assert_eq!(decide_start(&whole), Start::Master);
        let late = Observed { looked: GIVEN_UP, ..empty };
        assert_eq!(decide_start(&late), Start::Master);
    }

    async fn parse(text: &str) -> Result<Reply> {
        read_reply(&mut BufReader::new(text.as_bytes())).await
    }

    #[tokio::test]
    async fn answers_are_read_and_hostile_ones_refused() {
        let reply =
            parse("*1\r\n*4\r\n$4\r\nname\r\n$2\r\nnb\r\n$2\r\nip\r\n$8\r\n10.0.0.2\r\n").await;
        assert_eq!(reply.unwrap().list()[0].find("ip"), Some("10.0.0.2"));
        assert_eq!(parse("+OK\r\n").await.unwrap(), Reply::Text("OK".into()));
        assert_eq!(parse("$-1\r\n").await.unwrap(), Reply::Nothing);
        let hostile = ["", "-ERR no\r\n", "$99999999999\r\n", "*99999\r\n", "$5\r\nab", "x\r\n"];
        for text in hostile.into_iter().chain([&*"*1\r\n".repeat(9999)]) {
            assert!(parse(text).await.is_err(), "{text:?}");
        }
    }

    #[test]
    fn replication_is_read() {
        let text = "# Replication\r\nrole:slave\r\nmaster_host:10.0.0.2\r\nmaster_link_status:up\r\nconnected_slaves:0\r\n";
        let view = read_replication(text);
        assert_eq!((view.is_master, view.master, view.link_up), (false, Some(OTHER), true));
    }
}
