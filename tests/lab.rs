//! Labs of the real `db` image: nodes side by side, faults and their mending, and nothing
//! left behind however a lab ends.

#[allow(dead_code, reason = "other tests look into the image")]
#[path = "support/image.rs"]
mod image;
#[path = "support/lab.rs"]
mod lab;

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use lab::{Traces, boot, find_network, ping, run};
use stanchion::error::exit_code;
use stanchion::lab::{Lab, Nspawn, Places};

const SOON: Duration = Duration::from_secs(10);
/// Long enough for an answer, had there been one.
const NEVER: Duration = Duration::from_millis(1500);

fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 88, 0, 10 + number)
}

#[test]
fn three_nodes_boot_side_by_side_and_meet_on_the_bridge() {
    let _turn = lab::wait_turn();
    let Some(test) = lab::start(3) else { return };
    let lab = &test.lab;
    let mut ids = Vec::new();
    for node in lab.list_nodes() {
        assert_eq!(run(lab, node, &["systemctl", "--failed", "--no-legend"]), "");
        assert_eq!(run(lab, node, &["hostname"]), node);
        ids.push(run(lab, node, &["cat", "/etc/machine-id"]));
        // As on a real boot: the root cannot be written to, /etc is memory, /var is not.
        let ran = lab.exec(node, &["touch", "/usr/mark"], SOON).unwrap();
        assert_eq!(ran.code, Some(1));
        assert!(String::from_utf8_lossy(&ran.stderr).contains("Read-only file system"));
        let kind = |path| run(lab, node, &["findmnt", "--noheadings", "--output", "FSTYPE", path]);
        assert_eq!((kind("/").as_str(), kind("/etc").as_str()), ("erofs", "overlay"));
        assert_ne!(kind("/var"), "tmpfs");
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 3, "{ids:?}");

    for from in 1..=3 {
        let network = find_network(lab, &format!("n{from}"));
        for to in 1..=3 {
            assert!(ping(&network, address(to), SOON), "n{from} does not reach n{to}");
        }
        assert!(ping(&network, lab.operator(), SOON));
    }
    // The operator's side, for clients of the tests.
    let own = lab.enter_network(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect((address(1), 9)).unwrap();
        socket.local_addr().unwrap().ip()
    });
    assert_eq!(own.unwrap(), lab.operator());
    // And nothing beyond.
    let beyond =
        lab.enter_network(|| UdpSocket::bind("0.0.0.0:0").unwrap().connect("192.0.2.1:9").is_err());
    assert!(beyond.unwrap());

    let traces = Traces::take(&test.places, lab.name());
    assert!(traces.count_processes() > 20);
    Lab::remove(&test.places, lab.name()).unwrap();
    traces.expect_gone(&lab::prepare().unwrap().0.raw);
    // What is down is down.
    Lab::remove(&test.places, lab.name()).unwrap();
}

#[test]
fn a_killed_node_keeps_its_var_and_loses_what_was_changed_in_etc() {
    let _turn = lab::wait_turn();
    let Some(test) = lab::start(1) else { return };
    let lab = &test.lab;
    let id = run(lab, "n1", &["cat", "/etc/machine-id"]);
    run(lab, "n1", &["sh", "-c", "echo kept > /var/lib/mark && echo lost > /etc/mark"]);
    lab.kill("n1").unwrap();
    assert!(!lab.status("n1").unwrap().running);
    let error = lab.exec("n1", &["true"], SOON).unwrap_err();
    assert_eq!(exit_code(&error), 2);
    // Twice is no mistake.
    lab.kill("n1").unwrap();

    lab.start("n1").unwrap();
    assert_eq!(boot(lab, "n1"), "running");
    assert_eq!(run(lab, "n1", &["cat", "/var/lib/mark"]), "kept");
    assert_eq!(lab.exec("n1", &["cat", "/etc/mark"], SOON).unwrap().code, Some(1));
    assert_eq!(run(lab, "n1", &["cat", "/etc/machine-id"]), id);
    assert_eq!(exit_code(&lab.start("n1").unwrap_err()), 2);

    // A reboot from inside, and a power-off.
    let _ = lab.exec("n1", &["systemctl", "reboot"], SOON);
    let again = || lab.status("n1").is_ok_and(|status| status.boots == 2);
    assert!(wait_until(Duration::from_secs(60), again));
    assert_eq!(boot(lab, "n1"), "running");
    lab.stop("n1").unwrap();
    assert!(!lab.status("n1").unwrap().running);

    lab.destroy("n1").unwrap();
    lab.start("n1").unwrap();
    assert_eq!(boot(lab, "n1"), "running");
    assert_eq!(lab.exec("n1", &["cat", "/var/lib/mark"], SOON).unwrap().code, Some(1));
    assert_ne!(run(lab, "n1", &["cat", "/etc/machine-id"]), id);
    let console = fs::read_to_string(lab.console_path("n1").unwrap()).unwrap();
    assert!(console.matches("Welcome to Stanchion").count() == 4, "{console}");
}

