//! Downloads: parallel, resumable, checked while they stream.

mod partial;
#[cfg(test)]
pub(crate) mod tests;
mod transfer;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use reqwest::Client;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::digest::Digest;
use crate::error::UserError;
use crate::progress::{Bar, Mode, Progress, format_bytes};
use crate::store::Store;

use partial::{Partial, Sink};
use transfer::{Bounds, Failure, receive};

/// The longest file that is taken when its size is not known beforehand.
const UNKNOWN_SIZE_LIMIT: u64 = 8 << 30;

/// A file to have in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Download {
    /// For messages and bars.
    pub name: String,
    /// Where it is (http, https or file), the best place first.
    pub urls: Vec<String>,
    pub digest: Digest,
    /// In bytes, when known.
    pub size: Option<u64>,
}

/// How long to try.
#[derive(Debug, Clone)]
pub struct Patience {
    /// A transfer that brings nothing for so long is broken off.
    pub stall: Duration,
    /// Tries of one URL that bring nothing.
    pub tries: u32,
    /// The pause after the first try; it doubles with each.
    pub pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience { stall: Duration::from_secs(30), tries: 5, pause: Duration::from_millis(500) }
    }
}

/// Files that none of their places has (any more).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("gone from every place where it should be: {}", names.join(", "))]
pub struct Vanished {
    /// The downloads' names, or the URL of [`Fetcher::fetch_bytes`].
    pub names: Vec<String>,
}

/// Downloads, with a runtime of its own; not to be used from within another.
pub struct Fetcher {
    runtime: Runtime,
    client: Client,
    jobs: usize,
    offline: bool,
    patience: Patience,
}

impl Fetcher {
    /// `jobs` files at once; `offline`: only what the store holds.
    pub fn new(jobs: usize, offline: bool) -> Result<Self> {
        Self::with_patience(jobs, offline, Patience::default())
    }

    pub fn with_patience(jobs: usize, offline: bool, patience: Patience) -> Result<Self> {
        // Another part of the process may have been first: that one serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let builder = || {
            Client::builder()
                .user_agent(concat!("stanchion/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(patience.stall)
        };
        // A system without any certificate can still use mirrors without TLS.
        let client = builder()
            .build()
            .or_else(|_| builder().tls_certs_only([]).build())
            .context("preparing downloads")?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("fetch")
            .enable_all()
            .build()
            .context("starting the threads for downloads")?;
        Ok(Fetcher { runtime, client, jobs: jobs.max(1), offline, patience })
    }

    /// Bring what is missing into the store; the paths there, in the order of `downloads`.
    ///
    /// # Errors
    /// [`Vanished`] when all else has been fetched and some files are nowhere. Else the
    /// first failure ends the whole: a [`UserError`] for a mirror that cannot be reached,
    /// for a file with a wrong digest, for a full disk, and for what is missing offline.
    pub fn fetch_all(
        &self,
        store: &Store,
        downloads: &[Download],
        progress: &Progress,
    ) -> Result<Vec<PathBuf>> {
        let missing: BTreeMap<Digest, &Download> = downloads
            .iter()
            .filter(|download| !store.has_file(&download.digest, download.size))
            .map(|download| (download.digest, download))
            .collect();
        if !missing.is_empty() {
            // In the order given, each once.
            let mut seen = missing.clone();
            let queue: VecDeque<Download> =
                downloads.iter().filter_map(|d| seen.remove(&d.digest)).cloned().collect();
            if self.offline {
                return Err(explain_offline(&queue).into());
            }
            self.runtime.block_on(self.fetch_missing(store, queue, progress))?;
        }
        Ok(downloads.iter().map(|download| store.file_path(&download.digest)).collect())
    }

    /// A small file of at most `limit` bytes, not kept.
    ///
    /// # Errors
    /// As [`Fetcher::fetch_all`]; [`Vanished`] when the URL has no such file.
    pub fn fetch_bytes(&self, url: &str, limit: u64) -> Result<Vec<u8>> {
        if self.offline {
            return Err(UserError::new(format!("cannot download {url}"))
                .why("`--offline` forbids it")
                .help("run again without `--offline`")
                .into());
        }
        let mut bytes = Vec::new();
        let bounds = Bounds { size: None, limit };
        let whole = Whole::default();
        let mut meter = Meter::new(&whole, None, "");
        let receiving = receive(&self.client, &self.patience, url, &mut bytes, bounds, &mut meter);
        match self.runtime.block_on(receiving) {
            Ok(()) => Ok(bytes),
            Err(Failure::Gone) => Err(Vanished { names: vec![url.to_string()] }.into()),
            Err(Failure::Refused(error) | Failure::Local(error)) => Err(error),
        }
    }

    async fn fetch_missing(
        &self,
        store: &Store,
        mut queue: VecDeque<Download>,
        progress: &Progress,
    ) -> Result<()> {
        let began = Instant::now();
        let step = progress.begin("fetch");
        let files = queue.len();
        let known: u64 = queue.iter().filter_map(|download| download.size).sum();
        if progress.mode() == Mode::Lines {
            progress.note(&format!("fetching {}", count_files(files, known)));
        }
        let whole = Arc::new(Whole {
            bar: Some(progress.begin_bytes(&count_files(files, 0), known)),
            ..Whole::default()
        });
        let (mut running, mut vanished) = (JoinSet::new(), Vec::new());
        loop {
            while running.len() < self.jobs
                && let Some(download) = queue.pop_front()
            {
                let (client, patience) = (self.client.clone(), self.patience.clone());
                let (store, progress, whole) = (store.clone(), progress.clone(), whole.clone());
                running.spawn(async move {
                    let found =
                        fetch_one(&client, &patience, &store, &download, &progress, &whole).await;
                    (download.name, found)
                });
            }
            // Leaving early drops `running`, which stops the others; their partials stay.
            match running.join_next().await {
                None => break,
                Some(ended) => match ended.context("a download broke down")? {
                    (_, Ok(())) => {}
                    (name, Err(Failure::Gone)) => vanished.push(name),
                    (name, Err(Failure::Refused(error) | Failure::Local(error))) => {
                        return Err(error.context(format!("fetching {name}")));
                    }
                },
            }
        }
        let received = whole.received.load(Ordering::Relaxed);
        let seconds = began.elapsed().as_secs_f64();
        let speed = format_bytes((received as f64 / seconds.max(0.001)) as u64);
        drop(whole);
        if !vanished.is_empty() {
            vanished.sort();
            return Err(Vanished { names: vanished }.into());
        }
        step.finish(format!("{} ({speed}/s)", count_files(files, received)));
        Ok(())
    }
}

/// One file, from the first of its places that has it.
async fn fetch_one(
    client: &Client,
    patience: &Patience,
    store: &Store,
    download: &Download,
    progress: &Progress,
    whole: &Whole,
) -> Result<(), Failure> {
    let mut meter = Meter::new(whole, Some(progress), &download.name);
    meter.known = download.size;
    let wait = || {
        if !whole.waited.swap(true, Ordering::Relaxed) {
            progress.note("waiting for another command that fetches the same files");
        }
    };
    let Some(mut partial) =
        Partial::open(store, download.digest, download.size, wait).await.map_err(Failure::Local)?
    else {
        meter.set(download.size.unwrap_or_default());
        return Ok(());
    };
    tokio::task::block_in_place(|| partial.hash_rest(download.size)).map_err(Failure::Local)?;
    if partial.check_digest().is_err() {
        let bounds =
            Bounds { size: download.size, limit: download.size.unwrap_or(UNKNOWN_SIZE_LIMIT) };
        receive_any(client, patience, download, &mut partial, bounds, &mut meter).await?;
    }
    tokio::task::block_in_place(|| partial.finish(store)).map_err(Failure::Local)?;
    Ok(())
}

/// Gone only when every place says so; otherwise the last that failed for another reason.
async fn receive_any(
    client: &Client,
    patience: &Patience,
    download: &Download,
    partial: &mut Partial,
    bounds: Bounds,
    meter: &mut Meter<'_>,
) -> Result<(), Failure> {
    let mut failure = Failure::Gone;
    for url in &download.urls {
        match receive(client, patience, url, partial, bounds, meter).await {
            Ok(()) => return Ok(()),
            Err(Failure::Gone) => {}
            Err(Failure::Local(error)) => return Err(Failure::Local(error)),
            Err(refused) => failure = refused,
        }
    }
    Err(failure)
}

/// What all running downloads have done.
#[derive(Default)]
struct Whole {
    bar: Option<Bar>,
    done: AtomicU64,
    /// Counts what came twice, twice.
    received: AtomicU64,
    /// Whether it was said that another command is waited for.
    waited: AtomicBool,
}

/// What one download shows.
struct Meter<'a> {
    whole: &'a Whole,
    progress: Option<&'a Progress>,
    name: &'a str,
    /// The size that the whole already counts on.
    known: Option<u64>,
    bar: Option<Bar>,
    at: u64,
}

