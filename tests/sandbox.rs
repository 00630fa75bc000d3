//! The sandbox with its real program, as whoever runs the tests: root, or an ordinary user
//! with subordinate ids. Without those each test says what it skips.
//!
//! Programs come from the host's `/usr`, bound read-only into an otherwise empty tree.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stanchion::command::{Command, Failed};
use stanchion::error::UserError;
use stanchion::sandbox::{Bind, Program, Sandbox, Spec};

struct Tree {
    sandbox: Sandbox,
    dir: PathBuf,
    spec: Spec,
}

impl Drop for Tree {
    fn drop(&mut self) {
        self.sandbox.remove_tree(&self.dir).unwrap();
    }
}

/// A tree that can run the host's shell, unless namespaces are not to be had here.
fn make_tree() -> Option<Tree> {
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_stanchion"));
    let dir = tempfile::tempdir().unwrap().keep();
    if let Some(check) = sandbox.probe(&dir).into_iter().find(|check| !check.ok) {
        eprintln!("skipped: {}: {}", check.name, check.detail);
        fs::remove_dir_all(&dir).unwrap();
        return None;
    }
    for name in ["lower/usr", "lower/etc", "upper", "merged"] {
        fs::create_dir_all(dir.join(name)).unwrap();
    }
    let mut binds = vec![bind("/usr", "/usr")];
    for name in ["bin", "sbin", "lib", "lib64"] {
        let (host, inside) = (Path::new("/").join(name), dir.join("lower").join(name));
        match fs::read_link(&host) {
            Ok(to) => symlink(to, inside).unwrap(),
            Err(_) if host.is_dir() => {
                fs::create_dir(inside).unwrap();
                binds.push(bind(&host, &host));
            }
            Err(_) => {}
        }
    }
    let spec = Spec {
        lower: vec![dir.join("lower")],
        upper: Some(dir.join("upper")),
        work: Some(dir.join("work")),
        merged: Some(dir.join("merged")),
        binds,
        ..Spec::default()
    };
    Some(Tree { sandbox, dir, spec })
}

/// Where a container hides parts of `/proc`, programs see that one instead of their own.
fn has_fresh_proc(tree: &Tree) -> bool {
    let fresh = tree.sandbox.probe(&tree.dir).iter().any(|check| check.detail.contains("fresh"));
    if !fresh {
        eprintln!("skipped: the view of processes: the kernel gives no fresh /proc here");
    }
    fresh
}

