//! One file from one URL: tries, resumes and bounds.

use std::collections::hash_map::RandomState;
use std::fmt::Display;
use std::fs::File;
use std::hash::{BuildHasher, Hasher as _};
use std::io::Read;
use std::time::Duration;

use anyhow::Error;
use reqwest::header::{CACHE_CONTROL, CONTENT_RANGE, RANGE};
use reqwest::{Client, Response, StatusCode, Url};
use tokio::time::timeout;

use super::partial::Sink;
use super::{Meter, Patience};
use crate::error::UserError;

/// How many times a URL may give other bytes than were promised.
const WRONG_LIMIT: u32 = 2;
/// A try that brought at least so many new bytes does not count as one.
const GAIN: u64 = 1 << 20;
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// What may be received.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Exactly so many bytes, when known.
    pub size: Option<u64>,
    /// Never more than so many.
    pub limit: u64,
}

/// Why a URL has not given the file.
pub(super) enum Failure {
    /// It is not there (any more).
    Gone,
    /// Another URL may do better.
    Refused(Error),
    /// Nothing can be received: our own side fails.
    Local(Error),
}

/// Why one try has failed.
enum Try {
    /// Another try may do better.
    Again(String),
    /// It is another file than was promised.
    Wrong(String),
    Failed(Failure),
}

impl From<Error> for Try {
    fn from(error: Error) -> Self {
        Try::Failed(Failure::Local(error))
    }
}

/// Receive `url` into `sink`, going on from what is there.
pub(super) async fn receive<S: Sink>(
    client: &Client,
    patience: &Patience,
    url: &str,
    sink: &mut S,
    bounds: Bounds,
    meter: &mut Meter<'_>,
) -> Result<(), Failure> {
    let parsed = Url::parse(url).map_err(|error| {
        Failure::Refused(UserError::new(format!("`{url}` is no URL: {error}")).into())
    })?;
    let (mut tries, mut wrong, mut furthest) = (0, 0, sink.len());
    loop {
        let outcome = match parsed.scheme() {
            "file" => tokio::task::block_in_place(|| copy_file(&parsed, sink, bounds, meter)),
            "http" | "https" => {
                let request = Request { client, patience, url: &parsed, afresh: wrong > 0 };
                try_once(&request, sink, bounds, meter).await
            }
            other => Err(Try::Failed(Failure::Refused(
                UserError::new(format!(
                    "cannot download {}: {other} is not http, https or file",
                    show(&parsed)
                ))
                .into(),
            ))),
        };
        let outcome = outcome.and_then(|()| sink.check_digest().map_err(Try::Wrong));
        match outcome {
            Ok(()) => return Ok(()),
            Err(Try::Failed(failure)) => return Err(failure),
            Err(Try::Wrong(why)) => {
                sink.clear().map_err(Failure::Local)?;
                meter.set(0);
                wrong += 1;
                if wrong >= WRONG_LIMIT {
                    return Err(Failure::Refused(explain_wrong(&parsed, &why).into()));
                }
            }
            Err(Try::Again(why)) => {
                if sink.len() >= furthest.saturating_add(GAIN) {
                    (tries, furthest) = (0, sink.len());
                }
                tries += 1;
                if tries >= patience.tries {
                    return Err(Failure::Refused(explain_unreachable(&parsed, &why, tries).into()));
                }
                tokio::time::sleep(choose_pause(patience.pause, tries)).await;
            }
        }
    }
}

struct Request<'a> {
    client: &'a Client,
    patience: &'a Patience,
    url: &'a Url,
    /// Past the caches on the way, which have given a wrong file.
    afresh: bool,
}

async fn try_once<S: Sink>(
    request: &Request<'_>,
    sink: &mut S,
    bounds: Bounds,
    meter: &mut Meter<'_>,
) -> Result<(), Try> {
    if !S::RESUMES {
        sink.clear()?;
    }
    meter.set(sink.len());
    let stall = request.patience.stall;
    let stalled = || Try::Again(format!("nothing came for {} seconds", stall.as_secs_f32()));
    let mut builder = request.client.get(request.url.clone());
    if sink.len() > 0 {
        builder = builder.header(RANGE, format!("bytes={}-", sink.len()));
    }
    if request.afresh || !S::RESUMES {
        builder = builder.header(CACHE_CONTROL, "no-cache");
    }
    let sent = timeout(stall, builder.send()).await.map_err(|_| stalled())?;
    let mut response = sent.map_err(|error| judge_error(request.url, error))?;
    judge_status(request.url, &response, sink)?;
    if let Some(rest) = response.content_length() {
        check_announced(sink.len().saturating_add(rest), bounds)?;
        meter.begin(sink.len().saturating_add(rest));
    } else {
        meter.begin(bounds.size.unwrap_or_default());
    }
    meter.set(sink.len());
    loop {
        let whole = bounds.size == Some(sink.len());
        match timeout(stall, response.chunk()).await {
            Ok(Ok(Some(bytes))) => {
                take_bytes(&bytes, sink, bounds)?;
                meter.receive(bytes.len() as u64);
            }
            Ok(Ok(None)) => break,
            // All bytes are there, and only the end of the transfer is not.
            _ if whole => break,
            Ok(Err(error)) => return Err(judge_error(request.url, error)),
            Err(_) => return Err(stalled()),
        }
    }
    match bounds.size {
        Some(size) if sink.len() < size => {
            Err(Try::Again(format!("the transfer ended after {} of {size} bytes", sink.len())))
        }
        _ => Ok(()),
    }
}

