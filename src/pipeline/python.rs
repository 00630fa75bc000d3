//! Distributions of Python: locked through pip and its index, fetched into the store.
//!
//! pip runs in the sandbox over a tools root, with the host's network and nothing else of
//! the host: what it resolves may run code of source archives.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

use super::source::Source;
use super::unpacked::provide_tools;
use crate::command::Failed;
use crate::config::build::{Build, normalize_name};
use crate::config::layer::Layer;
use crate::config::profile::Profile;
use crate::digest::Digest;
use crate::error::UserError;
use crate::lock::{Lock, LockedDistribution, LockedPython, PythonRequest};
use crate::sandbox::{Inside, Program, Sandbox, Spec};
use crate::tools;

pub const PIP_JOB: &str = "python/pip";

/// Where pip, and Debian's patched certifi, see certificates.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";
const REQUIREMENTS: &str = "/requirements.txt";
const DOWNLOADS: &str = "/downloads";
/// What of the environment says how to reach an index.
const PASSED: [&str; 8] = [
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
];
/// Bundles of certificates: what the environment names, then where systems have them.
const BUNDLE_VARIABLES: [&str; 3] = ["PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"];
const BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// Files of the host that name lookups need.
const RESOLVER: [&str; 2] = ["/etc/resolv.conf", "/etc/hosts"];

/// What pip says that it would install (`pip install --report`, version 1).
#[derive(Deserialize)]
struct Report {
    install: Vec<Installed>,
}

#[derive(Deserialize)]
struct Installed {
    download_info: DownloadInfo,
    metadata: Metadata,
}

#[derive(Deserialize)]
struct DownloadInfo {
    url: String,
    #[serde(default)]
    archive_info: ArchiveInfo,
}

#[derive(Deserialize, Default)]
struct ArchiveInfo {
    #[serde(default)]
    hashes: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
    version: String,
}

/// What the lock holds for the virtualenvs of a layer, in the layer's order.
pub fn list_locked<'a>(
    lock: &'a Lock,
    layer: &Layer,
    build: &Build,
) -> Result<Vec<&'a LockedPython>> {
    let find = |path: &Path| {
        lock.pythons.iter().find(|one| one.layer == layer.name && Path::new(&one.path) == path)
    };
    build
        .pythons
        .iter()
        .map(|python| {
            find(&python.path)
                .with_context(|| format!("the lock has no Python in {}", python.path.display()))
        })
        .collect()
}

/// What the lock holds for all virtualenvs of the profile.
pub fn list_all<'a>(lock: &'a Lock, profile: &Profile) -> Result<Vec<&'a LockedPython>> {
    let mut pythons = Vec::new();
    for layer in &profile.layers {
        if let Some(build) = &layer.build {
            pythons.extend(list_locked(lock, layer, build)?);
        }
    }
    Ok(pythons)
}

/// Have pip choose all distributions that the requirements need.
///
/// # Errors
/// A [`UserError`] with the end of what pip says.
pub fn resolve(
    source: &Source,
    lock: &Lock,
    request: &PythonRequest,
) -> Result<Vec<LockedDistribution>> {
    let step = source.progress.begin(format!("{} Python", request.layer));
    let what = format!("the requirements of layer `{}` cannot be locked", request.layer);
    let requirements = request.requirements.join("\n") + "\n";
    let text = run_pip(
        source,
        lock,
        &requirements,
        &["install", "--dry-run", "--ignore-installed", "--break-system-packages", "--report", "-"],
        &what,
    )?
    .0;
    let report: Report = serde_json::from_str(&text).context("reading pip's report")?;
    let distributions = report.install.iter().map(read_installed).collect::<Result<Vec<_>>>()?;
    step.finish(format!("{} distributions", distributions.len()));
    Ok(distributions)
}

fn read_installed(installed: &Installed) -> Result<LockedDistribution> {
    let Metadata { name, version } = &installed.metadata;
    let url = installed.download_info.url.split(['#', '?']).next().unwrap_or_default();
    let file = url.rsplit('/').next().unwrap_or_default().replace("%2B", "+").replace("%21", "!");
    let sha256 = installed.download_info.archive_info.hashes.get("sha256");
    let sha256 = sha256.and_then(|digits| digits.parse::<Digest>().ok()).ok_or_else(|| {
        UserError::new(format!("the index gives no SHA-256 of {name} {version}"))
            .help("use an index that does, or another version")
    })?;
    let distribution =
        LockedDistribution { name: normalize_name(name), version: version.clone(), file, sha256 };
    distribution.check().map_err(|why| anyhow!("pip's report: {why}"))?;
    Ok(distribution)
}

