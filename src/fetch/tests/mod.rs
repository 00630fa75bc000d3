pub(crate) mod server;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;

use proptest::prelude::*;

use super::*;
use crate::error::exit_code;
use server::{Request, Server, write_good, write_good_head, write_head, write_status};

/// Waits little, so that tests do.
pub(crate) fn impatient(offline: bool) -> Fetcher {
    let patience =
        Patience { stall: Duration::from_millis(800), tries: 4, pause: Duration::from_millis(5) };
    Fetcher::with_patience(4, offline, patience).unwrap()
}

pub(crate) fn quiet() -> Progress {
    Progress::new(Mode::Quiet)
}

/// Bytes that differ from place to place.
fn make_body(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
}

fn want(url: String, body: &[u8]) -> Download {
    Download {
        name: url.rsplit('/').next().unwrap().to_string(),
        urls: vec![url],
        digest: Digest::of(body),
        size: Some(body.len() as u64),
    }
}

struct Place {
    dir: tempfile::TempDir,
    store: Store,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        Place { dir, store }
    }

    fn fetch(&self, downloads: &[Download]) -> Result<Vec<PathBuf>> {
        impatient(false).fetch_all(&self.store, downloads, &quiet())
    }

    fn partial(&self, download: &Download) -> PathBuf {
        self.dir.path().join("partial").join(download.digest.to_string())
    }

    fn leave_partial(&self, download: &Download, bytes: &[u8]) {
        fs::create_dir_all(self.dir.path().join("partial")).unwrap();
        fs::write(self.partial(download), bytes).unwrap();
    }

    #[track_caller]
    fn assert_has(&self, download: &Download, body: &[u8]) {
        assert!(fs::read(self.store.file_path(&download.digest)).unwrap() == body);
        assert!(!self.partial(download).exists());
    }
}

fn froms(server: &Server) -> Vec<Option<usize>> {
    server.requests().iter().map(|request| request.from).collect()
}

