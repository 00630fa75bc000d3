//! The dates of Release files: RFC 822, always UTC (`Sat, 12 Sep 2026 07:55:41 UTC`), as
//! the Debian repository format prescribes (wiki: DebianRepository/Format).

const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// The last second of the year 9999.
const LAST: u64 = 253_402_300_799;

/// Seconds since 1970, or nothing when the text is not a date of the years 1970 to 9999
/// in UTC. The weekday may be missing, and is not held against the date.
pub fn parse_date(text: &str) -> Option<u64> {
    let text = match text.trim().split_once(',') {
        Some((day, rest)) => DAYS.contains(&day).then_some(rest)?,
        None => text,
    };
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let [day, month, year, time, zone] = words.try_into().ok()?;
    if !["UTC", "GMT", "Z", "+0000", "-0000"].contains(&zone) {
        return None;
    }
    let year = parse_number(year, 4..=4)?;
    let month = MONTHS.iter().position(|name| *name == month)? as u64;
    let day = parse_number(day, 1..=2)?;
    if year < 1970 || day < 1 || day > count_days(year, month) {
        return None;
    }
    let days = count_days_before(year) + (0..month).map(|m| count_days(year, m)).sum::<u64>();
    let clock: Vec<&str> = time.split(':').collect();
    let [hour, minute, second] = clock.try_into().ok()?;
    let (hour, minute, second) =
        (parse_number(hour, 1..=2)?, parse_number(minute, 2..=2)?, parse_number(second, 2..=2)?);
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    Some((days + day - 1) * 86_400 + hour * 3_600 + minute * 60 + second)
}

/// The date as a Release file writes it; what lies after the year 9999 is its last second.
pub fn format_date(seconds: u64) -> String {
    let seconds = seconds.min(LAST);
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // An estimate that is never too late, and at most some years early.
    let mut year = 1970 + days / 366;
    while count_days_before(year + 1) <= days {
        year += 1;
    }
    let mut day = days - count_days_before(year);
    let mut month = 0;
    while day >= count_days(year, month) {
        day -= count_days(year, month);
        month += 1;
    }
    format!(
        "{}, {:02} {} {year} {:02}:{:02}:{:02} UTC",
        DAYS[(days % 7) as usize],
        day + 1,
        MONTHS[month as usize],
        rest / 3_600,
        rest / 60 % 60,
        rest % 60
    )
}

fn parse_number(text: &str, digits: std::ops::RangeInclusive<usize>) -> Option<u64> {
    let plain = digits.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok())?
}

/// Days of a month; January is 0.
fn count_days(year: u64, month: u64) -> u64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

/// Days from 1970 to the first of January.
fn count_days_before(year: u64) -> u64 {
    let leaps = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Command;
    use proptest::prelude::*;

    #[test]
    fn known_dates_are_read() {
        assert_eq!(parse_date("Thu, 01 Jan 1970 00:00:00 UTC"), Some(0));
        assert_eq!(parse_date("Sat, 12 Sep 2026 07:55:41 UTC"), Some(1_789_199_741));
        assert_eq!(parse_date("Sat, 12 Sep 2026  7:55:41 +0000"), Some(1_789_199_741));
        assert_eq!(parse_date("29 Feb 2024 12:00:00 GMT"), Some(1_709_208_000));
        assert_eq!(format_date(LAST), "Fri, 31 Dec 9999 23:59:59 UTC");
    }

    #[test]
    fn what_is_no_date_in_utc_is_refused() {
        for text in [
            "",
            "Sat, 12 Sep 2026 07:55:41",
            "Sat, 12 Sep 2026 07:55:41 CET",
            "Sat, 12 Sep 2026 07:55:41 +0100",
            "Sat, 12 Sep 2026 07:55:41 UTC UTC",
            "Xyz, 12 Sep 2026 07:55:41 UTC",
            "Sat, 00 Sep 2026 07:55:41 UTC",
            "Sat, 31 Sep 2026 07:55:41 UTC",
            "29 Feb 2023 00:00:00 UTC",
            "29 Feb 2100 00:00:00 UTC",
            "12 Sep 1969 07:55:41 UTC",
            "12 Sep 26 07:55:41 UTC",
            "12 Sep 99999 07:55:41 UTC",
            "12 Sep 2026 24:00:00 UTC",
            "12 Sep 2026 07:60:00 UTC",
            "12 Sep 2026 +7:00:00 UTC",
            "12 Sep 2026 07:00 UTC",
        ] {
            assert_eq!(parse_date(text), None, "{text}");
        }
    }

    #[test]
    fn dates_agree_with_those_of_date_1() {
        let instants: Vec<u64> = (0..200).map(|i| i * 1_234_567_891 % LAST).collect();
        let input: String = instants.iter().map(|instant| format!("@{instant}\n")).collect();
        let output = Command::new("date")
            .args(["-u", "-f", "-", "+%a, %d %b %Y %H:%M:%S UTC"])
            .env("LC_ALL", "C")
            .input(input)
            .run();
        let Ok(output) = output else {
            eprintln!("skipped: no date(1) that reads -f");
            return;
        };
        let expected = String::from_utf8(output.stdout).unwrap();
        let found: Vec<String> = instants.iter().map(|instant| format_date(*instant)).collect();
        assert_eq!(expected.lines().collect::<Vec<_>>(), found);
    }

    proptest! {
        #[test]
        fn a_date_survives_its_text(seconds in 0..=LAST) {
            prop_assert_eq!(parse_date(&format_date(seconds)), Some(seconds));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,60}") {
            let _ = parse_date(&text);
        }

        #[test]
        fn a_nearly_right_date_never_panics(
            text in "([A-Z][a-z]{2}, )?[0-9]{0,3} (Jan|Feb|Dec|Xxx) [0-9]{0,20} [0-9:]{0,12} (UTC|GMT|\\+0000)"
        ) {
            let _ = parse_date(&text);
        }
    }
}
