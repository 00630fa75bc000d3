//! Mirrors that are away, wrong or hostile; packages and artifacts that are gone.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::time::Duration;

use stanchion::debian::mirror::{Archive, Mirror, Places};
use stanchion::digest::Digest;
use stanchion::fetch::Fetcher;

use crate::hostile::{Package, make_deb, project_of};
use crate::project::{
    Project, can_build, can_mount, in_mount_namespace, load_lock, mount_small, take_turn,
};
use crate::server::{Server, write_good, write_good_head, write_head, write_status};

/// A project whose lock names one harmless package, which no store has.
fn project() -> (Project, Package) {
    let package = Package::new("hello", make_deb(&[("./usr/share/hello", "hello")]));
    (project_of(&[&package]), package)
}

const DEB: &str = "debian/pool/main/h/hello/hello_1.0_amd64.deb";

#[track_caller]
fn build(project: &Project, server: &Server, more: &[&str]) -> crate::project::Ran {
    let url = server.url("debian");
    project.run(&[&["build", "tiny", "--mirror", &url], more].concat())
}

/// Nothing of what a bad mirror gave is among the store's downloads.
#[track_caller]
fn assert_nothing_stored(project: &Project) {
    assert_eq!(fs::read_dir(project.store().join("files")).unwrap().count(), 0);
}

#[test]
fn a_mirror_that_cannot_be_reached_is_named_with_its_cause() {
    let (project, _) = project();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mirror = format!("http://127.0.0.1:{port}/debian");
    let ran = project.run(&["build", "tiny", "--mirror", &mirror]);
    let url = format!("cannot download {mirror}/pool/main/h/hello/hello_1.0_amd64.deb");
    ran.expect(
        2,
        &["fetching hello 1.0", &url, "refused", "5 tries", "give another mirror (--mirror URL)"],
    );
    assert!(ran.took < Duration::from_secs(30), "{:?}", ran.took);
}

#[test]
fn what_a_truncating_mirror_gave_is_kept_and_completed_by_the_next_run() {
    let (project, package) = project();
    let bytes = package.bytes.clone();
    let server = Server::start(move |request, to| {
        let rest = write_good_head(to, request, &bytes)?;
        to.write_all(&rest[..rest.len().min(40)])
    });
    let ran = build(&project, &server, &[]);
    ran.expect(2, &["fetching hello 1.0", "cannot download", "what has arrived is kept"]);
    assert_nothing_stored(&project);
    assert!(server.requests().iter().skip(1).all(|request| request.from > Some(0)));

    let bytes = package.bytes.clone();
    let whole = Server::start(move |request, to| write_good(to, request, &bytes));
    // It goes on, and fails for want of a base system only.
    build(&project, &whole, &[]).expect_not("fetching hello");
    assert!(whole.requests()[0].from >= Some(40));
    assert!(project.store().join("files").join(package.digest().to_string()).exists());
}

#[test]
fn a_package_with_other_bytes_than_were_locked_is_refused() {
    let (project, package) = project();
    let mut bytes = package.bytes.clone();
    *bytes.last_mut().unwrap() ^= 1;
    let found = Digest::of(&bytes);
    let server = Server::start(move |request, to| write_good(to, request, &bytes));
    let ran = build(&project, &server, &[]);
    let why = format!("its SHA-256 is {found}, and should be {}", package.digest());
    ran.expect(
        2,
        &["fetching hello 1.0", &server.url(DEB), "is not the file that it should be", &why],
    );
    assert_nothing_stored(&project);

    let portal = Server::start(|request, to| write_good(to, request, b"<html>Log in first</html>"));
    let ran = build(&project, &portal, &[]);
    ran.expect(2, &["is not the file that it should be", "it is 25 bytes long, and should be"]);
    assert_nothing_stored(&project);

    // A header that announces what never comes must not fill memory or disk.
    let endless = Server::start(|_, to| {
        write_head(to, "200 OK", "")?;
        loop {
            to.write_all(&[0; 1 << 16])?;
        }
    });
    build(&project, &endless, &[]).expect(2, &["more than", "bytes came"]);
    assert_nothing_stored(&project);
}

