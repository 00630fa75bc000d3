use super::*;
use proptest::prelude::*;

/// A raw entry: header with a right checksum, content, padding.
pub(crate) fn raw_entry(path: &[u8], kind: u8, link: &[u8], content: &[u8]) -> Vec<u8> {
    edit_entry(path, kind, link, content, |_| {})
}

/// The same, with a header that `edit` changes before the checksum is made.
pub(crate) fn edit_entry(
    path: &[u8],
    kind: u8,
    link: &[u8],
    content: &[u8],
    edit: impl FnOnce(&mut tar::Header),
) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..path.len()].copy_from_slice(path);
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
    header.as_old_mut().linkflag = [kind];
    header.set_mode(if kind == b'5' { 0o755 } else { 0o644 });
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_700_000_000);
    header.set_size(content.len() as u64);
    edit(&mut header);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

pub(crate) fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let digits = if rest + 1 < 10 {
            1
        } else if rest + 2 < 100 {
            2
        } else {
            3
        };
        body.extend_from_slice(format!("{} {key}=", rest + digits).as_bytes());
        body.extend_from_slice(value);
        body.push(b'\n');
    }
    raw_entry(b"pax", b'x', b"", &body)
}

fn read(parts: &[Vec<u8>]) -> Result<Vec<(Entry, Vec<u8>)>> {
    let bytes = [&parts.concat()[..], &[0; 1024]].concat();
    let mut entries = Vec::new();
    read_entries(tar::Archive::new(&bytes[..]), |entry, content| {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes)?;
        entries.push((entry.clone(), bytes));
        Ok(())
    })?;
    Ok(entries)
}

fn refuse(parts: &[Vec<u8>], why: &str) {
    let error = format!("{:#}", read(parts).unwrap_err());
    assert!(error.contains(why), "{error}");
}

#[test]
fn long_names_of_both_kinds_reach_the_entry_after_them() {
    let long = [b"./", &b"d/".repeat(60)[..], b"name"].concat();
    let gnu = [&long[..], b"\0"].concat();
    let entries = read(&[
        raw_entry(b"././@LongLink", b'L', b"", &gnu),
        raw_entry(b"cut", b'0', b"", b"one"),
        pax(&[("path", &long[2..]), ("mtime", b"12.5"), ("uid", b"70000")]),
        raw_entry(b"cut", b'0', b"", b"two"),
        raw_entry(b"./plain", b'2', b"target", b""),
    ])
    .unwrap();
    assert_eq!(entries[0].0.path, long[2..]);
    assert_eq!(entries[1].0.path, long[2..]);
    assert_eq!((entries[1].0.mtime, entries[1].0.uid), (12, 70000));
    assert_eq!((&entries[0].1[..], &entries[1].1[..]), (&b"one"[..], &b"two"[..]));
    assert_eq!(entries[2].0.path, b"plain");
    assert_eq!(entries[2].0.kind, Kind::Symlink(b"target".to_vec()));
}

#[test]
fn paths_that_leave_the_root_are_refused() {
    refuse(&[raw_entry(b"../x", b'0', b"", b"")], "`..`");
    refuse(&[raw_entry(b"a/../../x", b'0', b"", b"")], "`..`");
    refuse(&[raw_entry(b"/etc/x", b'0', b"", b"")], "absolute");
    refuse(&[pax(&[("path", b"/x")]), raw_entry(b"y", b'0', b"", b"")], "absolute");
    refuse(&[pax(&[("path", b"x\0y")]), raw_entry(b"y", b'0', b"", b"")], "NUL");
    refuse(&[raw_entry(b"x\ny", b'0', b"", b"")], "line break");
    refuse(&[raw_entry(b"x", b'1', b"../y", b"")], "`..`");
    refuse(&[raw_entry(b"x", b'1', b"/etc/shadow", b"")], "absolute");
}

