//! Builds that are interrupted: nothing of them goes on, the images of the last good build
//! are as they were, and the next build clears up and succeeds.

#[path = "support/project.rs"]
#[allow(dead_code, reason = "the tests of the command line use more of it")]
mod project;

use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use project::{Project, TINY, add_set, can_build, list_files, load_lock, take_turn};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// Where a build is when it is interrupted.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Moment {
    Unpacking,
    Configuring,
    Command,
    Blob,
    Disk,
    Qcow2,
}

/// Who gets the signal.
#[derive(Debug, Clone, Copy)]
enum To {
    /// Everybody, as when it is typed.
    Group,
    Builder,
}

/// A process of the build: its id, its parent's, its state, and its command line.
struct Process {
    pid: u32,
    command: String,
}

/// All live processes of a process group.
fn list_group(group: u32) -> Vec<Process> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        // The name is in brackets and may hold anything: state, parent and group follow it.
        let after = stat.rsplit_once(") ").unwrap().1;
        let fields: Vec<&str> = after.split(' ').collect();
        if fields[2] == group.to_string() && fields[0] != "Z" {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            found.push(Process { pid, command });
        }
    }
    found
}

/// Processes that stand in the folder, name it, or have something of it mounted.
fn list_users(folder: &Path) -> Vec<String> {
    let name = folder.to_str().unwrap();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let path = entry.path();
        let is_other = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
            .is_some_and(|pid| pid != std::process::id());
        if !is_other {
            continue;
        }
        let text = |file: &str| {
            String::from_utf8_lossy(&fs::read(path.join(file)).unwrap_or_default()).into_owned()
        };
        let link =
            |file: &str| fs::read_link(path.join(file)).unwrap_or_default().display().to_string();
        let places = [text("cmdline"), text("mountinfo"), link("cwd"), link("root"), link("exe")];
        if places.iter().any(|place| place.contains(name)) {
            found.push(format!("{} {}", entry.file_name().to_string_lossy(), places[0]));
        }
    }
    found
}

impl Moment {
    fn is_now(self, project: &Project, group: u32) -> bool {
        let runs =
            |part: &str| list_group(group).iter().any(|process| process.command.contains(part));
        let grows = |part: &str| {
            list_names(&project.out()).iter().filter(|name| name.starts_with('.')).any(|folder| {
                list_names(&project.out().join(folder)).iter().any(|name| name.contains(part))
            })
        };
        match self {
            Moment::Unpacking => {
                let tmp = project.store().join("tmp");
                list_names(&tmp)
                    .iter()
                    .filter(|name| name.ends_with("-layer"))
                    .any(|name| tmp.join(name).join("tree/usr").exists())
            }
            Moment::Configuring => runs("dpkg --configure"),
            Moment::Command => runs("sleep 987"),
            Moment::Blob => runs("mkfs.erofs"),
            Moment::Disk => grows("tiny.raw"),
            Moment::Qcow2 => grows("tiny.qcow2"),
        }
    }

    /// Change the project so that the next build comes by.
    fn prepare(self, project: &Project, number: usize) {
        let repository = concat!(env!("CARGO_MANIFEST_DIR"), "/layers/observability/layer.toml");
        let layer = fs::read_to_string(repository).unwrap();
        match self {
            Moment::Unpacking | Moment::Configuring | Moment::Blob => {
                let exclude = format!("exclude = [\"/nowhere/{number}\"]\npackages = ");
                project.write(
                    "layers/observability/layer.toml",
                    &layer.replace("packages = ", &exclude),
                );
            }
            Moment::Command => project.write_extra("commands = [\"sleep 987 & sleep 987\"]"),
            Moment::Disk | Moment::Qcow2 => {
                project.write("layers/extra/tree/etc/number", &number.to_string());
            }
        }
    }
}

fn list_names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn start(project: &Project) -> Child {
    let mut command = project.command(&["build", "tiny", "--offline", "--quiet"]);
    // A shell that runs these tests in the background has let them ignore what is typed.
    let heed = || {
        // SAFETY: signal is async-signal-safe.
        unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
        Ok(())
    };
    // SAFETY: the closure only calls signal.
    unsafe { command.pre_exec(heed) };
    command.process_group(0).spawn().unwrap()
}