#[test]
fn a_mirror_that_forbids_or_fails_says_so() {
    let (project, _) = project();
    for (status, tries) in [("403 Forbidden", 1), ("503 Service Unavailable", 5)] {
        let server = Server::start(move |_, to| write_status(to, status));
        build(&project, &server, &[]).expect(2, &["cannot download", status, "--mirror URL"]);
        assert_eq!(server.requests().len(), tries);
    }
}

#[test]
fn an_empty_store_offline_lacks_what_the_lock_names() {
    let (project, _) = project();
    let ran = project.run(&["build", "tiny", "--offline"]);
    ran.expect(2, &["the store lacks 1 file", "hello 1.0", "run once without `--offline`"]);
}

#[test]
fn a_vanished_package_is_an_error_when_the_lock_must_not_change() {
    let (project, _) = project();
    let server = Server::start(|_, to| write_status(to, "404 Not Found"));
    let before = fs::read(project.root().join("stanchion.lock")).unwrap();
    let ran = build(&project, &server, &["--locked"]);
    ran.expect(
        2,
        &[
            "the mirror no longer has packages that the lock names",
            "stanchion.lock",
            "why: hello 1.0",
            "run `stanchion lock --update hello`",
        ],
    );
    // Else the lock is solved anew, for which this mirror has nothing either.
    let ran = build(&project, &server, &[]);
    ran.expect(2, &["the mirror has no suite `trixie`", "dists/trixie/InRelease", "SECURITY-URL"]);
    assert_eq!(fs::read(project.root().join("stanchion.lock")).unwrap(), before);
}

#[test]
fn an_in_release_that_is_unsigned_or_of_another_suite_is_refused() {
    let (project, _) = project();
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/src/debian/release/testdata/trixie-security.InRelease"
    );
    let signed = fs::read(path).unwrap();
    let begin = signed.windows(2).position(|two| two == b"\n\n").unwrap() + 2;
    let end = signed.windows(29).position(|part| part == b"-----BEGIN PGP SIGNATURE-----").unwrap();
    let mut tampered = signed.clone();
    let at = tampered.windows(7).position(|part| part == b"SHA256:").unwrap() + 10;
    tampered[at] = if tampered[at] == b'0' { b'1' } else { b'0' };
    let cases: [(&[u8], &str); 5] = [
        (&signed[begin..end], "it does not begin as a signed message"),
        (&tampered, "does not hold"),
        (&signed, "trixie-security"),
        (b"", "it does not begin as a signed message"),
        (b"<html>Log in first</html>", "try another mirror"),
    ];
    for (body, expected) in cases {
        let body = body.to_vec();
        let server = Server::start(move |request, to| write_good(to, request, &body));
        let url = server.url("debian");
        let ran = project.run(&["lock", "--update", "--mirror", &url]);
        ran.expect(2, &["dists/trixie/InRelease", expected]);
    }
}

#[test]
fn an_artifact_that_is_gone_or_changed_names_its_layer() {
    let digest = Digest::of(b"the artifact");
    let (project, package) = project();
    let files = project.store().join("files");
    fs::create_dir_all(&files).unwrap();
    fs::write(files.join(package.digest().to_string()), &package.bytes).unwrap();
    let declare = |url: &str| {
        let lines = format!(
            "description = \"a\"\npackages = [\"hello\"]\n[[artifact]]\nname = \"thing\"\nurl = \"{url}\"\nsha256 = \"{digest}\"\npath = \"/usr/lib/thing\"\n"
        );
        project.write("layers/a/layer.toml", &lines);
    };
    let server = Server::start(|_, to| write_status(to, "404 Not Found"));
    declare(&server.url("thing-1.2"));
    project.run(&["build", "tiny"]).expect(
        2,
        &[
            "building profile `tiny`",
            "the artifact `thing` of layer `a` cannot be fetched",
            "no such file (any more)",
            &server.url("thing-1.2"),
            "--artifact thing=FILE",
            "mend the artifact's `url`",
        ],
    );
    let server = Server::start(|request, to| write_good(to, request, b"other artifact"));
    declare(&server.url("thing-1.2"));
    let found = Digest::of(b"other artifact").to_string();
    project.run(&["build", "tiny"]).expect(
        2,
        &[
            "the artifact `thing` of layer `a` cannot be fetched",
            "is not the file that it should be",
            &found,
            &digest.to_string(),
            "`url` and `sha256` in layer.toml",
        ],
    );
    let ran = project.run(&["build", "tiny", "--offline"]);
    ran.expect(2, &["the store lacks 1 file", "artifact `thing` of layer `a`"]);
}

