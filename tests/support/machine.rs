//! A virtual machine that boots an image under OVMF, for checks that come in from outside:
//! an unmodified image gets a script as a systemd credential over SMBIOS, and answers on
//! its serial port.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use stanchion::command::Command;
use stanchion::tools::Tools;

/// Marks around what the script writes, among the other lines of the console.
pub const BEGIN: &str = "PROBE-BEGIN";
const END: &str = "PROBE-END";

/// The firmware writes its first byte far sooner, unless the guest does not run at all.
const FIRST_SIGN: Duration = Duration::from_secs(10);

/// A running machine; it ends with its owner.
pub struct Machine {
    child: Child,
    console: mpsc::Receiver<Vec<u8>>,
    seen: Vec<u8>,
    began: Instant,
}

/// How a wait ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The machine powered off by itself.
    PoweredOff,
    /// One of the texts appeared.
    Saw(String),
    TimedOut,
}

impl Machine {
    /// Start `disk` (raw, written to). The shell script runs when multi-user is reached;
    /// its output comes between marks, and then the machine powers off. `words` are added
    /// to the kernel's command line.
    pub fn start(tools: &Tools, disk: &Path, script: &str, words: &str) -> Machine {
        Machine::start_with(tools, disk, script, words, &[])
    }

    /// The same, with more arguments for QEMU: what else the machine has.
    pub fn start_with(
        tools: &Tools,
        disk: &Path,
        script: &str,
        words: &str,
        attached: &[String],
    ) -> Machine {
        let accelerator = choose_accelerator(tools);
        let mut command = describe_machine(tools, accelerator, &disk.with_extension("vars"))
            // A network, so that what would listen on it does, with nothing behind it.
            .args(["-netdev", "user,id=net,restrict=on"])
            .args(["-device", "virtio-net-pci,netdev=net,romfile="])
            .arg("-drive")
            .arg(format!("if=virtio,cache=unsafe,format=raw,file={}", disk.display()));
        for credential in describe_probe(script) {
            command = command.arg("-smbios").arg(credential);
        }
        if !words.is_empty() {
            // systemd-stub(7)
            let words = format!("type=11,value=io.systemd.stub.kernel-cmdline-extra={words}");
            command = command.arg("-smbios").arg(words);
        }
        Machine::run(command.args(attached))
    }

    fn run(command: Command) -> Machine {
        let mut child = command.spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let stderr = child.stderr.take().unwrap();
        let (sender, console) = mpsc::channel();
        let errors = sender.clone();
        std::thread::spawn(move || forward(stdout, &sender));
        std::thread::spawn(move || forward(stderr, &errors));
        Machine { child, console, seen: Vec::new(), began: Instant::now() }
    }

    /// Wait until the machine powers off or writes one of `texts`, at most until `limit`
    /// after its start.
    pub fn wait_for(&mut self, texts: &[&str], limit: Duration) -> Outcome {
        loop {
            if let Some(text) = texts.iter().find(|text| self.console().contains(**text)) {
                return Outcome::Saw(text.to_string());
            }
            let left = limit.saturating_sub(self.began.elapsed());
            match self.console.recv_timeout(left) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(mpsc::RecvTimeoutError::Timeout) => return Outcome::TimedOut,
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let _ = self.child.wait();
                    return Outcome::PoweredOff;
                }
            }
        }
    }

    /// Everything on the console so far, without what moves the cursor or sets colours.
    pub fn console(&self) -> String {
        let text = String::from_utf8_lossy(&self.seen);
        let mut pieces = text.split('\x1b');
        let mut plain = pieces.next().unwrap_or_default().to_string();
        for piece in pieces {
            // `ESC [ parameters letter`
            let end = piece.find(|c: char| c.is_ascii_alphabetic()).map_or(0, |at| at + 1);
            plain.push_str(&piece[end..]);
        }
        plain.retain(|c| c != '\r');
        plain
    }
}