fn bind(from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Bind {
    Bind { from: from.into(), to: to.into(), read_only: true }
}

fn sh(script: &str) -> Program {
    Program::new("sh").args(["-euc", script])
}

impl Tree {
    fn run(&self, script: &str) -> String {
        self.sandbox.read(&self.spec, &sh(script)).unwrap_or_else(|error| panic!("{error:?}"))
    }
}

#[test]
fn a_program_has_no_network_but_a_loopback_of_its_own() {
    let Some(tree) = make_tree() else { return };
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let interfaces = tree.run("tail -n +3 /proc/net/dev | cut -d: -f1");
    assert_eq!(interfaces.trim(), "lo");
    assert_eq!(tree.run("cat /proc/net/route | wc -l").trim(), "1");
    for address in ["127.0.0.1", "192.0.2.1"] {
        let script = format!("! (exec 3<>/dev/tcp/{address}/{port}) 2>&1");
        let program = Program::new("bash").args(["-c", &script]);
        let said = tree.sandbox.read(&tree.spec, &program).unwrap();
        let expected = if address == "127.0.0.1" { "refused" } else { "unreachable" };
        assert!(said.contains(expected), "{address}: {said}");
    }
}

#[test]
fn a_program_is_root_among_few_processes_with_few_capabilities() {
    let Some(tree) = make_tree() else { return };
    let seen = tree.run("id -u; id -G; cd /proc; echo [0-9]*; grep CapEff self/status; umask; pwd");
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(lines[..2], ["0", "0"], "{seen}");
    if has_fresh_proc(&tree) {
        assert_eq!(lines[2], "1 2", "{seen}");
    }
    let rights = u64::from_str_radix(lines[3].split_whitespace().nth(1).unwrap(), 16).unwrap();
    let (ptrace, admin, chown) = (1 << 19, 1 << 21, 1 << 0);
    assert_eq!(rights & (ptrace | admin | chown), chown, "{seen}");
    assert_eq!(lines[4..], ["0022", "/proc"], "{seen}");
    assert_eq!(tree.run("grep NoNewPrivs /proc/self/status").trim(), "NoNewPrivs:\t1");
}

#[test]
fn the_environment_is_clean_and_the_usual_places_are_there() {
    let Some(mut tree) = make_tree() else { return };
    tree.spec.env.insert("SOURCE_DATE_EPOCH".into(), "7".into());
    tree.spec.hostname = Some("builder".into());
    let seen = tree.run("env | sort; uname -n");
    let expected = [
        "DEBCONF_NONINTERACTIVE_SEEN=true",
        "DEBIAN_FRONTEND=noninteractive",
        "HOME=/root",
        "LC_ALL=C.UTF-8",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PWD=/",
        "SOURCE_DATE_EPOCH=7",
        "TZ=UTC",
        "builder",
    ];
    let plain: Vec<&str> =
        seen.lines().filter(|line| !line.starts_with("_=") && !line.contains("OLDPWD")).collect();
    assert_eq!(plain, expected);
    tree.run(
        "echo x > /dev/null; head -c1 /dev/zero | wc -c; head -c1 /dev/urandom >/dev/full && exit 1
         test -e /dev/ptmx; test -d /dev/shm; echo x > /dev/stderr; test -e /dev/fd/0
         test \"$(stat -c %a /tmp /dev/shm /run /run/lock)\" = \"$(printf '1777\\n1777\\n755\\n1777')\"
         test -z \"$(ls /sys)\"; ! touch /sys/x; touch /tmp/x /run/x; ! touch /usr/x",
    );
}

#[test]
fn the_host_cannot_be_reached_from_a_program() {
    let Some(tree) = make_tree() else { return };
    let marker = tree.dir.join("marker");
    fs::write(&marker, "secret").unwrap();
    let script = format!(
        "for root in '' /proc/*/root /proc/*/cwd /.. /proc/self/root/../.. /proc/thread-self/root; do
             if cat \"$root{m}\"; then exit 9; fi
         done 2>/dev/null
         # Out of a chroot by a directory held open: to the tree's root and no further.
         mkdir -p /tmp/jail
         if command -v perl >/dev/null; then
             perl -e 'opendir D, \"/\"; chroot \"/tmp/jail\" or die; chdir *D; chdir \"..\" for 1..64;
                      chroot \".\"; exit(-e \"{m}\" ? 9 : 0)'
         fi
         ! mount -t tmpfs none /mnt 2>/dev/null; ! umount -l /proc 2>/dev/null
         ! nsenter -t 1 -m true 2>/dev/null
         for file in sys/kernel/core_pattern sysrq-trigger; do
             if (: >> /proc/$file) 2>/dev/null; then exit 9; fi
         done
         cut -d' ' -f2 /proc/self/mounts",
        m = marker.display()
    );
    let mounts = tree.run(&script);
    assert!(!mounts.contains(tree.dir.to_str().unwrap()), "{mounts}");
    let known = "dev proc run tmp sys usr bin sbin lib lib64";
    for on in mounts.lines().skip(1) {
        let area = on.split('/').nth(1).unwrap();
        assert!(known.split(' ').any(|name| name == area), "{on}");
    }
}

#[test]
fn a_hostile_tree_cannot_lead_a_mount_to_the_host() {
    let Some(mut tree) = make_tree() else { return };
    let host = tree.dir.join("host");
    fs::create_dir(&host).unwrap();
    fs::write(host.join("kept"), "").unwrap();
    symlink(&host, tree.dir.join("lower/srv")).unwrap();
    tree.spec.binds.push(bind("/etc", "/srv"));
    let error = tree.sandbox.read(&tree.spec, &sh("true")).unwrap_err();
    assert!(format!("{error:#}").contains("/srv of the tree"), "{error:#}");
    tree.spec.binds.pop();
    tree.spec.binds.push(bind("/etc", "/run/../../etc"));
    assert!(tree.sandbox.read(&tree.spec, &sh("true")).is_err());
}

#[test]
fn writes_land_in_the_upper_side_with_owners_modes_and_capabilities() {
    let Some(tree) = make_tree() else { return };
    fs::write(tree.dir.join("lower/etc/gone"), "").unwrap();
    tree.run(
        "rm /etc/gone; echo 1 > /etc/new; chown 42:65534 /etc/new; chmod 6755 /etc/new
         chgrp 42 /usr 2>/dev/null || true; mkdir /srv; chown 999:999 /srv; chmod 2750 /srv",
    );
    let upper = tree.dir.join("upper");
    let new = fs::metadata(upper.join("etc/new")).unwrap();
    assert_eq!(new.permissions().mode() & 0o7777, 0o6755);
    let srv = fs::metadata(upper.join("srv")).unwrap();
    assert_eq!(srv.permissions().mode() & 0o7777, 0o2750);
    let whiteout = fs::symlink_metadata(upper.join("etc/gone")).unwrap();
    assert_eq!((whiteout.mode() & libc::S_IFMT, whiteout.rdev()), (libc::S_IFCHR, 0));
    if new_user_is_root() {
        assert_eq!((new.uid(), new.gid(), srv.uid()), (42, 65534, 999));
    } else {
        assert_eq!(new.gid() - new.uid() + 42, 65534);
        assert_eq!(srv.uid() - new.uid(), 999 - 42);
    }
    assert!(!tree.dir.join("lower/etc/new").exists());
    // Another job sees what the first one left.
    let seen = tree.run("stat -c '%u:%g %a' /etc/new /srv; test ! -e /etc/gone");
    assert_eq!(seen, "42:65534 6755\n999:999 2750\n");
}

#[test]
fn a_file_capability_looks_inside_as_it_was_set() {
    let Some(tree) = make_tree() else { return };
    if !Path::new("/usr/bin/python3").exists() {
        return eprintln!("skipped: there is no /usr/bin/python3 to set a file capability with");
    }
    let script = "import os; f = '/etc/capable'; n = 'security.capability'
v = bytes.fromhex('0100000200200000000000000000000000000000')
open(f, 'w'); os.setxattr(f, n, v); print(os.getxattr(f, n) == v)";
    let program = Program::new("/usr/bin/python3").args(["-c", script]);
    assert_eq!(tree.sandbox.read(&tree.spec, &program).unwrap(), "True\n");
    // Outside it belongs to the root of the namespace: version 3 (`capabilities(7)`).
    let mut value = [0_u8; 64];
    let file = tree.dir.join("upper/etc/capable");
    let length = rustix::fs::getxattr(&file, "security.capability", &mut value).unwrap();
    if !new_user_is_root() {
        assert_eq!((length, value[3]), (24, 3));
        let owner = u32::from_le_bytes(value[20..24].try_into().unwrap());
        assert_eq!(owner, rustix::process::getuid().as_raw());
    }
}

fn new_user_is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn many_lower_trees_with_odd_names_make_one() {
    let Some(mut tree) = make_tree() else { return };
    for i in 0..120 {
        let dir = tree.dir.join(format!("a long name, with: odd\\ characters, number {i:0100}"));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("which"), i.to_string()).unwrap();
        fs::write(dir.join(format!("only-{i}")), "").unwrap();
        tree.spec.lower.push(dir);
    }
    assert_eq!(tree.run("cat /which; ls -d /only-* | wc -l"), "119120\n");
    tree.spec.upper = None;
    assert_eq!(tree.run("cat /which; ! touch /x 2>/dev/null"), "119");
}