/// Have the distributions in the store.
///
/// # Errors
/// A [`UserError`] when the index has one no longer, or another file in its place.
pub fn fetch(source: &Source, lock: &Lock, pythons: &[&LockedPython]) -> Result<()> {
    let missing: BTreeMap<&str, &LockedDistribution> = pythons
        .iter()
        .flat_map(|python| &python.distributions)
        .filter(|one| !source.store.has_file(&one.sha256, None))
        .map(|one| (one.file.as_str(), one))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if source.is_offline() {
        let names: Vec<&str> = missing.keys().copied().take(20).collect();
        return Err(UserError::new(format!(
            "the store lacks {} distributions of Python",
            missing.len()
        ))
        .why(format!("`--offline` forbids downloads of:\n{}", names.join("\n")))
        .help("run once without `--offline`")
        .into());
    }
    let step = source.progress.begin("fetch Python");
    let line = |one: &&LockedDistribution| {
        format!("{}=={} --hash=sha256:{}\n", one.name, one.version, one.sha256)
    };
    let requirements: String = missing.values().map(line).collect();
    let (_, scratch) = run_pip(
        source,
        lock,
        &requirements,
        &["download", "--no-deps", "--require-hashes", "--dest", DOWNLOADS],
        "distributions of Python cannot be fetched",
    )?;
    let folder = scratch.path().join("upper").join(&DOWNLOADS[1..]);
    for one in missing.values() {
        let file = folder.join(&one.file);
        if !file.is_file() || Digest::of_file(&file)? != one.sha256 {
            return Err(UserError::new(format!("the index has another {}", one.file))
                .why(format!("the lock has SHA-256 {}", one.sha256))
                .help("take what there is now: `stanchion lock --update`")
                .into());
        }
        source.store.insert_file(&file, &one.sha256)?;
    }
    step.finish(format!("{} files", missing.len()));
    Ok(())
}

/// Copies of the distributions' files, under their names.
///
/// # Errors
/// A [`UserError`] for one that has rotted in the store, which is removed.
pub fn lay_files(source: &Source, python: &LockedPython, folder: &Path) -> Result<()> {
    for one in &python.distributions {
        let to = folder.join(&one.file);
        fs::copy(source.store.file_path(&one.sha256), &to)
            .with_context(|| format!("copying {}", one.file))?;
        if Digest::of_file(&to)? != one.sha256 {
            source.store.discard_file(&one.sha256)?;
            return Err(UserError::new("files in the store are damaged")
                .in_file(source.store.root())
                .why(one.file.clone())
                .help("it was removed: build again, and it is fetched anew")
                .into());
        }
    }
    Ok(())
}

/// Run pip with a requirements file; what it wrote to standard output, and the scratch
/// folder whose `upper` holds what it left.
fn run_pip(
    source: &Source,
    lock: &Lock,
    requirements: &str,
    arguments: &[&str],
    what: &str,
) -> Result<(String, crate::store::Scratch)> {
    let tools = provide_tools(source, lock, tools::set::PYTHON)?;
    let scratch = source.store.make_scratch("pip")?;
    let folder = |name: &str| -> Result<PathBuf> {
        let path = scratch.path().join(name);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(path)
    };
    let upper = folder("upper")?;
    link_merged(&upper, tools.root())?;
    folder("upper/etc")?;
    for path in RESOLVER {
        // A host without one finds names in another way, or none.
        if let Ok(text) = fs::read(path) {
            fs::write(upper.join(&path[1..]), text).with_context(|| format!("copying {path}"))?;
        }
    }
    fs::write(upper.join(&REQUIREMENTS[1..]), requirements).context("writing requirements")?;
    let bundle = upper.join(&CERTIFICATES[1..]);
    fs::create_dir_all(bundle.parent().unwrap_or(&upper)).context("making /etc/ssl")?;
    fs::write(&bundle, read_bundle(tools.root())?).context("writing certificates")?;
    let spec = Spec {
        lower: vec![tools.root().to_path_buf()],
        upper: Some(upper),
        work: Some(folder("work")?),
        merged: Some(folder("merged")?),
        env: list_environment(),
        network: true,
        ..Spec::default()
    };
    let program = Program::new("/usr/bin/python3")
        .args(["-m", "pip"])
        .args(arguments.to_vec())
        .args(["--requirement", REQUIREMENTS, "--cert", CERTIFICATES])
        // pip's own store of certificates would be asked beside the bundle.
        .args(["--use-deprecated=legacy-certs", "--quiet", "--no-input", "--no-cache-dir"])
        .args(["--no-build-isolation", "--disable-pip-version-check"])
        .args(["--progress-bar=off"])
        .env("PIP_ROOT_USER_ACTION", "ignore");
    let job = serde_json::to_value(PipJob { program, what: what.to_string() })?;
    let text = Sandbox::default().start(&spec, PIP_JOB, job, &mut |_| ())?;
    Ok((serde_json::from_value(text).context("reading pip's output")?, scratch))
}

