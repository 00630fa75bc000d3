//! What an agent answers: to the cluster over mutual TLS on 7443, to this machine in plain
//! HTTP on 7080 (health only), and to `stanchion-agent` itself on a socket for root.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use axum::Router;
use axum::body::Bytes;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::advice::read_page;
use super::board::{Board, Status, StepOutcome, log};
use super::join_act::answer_bootstrap;
use super::node::Node;
use super::operate::{self, Desk, Jobs, is_verb, run_verb};
use super::page::{POLICY, write_page};
use super::places::Places;
use super::registry::{Registration, Registry};
use super::render::make_plan;
use super::site::Site;
use super::table::{Answer, make_table};
use super::web::health::{self, Health};
use crate::error::UserError;
use crate::pki::Certificate;

pub const PORT: u16 = 7443;
pub const HEALTH_PORT: u16 = 7080;
/// Connections that may be in their handshake, or open, at the same time.
const MAX_CONNECTIONS: usize = 128;
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Verbs on the agent's socket.
pub const STATUS: &str = "status";
pub const RENEW: &str = "renew-certificate";
const MAX_RELAYED: usize = 8 << 20;
/// Of what comes with a verb.
const MAX_WISH: usize = 64 << 10;
/// A question for a job's progress is answered by then, with whatever there is.
const LONG_ANSWER: Duration = Duration::from_secs(5);

#[derive(Clone)]
struct Answers {
    board: Board,
    places: Places,
    registry: Registry,
    http: reqwest::Client,
    health: Health,
    domain: Arc<str>,
    node: Arc<str>,
    plan: Arc<str>,
    desk: Desk,
    jobs: Jobs,
    vip: Option<Ipv4Addr>,
}

/// What `status` shows: this node in detail, the others as they registered.
#[derive(Debug, Serialize, serde::Deserialize)]
pub struct Page {
    #[serde(flatten)]
    pub status: Status,
    pub nodes: Vec<Registration>,
}

/// Listen on the node's address and on loopback; both go on in the background.
pub async fn serve(node: &Node) -> Result<()> {
    let answers = Answers {
        board: node.board.clone(),
        places: node.places.clone(),
        registry: node.registry.clone(),
        http: node.http.clone(),
        health: node.health.clone(),
        domain: node.seed.cluster.domain.as_str().into(),
        node: node.entry.name.as_str().into(),
        plan: make_plan(&node.seed).into(),
        desk: Desk::of(node),
        jobs: Jobs::default(),
        vip: node.seed.cluster.vip,
    };
    let ca = Certificate::read(&node.seed.ca).context("reading the cluster's CA")?;
    let health =
        Router::new().route("/healthz", get(tell_health)).route("/readyz", get(tell_ready));
    let all = health
        .clone()
        .route("/", get(show_page))
        .route("/help/{page}", get(show_help))
        .route("/status", get(tell_status))
        .route("/bootstrap", get(tell_bootstrap))
        .route("/metrics", get(tell_metrics))
        .route("/metrics/{exporter}", get(relay_metrics))
        .route("/operate/{verb}", post(start_verb).layer(DefaultBodyLimit::max(MAX_WISH)))
        .route("/operate/job/{job}/{after}", get(follow_job))
        .with_state(answers.clone());
    let address = SocketAddr::from((node.entry.address, PORT));
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))?;
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, HEALTH_PORT));
    match TcpListener::bind(loopback).await {
        Ok(plain) => {
            let health = health.route("/web", get(tell_web)).with_state(answers.clone());
            tokio::spawn(async move { axum::serve(plain, health).await });
        }
        // A node does without; whoever asks there finds out.
        Err(error) => node.board.raise("health", format!("listening on {loopback}: {error}")),
    }
    let secure = accept_secure(listener, TlsAcceptor::from(node.tls.server.clone()), ca);
    let all = all.into_make_service_with_connect_info::<Peer>();
    tokio::spawn(async move { axum::serve(secure, all).await });
    Ok(())
}

/// Who is at the other end, by the certificate that was shown.
#[derive(Debug, Clone)]
struct Peer {
    name: String,
    address: SocketAddr,
    is_operator: bool,
}

impl Peer {
    fn read(stream: &TlsStream<TcpStream>, address: SocketAddr, ca: &Certificate) -> Self {
        let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        match shown.and_then(|shown| Certificate::read_der(shown).ok()) {
            Some(shown) => Peer { is_operator: shown.is_operator(ca), name: shown.name, address },
            None => Peer { name: String::new(), address, is_operator: false },
        }
    }
}

impl Connected<IncomingStream<'_, Secure>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Secure>) -> Self {
        stream.remote_addr().clone()
    }
}

