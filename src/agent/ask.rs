//! Asking the agents of a cluster from outside, with a certificate of its CA.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;

use super::server::{PORT, Page};
use super::table::Answer;
use super::tls::Tls;
use crate::config::cluster::Node;

/// For a whole answer; a connection must be made sooner.
const PATIENCE: Duration = Duration::from_secs(3);
const MAX_PAGE: usize = 4 << 20;

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