#[test]
fn a_tree_without_lower_sides_is_the_upper_side_itself() {
    let Some(mut tree) = make_tree() else { return };
    tree.spec.upper = tree.spec.lower.pop();
    tree.run("echo 1 > /etc/new; rm /etc/new; echo 2 > /etc/newer");
    assert_eq!(fs::read_to_string(tree.dir.join("lower/etc/newer")).unwrap(), "2\n");
    assert!(!tree.dir.join("lower/etc/new").exists());
    let mode = |name: &str| fs::metadata(tree.dir.join("lower").join(name)).unwrap().mode();
    assert_eq!((mode("tmp") & 0o7777, mode("proc") & 0o7777), (0o1777, 0o755));
    assert_eq!(fs::read_dir(tree.dir.join("lower/dev")).unwrap().count(), 0);
}

#[test]
fn a_failing_program_shows_its_last_forty_lines() {
    let Some(tree) = make_tree() else { return };
    let mut lines = Vec::new();
    let program = sh("seq 1 500; echo gone >&2; exit 3");
    let error = tree.sandbox.run(&tree.spec, &program, &mut |line| lines.push(line.to_string()));
    let error = format!("{:#}", error.unwrap_err());
    assert!(error.contains("exit code 3") && error.ends_with("    500\n    gone"), "{error}");
    assert!(error.contains("    462\n") && !error.contains("    461\n"), "{error}");
    assert_eq!(lines.len(), 501);
    let error = tree.sandbox.read(&tree.spec, &sh("kill -9 $$")).unwrap_err();
    assert!(error.to_string().contains("signal 9"), "{error}");
    let error = tree.sandbox.read(&tree.spec, &Program::new("no-such-program")).unwrap_err();
    assert!(format!("{error:#}").contains("no-such-program"), "{error:#}");
    assert!(error.downcast_ref::<Failed>().is_none());
}