/// Connections whose handshake is done; a slow or wrong peer holds up nobody.
struct Secure {
    ready: mpsc::Receiver<(TlsStream<TcpStream>, Peer)>,
    local: SocketAddr,
}

fn accept_secure(listener: TcpListener, acceptor: TlsAcceptor, ca: Certificate) -> Secure {
    let local = listener.local_addr().unwrap_or(SocketAddr::from(([0, 0, 0, 0], PORT)));
    let ca = Arc::new(ca);
    let (sender, ready) = mpsc::channel(16);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    tokio::spawn(async move {
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else { return };
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(_) => {
                    // Out of descriptors, perhaps: a pause helps, ending does not.
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
            };
            let (acceptor, sender, ca) = (acceptor.clone(), sender.clone(), ca.clone());
            tokio::spawn(async move {
                match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => {
                        let peer = Peer::read(&stream, peer, &ca);
                        drop(sender.send((stream, peer)).await);
                    }
                    Ok(Err(error)) => log(&format!("refused {}: {error}", peer.ip())),
                    Err(_) => log(&format!("refused {}: no handshake", peer.ip())),
                }
                drop(slot);
            });
        }
    });
    Secure { ready, local }
}

impl axum::serve::Listener for Secure {
    type Io = TlsStream<TcpStream>;
    type Addr = Peer;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(accepted) => accepted,
            // The accepting task ends only with the program.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(Peer { name: String::new(), address: self.local, is_operator: false })
    }
}

async fn tell_health() -> &'static str {
    "ok\n"
}

/// For nginx, which the edges ask: whether NetBox on this node serves.
async fn tell_web(State(answers): State<Answers>) -> Response {
    let reasons = answers.health.list_faults();
    match reasons.is_empty() {
        true => "ok\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n").into_response(),
    }
}

async fn tell_ready(State(answers): State<Answers>) -> Response {
    let (ready, reasons, warnings) = {
        let status = answers.board.lock();
        (status.ready, status.reasons.clone(), status.warnings.clone())
    };
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(json!({"ready": ready, "reasons": reasons, "warnings": warnings}))).into_response()
}

async fn tell_status(State(answers): State<Answers>) -> Json<Page> {
    Json(make_page(&answers.board, Some(&answers.registry)))
}