#[track_caller]
fn assert_user_error(error: &anyhow::Error, parts: &[&str]) {
    assert_eq!(exit_code(error), 2, "{error:?}");
    let text = format!("{error:#}");
    for part in parts {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
}

#[test]
fn many_files_come_in_the_order_given_and_only_once() {
    let server = Server::start(|request, to| {
        write_good(to, request, make_body(request.path.parse().unwrap()).as_slice())
    });
    let place = Place::new();
    let mut downloads: Vec<Download> = (0..20)
        .rev()
        .map(|i| want(server.url(&(i * 997).to_string()), &make_body(i * 997)))
        .collect();
    downloads.push(downloads[3].clone());
    let paths = place.fetch(&downloads).unwrap();
    assert_eq!(paths.len(), 21);
    for (download, path) in downloads.iter().zip(&paths) {
        assert_eq!(Digest::of_file(path).unwrap(), download.digest);
    }
    // The empty file need not come at all.
    assert_eq!(server.requests().len(), 19);
    drop(server);
    assert_eq!(place.fetch(&downloads).unwrap(), paths);
    assert_eq!(impatient(true).fetch_all(&place.store, &downloads, &quiet()).unwrap(), paths);
}

#[test]
fn a_broken_transfer_goes_on_where_it_broke() {
    let body = make_body(300_000);
    let sent = body.clone();
    let server = Server::start(move |request, to| {
        let rest = write_good_head(to, request, &sent)?;
        to.write_all(&rest[..rest.len().min(100_000)])
    });
    let place = Place::new();
    let download = want(server.url("a"), &body);
    place.fetch(std::slice::from_ref(&download)).unwrap();
    place.assert_has(&download, &body);
    assert_eq!(froms(&server), [None, Some(100_000), Some(200_000)]);
}

#[test]
fn a_transfer_may_break_often_while_it_gets_on() {
    let body = make_body(9 << 20);
    let sent = body.clone();
    let server = Server::start(move |request, to| {
        let rest = write_good_head(to, request, &sent)?;
        to.write_all(&rest[..rest.len().min(1 << 20)])
    });
    let place = Place::new();
    let download = want(server.url("a"), &body);
    place.fetch(std::slice::from_ref(&download)).unwrap();
    place.assert_has(&download, &body);
}

#[test]
fn a_server_that_ignores_ranges_begins_again() {
    let body = make_body(200_000);
    let sent = body.clone();
    let server = Server::start(move |request, to| {
        let all = Request { from: None, ..request.clone() };
        let rest = write_good_head(to, &all, &sent)?;
        to.write_all(if request.before < 2 { &rest[..50_000] } else { rest })
    });
    let place = Place::new();
    let download = want(server.url("a"), &body);
    place.fetch(std::slice::from_ref(&download)).unwrap();
    place.assert_has(&download, &body);
    assert_eq!(froms(&server), [None, Some(50_000), Some(50_000)]);
}

#[test]
fn another_range_than_the_one_asked_for_is_not_taken() {
    let body = make_body(1_000);
    let sent = body.clone();
    let server = Server::start(move |request, to| match (request.path.as_str(), request.from) {
        ("other", Some(10)) => {
            let range = "Content-Length: 5\r\nContent-Range: bytes 7-11/1000\r\n";
            write_head(to, "206 Partial Content", range)?;
            to.write_all(b"wrong")
        }
        ("none", Some(10)) => write_status(to, "416 Range Not Satisfiable"),
        ("unasked", None) => write_head(to, "206 Partial Content", "Content-Length: 0\r\n"),
        _ => write_good(to, request, &sent),
    });
    for path in ["other", "none"] {
        let place = Place::new();
        let download = want(server.url(path), &body);
        place.leave_partial(&download, &body[..10]);
        place.fetch(std::slice::from_ref(&download)).unwrap();
        place.assert_has(&download, &body);
    }
    assert_eq!(froms(&server), [Some(10), None, Some(10), None]);
    let error = Place::new().fetch(&[want(server.url("unasked"), &body)]).unwrap_err();
    assert_user_error(&error, &["206"]);
}

#[test]
fn a_stalled_transfer_is_broken_off_and_resumed() {
    let body = make_body(100_000);
    let sent = body.clone();
    let server = Server::start(move |request, to| {
        let rest = write_good_head(to, request, &sent)?;
        if request.before == 0 {
            to.write_all(&rest[..60_000])?;
            sleep(Duration::from_secs(20));
        }
        to.write_all(rest)
    });
    let place = Place::new();
    let download = want(server.url("a"), &body);
    let began = Instant::now();
    place.fetch(std::slice::from_ref(&download)).unwrap();
    assert!(began.elapsed() < Duration::from_secs(5));
    place.assert_has(&download, &body);
    assert_eq!(froms(&server), [None, Some(60_000)]);
}

#[test]
fn a_server_that_never_answers_is_given_up() {
    let server = Server::start(|_, _| {
        sleep(Duration::from_secs(20));
        Ok(())
    });
    let error = Place::new().fetch(&[want(server.url("a"), b"abc")]).unwrap_err();
    assert_user_error(&error, &["nothing came for 0.8 seconds", "4 tries", &server.url("a")]);
    assert_eq!(server.requests().len(), 4);
}

#[test]
fn a_slow_transfer_that_never_stalls_is_waited_for() {
    let body = make_body(1_000);
    let sent = body.clone();
    let server = Server::start(move |request, to| {
        for piece in write_good_head(to, request, &sent)?.chunks(100) {
            to.write_all(piece)?;
            sleep(Duration::from_millis(110));
        }
        Ok(())
    });
    let place = Place::new();
    let download = want(server.url("a"), &body);
    let began = Instant::now();
    place.fetch(std::slice::from_ref(&download)).unwrap();
    assert!(began.elapsed() > Duration::from_millis(900));
    place.assert_has(&download, &body);
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn wrong_bytes_are_fetched_once_more_and_then_refused() {
    let body = make_body(5_000);
    let (sent, bad) = (body.clone(), Digest::of(&vec![b'x'; 5_000]));
    let server = Server::start(move |request, to| {
        let once = request.path == "once" && request.before > 0;
        let wrong = vec![b'x'; 5_000];
        write_good(to, request, if once { &sent } else { &wrong })
    });
    let place = Place::new();
    let once = want(server.url("once"), &body);
    place.fetch(std::slice::from_ref(&once)).unwrap();
    place.assert_has(&once, &body);
    assert_eq!(froms(&server), [None, None]);

    let place = Place::new();
    let always = want(server.url("always"), &body);
    let error = place.fetch(std::slice::from_ref(&always)).unwrap_err();
    let url = server.url("always");
    assert_user_error(&error, &[&bad.to_string(), &always.digest.to_string(), &url, "help:"]);
    assert_eq!(server.requests().len(), 4);
    assert!(!place.store.has_file(&always.digest, None) && !place.partial(&always).exists());
}

#[test]
fn more_bytes_than_promised_are_not_taken() {
    let body = make_body(1_000);
    let pushed = Arc::new(AtomicUsize::new(0));
    let counted = pushed.clone();
    let server = Server::start(move |request, to| {
        match request.path.as_str() {
            // A body without end.
            "endless" => write_head(to, "200 OK", "")?,
            _ => write_head(to, "200 OK", "Content-Length: 100000000000\r\n")?,
        }
        loop {
            to.write_all(&[0; 65_536])?;
            counted.fetch_add(65_536, Ordering::SeqCst);
        }
    });
    for name in ["endless", "announced"] {
        let place = Place::new();
        let download = want(server.url(name), &body);
        let error = place.fetch(std::slice::from_ref(&download)).unwrap_err();
        assert_user_error(&error, &["1000", &server.url(name)]);
        assert!(
            !place.store.has_file(&download.digest, None) && !place.partial(&download).exists()
        );
    }
    let error = impatient(false).fetch_bytes(&server.url("endless"), 5_000).unwrap_err();
    assert_user_error(&error, &["more than 5000 bytes"]);
    assert_eq!(server.requests().len(), 6);
    assert!(pushed.load(Ordering::SeqCst) < 200_000_000);
}

#[test]
fn what_is_gone_is_named_after_all_else_has_come() {
    let body = make_body(1_000);
    let sent = body.clone();
    let server = Server::start(move |request, to| match request.path.as_str() {
        "there" => {
            sleep(Duration::from_millis(100));
            write_good(to, request, &sent)
        }
        "gone" => write_status(to, "410 Gone"),
        _ => write_status(to, "404 Not Found"),
    });
    let place = Place::new();
    let there = want(server.url("there"), &body);
    let lost = [want(server.url("missing"), b"1"), want(server.url("gone"), b"2")];
    let error = place.fetch(&[lost[0].clone(), there.clone(), lost[1].clone()]).unwrap_err();
    let vanished = error.downcast_ref::<Vanished>().unwrap();
    assert_eq!(vanished.names, ["gone", "missing"]);
    place.assert_has(&there, &body);
    assert_eq!(server.requests().len(), 3);
    assert!(!place.partial(&lost[0]).exists());
}

#[test]
fn the_next_place_is_asked_when_one_does_not_have_the_file() {
    let body = make_body(1_000);
    let sent = body.clone();
    let server = Server::start(move |request, to| match request.path.as_str() {
        "plain" => write_good(to, request, &sent),
        "forbidden" => write_status(to, "403 Forbidden"),
        "wrong" => write_good(to, request, b"wrong"),
        _ => write_status(to, "404 Not Found"),
    });
    let place = Place::new();
    let mut download = want(server.url("by-hash"), &body);
    let more = ["forbidden", "wrong", "plain"].map(|path| server.url(path));
    download.urls.extend(more);
    place.fetch(std::slice::from_ref(&download)).unwrap();
    place.assert_has(&download, &body);

    // Gone from one place and refused by another is not gone.
    download.urls = vec![server.url("by-hash"), server.url("forbidden")];
    let error = Place::new().fetch(&[download]).unwrap_err();
    assert!(error.downcast_ref::<Vanished>().is_none());
    assert_user_error(&error, &["403"]);
}

#[test]
fn a_server_error_is_tried_again_and_not_for_ever() {
    let body = make_body(1_000);
    let sent = body.clone();
    let server = Server::start(move |request, to| match request.before {
        0 => write_status(to, "500 Internal Server Error"),
        1 => write_status(to, "503 Service Unavailable"),
        2 => write_status(to, "429 Too Many Requests"),
        _ => write_good(to, request, &sent),
    });
    let place = Place::new();
    let download = want(server.url("a"), &body);
    place.fetch(std::slice::from_ref(&download)).unwrap();
    place.assert_has(&download, &body);

    let server = Server::start(|_, to| write_status(to, "502 Bad Gateway"));
    let error = Place::new().fetch(&[want(server.url("a"), b"abc")]).unwrap_err();
    assert_user_error(&error, &["502", "4 tries"]);
    assert_eq!(server.requests().len(), 4);
}

#[test]
fn a_refused_connection_and_a_senseless_url_are_the_users_to_mend() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("http://127.0.0.1:{port}/a");
    let error = Place::new().fetch(&[want(url.clone(), b"abc")]).unwrap_err();
    assert_user_error(&error, &[&url, "refused", "--mirror"]);
    for url in ["ftp://a.example.org/x", "nonsense", "http://user:secret@127.0.0.1:1/x"] {
        let error = Place::new().fetch(&[want(url.to_string(), b"abc")]).unwrap_err();
        assert_user_error(&error, &[]);
        assert!(!format!("{error:#}").contains("secret"));
    }
}

#[test]
fn redirections_are_followed_but_not_round_and_round_nor_to_files() {
    let body = make_body(100);
    let sent = body.clone();
    let server = Server::start(move |request, to| match request.path.as_str() {
        "good" => write_head(to, "302 Found", "Location: /there\r\nContent-Length: 0\r\n"),
        "there" => write_good(to, request, &sent),
        "file" => {
            write_head(to, "302 Found", "Location: file:///etc/passwd\r\nContent-Length: 0\r\n")
        }
        _ => write_head(to, "302 Found", "Location: /round\r\nContent-Length: 0\r\n"),
    });
    let fetcher = impatient(false);
    assert_eq!(fetcher.fetch_bytes(&server.url("good"), 100).unwrap(), body);
    assert_user_error(&fetcher.fetch_bytes(&server.url("file"), 100).unwrap_err(), &["/file"]);
    assert_user_error(&fetcher.fetch_bytes(&server.url("round"), 100).unwrap_err(), &["redirect"]);
}

#[test]
fn what_an_earlier_command_left_is_used_when_it_is_good() {
    let body = make_body(10_000);
    let sent = body.clone();
    let server = Server::start(move |request, to| write_good(to, request, &sent));
    let wrong = vec![0; 4_000];
    let long = make_body(10_001);
    let cases: [(&[u8], &[Option<usize>]); 5] = [
        (&body[..4_000], &[Some(4_000)]),
        (&wrong, &[Some(4_000), None]),
        (&long, &[None]),
        (&vec![0; 10_000], &[None]),
        (&body, &[]),
    ];
    for size in [Some(10_000), None] {
        for (left, expected) in cases {
            let place = Place::new();
            let before = server.requests().len();
            let download = Download { size, ..want(server.url("a"), &body) };
            place.leave_partial(&download, left);
            place.fetch(std::slice::from_ref(&download)).unwrap();
            place.assert_has(&download, &body);
            if size.is_some() {
                assert_eq!(froms(&server)[before..], *expected);
            }
        }
    }
}

#[test]
fn a_transfer_that_lacks_only_its_end_is_whole() {
    let body = make_body(1_000);
    let sent = body.clone();
    let server = Server::start(move |_, to| {
        write_head(to, "200 OK", "Transfer-Encoding: chunked\r\n")?;
        write!(to, "{:x}\r\n", sent.len())?;
        to.write_all(&sent)
    });
    let place = Place::new();
    let download = want(server.url("a"), &body);
    place.fetch(std::slice::from_ref(&download)).unwrap();
    place.assert_has(&download, &body);
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn two_commands_share_a_store_without_harm() {
    let body = make_body(3_000_000);
    let sent = body.clone();
    let server = Server::start(move |request, to| {
        for piece in write_good_head(to, request, &sent)?.chunks(300_000) {
            to.write_all(piece)?;
            sleep(Duration::from_millis(30));
        }
        Ok(())
    });
    let place = Place::new();
    let download = want(server.url("a"), &body);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| place.fetch(std::slice::from_ref(&download)).unwrap());
        }
    });
    place.assert_has(&download, &body);
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn offline_names_all_that_is_missing_and_asks_nobody() {
    let server = Server::start(|_, to| write_status(to, "404 Not Found"));
    let place = Place::new();
    let downloads = [want(server.url("one"), b"1"), want(server.url("two"), b"2")];
    let error = impatient(true).fetch_all(&place.store, &downloads, &quiet()).unwrap_err();
    assert_user_error(&error, &["2 files", "one\n", "two", "--offline"]);
    assert_user_error(
        &impatient(true).fetch_bytes(&server.url("x"), 9).unwrap_err(),
        &["--offline"],
    );
    assert!(server.requests().is_empty());
}

