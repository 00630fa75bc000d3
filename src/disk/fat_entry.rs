//! Entries of a FAT folder, the same on every FAT: names short and long, times, places.
//!
//! Source: Microsoft's FAT32 File System Specification 1.03.

use std::collections::BTreeSet;

/// Bytes of an entry.
pub(super) const ENTRY: usize = 32;

pub(super) const FOLDER: u8 = 0x10;
pub(super) const ARCHIVE: u8 = 0x20;
pub(super) const VOLUME_LABEL: u8 = 0x08;
const LONG_NAME: u8 = 0x0f;

/// The short entry of a file or folder whose content begins at the cluster `first`.
pub(super) fn encode_entry(
    name: &[u8; 11],
    kind: u8,
    first: u32,
    size: u32,
    (date, time): (u16, u16),
) -> [u8; ENTRY] {
    let mut entry = [0; ENTRY];
    entry[..11].copy_from_slice(name);
    entry[11] = kind;
    // Made, last read, last written.
    for (at, value) in [(14, time), (16, date), (18, date), (22, time), (24, date)] {
        entry[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    entry[20..22].copy_from_slice(&first.to_le_bytes()[2..]);
    entry[26..28].copy_from_slice(&first.to_le_bytes()[..2]);
    entry[28..].copy_from_slice(&size.to_le_bytes());
    entry
}

/// The entries before the short one that carry the long name, its end first.
pub(super) fn encode_long_name(name: &str, short: &[u8; 11]) -> Vec<u8> {
    let sum = short.iter().fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
    let units: Vec<u16> = name.encode_utf16().collect();
    let count = units.len().div_ceil(13);
    let mut bytes = Vec::new();
    for (i, piece) in units.chunks(13).enumerate().rev() {
        let mut entry = [0xff; ENTRY];
        entry[0] = (i + 1) as u8 | if i + 1 == count { 0x40 } else { 0 };
        entry[11..14].copy_from_slice(&[LONG_NAME, 0, sum]);
        entry[26..28].fill(0);
        let places = (1..11).chain(14..26).chain(28..32).step_by(2);
        for (unit, place) in piece.iter().chain([&0]).zip(places) {
            entry[place..place + 2].copy_from_slice(&unit.to_le_bytes());
        }
        bytes.extend(entry);
    }
    bytes
}

pub(super) fn count_entries(name: &str) -> usize {
    let long = if is_short(name) { 0 } else { name.encode_utf16().count().div_ceil(13) };
    1 + long
}

/// Whether the name needs no long one: at most eight and three capitals or digits.
pub(super) fn is_short(name: &str) -> bool {
    let (stem, extension) = name.split_once('.').unwrap_or((name, "-"));
    let fits = |part: &str, most: usize| {
        (1..=most).contains(&part.len())
            && part.bytes().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == b'-')
    };
    fits(stem, 8) && fits(extension, 3)
}

/// The name in its short form, made unlike all `taken` by a number where it was cut.
pub(super) fn shorten_name(name: &str, taken: &mut BTreeSet<[u8; 11]>) -> [u8; 11] {
    let (stem, extension) = match name.rsplit_once('.') {
        Some((stem, extension)) if !stem.is_empty() => (stem, extension),
        _ => (name, ""),
    };
    let reduce = |part: &str, most: usize| -> String {
        let kept = part.chars().filter(|c| !matches!(c, '.' | ' ')).take(most);
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        kept.map(|c| if allowed(c) { c.to_ascii_uppercase() } else { '_' }).collect()
    };
    let build = |stem: &str| {
        let mut short = [b' '; 11];
        let extension = reduce(extension, 3);
        short[..stem.len()].copy_from_slice(stem.as_bytes());
        short[8..8 + extension.len()].copy_from_slice(extension.as_bytes());
        short
    };
    let mut short = build(&reduce(stem, 8));
    let mut number = 1;
    while (number == 1 && !is_short(name)) || taken.contains(&short) {
        let tail = format!("~{number}");
        short = build(&format!("{}{tail}", reduce(stem, 8 - tail.len())));
        number += 1;
    }
    taken.insert(short);
    short
}

/// Date and time of a folder entry. FAT knows the years 1980 to 2107; what lies outside becomes the nearest moment inside.
pub(super) fn convert_to_dos(epoch: u64) -> (u16, u16) {
    const FIRST: u64 = 315_532_800; // 1980-01-01
    const LAST: u64 = 4_354_819_199; // 2107-12-31 23:59:59
    let epoch = epoch.clamp(FIRST, LAST);
    let (mut days, seconds) = ((epoch - FIRST) / 86_400, epoch % 86_400);
    let leap = |year: u16| year.is_multiple_of(4) && year != 2100;
    let mut year = 1980;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let date = (year - 1980) << 9 | month << 5 | (days as u16 + 1);
    let time = (seconds / 3600) << 11 | (seconds / 60 % 60) << 5 | (seconds % 60 / 2);
    (date, time as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_unlike_each_other() {
        let mut taken = BTreeSet::new();
        let mut shorten = |name| String::from_utf8(shorten_name(name, &mut taken).into()).unwrap();
        assert_eq!(shorten("BOOTX64.EFI"), "BOOTX64 EFI");
        assert_eq!(shorten("bootx64.efi"), "BOOTX6~1EFI");
        assert_eq!(shorten("stanchion_1.0+3-0.efi"), "STANCH~1EFI");
        for i in 2..=12 {
            let expected = if i < 10 { format!("STANCH~{i}EFI") } else { format!("STANC~{i}EFI") };
            assert_eq!(shorten("stanchion_1.0+3-0.efi"), expected);
        }
        assert_eq!(shorten("é.x"), "_~1     X  ");
        assert_eq!(shorten(".profile"), "PROFIL~1   ");
    }

    #[test]
    fn times_are_those_of_the_epoch() {
        let show = |epoch| {
            let (date, time) = convert_to_dos(epoch);
            let (year, month, day) = (1980 + (date >> 9), date >> 5 & 15, date & 31);
            let (hour, minute, second) = (time >> 11, time >> 5 & 63, (time & 31) * 2);
            format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
        };
        assert_eq!(show(0), "1980-01-01 00:00:00");
        assert_eq!(show(1_700_000_000), "2023-11-14 22:13:20");
        assert_eq!(show(1_709_210_096), "2024-02-29 12:34:56");
        assert_eq!(show(1_735_689_599), "2024-12-31 23:59:58");
        assert_eq!(show(4_107_542_400), "2100-03-01 00:00:00");
        assert_eq!(show(u64::MAX), "2107-12-31 23:59:58");
    }
}