/// What to do at night, as it is written in the documents.
async fn show_help(Path(page): Path<String>) -> Response {
    match read_page(page.trim_end_matches(".md")) {
        Some(text) => ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

/// The cluster at a glance, for a browser.
async fn show_page(State(answers): State<Answers>) -> Response {
    let page = make_page(&answers.board, Some(&answers.registry));
    let (cluster, members) = (page.status.cluster.clone(), page.status.members.clone());
    let asked = [(answers.node.to_string(), Answer::Page(Box::new(page)))].into();
    let table = make_table(&cluster, &members, &asked);
    let vip = answers.vip.map(|vip| vip.to_string());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    match write_page(&table, vip.as_deref(), &answers.node, now) {
        Ok(text) => (headers, text).into_response(),
        Err(error) => fail(&error),
    }
}

/// What the agent shows of itself and of the others.
pub fn make_page(board: &Board, registry: Option<&Registry>) -> Page {
    let nodes = registry.map(|registry| registry.list_nodes().into_values().collect());
    Page { status: board.snapshot(), nodes: nodes.unwrap_or_default() }
}

async fn tell_bootstrap(State(answers): State<Answers>) -> Response {
    match answer_bootstrap(&answers.places, &answers.node, &answers.plan) {
        Ok(answer) => Json(answer).into_response(),
        Err(error) => fail(&error),
    }
}

/// Verbs are for the operator alone; a node that asks is told of in the journal.
fn expect_operator(peer: &Peer, what: &str) -> Option<Response> {
    if peer.is_operator {
        return None;
    }
    let name: String = peer.name.escape_debug().take(63).collect();
    log(&format!("operator: refused {what} to {name} at {}", peer.address.ip()));
    let body = Json(json!({"error": "this is for the operator's certificate only"}));
    Some((StatusCode::FORBIDDEN, body).into_response())
}

/// A browser that has the operator's certificate would send it with what any web page makes
/// it send: verbs are for programs.
fn refuse_browser(headers: &HeaderMap) -> Option<Response> {
    let is_browser = headers.contains_key(header::ORIGIN) || headers.contains_key("sec-fetch-site");
    let kind = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    let (code, why) = match (is_browser, kind) {
        (true, _) => (StatusCode::FORBIDDEN, "verbs are not for browsers"),
        (false, Some(b"application/json")) => return None,
        (false, _) => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "what comes with a verb is JSON"),
    };
    Some((code, Json(json!({"error": why}))).into_response())
}

async fn start_verb(
    State(answers): State<Answers>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(verb): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let shown: String = verb.escape_debug().take(63).collect();
    if let Some(refusal) = expect_operator(&peer, &shown) {
        return refusal;
    }
    if let Some(refusal) = refuse_browser(&headers) {
        log(&format!("operator: refused {shown}, as a browser asks, to {}", peer.address.ip()));
        return refusal;
    }
    if !is_verb(&verb) {
        let body = Json(json!({"error": "this agent does not know the verb"}));
        return (StatusCode::NOT_FOUND, body).into_response();
    }
    let wish: Value = match serde_json::from_slice(&body) {
        Ok(wish) => wish,
        Err(_) => {
            let body = Json(json!({"error": "what comes with a verb is JSON"}));
            return (StatusCode::BAD_REQUEST, body).into_response();
        }
    };
    log(&format!("operator: {verb}, asked from {}", peer.address.ip()));
    let (desk, name) = (answers.desk.clone(), verb.clone());
    let started =
        answers.jobs.start(&verb, move |say| async move { run_verb(desk, &name, wish, say).await });
    match started {
        Ok(job) => (StatusCode::ACCEPTED, Json(json!({"job": job}))).into_response(),
        Err(error) => fail(&error),
    }
}

async fn follow_job(
    State(answers): State<Answers>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path((job, after)): Path<(String, usize)>,
) -> Response {
    if let Some(refusal) = expect_operator(&peer, "a job's progress") {
        return refusal;
    }
    match answers.jobs.follow(&job, after, LONG_ANSWER).await {
        Some(progress) => Json(progress).into_response(),
        None => (StatusCode::NOT_FOUND, Json(json!({"error": "no such job"}))).into_response(),
    }
}

fn fail(error: &anyhow::Error) -> Response {
    let body = Json(json!({"error": format!("{error:#}")}));
    (StatusCode::INTERNAL_SERVER_ERROR, body).into_response()
}

/// The agent's own figures in Prometheus' form.
async fn tell_metrics(State(answers): State<Answers>) -> Response {
    let status = answers.board.snapshot();
    let text = write_metrics(&status, &answers.registry);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

fn write_metrics(status: &Status, registry: &Registry) -> String {
    let mut text = String::new();
    let mut figure = |name: &str, help: &str, value: f64| {
        text += &format!("# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}\n");
    };
    let memory = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: f64 =
        memory.split_whitespace().nth(1).and_then(|text| text.parse().ok()).unwrap_or(0.0);
    figure("stanchion_ready", "Whether this node is ready.", f64::from(u8::from(status.ready)));
    figure("stanchion_phase", "0 pre-start, 1 bootstrap, 2 main.", f64::from(status.phase as u8));
    figure("stanchion_problems", "Things that are not well.", status.problems.len() as f64);
    figure("stanchion_reasons", "Reasons for not being ready.", status.reasons.len() as f64);
    figure("stanchion_nodes", "Nodes that are registered.", registry.list_nodes().len() as f64);
    figure("stanchion_agent_resident_bytes", "Memory of the agent.", pages * 4096.0);
    text += "# HELP stanchion_step_seconds How long a step took.\n";
    text += "# TYPE stanchion_step_seconds gauge\n";
    for step in &status.steps {
        let done = matches!(step.outcome, StepOutcome::Done | StepOutcome::Warned(_));
        text += &format!(
            "stanchion_step_seconds{{phase=\"{}\",step=\"{}\",done=\"{done}\"}} {}\n",
            step.phase.name(),
            step.name,
            step.seconds
        );
    }
    text
}

/// Figures of the exporters, which listen on loopback only.
async fn relay_metrics(State(answers): State<Answers>, Path(exporter): Path<String>) -> Response {
    if exporter == "netbox" {
        let socket = answers.places.join(health::SOCKET);
        let asked = health::ask_socket(&socket, "/metrics", &answers.domain);
        let limit = Duration::from_secs(10);
        return match tokio::time::timeout(limit, asked).await {
            Ok(Ok((200, bytes))) => {
                ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], bytes).into_response()
            }
            _ => (StatusCode::BAD_GATEWAY, "NetBox does not answer\n").into_response(),
        };
    }
    let port = match exporter.as_str() {
        "node" => 9100,
        "postgres" => 9187,
        "redis" => 9121,
        _ => return StatusCode::NOT_FOUND.into_response(),
    };
    let relay = async {
        let url = format!("http://127.0.0.1:{port}/metrics");
        let request = answers.http.get(url).timeout(Duration::from_secs(10));
        let mut response = request.send().await?.error_for_status()?;
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            bytes.extend_from_slice(&chunk);
            anyhow::ensure!(bytes.len() <= MAX_RELAYED, "too many figures");
        }
        Ok::<_, anyhow::Error>(bytes)
    };
    match relay.await {
        Ok(bytes) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], bytes).into_response(),
        Err(_) => (StatusCode::BAD_GATEWAY, "the exporter does not answer\n").into_response(),
    }
}

