//! `patronictl pause`: since when, and whether it was forgotten. Nobody takes over meanwhile.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;

use super::etcd::Etcd;

/// A pause for maintenance is over by then.
pub const FORGOTTEN: Duration = Duration::from_secs(4 * 3600);

/// Say what a pause means after so long.
pub fn describe_pause(paused: Duration) -> String {
    let minutes = paused.as_secs() / 60;
    let long = match (minutes / 60, minutes % 60) {
        (0, minutes) => format!("{minutes} min"),
        (hours, minutes) => format!("{hours} h {minutes} min"),
    };
    if paused >= FORGOTTEN {
        format!(
            "ALARM: Patroni has been paused for {long}, longer than {} h, and nobody takes over: \
             was it forgotten? (`patronictl resume`)",
            FORGOTTEN.as_secs() / 3600
        )
    } else {
        format!("Patroni has been paused for {long}: nobody takes over (`patronictl resume`)")
    }
}

/// Since when Patroni is paused, written down in etcd so that no agent's restart forgets it.
#[derive(Debug, Default)]
pub struct Pause {
    /// Seconds since 1970; `None` when it is not paused.
    since: Option<u64>,
    /// What an earlier pause left was looked for.
    cleared: bool,
}

impl Pause {
    /// Take what Patroni says now; for how long it has been paused.
    pub async fn track(&mut self, etcd: &Etcd, key: &str, paused: bool) -> Option<Duration> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        // What fails is done at the next look.
        if paused && self.since.is_none() {
            self.since = note(etcd, key, now).await.ok();
            self.cleared = false;
        } else if !paused && !self.cleared {
            self.since = None;
            self.cleared = etcd.delete(key).await.is_ok();
        }
        paused.then(|| measure(self.since, now))
    }
}

/// Whoever sees it first notes it; what is on record, or `now`.
async fn note(etcd: &Etcd, key: &str, now: u64) -> Result<u64> {
    etcd.create(key, &now.to_string(), None).await?;
    let noted = etcd.get(key).await?.and_then(|entry| entry.value.parse().ok());
    Ok(noted.unwrap_or(now))
}

/// A record from the future, by another's clock, counts as new.
fn measure(since: Option<u64>, now: u64) -> Duration {
    Duration::from_secs(now.saturating_sub(since.unwrap_or(now)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forgotten_pause_is_an_alarm() {
        let hours = |hours: u64| Duration::from_secs(hours * 3600 + 720);
        assert!(describe_pause(hours(0)).starts_with("Patroni has been paused for 12 min"));
        assert!(describe_pause(hours(3)).contains("paused for 3 h 12 min: nobody"));
        let alarm = describe_pause(hours(5));
        assert!(alarm.starts_with("ALARM: ") && alarm.contains("5 h 12 min"), "{alarm}");
        assert!(describe_pause(FORGOTTEN).starts_with("ALARM: "));
    }

    #[test]
    fn a_pause_lasts_since_it_was_noted() {
        assert_eq!(measure(Some(100), 160), Duration::from_secs(60));
        assert_eq!(measure(Some(200), 160), Duration::ZERO);
        assert_eq!(measure(None, 160), Duration::ZERO);
    }
}