/// What a sandbox with pip does.
#[derive(Serialize, Deserialize)]
pub struct PipJob {
    program: Program,
    /// What it means when pip fails.
    what: String,
}

/// Run pip inside of the sandbox; its standard output.
pub fn run_job(job: &PipJob, inside: &Inside) -> Result<String> {
    let ran = inside.run(&job.program).map_err(|error| match error.downcast_ref::<Failed>() {
        Some(failed) => UserError::new(&job.what)
            .why(failed.tail.clone())
            .help("look at the requirements in layer.toml, and at the network; pip's own variables (PIP_INDEX_URL, …) hold here too")
            .into(),
        None => error.context(job.what.clone()),
    });
    Ok(String::from_utf8_lossy(&ran?.stdout).into_owned())
}

/// Links that a configured Debian has.
fn link_merged(upper: &Path, tools: &Path) -> Result<()> {
    for name in ["bin", "lib", "lib64", "sbin"] {
        if tools.join(name).symlink_metadata().is_err() && tools.join("usr").join(name).is_dir() {
            std::os::unix::fs::symlink(format!("usr/{name}"), upper.join(name))
                .with_context(|| format!("linking /{name}"))?;
        }
    }
    Ok(())
}

/// The host's certificates, or else Debian's.
fn read_bundle(tools: &Path) -> Result<Vec<u8>> {
    let named = BUNDLE_VARIABLES.iter().filter_map(std::env::var_os).map(PathBuf::from);
    let known = BUNDLES.iter().map(PathBuf::from);
    if let Some(bundle) = named.chain(known).find(|path| path.is_file()) {
        return fs::read(&bundle).with_context(|| format!("reading {}", bundle.display()));
    }
    let folder = tools.join("usr/share/ca-certificates/mozilla");
    let mut bundle = Vec::new();
    for entry in fs::read_dir(&folder).context("listing Debian's certificates")? {
        bundle.extend(fs::read(entry?.path()).context("reading Debian's certificates")?);
    }
    Ok(bundle)
}

/// pip's variables and the proxies, as the host has them. Paths of the host mean nothing
/// inside, and certificates are given on the command line.
fn list_environment() -> BTreeMap<String, String> {
    let is_passed = |name: &str, value: &str| {
        PASSED.contains(&name)
            || (name.starts_with("PIP_")
                && !["PIP_CERT", "PIP_CONFIG_FILE"].contains(&name)
                && !value.starts_with(['/', '~', '.']))
    };
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, value)| is_passed(name, value))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::exit_code;

    /// What is made of one entry of pip's report.
    fn read(name: &str, url: &str, hashes: &str) -> Result<LockedDistribution> {
        let entry = format!(
            r#"{{"download_info": {{"url": "{url}", "archive_info": {{"hash": "x", "hashes": {hashes}}}}}, "is_direct": false, "metadata": {{"name": "{name}", "version": "1.0+local", "summary": "x"}}}}"#
        );
        read_installed(&serde_json::from_str(&entry)?)
    }

    #[test]
    fn of_pips_report_the_lock_keeps_no_places() {
        let digest = Digest::of(b"x");
        let hashes = format!(r#"{{"md5": "y", "sha256": "{digest}"}}"#);
        let read = |url: &str| read("Some_Name", url, &hashes);
        let distribution =
            read("https://example.org/a/b/some_name-1.0%2Blocal-py3-none-any.whl#sha256=1?x")
                .unwrap();
        assert_eq!(distribution.name, "some-name");
        assert_eq!(distribution.file, "some_name-1.0+local-py3-none-any.whl");
        assert_eq!(distribution.sha256, digest);
        for hostile in ["https://example.org/", "https://example.org/a%2F..%2Fb.whl", "x/.whl", ""]
        {
            assert!(read(hostile).is_err(), "{hostile}");
        }
    }

    #[test]
    fn an_index_without_digests_is_the_users_to_mend() {
        for hashes in ["{}", r#"{"md5": "y"}"#, r#"{"sha256": "short"}"#] {
            let error = read("a", "https://example.org/a.whl", hashes).unwrap_err();
            assert_eq!(exit_code(&error), 2, "{error:#}");
        }
    }
}