/// Start a build and send it the signal at the moment; how it ended, and what it said.
fn interrupt(project: &Project, moment: Moment, signal: Signal, to: To) -> (ExitStatus, String) {
    let mut child = start(project);
    let group = child.id();
    let began = Instant::now();
    while !moment.is_now(project, group) {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "the build ended before {moment:?}: {ended:?}");
        assert!(began.elapsed() < Duration::from_secs(120), "{moment:?} never came");
        std::thread::sleep(Duration::from_millis(2));
    }
    let pid = Pid::from_child(&child);
    match to {
        To::Group => kill_process_group(pid, signal),
        To::Builder => kill_process(pid, signal),
    }
    .unwrap();
    let sent = Instant::now();
    let output = child.wait_with_output().unwrap();
    assert!(
        sent.elapsed() < Duration::from_secs(3),
        "{moment:?}: it took {:?} to end",
        sent.elapsed()
    );
    assert!(output.stdout.is_empty());
    let said = String::from_utf8(output.stderr).unwrap();
    assert_all_gone(project, group);
    (output.status, said)
}

#[track_caller]
fn assert_all_gone(project: &Project, group: u32) {
    let folder = project.root().parent().unwrap().to_path_buf();
    let deadline = Instant::now() + Duration::from_secs(3);
    loop {
        let left: Vec<String> = list_group(group)
            .iter()
            .map(|process| format!("{} {}", process.pid, process.command))
            .collect();
        let left = [left, list_users(&folder)].concat();
        if left.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "these go on:\n{}", left.join("\n"));
        std::thread::sleep(Duration::from_millis(10));
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(folder.to_str().unwrap()), "a mount was left");
    for device in list_names(Path::new("/sys/block")) {
        let backing = Path::new("/sys/block").join(device).join("loop/backing_file");
        let backing = fs::read_to_string(backing).unwrap_or_default();
        assert!(!backing.contains(folder.to_str().unwrap()), "a loop device was left");
    }
}

fn prepare() -> Option<Project> {
    can_build().then(|| {
        let project = Project::tiny("");
        project.copy_store();
        project.write(
            "profiles/tiny.toml",
            &TINY.replace("\"extra\"", "\"observability\", \"extra\""),
        );
        let mut lock = load_lock();
        assert!(
            lock.sets.iter().any(|set| set.name == "base+kernel+observability"),
            "this test needs a shipped profile that begins with base, kernel, observability"
        );
        add_set(
            &mut lock,
            "base+kernel+observability+extra",
            Some("base+kernel+observability"),
            &[],
            false,
        );
        lock.save(&project.root().join("stanchion.lock")).unwrap();
        project.run(&["build", "tiny", "--offline"]).expect(0, &[]);
        project
    })
}

/// Interrupt one build after the other, each followed by one that must succeed.
fn check(cases: &[(Moment, Signal, To)]) {
    let _turn = take_turn();
    let Some(project) = prepare() else { return };
    let mut before = list_files(&project.out());
    for (number, (moment, signal, to)) in cases.iter().enumerate() {
        let what = format!("{signal:?} to {to:?} while {moment:?}");
        moment.prepare(&project, number);
        let (status, said) = interrupt(&project, *moment, *signal, *to);
        let signal = signal.as_raw();
        let ended = status.signal() == Some(signal) || status.code() == Some(128 + signal);
        assert!(ended, "{what}: {status}\n{said}");
        assert!(said.lines().count() <= 1, "{what}: it said\n{said}");
        let mut after = list_files(&project.out());
        after.retain(|name, _| !name.starts_with('.'));
        assert_eq!(after, before, "{what}: the images of the last good build have changed");

        project.write_extra("");
        let ran = project.run(&["build", "tiny", "--offline"]);
        ran.expect(0, &["out/tiny.raw", "out/tiny.qcow2"]);
        before = list_files(&project.out());
        assert_eq!(before.len(), 3, "{what}: something was left: {before:?}");
        assert_eq!(list_names(&project.store().join("tmp")), [""; 0], "{what}");
        let ran = project.run(&["inspect", "out/tiny.qcow2", "--quiet"]);
        ran.expect(0, &[]);
    }
}

#[test]
fn a_build_that_is_killed_leaves_nothing_running_and_the_last_images_as_they_were() {
    use Moment::{Blob, Command, Configuring, Disk, Qcow2, Unpacking};
    let moments = [Unpacking, Configuring, Command, Blob, Disk, Qcow2];
    check(&moments.map(|moment| (moment, Signal::KILL, To::Builder)));
}

#[test]
fn a_build_that_is_interrupted_ends_quietly_and_at_once() {
    use Moment::{Command, Configuring, Disk, Qcow2};
    check(&[
        (Configuring, Signal::TERM, To::Builder),
        (Command, Signal::INT, To::Group),
        (Command, Signal::INT, To::Builder),
        (Disk, Signal::TERM, To::Group),
        (Qcow2, Signal::INT, To::Group),
    ]);
}