#[test]
fn a_full_disk_is_told_as_such() {
    if !Path::new("/dev/full").exists() {
        eprintln!("skipped: there is no /dev/full here");
        return;
    }
    let server = Server::start(|request, to| write_good(to, request, b"abc"));
    let place = Place::new();
    let download = want(server.url("a"), b"abc");
    fs::create_dir_all(place.dir.path().join("partial")).unwrap();
    std::os::unix::fs::symlink("/dev/full", place.partial(&download)).unwrap();
    let error = place.fetch(&[download]).unwrap_err();
    assert_user_error(&error, &["disk is full", "partial", "XDG_CACHE_HOME"]);
}

#[test]
fn files_of_this_machine_are_copied_and_checked() {
    let place = Place::new();
    let body = make_body(700_000);
    let path = place.dir.path().join("a+b c");
    fs::write(&path, &body).unwrap();
    let url = format!("file://{}", path.display()).replace(' ', "%20").replace('+', "%2B");
    let download = want(url.clone(), &body);
    place.leave_partial(&download, &body[..10]);
    place.fetch(std::slice::from_ref(&download)).unwrap();
    place.assert_has(&download, &body);
    assert_eq!(impatient(false).fetch_bytes(&url, 1 << 20).unwrap(), body);
    assert_user_error(&impatient(false).fetch_bytes(&url, 1_000).unwrap_err(), &["1000"]);
    assert_user_error(&place.fetch(&[want(url.clone(), b"other")]).unwrap_err(), &["700000"]);
    let error = place.fetch(&[want(format!("{url}x"), b"other")]).unwrap_err();
    assert!(error.downcast_ref::<Vanished>().is_some());
}

