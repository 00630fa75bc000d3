//! Labs of the tests' own, on the shared image, and what must not be left of them.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stanchion::error::UserError;
use stanchion::lab::{Lab, NodeSpec, Nspawn, Places, Process, Spec, check_host};
use stanchion::tools::set;
use tempfile::TempDir;

use crate::image::{self, Image};

/// Far more than a boot takes on two busy processors.
pub const BOOT_LIMIT: Duration = Duration::from_secs(180);
pub const EXEC_LIMIT: Duration = Duration::from_secs(60);

/// One lab at a time: they are looked at for what they leave, and slow each other down.
pub fn wait_turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A lab that is taken down with its owner.
pub struct TestLab {
    pub lab: Lab,
    pub places: Places,
    _folder: TempDir,
}

impl Drop for TestLab {
    fn drop(&mut self) {
        if let Err(error) = Lab::remove(&self.places, self.lab.name()) {
            eprintln!("taking the test's lab down: {error:?}");
        }
    }
}

/// The image and the nspawn for labs. `None`, with a line that says why, where there can be
/// no lab.
pub fn prepare() -> Option<(&'static Image, Nspawn)> {
    if let Err(error) = check_host() {
        eprintln!("skipped: {}", summarize(&error));
        return None;
    }
    let image = image::provide(&[set::LAB])?;
    let nspawn = Nspawn::find_on_host()
        .unwrap_or_else(|| Nspawn::Tools(image.tools[0].root().to_path_buf()));
    Some((image, nspawn))
}

/// A place for labs, and the program under test to keep their nodes.
pub fn make_places() -> (TempDir, Places) {
    let folder = tempfile::tempdir_in(image::scratch()).unwrap();
    let places =
        Places { labs: folder.path().join("stanchion/labs"), program: image::PROGRAM.into() };
    (folder, places)
}

/// Nodes `n1`, `n2`, … from 10.88.0.11 on, without seeds, booted. `None`, with a line that
/// says why, where there can be no lab.
pub fn start(count: u8) -> Option<TestLab> {
    let (image, nspawn) = prepare()?;
    let node = |number: u8| NodeSpec {
        name: format!("n{number}"),
        address: Ipv4Addr::new(10, 88, 0, 10 + number),
        image: image.raw.clone(),
    };
    let nodes = (1..=count).map(node).collect();
    let (folder, places) = make_places();
    let network = "10.88.0.0/24".parse().unwrap();
    let spec = Spec { name: "test".to_string(), network, nspawn, nodes, cluster: None };
    let lab = skip_if_missing(Lab::create(&places, &spec))?;
    let lab = TestLab { lab, places, _folder: folder };
    for node in lab.lab.list_nodes() {
        skip_if_missing(lab.lab.start(node))?;
    }
    for node in lab.lab.list_nodes() {
        assert_eq!(boot(&lab.lab, node), "running", "node {node}");
    }
    Some(lab)
}

/// Wait until a node is up; what has failed is printed.
pub fn boot(lab: &Lab, node: &str) -> String {
    let state = lab.wait_for_boot(node, BOOT_LIMIT).unwrap();
    if state != "running" {
        let failed = run(lab, node, &["systemctl", "--failed", "--no-legend", "--plain"]);
        eprintln!("failed in {node}:\n{failed}");
    }
    state
}

/// What a command in a node, which must succeed, writes.
#[track_caller]
pub fn run(lab: &Lab, node: &str, argv: &[&str]) -> String {
    let ran = lab.exec(node, argv, EXEC_LIMIT).unwrap();
    assert_eq!(ran.code, Some(0), "{argv:?}: {}", String::from_utf8_lossy(&ran.stderr));
    ran.text()
}

fn skip_if_missing<T>(done: anyhow::Result<T>) -> Option<T> {
    match done {
        Ok(done) => Some(done),
        Err(error) if is_missing(&error) => {
            eprintln!("skipped: {}", summarize(&error));
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

/// Whether it is the machine that cannot.
fn is_missing(error: &anyhow::Error) -> bool {
    let mistake = error.chain().find_map(|cause| cause.downcast_ref::<UserError>());
    mistake.is_some_and(|mistake| mistake.summary().starts_with("this machine cannot"))
}

fn summarize(error: &anyhow::Error) -> String {
    let mistake = error.chain().find_map(|cause| cause.downcast_ref::<UserError>());
    mistake.map_or_else(|| format!("{error:#}"), UserError::summary)
}

/// Whether `address` answers to an echo request from the network namespace at `from` within
/// `limit`; asked several times, for neighbours are found first.
pub fn ping(from: &Path, address: Ipv4Addr, limit: Duration) -> bool {
    let namespace = fs::File::open(from).unwrap();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            rustix::thread::move_into_link_name_space(namespace.as_fd(), None).unwrap();
            let end = Instant::now() + limit;
            loop {
                match ask_echo(address) {
                    Ok(()) => return true,
                    Err(_) if Instant::now() >= end => return false,
                    Err(_) => std::thread::sleep(Duration::from_millis(50)),
                }
            }
        });
        asked.join().unwrap()
    })
}