/// A file of this machine, in the same bounds.
fn copy_file<S: Sink>(
    url: &Url,
    sink: &mut S,
    bounds: Bounds,
    meter: &mut Meter<'_>,
) -> Result<(), Try> {
    let refuse = |why: &dyn Display| {
        let error = UserError::new(format!("cannot read {}", show(url))).why(why.to_string());
        Try::Failed(Failure::Refused(error.into()))
    };
    let path = url.to_file_path().map_err(|()| refuse(&"it names no file of this machine"))?;
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Try::Failed(Failure::Gone));
        }
        Err(error) => return Err(refuse(&error)),
    };
    let length = file.metadata().map_err(|error| refuse(&error))?.len();
    check_announced(length, bounds)?;
    sink.clear()?;
    meter.begin(length);
    meter.set(0);
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer).map_err(|error| refuse(&error))? {
            0 => return Ok(()),
            n => {
                take_bytes(&buffer[..n], sink, bounds)?;
                meter.receive(n as u64);
            }
        }
    }
}

fn take_bytes<S: Sink>(bytes: &[u8], sink: &mut S, bounds: Bounds) -> Result<(), Try> {
    let limit = bounds.size.unwrap_or(u64::MAX).min(bounds.limit);
    if bytes.len() as u64 > limit - sink.len().min(limit) {
        return Err(Try::Wrong(format!("more than {limit} bytes came")));
    }
    Ok(sink.append(bytes)?)
}

/// Whether a file of the announced length can be the right one.
fn check_announced(length: u64, bounds: Bounds) -> Result<(), Try> {
    match bounds.size {
        Some(size) if length != size => {
            Err(Try::Wrong(format!("it is {length} bytes long, and should be {size}")))
        }
        None if length > bounds.limit => Err(Try::Wrong(format!(
            "it is {length} bytes long, and may not be longer than {}",
            bounds.limit
        ))),
        _ => Ok(()),
    }
}

/// What the answer's head means; `sink` is cleared when the body begins at its start.
fn judge_status<S: Sink>(url: &Url, response: &Response, sink: &mut S) -> Result<(), Try> {
    let status = response.status();
    match status {
        StatusCode::OK => {
            if sink.len() > 0 {
                sink.clear()?;
            }
            Ok(())
        }
        StatusCode::PARTIAL_CONTENT if sink.len() > 0 => {
            if find_range_start(response) == Some(sink.len()) {
                return Ok(());
            }
            sink.clear()?;
            Err(Try::Again("another part came than was asked for".to_string()))
        }
        StatusCode::RANGE_NOT_SATISFIABLE if sink.len() > 0 => {
            sink.clear()?;
            Err(Try::Again("the part that was asked for is not there".to_string()))
        }
        StatusCode::NOT_FOUND | StatusCode::GONE => Err(Try::Failed(Failure::Gone)),
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
            Err(Try::Again(format!("the answer was {status}")))
        }
        _ if status.is_server_error() => Err(Try::Again(format!("the answer was {status}"))),
        _ => Err(Try::Failed(Failure::Refused(
            UserError::new(format!("cannot download {}", show(url)))
                .why(format!("the answer was {status}"))
                .help("give another mirror (--mirror URL), or mend what stands between (a proxy, a password)")
                .into(),
        ))),
    }
}

/// `7` of `Content-Range: bytes 7-99/100`.
fn find_range_start(response: &Response) -> Option<u64> {
    let value = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    value.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

fn judge_error(url: &Url, error: reqwest::Error) -> Try {
    let why = describe_error(&error.without_url());
    if why.contains("certificate") {
        return Try::Failed(Failure::Refused(
            UserError::new(format!("cannot download {}", show(url)))
                .why(why)
                .help("the system's certificates must vouch for the server; SSL_CERT_FILE may name a file of others")
                .into(),
        ));
    }
    Try::Again(why)
}

/// The error and its causes, each once.
fn describe_error(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

fn explain_unreachable(url: &Url, why: &str, tries: u32) -> UserError {
    UserError::new(format!("cannot download {}", show(url)))
        .why(format!("{why} ({tries} tries)"))
        .help("look at the network, or give another mirror (--mirror URL); what has arrived is kept, and the next run goes on from there")
}

fn explain_wrong(url: &Url, why: &str) -> UserError {
    UserError::new(format!("{} is not the file that it should be", show(url)))
        .why(why)
        .help("the place may be in the middle of an update: try again later; else give another mirror (--mirror URL), or mend the `url` and `sha256` of an artifact")
}

/// The URL without its password.
fn show(url: &Url) -> String {
    let mut url = url.clone();
    if url.password().is_some() {
        // It has a host, since it has a password.
        let _ = url.set_password(Some("..."));
    }
    url.to_string()
}

/// Exponential, with jitter between half and the whole, so that many do not come back at once.
fn choose_pause(first: Duration, tries: u32) -> Duration {
    let pause = first.saturating_mul(1 << (tries - 1).min(10)).min(LONGEST_PAUSE);
    let random = RandomState::new().build_hasher().finish() as f64 / u64::MAX as f64;
    pause.mul_f64(0.5 + random / 2.0)
}
