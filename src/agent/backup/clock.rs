//! Times as people write them, in UTC, and seconds since 1970.

use crate::error::UserError;

/// `2026-11-21 18:30:05+00`, as PostgreSQL reads it.
pub fn format_utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = find_date(days as i64);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}+00",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

/// Read `2026-11-21T18:30:05Z`: `T` or a blank between, a fraction if wanted, and a zone in
/// any case: `Z`, `+02:00`, `-05`. Seconds since 1970, and microseconds beyond.
///
/// # Errors
/// A [`UserError`] when it is no such time; one without a zone could mean two.
pub fn parse_time(text: &str) -> Result<(u64, u32), UserError> {
    let fault = |why: &str| {
        let shown: String = text.escape_debug().take(60).collect();
        UserError::new(format!("`{shown}` is no time"))
            .why(why)
            .help("write it like 2026-11-21T18:30:05Z, or with +02:00 for Z")
    };
    let bytes = text.as_bytes();
    let is_shaped = text.is_ascii()
        && bytes.len() >= 19
        && bytes[4] == b'-'
        && bytes[7] == b'-'
        && matches!(bytes[10], b'T' | b't' | b' ')
        && bytes[13] == b':'
        && bytes[16] == b':';
    if !is_shaped {
        return Err(fault("it has no date and time with seconds"));
    }
    let number = |from: usize, to: usize| -> Option<i64> {
        let digits = &text[from..to];
        digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())?
    };
    let parts = [(0, 4), (5, 7), (8, 10), (11, 13), (14, 16), (17, 19)];
    let read: Option<Vec<i64>> = parts.iter().map(|(from, to)| number(*from, *to)).collect();
    let Some([year, month, day, hour, minute, second]) =
        read.and_then(|read| <[i64; 6]>::try_from(read).ok())
    else {
        return Err(fault("it has something else where digits belong"));
    };
    let days = count_days(year, month, day);
    let is_real = (1..=12).contains(&month)
        && find_date(days) == (year, month, day)
        && hour < 24
        && minute < 60
        && second < 60;
    if !is_real || !(1970..=9999).contains(&year) {
        return Err(fault("there is no such day or hour"));
    }
    let (micros, zone) = read_fraction(&text[19..]).ok_or_else(|| fault("a bad fraction"))?;
    let offset = read_zone(zone)
        .ok_or_else(|| fault(if zone.is_empty() { "it has no zone" } else { "a bad zone" }))?;
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second - offset;
    Ok((u64::try_from(seconds).map_err(|_| fault("it is before 1970"))?, micros))
}

/// `.25Z` is 250000 microseconds, and `Z`.
fn read_fraction(text: &str) -> Option<(u32, &str)> {
    let Some(rest) = text.strip_prefix('.') else { return Some((0, text)) };
    let length = rest.bytes().take_while(u8::is_ascii_digit).count();
    if !(1..=6).contains(&length) {
        return None;
    }
    let number: u32 = rest[..length].parse().ok()?;
    Some((number * 10_u32.pow(6 - length as u32), &rest[length..]))
}

/// Seconds east of UTC.
fn read_zone(text: &str) -> Option<i64> {
    if matches!(text, "Z" | "z") {
        return Some(0);
    }
    let (sign, rest) = match text.as_bytes().first()? {
        b'+' => (1, &text[1..]),
        b'-' => (-1, &text[1..]),
        _ => return None,
    };
    let (hours, minutes) = match rest.len() {
        2 => (rest, "0"),
        4 => rest.split_at(2),
        5 => rest.split_once(':')?,
        _ => return None,
    };
    let read = |text: &str, most: i64| -> Option<i64> {
        let is_number = text.bytes().all(|b| b.is_ascii_digit());
        is_number.then(|| text.parse().ok())?.filter(|number| *number <= most)
    };
    Some(sign * (read(hours, 15)? * 3600 + read(minutes, 59)? * 60))
}

/// Days since 1970 of a date of the Gregorian calendar, counted in eras of 400 years that
/// begin in March.
fn count_days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

fn find_date(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_with_their_zone() {
        let read = |text: &str| parse_time(text).unwrap();
        assert_eq!(read("1970-01-01T00:00:00Z"), (0, 0));
        assert_eq!(read("2026-11-21T18:30:05Z"), (1_795_285_805, 0));
        assert_eq!(read("2026-11-21 20:30:05.25+02:00"), (1_795_285_805, 250_000));
        assert_eq!(read("2026-11-21T13:30:05-0500").0, 1_795_285_805);
        assert_eq!(read("2024-02-29T00:00:00+00").0, 1_709_164_800);
        assert_eq!(format_utc(1_795_285_805), "2026-11-21 18:30:05+00");
        assert_eq!(format_utc(1_709_164_800), "2024-02-29 00:00:00+00");
    }

    #[test]
    fn what_is_no_time_or_two_is_refused() {
        for text in [
            "",
            "now",
            "2026-11-21",
            "2026-11-21T18:30:05",
            "2026-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-00-01T00:00:00Z",
            "2026-11-21T24:00:00Z",
            "2026-11-21T18:30:05.Z",
            "2026-11-21T18:30:05+99",
            "2026-11-21T18:30:05 CET",
            "2026-11-21T18:30:05'Z",
            "1969-12-31T23:59:59Z",
            "2026-11-21T１8:30:05Z",
            "+026-11-21T18:30:05Z",
        ] {
            assert!(parse_time(text).is_err(), "{text}");
        }
        assert!(parse_time("2026-11-21T18:30:05").unwrap_err().to_string().contains("no zone"));
    }
}