#[test]
fn input_reaches_the_program_and_all_its_output_comes_back() {
    let Some(tree) = make_tree() else { return };
    let text = "0123456789abcde\n".repeat(1 << 16);
    let program = Program::new("cat").input(text.clone());
    assert_eq!(tree.sandbox.read(&tree.spec, &program).unwrap(), text);
}

#[test]
fn a_daemon_left_behind_ends_with_its_program() {
    let Some(tree) = make_tree() else { return };
    let began = Instant::now();
    // It holds the output open; the orphans in between must be reaped, or kill would find them.
    let seen = tree.run(
        "(sleep 98761 & echo $! > /tmp/pid) ; (sleep 98761 &); kill $(cat /tmp/pid); i=0
         while kill -0 $(cat /tmp/pid) 2>/dev/null; do i=$((i+1)); test $i -lt 500; sleep 0.01; done
         echo reaped",
    );
    assert_eq!(seen, "reaped\n");
    assert!(began.elapsed() < Duration::from_secs(30));
    assert!(find_processes("98761").is_empty());
}

#[test]
fn an_unknown_job_and_a_missing_tree_are_errors() {
    let Some(tree) = make_tree() else { return };
    let start = |spec: &Spec, job: &str| {
        let null = serde_json::Value::Null;
        format!("{:#}", tree.sandbox.start(spec, job, null, &mut |_| ()).unwrap_err())
    };
    assert!(start(&Spec::default(), "nonsense").contains("nonsense"));
    assert!(start(&Spec::default(), "sandbox/shell").contains("no tree"));
    let spec = Spec { lower: vec!["/no/such/tree".into()], ..tree.spec.clone() };
    assert!(start(&spec, "nonsense").contains("/no/such/tree"));
}

