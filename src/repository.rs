//! The suites of Debian 13: their metadata from a mirror, verified.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use liblzma::read::XzDecoder;
use liblzma::stream::{CONCATENATED, Stream};

use crate::debian::mirror::{Archive, Mirror};
use crate::debian::release::{Expected, Keyring, Release, to_seconds, verify_in_release};
use crate::digest::Digest;
use crate::error::UserError;
use crate::fetch::{Download, Fetcher, Vanished};
use crate::progress::Progress;
use crate::store::{Store, write_atomically};

/// Suites by their codename, and where they lie.
const SUITES: [(&str, Archive); 3] = [
    ("trixie", Archive::Main),
    ("trixie-updates", Archive::Main),
    ("trixie-security", Archive::Security),
];
const COMPONENT: &str = "main";
/// Holds the packages for all architectures as well.
const INDEX: &str = "main/binary-amd64/Packages";

/// Bounds of what is taken, some times what Debian 13 has.
const IN_RELEASE_LIMIT: u64 = 4 << 20;
const PACKAGES_LIMIT: u64 = 512 << 20;
const XZ_MEMORY: u64 = 128 << 20;

/// One suite, verified.
#[derive(Debug, Clone)]
pub struct Suite {
    /// Its codename, `trixie-security`.
    pub name: String,
    pub component: String,
    pub release: Release,
    /// Of the signed file, `InRelease`.
    pub release_digest: Digest,
    /// The index of its packages, in the deb822 format.
    pub packages_text: String,
    /// The archive that its packages' paths are below.
    pub pool_base: Archive,
}

/// The archive that holds the packages of a suite.
pub fn find_archive(suite: &str) -> Archive {
    let known = SUITES.iter().find(|(name, _)| *name == suite);
    known.map_or(Archive::Main, |(_, archive)| *archive)
}

/// Whether the mirror answers with a signed Release for every suite.
pub fn check_reachable(fetcher: &Fetcher, mirror: &Mirror) -> Result<()> {
    for (name, archive) in SUITES {
        let url = mirror.locate(archive, &format!("dists/{name}/InRelease"));
        fetcher
            .fetch_bytes(&url, IN_RELEASE_LIMIT)
            .map_err(|error| explain_missing_suite(error, name, &url))?;
    }
    Ok(())
}

/// Fetch and verify what the mirror has now. `not_before`: the oldest Date that may come,
/// in seconds since 1970, by suite (from the lock).
///
/// # Errors
/// A [`UserError`] for a mirror that cannot be reached or lacks a suite, for a signature
/// that does not hold, and for metadata that is expired or older than what was seen.
pub fn refresh(
    fetcher: &Fetcher,
    store: &Store,
    mirror: &Mirror,
    progress: &Progress,
    not_before: &BTreeMap<String, u64>,
) -> Result<Vec<Suite>> {
    let trust = Trust { keyring: Keyring::debian()?, now: SystemTime::now() };
    refresh_trusting(&trust, fetcher, store, mirror, progress, not_before)
}

/// What verification rests on.
struct Trust {
    keyring: Keyring,
    now: SystemTime,
}

fn refresh_trusting(
    trust: &Trust,
    fetcher: &Fetcher,
    store: &Store,
    mirror: &Mirror,
    progress: &Progress,
    not_before: &BTreeMap<String, u64>,
) -> Result<Vec<Suite>> {
    let mut releases = Vec::new();
    for (name, archive) in SUITES {
        let url = mirror.locate(archive, &format!("dists/{name}/InRelease"));
        let bytes = fetcher
            .fetch_bytes(&url, IN_RELEASE_LIMIT)
            .map_err(|error| explain_missing_suite(error, name, &url))?;
        let release = verify_in_release(&trust.keyring, &bytes, trust.now)
            .and_then(|text| Release::parse(&text))
            .with_context(|| format!("verifying {url}"))?;
        release.check(&Expected {
            url: &url,
            codename: name,
            now: to_seconds(trust.now),
            seen: read_date_seen(store, name),
            locked: not_before.get(name).copied(),
        })?;
        releases.push((name, archive, release, Digest::of(&bytes)));
    }
    let downloads = releases
        .iter()
        .map(|(name, archive, release, _)| plan_download(mirror, name, *archive, release))
        .collect::<Result<Vec<_>>>()?;
    let paths = fetcher.fetch_all(store, &downloads, progress).map_err(explain_vanished_indexes)?;
    let mut suites = Vec::new();
    for ((name, archive, release, release_digest), path) in releases.into_iter().zip(paths) {
        let packages_text = read_packages(&path, release.find_file(INDEX)?)
            .with_context(|| format!("reading the package index of {name}"))?;
        suites.push(Suite {
            name: name.to_string(),
            component: COMPONENT.to_string(),
            release,
            release_digest,
            packages_text,
            pool_base: archive,
        });
    }
    // Only now: a date whose index cannot be had must not shut out an older whole one.
    for suite in &suites {
        record_date_seen(store, &suite.name, suite.release.date)?;
    }
    Ok(suites)
}

