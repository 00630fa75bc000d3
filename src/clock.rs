//! The machine's clock.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

/// Seconds since 1970, UTC.
///
/// # Errors
/// When the clock stands before 1970.
pub fn read_clock() -> Result<u64> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map(|since| since.as_secs()).context("reading a clock that stands before 1970")
}