#[test]
fn a_program_that_is_not_a_sandbox_is_an_error_and_not_a_hang() {
    let dir = tempfile::tempdir().unwrap();
    for program in ["true", "cat", "env", "no-such-program"] {
        let checks = Sandbox::new(program).probe(dir.path());
        assert!(checks.iter().any(|check| !check.ok), "{program}: {checks:?}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn the_probe_is_quick_and_leaves_nothing() {
    let Some(tree) = make_tree() else { return };
    let dir = tree.dir.join("probed");
    fs::create_dir(&dir).unwrap();
    let quickest = (0..5)
        .map(|_| {
            let began = Instant::now();
            assert!(tree.sandbox.probe(&dir).iter().all(|check| check.ok));
            began.elapsed()
        })
        .min();
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    tree.sandbox.require(&dir).unwrap();
    // A loaded machine is slower than the 20 ms of an idle one.
    assert!(quickest.unwrap() < Duration::from_millis(500), "{quickest:?}");
    let error = tree.sandbox.require(Path::new("/proc")).unwrap_err();
    assert!(error.downcast_ref::<UserError>().is_some(), "{error:?}");
}

#[test]
fn a_tree_of_other_owners_can_be_removed() {
    let Some(tree) = make_tree() else { return };
    tree.run("mkdir -p /srv/a/b; touch /srv/a/b/c; chown -R 7:7 /srv; chmod 0 /srv/a/b /srv/a");
    tree.sandbox.remove_tree(&tree.dir.join("upper")).unwrap();
    tree.sandbox.remove_tree(&tree.dir.join("work")).unwrap();
    assert!(!tree.dir.join("upper").exists() && !tree.dir.join("work").exists());
    tree.sandbox.remove_tree(&tree.dir.join("never-was")).unwrap();
}

/// Not a test of its own: the builder that [`kill_builder`] starts and kills.
#[test]
fn a_builder_sleeps_when_asked() {
    let Some(marker) = std::env::var_os("SANDBOX_TEST_SLEEP") else { return };
    let Some(tree) = make_tree() else { return };
    let script = format!("sleep {0} & sleep {0}", marker.to_str().unwrap());
    tree.sandbox.run(&tree.spec, &sh(&script), &mut |_| ()).unwrap();
}

fn kill_builder(signal: &str, marker: &str) {
    let Some(tree) = make_tree() else { return };
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mut builder = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_builder_sleeps_when_asked"])
        .env("SANDBOX_TEST_SLEEP", marker)
        .env("TMPDIR", &tree.dir)
        .spawn()
        .unwrap();
    wait_until(|| find_processes(marker).len() >= 3);
    let stages = find_processes("__sandbox").len();
    assert!(stages >= 4, "{stages}");
    let pid = builder.id().to_string();
    Command::new("sh").args(["-c", &format!("kill -{signal} {pid}")]).run().unwrap();
    builder.wait().unwrap();
    wait_until(|| find_processes(marker).is_empty());
    let is_ours = |pid: &str| {
        fs::read_to_string(format!("/proc/{pid}/environ")).is_ok_and(|env| env.contains(marker))
    };
    wait_until(|| !find_processes("__sandbox").iter().any(|pid| is_ours(pid)));
    assert_eq!(fs::read_to_string("/proc/self/mounts").unwrap(), mounts);
}

#[test]
fn a_killed_builder_leaves_no_process_and_no_mount() {
    kill_builder("KILL", "98762");
}

#[test]
fn an_interrupted_builder_leaves_no_process_and_no_mount() {
    kill_builder("INT", "98763");
}

fn wait_until(condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(30), "it did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The processes with this word on their command line.
fn find_processes(word: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|part| {
                std::str::from_utf8(part)
                    .is_ok_and(|part| part.split_whitespace().any(|found| found == word))
            })
        })
        .collect()
}