fn plan_download(
    mirror: &Mirror,
    suite: &str,
    archive: Archive,
    release: &Release,
) -> Result<Download> {
    let path = format!("{INDEX}.xz");
    let (digest, size) = release.find_file(&path)?;
    check_size(&path, size)?;
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let by_hash = format!("dists/{suite}/{folder}/by-hash/SHA256/{digest}");
    let plain = format!("dists/{suite}/{path}");
    let urls = release
        .acquire_by_hash
        .then_some(by_hash)
        .into_iter()
        .chain([plain])
        .map(|path| mirror.locate(archive, &path))
        .collect();
    Ok(Download {
        name: format!("{suite} {COMPONENT} Packages.xz"),
        urls,
        digest,
        size: Some(size),
    })
}

/// Decompress an index within the size that was signed, and check its digest.
fn read_packages(path: &Path, (digest, size): (Digest, u64)) -> Result<String> {
    check_size(INDEX, size)?;
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let stream = Stream::new_stream_decoder(XZ_MEMORY, CONCATENATED).context("starting xz")?;
    let mut bytes = Vec::with_capacity(size as usize);
    XzDecoder::new_stream(file, stream)
        .take(size + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("decompressing {}", path.display()))?;
    ensure!(
        bytes.len() as u64 == size && Digest::of(&bytes) == digest,
        "{} does not decompress to the index that was signed ({size} bytes, SHA-256 {digest})",
        path.display()
    );
    String::from_utf8(bytes).context("the index is not UTF-8")
}

fn check_size(path: &str, size: u64) -> Result<()> {
    ensure!(size <= PACKAGES_LIMIT, "{path} is said to be {size} bytes long; that is too much");
    Ok(())
}

/// The newest Date of the suite that any command on this store has verified; nothing when
/// none has, or what is written there is no number.
fn read_date_seen(store: &Store, suite: &str) -> Option<u64> {
    let text = std::fs::read_to_string(store.state_path(&name_state(suite))).ok()?;
    text.trim().parse().ok()
}

fn record_date_seen(store: &Store, suite: &str, date: u64) -> Result<()> {
    if read_date_seen(store, suite).is_some_and(|seen| seen >= date) {
        return Ok(());
    }
    write_atomically(&store.state_path(&name_state(suite)), format!("{date}\n").as_bytes())
}

fn name_state(suite: &str) -> String {
    format!("release-date-{suite}")
}

fn explain_missing_suite(error: anyhow::Error, suite: &str, url: &str) -> anyhow::Error {
    match error.downcast::<Vanished>() {
        Ok(_) => UserError::new(format!("the mirror has no suite `{suite}`"))
            .why(format!("there is no {url}"))
            .help("give another mirror: --mirror URL, or --mirror URL,SECURITY-URL when the security archive lies elsewhere")
            .into(),
        Err(error) => error,
    }
}

