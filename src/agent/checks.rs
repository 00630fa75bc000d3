//! Looks at the machine before it takes part: memory, disk, speed of the disk, clock.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::systemd::run_program;

/// Time for which the disk may be measured.
const MEASURE: Duration = Duration::from_millis(1500);
/// etcd's own advice for the 99th percentile of a write that is on the disk.
const SLOW: Duration = Duration::from_millis(10);
const CAP_SYS_TIME: u32 = 25;

/// `None` when there is enough memory.
pub fn check_memory(memory_mb: u64, database: bool) -> Option<String> {
    let wanted = if database { 900 } else { 450 };
    (memory_mb < wanted).then(|| {
        format!("the machine has {memory_mb} MiB of memory; give it at least {wanted} MiB")
    })
}

/// `None` when /var has room.
pub fn check_disk(var: &Path) -> Result<Option<String>> {
    let stat = rustix::fs::statvfs(var).context("asking for the room on /var")?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize) >> 20;
    let total = stat.f_blocks.saturating_mul(stat.f_frsize) >> 20;
    let wanted = 512.max(total / 20);
    Ok((free < wanted).then(|| {
        format!("/var has {free} MiB free of {total}; grow the disk or delete what is not needed")
    }))
}

/// How long a small write takes until it is on the disk, at the 99th percentile.
pub fn measure_fsync(folder: &Path) -> Result<Duration> {
    let path = folder.join("fsync-probe");
    let measure = || -> std::io::Result<Vec<Duration>> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&path)?;
        let (begun, block) = (Instant::now(), [0u8; 2048]);
        let mut times = Vec::new();
        while times.len() < 100 && (times.len() < 5 || begun.elapsed() < MEASURE) {
            let write = Instant::now();
            file.write_all(&block)?;
            file.sync_data()?;
            times.push(write.elapsed());
        }
        Ok(times)
    };
    let times = measure().context("measuring the disk");
    let _ = std::fs::remove_file(&path);
    let mut times = times?;
    times.sort_unstable();
    Ok(times[(times.len() * 99).div_ceil(100) - 1])
}

/// `None` when the disk is fast enough for etcd.
pub fn check_fsync(p99: Duration) -> Option<String> {
    (p99 > SLOW).then(|| {
        format!(
            "a write to /var takes {:.1} ms until it is safe (99th percentile; etcd wants less \
             than 10 ms): put the disk on faster storage, or elections will be called for nothing",
            p99.as_secs_f64() * 1000.0
        )
    })
}

/// Whether this machine may set its clock; in a container it is the host's.
pub fn owns_clock(proc_status: &str) -> bool {
    let bounding = proc_status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
    bounding
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & (1 << CAP_SYS_TIME) != 0)
}

/// Why the clock cannot be relied on; `None` when it is synchronised: with one of the
/// cluster's time servers, where it has any, else with the other nodes.
pub async fn check_clock(has_servers: bool) -> Result<Option<String>> {
    let text = run_program(&["chronyc", "-c", "-n", "tracking"]).await?;
    Ok(read_tracking(&text, has_servers))
}

/// From here on a stratum tells of nodes that keep together without any server (`local
/// stratum 10 orphan` in chrony.conf).
const ORPHANS: u32 = 10;

/// One line of comma-separated values; the third is the stratum, the fifth the offset in
/// seconds, the last the leap status.
fn read_tracking(text: &str, has_servers: bool) -> Option<String> {
    let fields: Vec<&str> = text.trim().split(',').collect();
    match fields.last() {
        Some(&"Not synchronised") => {
            Some("the clock is not synchronised: chrony reaches no time server".to_string())
        }
        Some(_) if fields.len() >= 14 => {
            if has_servers && fields[2].parse().is_ok_and(|stratum: u32| stratum >= ORPHANS) {
                return Some("no time server of the cluster file answers".to_string());
            }
            let offset: f64 = fields[4].parse().unwrap_or(0.0);
            (offset.abs() > 0.5).then(|| format!("the clock is off by {offset:.1} s"))
        }
        _ => Some("chrony does not say whether the clock is right".to_string()),
    }
}

/// Whether an interface has this address, from `/proc/net/fib_trie`.
pub fn has_address(fib_trie: &str, address: std::net::Ipv4Addr) -> bool {
    let wanted = format!("|-- {address}");
    let mut lines = fib_trie.lines().peekable();
    while let Some(line) = lines.next() {
        let is_local = |next: &&str| next.contains("/32 host LOCAL");
        if line.trim() == wanted && lines.peek().is_some_and(is_local) {
            return true;
        }
    }
    false
}

/// The text of a small file of the kernel.
pub fn read_kernel_file(path: &Path) -> Result<String> {
    use std::io::Read;
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(4 << 20).read_to_string(&mut text))
        .with_context(|| format!("reading {}", path.display()))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_does_not_own_the_clock() {
        assert!(owns_clock("Name:\tx\nCapBnd:\t000001ffffffffff\n"));
        assert!(!owns_clock("Name:\tx\nCapBnd:\t00000000fdecafff\n"));
        assert!(!owns_clock(""));
    }

    #[test]
    fn chronys_words_are_understood() {
        let tracking = |offset: &str, leap: &str| {
            format!(
                "C0A80001,192.168.0.1,3,1700000000.0,{offset},0.0,0.0,1,0,0.1,0.0,0.0,64,{leap}\n"
            )
        };
        assert_eq!(read_tracking(&tracking("0.0001", "Normal"), true), None);
        assert!(read_tracking(&tracking("2.5", "Normal"), true).unwrap().contains("2.5 s"));
        assert!(read_tracking(&tracking("0", "Not synchronised"), false).is_some());
        assert!(read_tracking("", false).is_some());
        let orphan = "7F7F0101,,10,1700000000.0,0.0,0.0,0.0,1,0,0.1,0.0,0.0,64,Normal";
        assert_eq!(read_tracking(orphan, false), None);
        assert!(read_tracking(orphan, true).unwrap().contains("no time server"));
    }

    #[test]
    fn a_local_address_is_told_from_a_route() {
        let trie = "Main:\n  +-- 10.0.0.0/24 2 0 2\n     |-- 10.0.0.0\n        /24 link UNICAST\n     |-- 10.0.0.7\n        /32 host LOCAL\n";
        assert!(has_address(trie, [10, 0, 0, 7].into()));
        assert!(!has_address(trie, [10, 0, 0, 0].into()));
        assert!(!has_address(trie, [10, 0, 0, 70].into()));
    }

    #[test]
    fn the_disk_is_measured() {
        let folder = tempfile::tempdir().unwrap();
        assert!(measure_fsync(folder.path()).unwrap() > Duration::ZERO);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(check_fsync(Duration::from_millis(30)).unwrap().contains("30.0 ms"));
        assert!(check_disk(folder.path()).is_ok());
    }
}
