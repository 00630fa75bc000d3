//! When something answered, and for how long it did not.

use std::time::{Duration, Instant};

/// A pause between two answers that counts as a loss of service. Clients try several times
/// a second.
const GAP: Duration = Duration::from_secs(1);

/// Moments at which a service answered, in order.
#[derive(Debug, Clone, Default)]
pub struct Timeline {
    answers: Vec<Instant>,
}

impl Timeline {
    /// Add an answer; not earlier than the last.
    pub fn push(&mut self, at: Instant) {
        debug_assert!(self.answers.last().is_none_or(|last| *last <= at));
        self.answers.push(at);
    }

    pub fn count(&self) -> usize {
        self.answers.len()
    }

    pub fn last(&self) -> Option<Instant> {
        self.answers.last().copied()
    }

    /// From an event to the first answer after the last pause that followed it: zero when
    /// nobody noticed, `None` when there is still no answer at `now`.
    pub fn find_return(&self, event: Instant, now: Instant) -> Option<Duration> {
        let after = self.answers.iter().copied().filter(|at| *at > event);
        let mut before = event;
        let mut back = Duration::ZERO;
        for at in after {
            if at - before >= GAP {
                back = at - event;
            }
            before = at;
        }
        (now.saturating_duration_since(before) < GAP).then_some(back)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(start: Instant, millis: &[u64]) -> Timeline {
        let mut timeline = Timeline::default();
        millis.iter().for_each(|at| timeline.push(start + Duration::from_millis(*at)));
        timeline
    }

    #[test]
    fn the_last_pause_counts() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let flapping = timeline(start, &[0, 100, 3000, 3100, 5200, 5300]);
        assert_eq!(flapping.find_return(at(150), at(5400)), Some(Duration::from_millis(5050)));
        // Not noticed, not back, and never there.
        assert_eq!(flapping.find_return(at(5250), at(5400)), Some(Duration::ZERO));
        assert_eq!(flapping.find_return(at(150), at(9000)), None);
        assert_eq!(Timeline::default().find_return(start, at(2000)), None);
    }
}