#[test]
fn a_huge_name_is_refused_before_it_is_read() {
    let huge = edit_entry(b"x", b'L', b"", b"", |header| header.set_size(1 << 40));
    let bytes = std::io::Read::chain(&huge[..], std::io::repeat(b'a').take(1 << 30));
    let error = read_entries(tar::Archive::new(bytes), |_, _| Ok(())).unwrap_err();
    assert!(error.to_string().contains("more than"), "{error}");
    refuse(
        &[raw_entry(b"x", b'L', b"", &[b'a'; 5000]), raw_entry(b"x", b'0', b"", b"")],
        "too long",
    );
    refuse(
        &[raw_entry(b"x", b'L', b"", &[b'a'; 300]), raw_entry(b"x", b'0', b"", b"")],
        "too long",
    );
}

#[test]
fn negative_numbers_are_refused() {
    let negative = |field: fn(&mut tar::OldHeader) -> &mut [u8]| {
        edit_entry(b"x", b'0', b"", b"", |header| field(header.as_old_mut()).fill(0xff))
    };
    refuse(&[negative(|old| &mut old.uid)], "uid");
    refuse(&[negative(|old| &mut old.gid)], "gid");
    refuse(&[negative(|old| &mut old.mtime)], "mtime");
    refuse(&[negative(|old| &mut old.mode)], "mode");
    assert!(read(&[negative(|old| &mut old.size)]).is_err());
    refuse(&[pax(&[("uid", b"-1")]), raw_entry(b"x", b'0', b"", b"")], "uid -1");
    refuse(&[pax(&[("gid", b"4294967295")]), raw_entry(b"x", b'0', b"", b"")], "too large");
}

#[test]
fn a_pax_size_that_lies_is_refused() {
    refuse(&[pax(&[("size", b"0")]), raw_entry(b"x", b'0', b"", b"abc")], "different sizes");
    refuse(&[pax(&[("size", b"512")]), raw_entry(b"x", b'0', b"", b"")], "different sizes");
    read(&[pax(&[("size", b"3")]), raw_entry(b"x", b'0', b"", b"abc")]).unwrap();
    refuse(&[raw_entry(b"x", b'5', b"", b"abc")], "content");
    refuse(
        &[raw_entry(b"x", b'x', b"", b"99 path=x\n"), raw_entry(b"x", b'0', b"", b"")],
        "record",
    );
    refuse(&[raw_entry(b"x", b'x', b"", b"3 =\n"), raw_entry(b"x", b'0', b"", b"")], "record");
    refuse(
        &[raw_entry(b"x", b'g', b"", b"10 path=x\n"), raw_entry(b"x", b'0', b"", b"")],
        "global",
    );
    refuse(&[raw_entry(b"x", b'x', b"", b"10 path=x\n")], "not there");
}

#[test]
fn a_damaged_or_cut_archive_is_refused() {
    let mut entry = raw_entry(b"x", b'0', b"", b"abc");
    entry[0] ^= 1;
    refuse(&[entry], "checksum");
    let whole = raw_entry(b"x", b'0', b"", &[1; 2000]);
    for cut in [100, 512, 600, 2500] {
        assert!(read_entries(tar::Archive::new(&whole[..cut]), |_, _| Ok(())).is_err(), "{cut}");
    }
    refuse(&[raw_entry(b"x", b'S', b"", b"")], "unknown type");
    refuse(&[raw_entry(b".", b'0', b"", b"")], "no directory");
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..3000), fix in any::<bool>()) {
        if fix && bytes.len() >= 512 {
            let mut block = [0; 512];
            block.copy_from_slice(&bytes[..512]);
            let header = tar::Header::from_byte_slice(&block).clone();
            let mut header = header;
            header.set_cksum();
            bytes[..512].copy_from_slice(header.as_bytes());
        }
        let _ = read_entries(tar::Archive::new(&bytes[..]), |_, _| Ok(()));
    }

    #[test]
    fn a_normal_path_has_no_dots_and_stays_what_it_is(path in "[a./]{0,20}") {
        if let Ok(normal) = normalise_path(path.as_bytes()) {
            prop_assert!(!normal.split(|b| *b == b'/').any(|part| part == b"." || part == b".."));
            prop_assert_eq!(normalise_path(&normal).unwrap(), normal);
        }
    }
}
