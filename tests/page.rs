//! The status page in a real browser: on a phone and on a wide screen, light and dark,
//! without JavaScript. Screenshots stay in the build's folder, to be looked at.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use stanchion::agent::board::Phase;
use stanchion::agent::page::write_page;
use stanchion::agent::table::{Row, Table};
use stanchion::config::cluster::Role;

/// A browser that starts on two busy processors.
const LIMIT: Duration = Duration::from_secs(120);
const PHONES: [u32; 2] = [360, 500];

fn row(number: u8, postgres: &str, etcd: &str, redis: &str) -> Row {
    Row {
        name: format!("n{number}"),
        zone: format!("rack-{number}"),
        roles: vec![Role::Db, Role::Cache, Role::Web, Role::Edge],
        phase: Some(Phase::Main),
        ready: true,
        etcd: etcd.into(),
        postgres: postgres.into(),
        lag: postgres.contains("streaming").then_some(2048),
        redis: redis.into(),
        web: "answers".into(),
        vip: number == 1,
        version: "0.1.0".into(),
        silent: None,
        registered: true,
        reasons: Vec::new(),
        warnings: Default::default(),
    }
}

fn well() -> Table {
    let nodes = vec![
        row(1, "leader running", "leader", "master"),
        row(2, "sync_standby streaming", "follower", "replica"),
        row(3, "replica streaming", "follower", "replica"),
    ];
    Table { cluster: "netbox".into(), ready: true, single: false, nodes }
}

/// A node is gone, and the others say so at length.
fn wounded() -> Table {
    let mut table = well();
    table.ready = false;
    for row in &mut table.nodes {
        row.ready = false;
        row.reasons = vec![
            "not HA: 1 of 3 nodes are not there: n3".into(),
            "/etc/haproxy/haproxy.cfg: the new file was refused, the old one is kept: \
             [ALERT] config : parsing [/run/stanchion/candidates/etc/haproxy/haproxy.cfg:117]"
                .into(),
        ];
    }
    table.nodes[0].warnings.insert("disk".into(), "/var has 4 % left".into());
    let gone = &mut table.nodes[2];
    gone.silent = Some("10.88.0.13:7443: No route to host".into());
    gone.reasons = vec!["its agent does not answer: 10.88.0.13:7443: No route to host".into()];
    table
}

fn write(table: &Table) -> String {
    write_page(table, Some("10.88.0.10"), "n1", 1_800_000_000).unwrap()
}

/// A browser on the PATH. `None`, with a line that says so, where there is none.
fn find_browser() -> Option<PathBuf> {
    let folders: Vec<PathBuf> =
        std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect();
    let found = ["chromium", "chromium-browser", "google-chrome"]
        .iter()
        .flat_map(|name| folders.iter().map(move |folder| folder.join(name)))
        .find(|path| path.is_file());
    if found.is_none() {
        eprintln!("skipped: no Chromium on the PATH, so the status page was not looked at");
    }
    found
}

/// Run the browser on a page of its own folder; what it writes to its standard output.
fn browse(browser: &Path, folder: &Path, page: &str, arguments: &[String]) -> String {
    let file = folder.join("page.html");
    fs::write(&file, page).unwrap();
    let output = folder.join("output");
    let mut child = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .args(["--disable-quic", "--disable-dev-shm-usage", "--hide-scrollbars"])
        .arg(format!("--user-data-dir={}", folder.join("profile").display()))
        .args(arguments)
        .arg(format!("file://{}", file.display()))
        .stdin(Stdio::null())
        .stdout(fs::File::create(&output).unwrap())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > LIMIT {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the browser has not ended within {} s", LIMIT.as_secs());
        }
        sleep(Duration::from_millis(50));
    };
    assert!(status.success(), "the browser ends with {status}");
    fs::read_to_string(&output).unwrap()
}

/// The page in a frame `width` pixels wide, and a script beside it that tells how wide and
/// high the page is in it, what colour its ground has, and what text it shows.
fn frame(page: &str, width: u32) -> String {
    let inner = page.replace('&', "&amp;").replace('"', "&quot;");
    format!(
        r#"<!doctype html><iframe width="{width}" height="800" srcdoc="{inner}"></iframe>
<pre id="told"></pre><script>onload = () => {{
const page = document.querySelector("iframe").contentDocument;
const style = getComputedStyle(page.body);
document.getElementById("told").textContent = JSON.stringify({{
  width: page.documentElement.scrollWidth, ground: style.backgroundColor,
  rows: page.querySelectorAll("tbody tr").length,
  headed: getComputedStyle(page.querySelector("thead")).position,
  cut: [...page.querySelectorAll("td, th, dd, li")]
    .filter(cell => cell.scrollWidth > cell.clientWidth + 1 && cell.clientWidth)
    .map(cell => cell.textContent),
  text: page.body.innerText }}); }};</script>"#
    )
}

fn ask(browser: &Path, page: &str, width: u32, dark: bool) -> serde_json::Value {
    let folder = tempfile::tempdir().unwrap();
    let scheme = u8::from(!dark);
    let arguments = [
        "--dump-dom".to_string(),
        "--virtual-time-budget=2000".into(),
        format!("--blink-settings=preferredColorScheme={scheme}"),
    ];
    let dom = browse(browser, folder.path(), &frame(page, width), &arguments);
    let told = dom.split_once(r#"<pre id="told">"#).unwrap().1.split_once("</pre>").unwrap().0;
    let told = told.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
    serde_json::from_str(&told).unwrap_or_else(|error| panic!("{error}: {told}"))
}

#[test]
fn the_page_fits_a_phone_and_a_wide_screen_in_light_and_dark() {
    let Some(browser) = find_browser() else { return };
    let page = write(&wounded());
    let phones = PHONES.map(|width| ask(&browser, &page, width, false));
    for (width, phone) in PHONES.into_iter().zip(&phones) {
        assert_eq!(phone["width"], width, "the page is wider than its phone: {phone}");
        assert_eq!(phone["rows"], 3);
        assert_eq!(phone["cut"], serde_json::json!([]), "texts run out of their cells");
        assert_eq!(phone["headed"], "absolute", "cells have their titles beside them: {phone}");
    }
    let wide = ask(&browser, &page, 1200, true);
    assert_eq!((&wide["width"], &wide["headed"]), (&1200.into(), &"static".into()));
    let text = wide["text"].as_str().unwrap();
    for words in ["0 of 3 nodes are ready", "n1 (10.88.0.10)", "not HA: 1 of 3", "no answer"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert_ne!(phones[0]["ground"], wide["ground"], "dark differs from light");
}

#[test]
fn screenshots_are_made_for_people_to_look_at() {
    let Some(browser) = find_browser() else { return };
    let shots = Path::new(env!("CARGO_TARGET_TMPDIR")).join("page");
    fs::create_dir_all(&shots).unwrap();
    for (name, table, size, dark) in [
        ("well-light", well(), "1200,600", false),
        ("wounded-dark", wounded(), "1200,800", true),
        ("wounded-light", wounded(), "1200,800", false),
        ("wounded-phone", wounded(), "500,1500", false),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let shot = shots.join(format!("{name}.png"));
        let _ = fs::remove_file(&shot);
        let scheme = u8::from(!dark);
        let arguments = [
            format!("--screenshot={}", shot.display()),
            format!("--window-size={size}"),
            format!("--blink-settings=preferredColorScheme={scheme}"),
        ];
        browse(&browser, folder.path(), &write(&table), &arguments);
        let png = fs::read(&shot).unwrap();
        assert!(png.starts_with(b"\x89PNG") && png.len() > 10_000, "{name} is {} bytes", png.len());
    }
}