impl<'a> Meter<'a> {
    fn new(whole: &'a Whole, progress: Option<&'a Progress>, name: &'a str) -> Self {
        Meter { whole, progress, name, known: None, bar: None, at: 0 }
    }

    /// Show a bar of `total` bytes from now on.
    fn begin(&mut self, total: u64) {
        if self.known.is_none()
            && let Some(whole) = &self.whole.bar
        {
            whole.lengthen(total);
            self.known = Some(total);
        }
        if self.bar.is_none() {
            self.bar = self.progress.map(|progress| progress.begin_bytes(self.name, total));
        }
    }

    fn set(&mut self, at: u64) {
        self.whole.done.fetch_sub(self.at, Ordering::Relaxed);
        let done = self.whole.done.fetch_add(at, Ordering::Relaxed) + at;
        self.at = at;
        if let Some(bar) = &self.whole.bar {
            bar.set(done);
        }
        if let Some(bar) = &self.bar {
            bar.set(at);
        }
    }

    /// Bytes that have just come.
    fn receive(&mut self, bytes: u64) {
        self.whole.received.fetch_add(bytes, Ordering::Relaxed);
        self.set(self.at + bytes);
    }
}

fn count_files(files: usize, bytes: u64) -> String {
    let files = if files == 1 { "1 file".to_string() } else { format!("{files} files") };
    if bytes == 0 { files } else { format!("{files}, {}", format_bytes(bytes)) }
}

fn explain_offline(missing: &VecDeque<Download>) -> UserError {
    const SHOWN: usize = 20;
    let mut names: Vec<&str> = missing.iter().take(SHOWN).map(|d| d.name.as_str()).collect();
    let rest = missing.len().saturating_sub(SHOWN);
    let more = format!("and {rest} more");
    if rest > 0 {
        names.push(&more);
    }
    UserError::new(format!("the store lacks {}", count_files(missing.len(), 0)))
        .why(format!("`--offline` forbids downloads of:\n{}", names.join("\n")))
        .help("run once without `--offline`")
}