#[test]
fn small_files_come_whole_after_a_broken_try() {
    let server = Server::start(|request, to| {
        let rest = write_good_head(to, request, b"hello world")?;
        to.write_all(if request.before == 0 { &rest[..4] } else { rest })
    });
    assert_eq!(impatient(false).fetch_bytes(&server.url("a"), 11).unwrap(), b"hello world");
    assert_eq!(froms(&server), [None, None]);
    let gone = Server::start(|_, to| write_status(to, "404 Not Found"));
    let error = impatient(false).fetch_bytes(&gone.url("a"), 11).unwrap_err();
    assert_eq!(error.downcast_ref::<Vanished>().unwrap().names, [gone.url("a")]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn no_answer_makes_a_download_panic_or_store_a_wrong_file(
        head in "(HTTP/1.[01] [0-9]{1,4} [A-Z]{0,5}\r\n)?((Content-Length|Content-Range|Transfer-Encoding|Location): ?\\PC{0,20}\r\n){0,3}(\r\n)?",
        body in proptest::collection::vec(any::<u8>(), 0..50),
    ) {
        let answer = [head.as_bytes(), &body].concat();
        let server = Server::start(move |_, to| to.write_all(&answer));
        let place = Place::new();
        let patience = Patience {
            stall: Duration::from_millis(300),
            tries: 2,
            pause: Duration::from_millis(1),
        };
        let fetcher = Fetcher::with_patience(1, false, patience).unwrap();
        let download = want(server.url("a"), b"what nobody sends");
        place.leave_partial(&download, b"what");
        prop_assert!(fetcher.fetch_all(&place.store, std::slice::from_ref(&download), &quiet()).is_err());
        prop_assert!(!place.store.has_file(&download.digest, None));
    }
}
