//! What the tests of a cluster measure, against what it was to be.

use std::time::{Duration, Instant};

use stanchion::lab::ledger::Write;
use stanchion::lab::timeline::Timeline;

/// One line of the table: what happened, and after how many seconds each service was back.
pub struct Line {
    pub scenario: &'static str,
    pub writes: Option<f64>,
    pub vip: Option<f64>,
    pub redis: Option<f64>,
    pub lost: usize,
}

/// Bounds in seconds; those that were missed are told together at the end.
#[derive(Default)]
pub struct Report {
    misses: Vec<String>,
}

impl Report {
    pub fn check(&mut self, scenario: &str, what: &str, found: Option<f64>, bound: f64) {
        match found {
            Some(found) if found <= bound => {}
            Some(found) => self.misses.push(format!("{scenario}: {what} {found:.1} s > {bound} s")),
            None => self.misses.push(format!("{scenario}: {what} never came back")),
        }
    }

    /// Show a line as soon as it is known.
    pub fn push(&mut self, line: Line) {
        let show = |seconds: Option<f64>| match seconds {
            Some(seconds) => format!("{seconds:.1} s"),
            None => "-".to_string(),
        };
        let Line { scenario, writes, vip, redis, lost } = line;
        let (writes, vip, redis) = (show(writes), show(vip), show(redis));
        eprintln!("{scenario}: writes {writes}, VIP {vip}, Redis {redis}, lost {lost}");
        if lost > 0 {
            self.misses.push(format!("{scenario}: {lost} acknowledged writes were lost"));
        }
    }

    pub fn finish(self) {
        assert!(self.misses.is_empty(), "missed:\n{}", self.misses.join("\n"));
    }
}

pub fn find_return(timeline: &Timeline, event: Instant) -> Option<f64> {
    timeline.find_return(event, Instant::now()).map(|back| back.as_secs_f64())
}

/// Seconds between two acknowledgements, at most, from the last one before the event to `end`,
/// when nobody waited any longer.
pub fn find_longest_pause(writes: &[Write], event: Instant, end: Instant) -> f64 {
    let around = event - Duration::from_secs(1);
    let times = writes.iter().map(|write| write.at).filter(|at| *at > around);
    let times: Vec<Instant> = times.chain([end]).collect();
    let pauses = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64());
    pauses.fold(0.0, f64::max)
}
