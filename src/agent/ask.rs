//! Asking the agents of a cluster from outside, with a certificate of its CA.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use reqwest::StatusCode;
use reqwest::header::CONTENT_TYPE;
use serde_json::Value;
use tokio::task::JoinSet;

use super::etcd::describe_transport;
use super::operate::{Outcome, Progress};
use super::server::{PORT, Page};
use super::table::Answer;
use super::tls::Tls;
use crate::config::cluster::Node;
use crate::error::UserError;

/// For a whole answer; a connection must be made sooner.
const PATIENCE: Duration = Duration::from_secs(3);
const MAX_PAGE: usize = 4 << 20;
/// Of what a job tells at once; a support bundle is the longest.
const MAX_PROGRESS: usize = 64 << 20;
/// A job's agent may be out of reach for so long.
const LOST: Duration = Duration::from_secs(60);

/// Ask all of them at once for their status pages, by name.
///
/// # Errors
/// When nobody can be asked at all; a node that does not answer is an answer.
pub fn ask_nodes(tls: &Tls, nodes: &[&Node]) -> Result<BTreeMap<String, Answer>> {
    let http = tls.make_http_client()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("starting to ask the nodes")?.block_on(async {
        let mut questions = JoinSet::new();
        for node in nodes {
            let (name, address) = (node.name.clone(), SocketAddr::from((node.address, PORT)));
            let http = http.clone();
            questions.spawn(async move {
                let asked = tokio::time::timeout(PATIENCE, ask(&http, &name, address)).await;
                let answer = match asked {
                    Ok(Ok(page)) => Answer::Page(Box::new(page)),
                    Ok(Err(error)) => Answer::Silent(explain(&error, address)),
                    Err(_) => {
                        Answer::Silent(format!("{address} is silent for {} s", PATIENCE.as_secs()))
                    }
                };
                (name, answer)
            });
        }
        let answers = questions.join_all().await;
        Ok(answers.into_iter().collect())
    })
}

async fn ask(http: &reqwest::Client, name: &str, address: SocketAddr) -> Result<Page> {
    let request = http.get(format!("https://{address}/status"));
    let mut response = request.send().await?.error_for_status()?;
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        bytes.extend_from_slice(&chunk);
        ensure!(bytes.len() <= MAX_PAGE, "its page has more than {MAX_PAGE} bytes");
    }
    let page: Page = serde_json::from_slice(&bytes)
        .context("its page cannot be read: is it of another version?")?;
    let who = &page.status.node;
    ensure!(who == name, "at this address is the node `{who}`");
    Ok(page)
}

/// Have a node's agent do what a verb says, and wait until it has. Each line that it says
/// meanwhile goes to `on_line`.
///
/// # Errors
/// A [`UserError`] for what the agent refuses, and when it cannot be asked.
pub fn operate(
    tls: &Tls,
    node: &Node,
    verb: &str,
    wish: &Value,
    on_line: &mut dyn FnMut(&str),
) -> Result<Value> {
    let http = tls.make_http_client()?;
    let address = SocketAddr::from((node.address, PORT));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("starting to ask a node")?.block_on(async {
        let job = start_job(&http, node, address, verb, wish).await?;
        let (mut heard, mut last) = (0, tokio::time::Instant::now());
        loop {
            let progress = match read_progress(&http, address, &job, heard).await {
                Ok(progress) => progress,
                Err(error) if error.is::<UserError>() => return Err(error),
                Err(error) if last.elapsed() > LOST => {
                    return Err(error.context(format!(
                        "{} has been silent for {} s; what it does may go on",
                        node.name,
                        LOST.as_secs()
                    )));
                }
                Err(_) => {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
            };
            last = tokio::time::Instant::now();
            heard += progress.lines.len();
            progress.lines.iter().for_each(|line| on_line(line));
            match progress.outcome {
                None => {}
                Some(Outcome::Done(value)) => return Ok(value),
                Some(Outcome::Refused(refusal)) => return Err(refusal.into()),
                Some(Outcome::Failed(why)) => bail!("{} says: {why}", node.name),
            }
        }
    })
}

async fn start_job(
    http: &reqwest::Client,
    node: &Node,
    address: SocketAddr,
    verb: &str,
    wish: &Value,
) -> Result<String> {
    let url = format!("https://{address}/operate/{verb}");
    let request = http
        .post(url)
        // The agent refuses what a browser's form could send.
        .header(CONTENT_TYPE, "application/json")
        .body(wish.to_string())
        .timeout(Duration::from_secs(10));
    let response = request.send().await.map_err(|error| {
        UserError::new(format!("{} does not answer", node.name))
            .why(format!("{address}: {}", describe_transport(&error)))
            .help("see `stanchion status`")
    })?;
    match response.status() {
        StatusCode::ACCEPTED => {}
        StatusCode::FORBIDDEN => {
            return Err(UserError::new(format!(
                "{} does not take this certificate for the operator's",
                node.name
            ))
            .help("use the cluster's directory that `stanchion cluster init` made")
            .into());
        }
        StatusCode::NOT_FOUND => {
            return Err(UserError::new(format!("{} does not know `{verb}`", node.name))
                .why("its agent is of another version")
                .help("use a `stanchion` of the version that `stanchion status` shows")
                .into());
        }
        other => bail!("{} answers {other}", node.name),
    }
    let answer: Value = serde_json::from_slice(&read_answer(response).await?)?;
    Ok(answer["job"].as_str().context("the agent names no job")?.to_string())
}

async fn read_progress(
    http: &reqwest::Client,
    address: SocketAddr,
    job: &str,
    heard: usize,
) -> Result<Progress> {
    let url = format!("https://{address}/operate/job/{job}/{heard}");
    let response = http.get(url).timeout(Duration::from_secs(60)).send().await?;
    if response.status() == StatusCode::NOT_FOUND {
        return Err(UserError::new("the node's agent was restarted while it was at work")
            .help("see `stanchion status` for how things are, then ask again")
            .into());
    }
    let bytes = read_answer(response.error_for_status()?).await?;
    serde_json::from_slice(&bytes).context("its answer cannot be read")
}

async fn read_answer(mut response: reqwest::Response) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        bytes.extend_from_slice(&chunk);
        ensure!(bytes.len() <= MAX_PROGRESS, "its answer has more than {MAX_PROGRESS} bytes");
    }
    Ok(bytes)
}

/// The last cause is what went wrong; the others repeat the address and the library's words.
fn explain(error: &anyhow::Error, address: SocketAddr) -> String {
    let is_slow = error.chain().any(|cause| {
        cause.downcast_ref::<reqwest::Error>().is_some_and(reqwest::Error::is_timeout)
    });
    match is_slow {
        true => format!("{address}: nothing answers there"),
        false => format!("{address}: {}", error.root_cause()),
    }
}
