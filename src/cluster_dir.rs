//! The cluster's directory: its CA and its shared secrets. It is made once, exists wholly
//! or not at all, is never overwritten, and is for nobody's eyes but its owner's.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::config::cluster::Cluster;
use crate::error::UserError;
use crate::files::{
    Existing, is_occupied, name_beside, rename_without_replacing, sync_parent, write_beside,
};
use crate::pki::{Authority, Certificate, Issued};
use crate::secrets::{
    FIRST, POSTGRES, REDIS, SECRETS, Secret, is_needed, list_brought, make_secret, make_secrets,
};

const CA: &str = "ca.pem";
const CA_KEY: &str = "ca.key";
const OPERATOR: &str = "operator.pem";
const OPERATOR_KEY: &str = "operator.key";
const SECRETS_FILE: &str = "secrets.toml";
/// Bytes of each of them.
const MAX_BYTES: u64 = 64 << 10;

/// An open cluster directory.
pub struct ClusterDir {
    pub authority: Authority,
    /// The CA's certificate, PEM.
    pub ca: String,
    /// All of them, by name.
    pub secrets: BTreeMap<String, Secret>,
}

/// Where a cluster's directory is when nothing else is said: beside the cluster file,
/// called like the cluster.
pub fn default_path(cluster_file: &Path, cluster: &Cluster) -> PathBuf {
    cluster_file.with_file_name(&cluster.name)
}

/// Make the directory of a new cluster, mode 0700: CA, the operator's certificate, all
/// secrets, of which `given` are somebody else's. `now` is in seconds since 1970, UTC.
///
/// # Errors
/// A [`UserError`] when there is something at the path already, and when a secret is not
/// given that only somebody else can make.
pub fn make_directory(
    path: &Path,
    cluster: &Cluster,
    given: &BTreeMap<String, Secret>,
    now: u64,
) -> Result<()> {
    check_given(cluster, |name| given.contains_key(name))?;
    let (authority, ca) = Authority::make(&cluster.name, now)?;
    let operator = authority.certify_operator(now)?;
    let secrets = write_secrets(cluster, &make_secrets(cluster, given)?)?;
    let files = list_files(&ca, &operator, &secrets);
    if path.symlink_metadata().is_ok() {
        return Err(refuse_second(path).into());
    }
    place_directory(path, &files)
}

/// Make those secrets that a newer version needs and the directory lacks; the others stay
/// as they are, byte for byte. The names of what was made.
///
/// # Errors
/// As of [`ClusterDir::open`], and a [`UserError`] when a secret is missing that the
/// directory has had from its beginning, or that is somebody else's and not `given`.
pub fn add_missing(
    path: &Path,
    cluster: &Cluster,
    given: &BTreeMap<String, Secret>,
) -> Result<Vec<&'static str>> {
    open_authority(path, cluster)?;
    let file = path.join(SECRETS_FILE);
    let (mut text, secrets) = parse_secrets(&file)?;
    let missing = list_missing(&file, cluster, &secrets)?;
    check_given(cluster, |name| given.contains_key(name) || secrets.contains_key(name))?;
    for name in &missing {
        let secret = match given.get(*name) {
            Some(secret) => secret.clone(),
            None => make_secret(name)?,
        };
        let line = BTreeMap::from([(name, secret)]);
        if !text.ends_with('\n') {
            text.push('\n');
        }
        text += &toml::to_string(&line).context("writing the secrets as TOML")?;
    }
    if !missing.is_empty() {
        write_beside(&file, 0o600, Existing::Replace, |mut file: &File| {
            file.write_all(text.as_bytes()).context("writing the secrets")
        })?;
    }
    Ok(missing)
}

/// What somebody else has made must be brought.
fn check_given(cluster: &Cluster, has: impl Fn(&str) -> bool) -> Result<(), UserError> {
    let Some(name) = list_brought(cluster).into_iter().find(|name| !has(name)) else {
        return Ok(());
    };
    let (section, flag) = match name {
        POSTGRES => ("external.postgres", "--postgres-password-file FILE"),
        REDIS => ("external.redis", "--redis-password-file FILE"),
        _ => ("storage", "--s3-key-file FILE"),
    };
    Err(UserError::new(format!("the secret `{name}` is not given"))
        .why(format!("the cluster file has `[{section}]`, whose keys are somebody else's"))
        .help(format!("stanchion cluster init {flag}")))
}