#[test]
fn without_any_mirror_the_ways_to_name_one_are_told() {
    if !can_mount() {
        return;
    }
    in_mount_namespace(|| {
        let (project, _) = project();
        let _mounted = mount_small("/etc/apt".as_ref(), 1, true);
        let expected =
            ["no Debian mirror is known", "--mirror URL", "STANCHION_MIRROR", "config.toml"];
        project.run(&["build", "tiny"]).expect(2, &expected);
        let ran = project.run(&["doctor"]);
        ran.expect(2, &["1 of these checks failed"]);
        assert!(
            ran.stdout.contains("FAIL  mirror           no Debian mirror is known"),
            "{}",
            ran.stdout
        );
    });
}

#[test]
fn what_is_no_mirror_is_refused() {
    let (project, _) = project();
    for (mirror, why) in
        [("ftp://example.org/debian", "neither http, https nor file"), ("x", "is no URL")]
    {
        project
            .run(&["build", "tiny", "--mirror", mirror])
            .expect(2, &["is not a mirror", "--mirror", why]);
    }
}

/// The machine's own mirror, when it answers.
fn find_real_mirror() -> Option<(Mirror, Vec<u8>)> {
    let mirror = Mirror::find(&Places::of_this_machine(None)).ok()?;
    let url = mirror.locate(Archive::Main, "dists/trixie/InRelease");
    let bytes = Fetcher::new(1, false).ok()?.fetch_bytes(&url, 4 << 20);
    if bytes.is_err() {
        eprintln!("skipped: this machine reaches no Debian mirror");
    }
    Some((mirror, bytes.ok()?))
}

#[test]
fn an_in_release_older_than_one_that_was_seen_is_a_replay() {
    let Some((_, bytes)) = find_real_mirror() else { return };
    let (project, _) = project();
    let text = String::from_utf8(bytes.clone()).unwrap();
    let date = text.lines().find_map(|line| line.strip_prefix("Date: ")).unwrap().to_string();
    let state = project.store().join("state");
    fs::create_dir_all(&state).unwrap();
    fs::write(state.join("release-date-trixie"), "4000000000\n").unwrap();
    let server = Server::start(move |request, to| write_good(to, request, &bytes));
    let ran = project.run(&["lock", "--update", "--mirror", &server.url("debian")]);
    ran.expect(2, &["older than what this machine has seen", &date, &server.url("debian")]);
}

#[test]
fn a_vanished_package_is_replaced_with_a_warning_that_names_both_versions() {
    let _turn = take_turn();
    let Some((mirror, _)) = find_real_mirror() else { return };
    if !can_build() {
        return;
    }
    let project = Project::tiny("");
    project.copy_store();
    let path = project.root().join("stanchion.lock");
    let mut lock = load_lock();
    crate::project::add_set(&mut lock, "base+kernel+extra", Some("base+kernel"), &[], false);
    let package = lock.packages.iter_mut().find(|package| package.name == "nftables").unwrap();
    let real = package.version.to_string();
    package.version = "0.0.1-1".parse().unwrap();
    package.path = "pool/main/n/nftables/nftables_0.0.1-1_amd64.deb".to_string();
    package.sha256 = Digest::of(b"gone");
    lock.save(&path).unwrap();

    let ran = project.run(&["build", "tiny", "--locked"]);
    ran.expect(2, &["no longer has packages", "nftables 0.0.1-1", "or leave --locked out"]);
    let ran = project.run(&["build", "tiny"]);
    ran.expect(
        0,
        &[
            "warning: the mirror no longer has packages that the lock names; they were replaced:",
            "warning: nftables 0.0.1-1 -> ",
        ],
    );
    let renewed = stanchion::lock::Lock::load(&path).unwrap().unwrap();
    let package = renewed.packages.iter().find(|package| package.name == "nftables").unwrap();
    assert!(package.version >= real.parse().unwrap());
    let text = fs::read_to_string(&path).unwrap();
    assert!(!text.contains(&mirror.main) && !text.contains("://"), "the lock names a mirror");
    project.run(&["build", "tiny", "--locked", "--offline"]).expect(0, &["nothing had changed"]);
}