/// What the agent has once it knows who the node is.
pub struct Known {
    pub registry: Registry,
    pub site: Option<Site>,
}

/// Listen for `stanchion-agent status` and its like: whoever may open the socket writes a
/// line with the verb and gets JSON.
pub fn serve_socket(places: &Places, board: &Board, known: Arc<OnceLock<Known>>) -> Result<()> {
    let path = places.socket();
    std::fs::create_dir_all(places.run())
        .with_context(|| format!("making {}", places.run().display()))?;
    super::files::remove_file(&path).context("removing the last run's socket")?;
    // Nobody else may connect, not even between its making and a later change of mode.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(&path);
    rustix::process::umask(before);
    let listener = listener.with_context(|| format!("listening on {}", path.display()))?;
    let board = board.clone();
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            };
            let (board, known) = (board.clone(), known.clone());
            tokio::spawn(async move { answer_socket(stream, &board, &known).await });
        }
    });
    Ok(())
}

async fn answer_socket(
    mut stream: UnixStream,
    board: &Board,
    known: &OnceLock<Known>,
) -> Result<()> {
    let mut verb = String::new();
    let mut asked = (&mut stream).take(64);
    tokio::time::timeout(HANDSHAKE, asked.read_to_string(&mut verb)).await??;
    let answer = match verb.trim() {
        STATUS => {
            let registry = known.get().map(|known| &known.registry);
            serde_json::to_vec(&make_page(board, registry))
        }
        RENEW => serde_json::to_vec(&renew(known.get()).await),
        _ => serde_json::to_vec(&json!({"error": "an unknown verb"})),
    };
    let write = async {
        stream.write_all(&answer.unwrap_or_default()).await?;
        stream.shutdown().await
    };
    Ok(tokio::time::timeout(HANDSHAKE, write).await??)
}

async fn renew(known: Option<&Known>) -> Value {
    let renewed = match known {
        None => Err(UserError::new("this node does not know yet who it is").into()),
        Some(known) => operate::renew_certificate(known.site.as_ref()).await,
    };
    match renewed {
        Ok(renewal) => json!(renewal),
        Err(error) => match error.downcast_ref::<UserError>() {
            Some(refused) => json!({"refused": refused.to_string()}),
            None => json!({"error": format!("{error:#}")}),
        },
    }
}

/// Ask the agent of this machine; `patience` is how long it may take.
///
/// # Errors
/// A [`UserError`] when the agent says what to do instead.
pub fn ask_socket(places: &Places, verb: &str, patience: Duration) -> Result<Value> {
    use std::io::{Read, Write};
    let path = places.socket();
    let mut stream = std::os::unix::net::UnixStream::connect(&path)
        .with_context(|| format!("asking the agent at {}", path.display()))?;
    stream.set_read_timeout(Some(patience)).context("asking the agent")?;
    writeln!(stream, "{verb}").context("asking the agent")?;
    stream.shutdown(std::net::Shutdown::Write).context("asking the agent")?;
    let mut text = String::new();
    (&mut stream).take(4 << 20).read_to_string(&mut text).context("reading the agent's answer")?;
    let answer: Value = serde_json::from_str(&text).context("reading the agent's answer")?;
    if let Some(refused) = answer["refused"].as_str() {
        return Err(UserError::new(refused).into());
    }
    if let Some(error) = answer["error"].as_str() {
        anyhow::bail!("the agent answers: {error}");
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_of_a_browser_are_refused() {
        let ask = |pairs: &[(&'static str, &'static str)]| {
            let pairs = pairs.iter().map(|(name, value)| {
                (header::HeaderName::from_static(name), HeaderValue::from_static(value))
            });
            refuse_browser(&pairs.collect()).map(|response| response.status())
        };
        let json = ("content-type", "application/json");
        assert_eq!(ask(&[json]), None);
        let forbidden = Some(StatusCode::FORBIDDEN);
        assert_eq!(ask(&[json, ("origin", "https://a.test")]), forbidden);
        assert_eq!(ask(&[json, ("sec-fetch-site", "same-origin")]), forbidden);
        let unread = Some(StatusCode::UNSUPPORTED_MEDIA_TYPE);
        assert_eq!(ask(&[]), unread);
        assert_eq!(ask(&[("content-type", "text/plain")]), unread);
    }
}
