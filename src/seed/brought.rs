//! The certificate for users that the cluster file brings, checked before it goes anywhere.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

use super::document::Brought;
use crate::config::cluster::{CertificateFiles, Cluster};
use crate::error::UserError;
use crate::pki::{Chain, MAX_CHAIN, MAX_KEY};

/// Read the files that the cluster file names. `now` is in seconds since 1970, UTC.
///
/// # Errors
/// A [`UserError`] when a file is not there, the key is open to all, chain and key do not
/// belong together, the certificate is not for the cluster's domain, or is not valid now.
pub fn read_brought(files: &CertificateFiles, cluster: &Cluster, now: u64) -> Result<Brought> {
    let fault = |what: &str| UserError::new(what).at(&files.file, files.line);
    let chain = read_file(files, &files.chain, MAX_CHAIN, false)?;
    let key = read_file(files, &files.key, MAX_KEY, true)?;
    let read = Chain::read(&chain, &key).map_err(|error| {
        fault("the certificate cannot be used")
            .why(format!("{error:#}"))
            .help("the chain's file begins with the site's own certificate; then comes its CA's")
    })?;
    if !read.covers(&cluster.domain) {
        let names = match read.dns_names.as_slice() {
            [] => "it has no DNS name".to_string(),
            names => format!("it is for {}", names.join(", ")),
        };
        let what = format!("the certificate is not for {}", cluster.domain);
        return Err(fault(&what).why(names).into());
    }
    if now >= read.not_after {
        let days = (now - read.not_after) / 86_400;
        return Err(fault("the certificate has expired")
            .why(format!("it, or one above it, was valid until {days} days ago"))
            .into());
    }
    if now < read.not_before {
        let why = "it begins later, or this machine's clock is behind";
        return Err(fault("the certificate is not valid yet").why(why).into());
    }
    Ok(Brought { chain: read.pem.certificate, key: read.pem.key })
}

fn read_file(
    files: &CertificateFiles,
    path: &Path,
    limit: usize,
    is_secret: bool,
) -> Result<String> {
    let shown = path.display();
    if !path.is_file() {
        let what = format!("there is no file {shown}");
        return Err(UserError::new(what).at(&files.file, files.line).into());
    }
    let reading = || format!("reading {shown}");
    let file = File::open(path).with_context(reading)?;
    let mode = file.metadata().with_context(reading)?.mode() & 0o777;
    if is_secret && mode & 0o007 != 0 {
        return Err(UserError::new("the certificate's key is open to everybody")
            .in_file(path)
            .why(format!("its mode is {mode:04o}"))
            .help(format!("chmod 600 {shown}"))
            .into());
    }
    let mut bytes = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut bytes).with_context(reading)?;
    String::from_utf8(bytes).map_err(|_| UserError::new("the file is not PEM").in_file(path).into())
}