/// The network namespace of a node.
pub fn find_network(lab: &Lab, node: &str) -> std::path::PathBuf {
    let init = lab.status(node).unwrap().init.expect("the node runs");
    format!("/proc/{init}/ns/net").into()
}

/// One echo request (RFC 792), and its answer within a second.
fn ask_echo(address: Ipv4Addr) -> io::Result<()> {
    let check = |result: libc::c_long| match result {
        0.. => Ok(result),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: plain calls with valid pointers to buffers of the lengths given.
    unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let socket = check(libc::socket(libc::AF_INET, kind, libc::IPPROTO_ICMP).into())?;
        let socket = OwnedFd::from_raw_fd(socket as i32);
        let limit = libc::timeval { tv_sec: 1, tv_usec: 0 };
        let length = size_of::<libc::timeval>() as libc::socklen_t;
        let limit = (&raw const limit).cast();
        let option = libc::SO_RCVTIMEO;
        check(
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, limit, length).into(),
        )?;
        let mut to: libc::sockaddr_in = std::mem::zeroed();
        to.sin_family = libc::AF_INET as libc::sa_family_t;
        to.sin_addr.s_addr = address.to_bits().to_be();
        let length = size_of::<libc::sockaddr_in>() as libc::socklen_t;
        // Type 8; the sum is the complement of the one word that is not zero.
        let request = [8_u8, 0, 0xf7, 0xff, 0, 0, 0, 0];
        let (bytes, to) = (request.as_ptr().cast(), (&raw const to).cast());
        check(libc::sendto(socket.as_raw_fd(), bytes, request.len(), 0, to, length) as i64)?;
        let mut answer = [0_u8; 256];
        loop {
            let room = answer.as_mut_ptr().cast();
            let n = check(libc::recv(socket.as_raw_fd(), room, answer.len(), 0) as i64)?;
            // Behind the IP header: an echo reply, from whom was asked.
            if n >= 28 && answer[20] == 0 && answer[12..16] == address.octets() {
                return Ok(());
            }
        }
    }
}

/// What of a running lab can be left behind.
pub struct Traces {
    folder: std::path::PathBuf,
    name: String,
    network: u64,
    processes: Vec<Process>,
}

impl Traces {
    pub fn take(places: &Places, name: &str) -> Self {
        let lab = Lab::open(places, name).unwrap();
        let folder = places.labs.join(name);
        let network = fs::metadata(folder.join("network")).unwrap().ino();
        let processes = lab.list_processes().unwrap();
        Traces { folder, name: name.to_string(), network, processes }
    }

    pub fn count_processes(&self) -> usize {
        self.processes.len()
    }

    /// Nothing is left. Other labs may run on this machine meanwhile.
    #[track_caller]
    pub fn expect_gone(&self, image: &Path) {
        assert!(!self.folder.exists(), "{} is left", self.folder.display());
        let left: Vec<_> = self.processes.iter().filter(|process| process.is_alive()).collect();
        assert!(left.is_empty(), "processes are left: {left:?}");

        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let folder = self.folder.to_str().unwrap();
        assert!(!mounts.contains(folder), "mounts are left:\n{mounts}");

        let group = format!("stanchion-lab-{}-", self.name);
        let found = fs::read_to_string("/proc/self/mountinfo").unwrap();
        for place in found.lines().filter(|line| line.contains(" - cgroup")) {
            let place = place.split(' ').nth(4).unwrap();
            for entry in fs::read_dir(place).unwrap().flatten() {
                let name = entry.file_name().into_string().unwrap();
                // Other tests have labs of the same name elsewhere.
                let ours = name.starts_with(&group) && !self.is_of_others(&name);
                assert!(!ours, "the control group {name} is left in {place}");
            }
        }

        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let network = fs::metadata(entry.path().join("ns/net")).map(|found| found.ino());
            assert_ne!(network.ok(), Some(self.network), "{} is inside", entry.path().display());
        }
        for entry in fs::read_dir("/sys/block").unwrap().flatten() {
            let behind = fs::read_to_string(entry.path().join("loop/backing_file"));
            let ours = behind.is_ok_and(|file| Path::new(file.trim_end()) == image);
            assert!(!ours, "{} is left", entry.path().display());
        }
    }

    fn is_of_others(&self, group: &str) -> bool {
        let digest = stanchion::digest::Digest::of(self.folder.as_os_str().as_encoded_bytes());
        !group.ends_with(&digest.short())
    }
}
