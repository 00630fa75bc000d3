//! Giving a certificate to this node's HAProxy. A running one takes it over its socket, so
//! that no process is replaced and no connection sees anything of it; the file is for its
//! next start.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::agent::board::log;
use crate::agent::files::{Access, find_account, read_bounded, remove_file, write_file};
use crate::agent::places::Places;
use crate::agent::systemd::{Active, query_unit, reload_unit, run_program};
use crate::pki::Chain;

const UNIT: &str = "haproxy.service";
/// As HAProxy knows it; under the root of the [`Places`] it is the file.
const FILE: &str = "/run/stanchion/tls/haproxy/site.pem";
const SOCKET: &str = "/run/haproxy/admin.sock";
const MAX_FILE: u64 = 64 << 10;
const MAX_ANSWER: u64 = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(5);

/// See to it that HAProxy shows this one, now and after its next start.
///
/// # Errors
/// When HAProxy does not take it; then it shows the one that it had.
pub async fn show(places: &Places, chain: &Chain) -> Result<()> {
    let text = format!("{}{}", chain.pem.certificate, chain.pem.key);
    let path = places.join(FILE);
    if read_bounded(&path, MAX_FILE)?.as_deref() != Some(text.as_bytes()) {
        check_candidate(places, &text).await.context("HAProxy refuses the certificate")?;
        let passwd = std::fs::read_to_string(places.join("/etc/passwd")).unwrap_or_default();
        let access = Access { mode: 0o400, owner: find_account(&passwd, "haproxy") };
        write_file(&path, text.as_bytes(), access, false)?;
        log(&format!("site: {} is to be shown", chain.fingerprint));
    }
    if !wait_until_up().await? {
        return Ok(());
    }
    let socket = places.join(SOCKET);
    let wanted = find_sha1(&chain.leaf);
    if read_shown(&socket).await.is_ok_and(|shown| shown == wanted) {
        return Ok(());
    }
    if let Err(error) = replace(&socket, &text).await {
        log(&format!("site: {UNIT} is reloaded, since {error:#}"));
        return reload_unit(UNIT).await;
    }
    ensure!(read_shown(&socket).await? == wanted, "HAProxy still shows another certificate");
    log(&format!("site: {} is shown", chain.fingerprint));
    Ok(())
}

/// Whether HAProxy runs. One on its way up may have read the old file: it is waited for.
async fn wait_until_up() -> Result<bool> {
    let begun = Instant::now();
    loop {
        match query_unit(UNIT).await? {
            Active::Running => return Ok(true),
            // What it shows then, the next look finds out.
            Active::Starting if begun.elapsed() < PATIENCE => {}
            _ => return Ok(false),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Let HAProxy read it in a configuration of its own: its idea of what is good enough
/// counts.
async fn check_candidate(places: &Places, text: &str) -> Result<()> {
    let folder = places.candidates();
    let (pem, config) = (folder.join("site.pem"), folder.join("site.cfg"));
    let frontend = format!(
        "defaults\n    mode http\n    timeout client 1s\nfrontend site\n    bind :443 ssl crt {}\n",
        pem.display()
    );
    write_file(&pem, text.as_bytes(), Access::PRIVATE, false)?;
    write_file(&config, frontend.as_bytes(), Access::PRIVATE, false)?;
    let shown = config.to_string_lossy();
    let checked = run_program(&["haproxy", "-c", "-f", &shown]).await;
    for path in [pem, PathBuf::from(&*shown)] {
        let _ = remove_file(&path);
    }
    checked.map(drop)
}

async fn replace(socket: &Path, text: &str) -> Result<()> {
    // The text ends with an empty line, and has none before.
    let set = ask(socket, &format!("set ssl cert {FILE} <<\n{}\n\n", text.trim_end())).await?;
    ensure!(set.contains("Transaction"), "it does not take the certificate: {}", shorten(&set));
    let commit = ask(socket, &format!("commit ssl cert {FILE}\n")).await?;
    if !commit.contains("Success") {
        let _ = ask(socket, &format!("abort ssl cert {FILE}\n")).await;
        bail!("it does not put the certificate to use: {}", shorten(&commit));
    }
    Ok(())
}

/// SHA-1 of the certificate that HAProxy shows, in hexadecimal digits.
async fn read_shown(socket: &Path) -> Result<String> {
    let answer = ask(socket, &format!("show ssl cert {FILE}\n")).await?;
    let line = answer.lines().find_map(|line| line.strip_prefix("SHA1 FingerPrint:"));
    Ok(line.context("HAProxy does not say what it shows")?.trim().to_ascii_uppercase())
}

fn find_sha1(der: &[u8]) -> String {
    // HAProxy names certificates so; nothing is believed for it.
    let sum = digest(&SHA1_FOR_LEGACY_USE_ONLY, der);
    sum.as_ref().iter().map(|byte| format!("{byte:02X}")).collect()
}

async fn ask(socket: &Path, request: &str) -> Result<String> {
    let asked = async {
        let mut stream = UnixStream::connect(socket).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut bytes = Vec::new();
        stream.take(MAX_ANSWER).read_to_end(&mut bytes).await?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).into_owned())
    };
    let asked = tokio::time::timeout(PATIENCE, asked).await.context("HAProxy's socket is silent");
    asked?.with_context(|| format!("asking {}", socket.display()))
}

/// One line of what HAProxy said; it repeats no part of what it was given.
fn shorten(text: &str) -> String {
    let line = text.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("nothing");
    line.chars().take(200).collect()
}