/// The value behind `name=` in what the script wrote on the console.
pub fn read_answer(console: &str, name: &str) -> String {
    let body = console.split_once(BEGIN).map_or("", |(_, body)| body);
    let body = body.split_once(END).map_or(body, |(body, _)| body);
    let mut pairs = body.lines().filter_map(|line| line.trim().split_once('='));
    let found = pairs.find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
    found.unwrap_or_else(|| panic!("no answer `{name}`; the console:\n{console}"))
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn forward(mut pipe: impl Read, to: &mpsc::Sender<Vec<u8>>) {
    let mut buffer = [0; 4096];
    while let Ok(n) = pipe.read(&mut buffer) {
        if n == 0 || to.send(buffer[..n].to_vec()).is_err() {
            return;
        }
    }
}

/// KVM where a guest really runs on it (a device that can be opened is no proof), else
/// emulation.
fn choose_accelerator(tools: &Tools) -> &'static str {
    static CHOSEN: OnceLock<&str> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let vars = folder.path().join("vars");
        let has_device = File::options().read(true).write(true).open("/dev/kvm").is_ok();
        let works = has_device && {
            let command = describe_machine(tools, "kvm", &vars).args(["-nic", "none"]);
            matches!(Machine::run(command).wait_for(&["BdsDxe"], FIRST_SIGN), Outcome::Saw(_))
        };
        let chosen = if works { "kvm" } else { "tcg" };
        println!("machines run by {chosen}");
        chosen
    })
}

/// QEMU with OVMF, its variables in `vars`, and the serial port on standard output.
fn describe_machine(tools: &Tools, accelerator: &str, vars: &Path) -> Command {
    let data = tools.root().join("usr/share");
    fs::copy(data.join("OVMF/OVMF_VARS_4M.fd"), vars).unwrap();
    let flash =
        |flags: &str, file: PathBuf| format!("if=pflash,format=raw{flags},file={}", file.display());
    tools
        .command("qemu-system-x86_64")
        .unwrap()
        .env("QEMU_MODULE_DIR", tools.root().join("usr/lib/x86_64-linux-gnu/qemu"))
        .arg("-L")
        .arg(data.join("qemu"))
        .arg("-L")
        .arg(data.join("seabios"))
        .args(["-machine", "q35", "-accel", accelerator, "-cpu", "max", "-smp", "2"])
        .args(["-m", "1536", "-display", "none", "-monitor", "none", "-serial", "stdio"])
        .arg("-no-reboot")
        .arg("-drive")
        .arg(flash(",readonly=on", data.join("OVMF/OVMF_CODE_4M.fd")))
        .arg("-drive")
        .arg(flash("", vars.to_path_buf()))
}

/// SMBIOS strings that make systemd run `script` (systemd.system-credentials(7)).
fn describe_probe(script: &str) -> Vec<String> {
    let script =
        format!("exec >/dev/ttyS0 2>&1\necho {BEGIN}\n{script}\necho {END}\nsystemctl poweroff\n");
    // systemd expands `$` in a command line, so the script travels as base64.
    let unit = format!(
        "[Unit]\nDescription=Probe\n[Service]\nType=exec\nStandardOutput=null\n\
         ExecStart=/bin/sh -c \"echo {} | base64 -d > /run/probe && exec sh /run/probe\"\n",
        encode_base64(script.as_bytes())
    );
    let dropin = "[Unit]\nWants=probe.service\n";
    [
        ("systemd.extra-unit.probe.service", unit.as_str()),
        ("systemd.unit-dropin.multi-user.target", dropin),
    ]
    .iter()
    .map(|(name, text)| {
        let text = encode_base64(text.as_bytes());
        format!("type=11,value=io.systemd.credential.binary:{name}={text}")
    })
    .collect()
}

fn encode_base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0, |word, byte| word << 8 | u32::from(*byte));
        let word = word << (8 * (3 - chunk.len()));
        for place in 0..4 {
            match place <= chunk.len() {
                true => text.push(DIGITS[(word >> (18 - 6 * place) & 63) as usize] as char),
                false => text.push('='),
            }
        }
    }
    text
}