/// Read secrets that somebody else has made from a file of `count` lines, one on each. The
/// file must not be open to others.
///
/// # Errors
/// A [`UserError`], which does not show what the file holds.
pub fn read_brought_secrets(path: &Path, count: usize) -> Result<Vec<Secret>> {
    let text = read_brought_file(path)?;
    let secrets: Option<Vec<Secret>> = text.lines().map(|line| Secret::new(line.trim())).collect();
    match secrets.filter(|secrets| secrets.len() == count) {
        Some(secrets) => Ok(secrets),
        None => Err(UserError::new("the file does not hold what it should")
            .in_file(path)
            .why(match count {
                1 => "it must be one line: letters, digits and `+/=_.-`".to_string(),
                _ => format!("it must be {count} lines, each of letters, digits and `+/=_.-`"),
            })
            .into()),
    }
}

fn read_brought_file(path: &Path) -> Result<String> {
    if !path.is_file() {
        return Err(UserError::new(format!("there is no file {}", path.display())).into());
    }
    read_file(path, true)
}

/// Those that came with later versions, or with a section of the cluster file, and are not
/// there.
fn list_missing(
    path: &Path,
    cluster: &Cluster,
    secrets: &BTreeMap<String, Secret>,
) -> Result<Vec<&'static str>, UserError> {
    let is_missing = |(name, _): &&(&'static str, _)| !secrets.contains_key(*name);
    if let Some((name, _)) = SECRETS[..FIRST].iter().find(is_missing) {
        return Err(UserError::new(format!("the secret `{name}` is missing"))
            .in_file(path)
            .help("bring the file back from a copy; its secrets cannot be made anew"));
    }
    let missing = SECRETS[FIRST..].iter().filter(is_missing).map(|(name, _)| *name);
    Ok(missing.filter(|name| is_needed(cluster, name)).collect())
}

fn list_files<'a>(
    ca: &'a Issued,
    operator: &'a Issued,
    secrets: &'a str,
) -> [(&'static str, &'a str); 6] {
    [
        (CA, &ca.certificate),
        (CA_KEY, &ca.key),
        (OPERATOR, &operator.certificate),
        (OPERATOR_KEY, &operator.key),
        (SECRETS_FILE, secrets),
        // None of this belongs into a repository.
        (".gitignore", "*\n"),
    ]
}

/// Write all files into a new directory beside the path and give it its name in one step.
fn place_directory(path: &Path, files: &[(&str, &str)]) -> Result<()> {
    let making = || format!("making {}", path.display());
    let new = name_beside(path)?;
    DirBuilder::new().mode(0o700).create(&new).with_context(making)?;
    let placed = fill_directory(&new, files)
        .and_then(|()| rename_without_replacing(&new, path).with_context(making))
        .and_then(|()| sync_parent(path).with_context(making));
    if placed.is_err() {
        // Only what this run has made: the name is random.
        let _ = fs::remove_dir_all(&new);
    }
    match placed {
        Err(error) if is_occupied(&error) => Err(refuse_second(path).into()),
        placed => placed,
    }
}

fn fill_directory(folder: &Path, files: &[(&str, &str)]) -> Result<()> {
    for (name, text) in files {
        let path = folder.join(name);
        let filled = write_new(&path, text.as_bytes());
        filled.with_context(|| format!("writing {}", path.display()))?;
    }
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.with_context(|| format!("writing {}", folder.display()))
}

/// A new file, mode 0600, on the disk when this returns.
fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn refuse_second(path: &Path) -> UserError {
    UserError::new(format!("{} exists already", path.display()))
        .why("a second set of keys and secrets would lock the cluster out of its own data")
        .help("go on with `stanchion seed`, which uses it; for another cluster name another directory with --dir")
}

/// What the operator speaks to the nodes with.
pub struct Operator {
    /// The CA's certificate, PEM.
    pub ca: String,
    /// PEM.
    pub certificate: String,
    /// PEM.
    pub key: String,
}

impl Operator {
    /// Read it from a cluster directory, or from a copy of these three files of one.
    ///
    /// # Errors
    /// A [`UserError`] when it is not there, is another cluster's, or can be read by others.
    pub fn read(path: &Path, cluster: &Cluster) -> Result<Self> {
        if !path.is_dir() {
            let what = format!("there is no operator's certificate for `{}`", cluster.name);
            return Err(UserError::new(what)
                .why(format!("there is no directory {}", path.display()))
                .help("name the cluster's directory with --dir; `stanchion cluster init` makes it")
                .into());
        }
        let ca = read_file(&path.join(CA), false)?;
        let certificate = read_file(&path.join(OPERATOR), false)?;
        let key = read_file(&path.join(OPERATOR_KEY), true)?;
        for (name, pem) in [(CA, &ca), (OPERATOR, &certificate)] {
            let read = Certificate::read(pem).map_err(|_| {
                UserError::new("the operator's certificate cannot be used")
                    .in_file(path.join(name))
                    .why("it is no certificate in PEM")
                    .help("bring it back from a copy")
            })?;
            if read.organization != cluster.name {
                let what = format!("{} belongs to another cluster", path.display());
                let owner = read.organization;
                let why = format!("it is that of `{owner}`, and the file says `{}`", cluster.name);
                return Err(UserError::new(what).why(why).into());
            }
        }
        Ok(Operator { ca, certificate, key })
    }
}