#[test]
fn a_partition_cuts_and_heals_and_a_frozen_node_waits() {
    let _turn = lab::wait_turn();
    let Some(test) = lab::start(2) else { return };
    let lab = &test.lab;
    let (first, second) = (find_network(lab, "n1"), find_network(lab, "n2"));
    assert!(ping(&first, address(2), SOON));
    lab.partition("n1").unwrap();
    lab.partition("n1").unwrap();
    assert!(lab.status("n1").unwrap().partitioned);
    assert!(!ping(&first, address(2), NEVER) && !ping(&second, address(1), NEVER));
    // It lives on its own, and can be looked at.
    assert_eq!(run(lab, "n1", &["systemctl", "is-system-running"]), "running");
    lab.heal("n1").unwrap();
    assert!(!lab.status("n1").unwrap().partitioned);
    assert!(ping(&first, address(2), SOON) && ping(&second, address(1), SOON));

    let count = "i=0; while :; do i=$((i+1)); echo $i > /run/count; sleep 0.02; done";
    run(lab, "n1", &["systemd-run", "--quiet", "--", "sh", "-c", count]);
    let read = || run(lab, "n1", &["cat", "/run/count"]);
    assert!(wait_until(SOON, || lab.exec("n1", &["test", "-s", "/run/count"], SOON).unwrap().code
        == Some(0)));
    lab.freeze("n1").unwrap();
    assert!(lab.status("n1").unwrap().frozen);
    let before = read();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(read(), before);
    assert_eq!(exit_code(&lab.stop("n1").unwrap_err()), 2);
    lab.thaw("n1").unwrap();
    assert!(wait_until(SOON, || read() != before));
    // A frozen node can be killed, and started again.
    lab.freeze("n1").unwrap();
    lab.kill("n1").unwrap();
    lab.start("n1").unwrap();
    assert_eq!(boot(lab, "n1"), "running");
}

#[test]
fn a_command_that_hangs_is_ended_and_output_comes_back() {
    let _turn = lab::wait_turn();
    let Some(test) = lab::start(1) else { return };
    let ran = test.lab.exec("n1", &["sh", "-c", "echo out; echo err >&2; exit 7"], SOON).unwrap();
    assert_eq!((ran.code, ran.text().as_str(), &ran.stderr[..]), (Some(7), "out", &b"err\n"[..]));
    let began = Instant::now();
    // What it leaves behind does not hold us up.
    let hang = ["sh", "-c", "sleep 61 & sleep 60"];
    let error = test.lab.exec("n1", &hang, Duration::from_millis(500)).unwrap_err();
    assert!(format!("{error:#}").contains("did not end"), "{error:#}");
    assert!(began.elapsed() < Duration::from_secs(20));
    let error = test.lab.exec("n1", &["no-such-program"], SOON).unwrap_err();
    assert!(format!("{error:#}").contains("no-such-program"), "{error:#}");
    assert_eq!(exit_code(&test.lab.exec("n2", &["true"], SOON).unwrap_err()), 2);
}

/// The program as a user runs it, with its state in `folder`.
fn stanchion(folder: &Path) -> Command {
    let mut command = Command::new(image::PROGRAM);
    command.env("XDG_STATE_HOME", folder).current_dir(image::project("node"));
    command
}

/// As [`lab::prepare`], with the image of all roles that these tests can have.
fn prepare_node() -> Option<(&'static image::Image, Nspawn)> {
    let (_, nspawn) = lab::prepare()?;
    Some((image::provide_node(&[])?, nspawn))
}

fn up(folder: &Path, nodes: &str) -> Command {
    let mut command = stanchion(folder);
    command.args(["--quiet", "lab", "up", "--nodes", nodes, "--out"]);
    command.arg(image::scratch().join("image"));
    command
}

