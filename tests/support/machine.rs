//! A virtual machine that boots an image under OVMF, for checks that come in from outside:
//! an unmodified image gets a script as a systemd credential over SMBIOS, and answers on
//! its serial port.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use stanchion::command::Command;
use stanchion::tools::Tools;

/// Marks around what the script writes, among the other lines of the console.
const BEGIN: &str = "PROBE-BEGIN";
const END: &str = "PROBE-END";

pub struct Machine {
    child: Child,
    console: mpsc::Receiver<Vec<u8>>,
    seen: String,
    began: Instant,
}

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// The machine powered off by itself.
    PoweredOff,
    /// The text appeared.
    Saw,
    TimedOut,
}

impl Machine {
    /// Start `disk` (raw). With `script`, a shell script runs once multi-user is reached;
    /// its output comes between marks, and then the machine powers off.
    pub fn start(tools: &Tools, disk: &Path, folder: &Path, script: Option<&str>) -> Machine {
        let data = tools.root().join("usr/share");
        let vars = folder.join(format!("{}.vars", disk.file_name().unwrap().to_string_lossy()));
        std::fs::copy(data.join("OVMF/OVMF_VARS_4M.fd"), &vars).unwrap();
        let drive = |flags: &str, file: PathBuf| format!("{flags},format=raw,file={}", file.display());
        let mut command = tools
            .command("qemu-system-x86_64")
            .unwrap()
            .args(["-machine", "q35", "-cpu", "max", "-smp", "2", "-m", "1536"])
            .args(["-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot"])
            .args(["-nic", "none"])
            .arg("-L")
            .arg(data.join("qemu"))
            .arg("-L")
            .arg(data.join("seabios"))
            .arg("-drive")
            .arg(drive("if=pflash,readonly=on", data.join("OVMF/OVMF_CODE_4M.fd")))
            .arg("-drive")
            .arg(drive("if=pflash", vars))
            .arg("-drive")
            .arg(drive("if=virtio,cache=unsafe", disk.to_path_buf()))
            .env("QEMU_MODULE_DIR", tools.root().join("usr/lib/x86_64-linux-gnu/qemu"));
        if let Some(script) = script {
            for credential in describe_probe(script) {
                command = command.arg("-smbios").arg(credential);
            }
        }
        let mut child = command.spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut stderr = child.stderr.take().unwrap();
        let (sender, console) = mpsc::channel();
        let errors = sender.clone();
        std::thread::spawn(move || forward(&mut stdout, &sender));
        std::thread::spawn(move || forward(&mut stderr, &errors));
        Machine { child, console, seen: String::new(), began: Instant::now() }
    }

    /// Wait until the machine powers off or writes `text`, at most `seconds` after its start.
    pub fn wait_for(&mut self, text: Option<&str>, seconds: u64) -> Outcome {
        let deadline = self.began + Duration::from_secs(seconds);
        loop {
            if text.is_some_and(|text| self.seen.contains(text)) {
                return Outcome::Saw;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Outcome::TimedOut;
            }
            match self.console.recv_timeout(left.min(Duration::from_millis(500))) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return self.read_end(text),
            }
        }
    }

    fn read_end(&mut self, text: Option<&str>) -> Outcome {
        self.reap();
        match text.is_some_and(|text| self.seen.contains(text)) {
            true => Outcome::Saw,
            false => Outcome::PoweredOff,
        }
    }

    /// Everything on the console so far.
    pub fn console(&self) -> &str {
        &self.seen
    }

    /// What the script wrote, as `name=value` lines looked up by name.
    pub fn read_answer(&self, name: &str) -> Option<String> {
        let start = self.seen.find(BEGIN)?;
        let body = &self.seen[start..];
        let body = body.find(END).map_or(body, |end| &body[..end]);
        body.lines().find_map(|line| {
            let (key, value) = line.trim().split_once('=')?;
            (key == name).then(|| value.to_string())
        })
    }

    fn reap(&mut self) -> Option<ExitStatus> {
        self.child.wait().ok()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn forward(pipe: &mut impl Read, to: &mpsc::Sender<Vec<u8>>) {
    let mut buffer = [0; 4096];
    while let Ok(n) = pipe.read(&mut buffer) {
        if n == 0 || to.send(buffer[..n].to_vec()).is_err() {
            return;
        }
    }
}

/// SMBIOS strings that make systemd run `script` (systemd.system-credentials(7)).
fn describe_probe(script: &str) -> Vec<String> {
    let script = format!("exec >/dev/ttyS0 2>&1\necho {BEGIN}\n{script}\necho {END}\nsystemctl poweroff\n");
    // systemd expands `$` in a command line, so the script travels as base64.
    let unit = format!(
        "[Unit]\nDescription=Probe\n[Service]\nType=exec\nStandardOutput=null\n\
         ExecStart=/bin/sh -c \"echo {} | base64 -d > /run/probe && exec sh /run/probe\"\n",
        encode_base64(script.as_bytes())
    );
    let dropin = "[Unit]\nWants=probe.service\n";
    [("systemd.extra-unit.probe.service", unit.as_str()), ("systemd.unit-dropin.multi-user.target", dropin)]
        .iter()
        .map(|(name, text)| {
            format!("type=11,value=io.systemd.credential.binary:{name}={}", encode_base64(text.as_bytes()))
        })
        .collect()
}

fn encode_base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            match place <= chunk.len() {
                true => text.push(DIGITS[(word >> (18 - 6 * place) & 63) as usize] as char),
                false => text.push('='),
            }
        }
    }
    text
}