fn write_secrets(cluster: &Cluster, secrets: &BTreeMap<String, Secret>) -> Result<String> {
    let table = toml::to_string(secrets).context("writing the secrets as TOML")?;
    Ok(format!(
        "# The secrets of the cluster {}. Whoever reads them owns its data.\n{table}",
        cluster.name
    ))
}

impl ClusterDir {
    /// Open the directory of this cluster.
    ///
    /// # Errors
    /// A [`UserError`] when it is not there, is another cluster's, can be read by others,
    /// lacks a secret, or is damaged. No error shows what the files hold.
    pub fn open(path: &Path, cluster: &Cluster) -> Result<Self> {
        let (authority, ca) = open_authority(path, cluster)?;
        let secrets = read_secrets(&path.join(SECRETS_FILE), cluster)?;
        Ok(ClusterDir { authority, ca, secrets })
    }
}

/// The CA of the directory, which is this cluster's, and its certificate in PEM.
fn open_authority(path: &Path, cluster: &Cluster) -> Result<(Authority, String)> {
    if !path.is_dir() {
        let what = format!("the cluster `{}` has no secrets yet", cluster.name);
        return Err(UserError::new(what)
            .why(format!("there is no directory {}", path.display()))
            .help("make it with `stanchion cluster init`, or name it with --dir")
            .into());
    }
    let ca = read_file(&path.join(CA), false)?;
    let key = read_file(&path.join(CA_KEY), true)?;
    let authority = Authority::read(&ca, &key).map_err(|error| {
        UserError::new("the cluster's CA cannot be used").in_file(path).why(format!("{error:#}"))
    })?;
    let owner = &authority.certificate().organization;
    if *owner != cluster.name {
        let what = format!("{} belongs to another cluster", path.display());
        let why = format!("its CA is that of `{owner}`, and the file says `{}`", cluster.name);
        return Err(UserError::new(what).why(why).into());
    }
    Ok((authority, ca))
}

fn read_secrets(path: &Path, cluster: &Cluster) -> Result<BTreeMap<String, Secret>> {
    let (_, secrets) = parse_secrets(path)?;
    match list_missing(path, cluster, &secrets)?.first() {
        None => Ok(secrets),
        Some(name) => Err(UserError::new(format!("the secret `{name}` is missing"))
            .in_file(path)
            .why("this version or the cluster file needs it, and the directory was made without")
            .help("add what is missing with `stanchion cluster init --missing`, and keep a copy")
            .into()),
    }
}

/// The file's text, and what it says.
fn parse_secrets(path: &Path) -> Result<(String, BTreeMap<String, Secret>)> {
    let text = read_file(path, true)?;
    // TOML's own errors show the line, and with it the secret.
    let secrets = toml::from_str(&text).map_err(|error| {
        let before = error.span().map_or("", |span| text.get(..span.start).unwrap_or(""));
        UserError::new("the secrets cannot be read")
            .at(path, 1 + before.matches('\n').count())
            .why("each line is `name = \"secret\"`; a secret has letters, digits and `+/=_.-`")
    })?;
    Ok((text, secrets))
}

fn read_file(path: &Path, is_secret: bool) -> Result<String> {
    let reading = || format!("reading {}", path.display());
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(UserError::new(format!("there is no {}", path.display()))
                .why("the cluster's directory is not whole")
                .help("bring it back from a copy")
                .into());
        }
        file => file.with_context(reading)?,
    };
    let mode = file.metadata().with_context(reading)?.mode() & 0o777;
    if is_secret && mode & 0o077 != 0 {
        return Err(UserError::new("a file with secrets is open to others")
            .in_file(path)
            .why(format!("its mode is {mode:04o}"))
            .help(format!("chmod 600 {}", path.display()))
            .into());
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).with_context(reading)?;
    String::from_utf8(bytes)
        .map_err(|_| UserError::new("the file is not UTF-8 text").in_file(path).into())
}