fn explain_vanished_indexes(error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<Vanished>() {
        Ok(vanished) => UserError::new(format!("the mirror lacks {}", vanished.names.join(", ")))
            .why("its InRelease names an index that it does not have (any more)")
            .help("the mirror may be in the middle of an update: try again later, or give another one (--mirror URL)")
            .into(),
        Err(error) => error,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use super::*;
    use crate::debian::release::{format_date, tests::Archive as Signer};
    use crate::error::exit_code;
    use crate::fetch::tests::server::{Server, write_good, write_status};
    use crate::fetch::tests::{impatient, quiet};

    const TEXT: &str = "Package: hello\nVersion: 2.10\n\n";

    fn compress(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 6);
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// A mirror on 127.0.0.1 and a store; the files of the mirror may be changed.
    struct Place {
        _dir: tempfile::TempDir,
        store: Store,
        signer: Signer,
        files: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
        server: Server,
        now: u64,
    }

    impl Place {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let files: Arc<Mutex<BTreeMap<String, Vec<u8>>>> = Arc::default();
            let served = files.clone();
            let server = Server::start(move |request, to| {
                let body = served.lock().unwrap().get(&request.path).cloned();
                match body {
                    Some(body) => write_good(to, request, &body),
                    None => write_status(to, "404 Not Found"),
                }
            });
            let now = to_seconds(SystemTime::now());
            let store = Store::open(dir.path()).unwrap();
            let place = Place { _dir: dir, store, signer: Signer::new(), files, server, now };
            place.publish(now - 3_600);
            place
        }

        fn publish(&self, date: u64) {
            for (name, _) in SUITES {
                self.publish_suite(name, date, |text| text);
            }
        }

        /// Put a suite with one index, dated `date`, on the mirror.
        fn publish_suite(&self, name: &str, date: u64, change: impl Fn(String) -> String) {
            let index = format!("{TEXT}Package: of-{name}\n");
            let packed = compress(index.as_bytes());
            let text = format!(
                "Origin: Test\nSuite: x\nCodename: {name}\nDate: {}\nValid-Until: {}\nAcquire-By-Hash: yes\nSHA256:\n {} {} {INDEX}\n {} {} {INDEX}.xz\n",
                format_date(date),
                format_date(date + 7 * 86_400),
                Digest::of(index.as_bytes()),
                index.len(),
                Digest::of(&packed),
                packed.len()
            );
            let base = if name.ends_with("security") { "debian-security" } else { "debian" };
            let folder = format!("{base}/dists/{name}");
            let by_hash =
                format!("{folder}/main/binary-amd64/by-hash/SHA256/{}", Digest::of(&packed));
            let signed = self.signer.sign(&change(text));
            let mut files = self.files.lock().unwrap();
            files.insert(format!("{folder}/InRelease"), signed.into_bytes());
            files.insert(by_hash, packed);
        }

        fn refresh(&self) -> Result<Vec<Suite>> {
            self.refresh_after(&BTreeMap::new())
        }

        fn refresh_after(&self, not_before: &BTreeMap<String, u64>) -> Result<Vec<Suite>> {
            let trust = Trust {
                keyring: self.signer.keyring(),
                now: SystemTime::UNIX_EPOCH + Duration::from_secs(self.now),
            };
            let mirror = Mirror {
                main: self.server.url("debian"),
                security: self.server.url("debian-security"),
            };
            refresh_trusting(&trust, &impatient(false), &self.store, &mirror, &quiet(), not_before)
        }

        #[track_caller]
        fn assert_refused(&self, parts: &[&str]) {
            let error = self.refresh().unwrap_err();
            assert_eq!(exit_code(&error), 2, "{error:?}");
            for part in parts {
                assert!(format!("{error:#}").contains(part), "no `{part}` in: {error:#}");
            }
        }

        fn take_by_hash(&self) -> Vec<Vec<u8>> {
            let mut files = self.files.lock().unwrap();
            let paths: Vec<String> =
                files.keys().filter(|path| path.contains("by-hash")).cloned().collect();
            paths.iter().map(|path| files.remove(path).unwrap()).collect()
        }
    }

    #[test]
    fn three_suites_come_verified_and_unchanged_indexes_only_once() {
        let place = Place::new();
        let suites = place.refresh().unwrap();
        let names: Vec<&str> = suites.iter().map(|suite| suite.name.as_str()).collect();
        assert_eq!(names, ["trixie", "trixie-updates", "trixie-security"]);
        assert_eq!(suites[2].pool_base, Archive::Security);
        assert_eq!(suites[2].packages_text, format!("{TEXT}Package: of-trixie-security\n"));
        let signed = place.files.lock().unwrap()["debian/dists/trixie/InRelease"].clone();
        assert_eq!(suites[0].release_digest, Digest::of(&signed));
        assert_eq!(suites[0].release.date, place.now - 3_600);
        assert_eq!(place.server.requests().len(), 6);
        place.refresh().unwrap();
        assert_eq!(place.server.requests().len(), 9);
    }

    #[test]
    fn a_mirror_without_by_hash_folders_is_asked_for_the_plain_path() {
        let place = Place::new();
        let packed = place.take_by_hash();
        place.assert_refused(&["lacks trixie main Packages.xz, trixie-security", "help:"]);
        for name in ["trixie", "trixie-updates"] {
            let path = format!("debian/dists/{name}/{INDEX}.xz");
            let index = format!("{TEXT}Package: of-{name}\n");
            place.files.lock().unwrap().insert(path, compress(index.as_bytes()));
        }
        place.assert_refused(&["lacks trixie-security main"]);
        let path = format!("debian-security/dists/trixie-security/{INDEX}.xz");
        let index = format!("{TEXT}Package: of-trixie-security\n");
        assert!(packed.contains(&compress(index.as_bytes())));
        place.files.lock().unwrap().insert(path, compress(index.as_bytes()));
        place.refresh().unwrap();
    }

    #[test]
    fn an_old_in_release_is_refused_once_a_newer_one_was_seen() {
        let place = Place::new();
        place.refresh().unwrap();
        place.publish_suite("trixie-security", place.now - 7_200, |text| text);
        place.assert_refused(&[
            "older than what this machine has seen",
            &format_date(place.now - 7_200),
            &format_date(place.now - 3_600),
            &place.server.url("debian-security"),
        ]);
        place.publish(place.now - 60);
        place.refresh().unwrap();
        place.publish(place.now - 3_600);
        place.assert_refused(&["older than what this machine has seen"]);
    }

    #[test]
    fn a_date_that_could_not_be_used_is_not_held_against_older_ones() {
        let place = Place::new();
        place.refresh().unwrap();
        let wrong = Digest::of(b"nowhere").to_string();
        place.publish_suite("trixie", place.now - 60, |text| {
            let good = text.lines().last().unwrap().split(' ').nth(1).unwrap().to_string();
            text.replace(&good, &wrong)
        });
        place.assert_refused(&["lacks trixie main Packages.xz"]);
        place.publish(place.now - 3_600);
        place.refresh().unwrap();
    }

    #[test]
    fn what_is_older_than_the_lock_is_refused() {
        let place = Place::new();
        let not_before = |date| BTreeMap::from([("trixie-updates".to_string(), date)]);
        place.refresh_after(&not_before(place.now - 3_600)).unwrap();
        let error = place.refresh_after(&not_before(place.now - 3_599)).unwrap_err();
        assert_eq!(exit_code(&error), 2);
        assert!(error.to_string().contains("what the lock was made from"), "{error}");
    }

    #[test]
    fn an_expired_a_future_a_foreign_and_a_tampered_in_release_are_refused() {
        let place = Place::new();
        place.publish_suite("trixie", place.now - 8 * 86_400, |text| text);
        place.assert_refused(&["expired", &format_date(place.now - 86_400)]);
        place.publish_suite("trixie", place.now + 86_400, |text| text);
        place.assert_refused(&["from the future"]);
        place.publish_suite("trixie", place.now, |text| {
            text.replace("Codename: trixie", "Codename: forky")
        });
        place.assert_refused(&["`forky`, not `trixie`"]);
        place.publish_suite("trixie", place.now, |text| text);
        let path = "debian/dists/trixie/InRelease".to_string();
        let signed = place.files.lock().unwrap()[&path].clone();
        let tampered = String::from_utf8(signed).unwrap().replace("Origin: Test", "Origin: Tost");
        place.files.lock().unwrap().insert(path.clone(), tampered.into_bytes());
        place.assert_refused(&["does not hold", "InRelease"]);
        place.files.lock().unwrap().insert(path, vec![b'x'; 5 << 20]);
        place.assert_refused(&["4194304"]);
        place.publish_suite("trixie", place.now, |text| text);
        place.refresh().unwrap();
    }

    #[test]
    fn a_mirror_without_the_suite_is_named() {
        let place = Place::new();
        place.files.lock().unwrap().remove("debian-security/dists/trixie-security/InRelease");
        let url = place.server.url("debian-security/dists/trixie-security/InRelease");
        place.assert_refused(&["no suite `trixie-security`", &url, "SECURITY-URL"]);
    }

    #[test]
    fn an_index_that_unpacks_to_something_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("Packages.xz");
        let read = |packed: &[u8], text: &[u8], size| {
            std::fs::write(&path, packed).unwrap();
            read_packages(&path, (Digest::of(text), size))
        };
        let text = TEXT.as_bytes();
        let packed = compress(text);
        let size = text.len() as u64;
        assert_eq!(read(&packed, text, size).unwrap(), TEXT);
        assert!(read(&packed, text, size - 1).is_err());
        assert!(read(&packed, text, size + 1).is_err());
        assert!(read(&packed, b"other", size).is_err());
        assert!(read(&packed[..packed.len() - 9], text, size).is_err());
        assert!(read(b"no xz at all", text, size).is_err());
        assert!(read(&compress(b"\xff"), b"\xff", 1).is_err());
        assert!(read(&packed, text, u64::MAX).is_err());
        // A bomb is not unpacked further than was signed.
        let bomb = compress(&vec![0; 64 << 20]);
        assert!(read(&bomb, &[0; 100], 100).is_err());
    }
}