fn wait_until(limit: Duration, mut is_true: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    while !is_true() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

#[test]
fn the_commands_bring_a_lab_up_and_take_it_down() {
    let _turn = lab::wait_turn();
    let Some((image, _)) = prepare_node() else { return };
    let (folder, places) = lab::make_places();
    let run = |args: &[&str]| {
        let output = stanchion(folder.path()).args(args).output().unwrap();
        let stdout = String::from_utf8(output.stdout).unwrap();
        (output.status.code(), stdout, String::from_utf8(output.stderr).unwrap())
    };
    let _down = TakeDown(&places);
    let refused = up(folder.path(), "2").output().unwrap();
    assert_eq!(refused.status.code(), Some(2), "two nodes are no cluster");
    let brought = up(folder.path(), "3").output().unwrap();
    assert!(brought.status.success(), "{}", String::from_utf8_lossy(&brought.stderr));
    let table = String::from_utf8(brought.stdout).unwrap();
    assert_eq!(table.lines().count(), 4, "{table}");
    let again = up(folder.path(), "3").output().unwrap();
    assert_eq!(again.status.code(), Some(2));

    let (code, said, _) = run(&["lab", "exec", "n1", "--", "sh", "-c", "hostname; exit 9"]);
    assert_eq!((code, said.as_str()), (Some(9), "n1\n"));
    // Each node has taken the seed that was made for it.
    for node in ["n1", "n2", "n3"] {
        let begin = format!("{node} of cluster lab ");
        let asked = ["lab", "exec", node, "--", "stanchion-agent", "status"];
        let is_taken = || run(&asked).1.starts_with(&begin);
        assert!(wait_until(Duration::from_secs(60), is_taken), "{:?}", run(&asked));
    }
    for args in [
        &["lab", "stop", "n2"][..],
        &["lab", "start", "n2"],
        &["lab", "freeze", "n1"],
        &["lab", "thaw", "n1"],
        &["lab", "partition", "n1"],
    ] {
        assert_eq!(run(args).0, Some(0), "{args:?}");
    }
    let (_, said, _) = run(&["--json", "lab", "status"]);
    let status: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(status["operator"], "10.88.0.254");
    assert_eq!(status["nodes"][0]["partitioned"], true);
    assert_eq!(run(&["lab", "heal"]).0, Some(0));
    let (code, said, _) = run(&["lab", "logs", "n1"]);
    assert!(code == Some(0) && said.contains("Reached target"), "{said}");
    let (code, _, said) = run(&["lab", "kill", "m1"]);
    assert_eq!(code, Some(2));
    assert!(said.contains("did you mean `n1`?"), "{said}");
    run(&["lab", "kill", "n1"]);
    // Of a node that is down the console ends.
    let (code, said, _) = run(&["lab", "console", "n1"]);
    assert!(code == Some(0) && said.contains("Welcome to Stanchion"), "{said}");

    let traces = Traces::take(&places, "lab");
    assert_eq!(run(&["lab", "down"]).0, Some(0));
    traces.expect_gone(&image.raw);
    let (code, _, said) = run(&["lab", "status"]);
    assert_eq!(code, Some(2));
    assert!(said.contains("there is no lab `lab`"), "{said}");
}

#[test]
fn a_lab_whose_command_was_killed_is_taken_down_by_what_is_on_disk() {
    let _turn = lab::wait_turn();
    let Some((image, _)) = prepare_node() else { return };
    // Killed when this file of the lab is there: early, in the middle, late.
    for file in ["lab.json", "network", "nodes/n1/console.log", "nodes/n2/running.json"] {
        let (folder, places) = lab::make_places();
        let _down = TakeDown(&places);
        let mut command = up(folder.path(), "3").spawn().unwrap();
        let awaited = places.labs.join("lab").join(file);
        let appeared = wait_until(Duration::from_secs(120), || awaited.exists());
        command.kill().unwrap();
        command.wait().unwrap();
        assert!(appeared, "{file} did not appear");
        if file == "nodes/n2/running.json" {
            let traces = Traces::take(&places, "lab");
            assert!(traces.count_processes() > 5);
            down(folder.path());
            traces.expect_gone(&image.raw);
        } else {
            down(folder.path());
        }
        assert_eq!(fs::read_dir(&places.labs).unwrap().count(), 0, "after {file}");
        assert!(
            !fs::read_to_string("/proc/mounts").unwrap().contains(folder.path().to_str().unwrap())
        );
    }
}

fn down(folder: &Path) {
    let output = stanchion(folder).args(["lab", "down"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Takes the lab `lab` down when a test fails.
struct TakeDown<'a>(&'a Places);

impl Drop for TakeDown<'_> {
    fn drop(&mut self) {
        if let Err(error) = Lab::remove(self.0, "lab") {
            eprintln!("taking the test's lab down: {error:?}");
        }
    }
}
