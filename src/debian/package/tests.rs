use std::io::Write;

use super::*;
use crate::debian::archive::tests::{edit_entry, raw_entry};
use crate::error::exit_code;

pub(crate) fn compress(bytes: &[u8], suffix: &str) -> Vec<u8> {
    match suffix {
        "" => bytes.to_vec(),
        ".gz" => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        ".xz" => {
            let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        ".zst" => zstd::encode_all(bytes, 1).unwrap(),
        _ => unreachable!(),
    }
}

fn ar_member(name: &str, content: &[u8]) -> Vec<u8> {
    let header =
        format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100644, content.len());
    let mut bytes = header.into_bytes();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(2), b'\n');
    bytes
}

/// A .deb with these entries (see `raw_entry`), both archives compressed the same way.
pub(crate) fn make_deb(control: &[Vec<u8>], data: &[Vec<u8>], suffix: &str) -> Vec<u8> {
    let tar = |entries: &[Vec<u8>]| compress(&[&entries.concat()[..], &[0; 1024]].concat(), suffix);
    [
        b"!<arch>\n".to_vec(),
        ar_member("debian-binary", b"2.0\n"),
        ar_member("_odd", b"odd"),
        ar_member(&format!("control.tar{suffix}"), &tar(control)),
        ar_member(&format!("data.tar{suffix}"), &tar(data)),
    ]
    .concat()
}

fn control() -> Vec<u8> {
    raw_entry(b"./control", b'0', b"", b"Package: p\nVersion: 1\nArchitecture: all\n")
}

fn read_all(deb: &[u8], limit: u64) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let package = open_package(deb, "p", limit)?;
    let mut files = Vec::new();
    archive::read_entries(package.into_data(), |entry, content| {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes)?;
        files.push((entry.path.clone(), bytes));
        Ok(())
    })
    .map_err(lift_user_error)?;
    Ok(files)
}

fn refuse(deb: &[u8], why: &str) {
    let error = format!("{:#}", read_all(deb, 1 << 20).unwrap_err());
    assert!(error.contains(why), "{error}");
}

#[test]
fn every_compression_is_read() {
    for suffix in ["", ".gz", ".xz", ".zst"] {
        let script = edit_entry(b"./postinst", b'0', b"", b"#!/bin/sh\n", |h| h.set_mode(0o755));
        let data = [raw_entry(b"./", b'5', b"", b""), raw_entry(b"./x", b'0', b"", b"hello")];
        let deb = make_deb(&[raw_entry(b"./", b'5', b"", b""), control(), script], &data, suffix);
        let package = open_package(&deb[..], "p", 1 << 20).unwrap();
        assert_eq!(package.control["postinst"], (0o755, b"#!/bin/sh\n".to_vec()));
        let files = read_all(&deb, 1 << 20).unwrap();
        assert_eq!(files, [(b"".to_vec(), b"".to_vec()), (b"x".to_vec(), b"hello".to_vec())]);
    }
}

#[test]
fn a_bomb_is_refused_and_the_package_is_named() {
    for suffix in [".gz", ".xz", ".zst"] {
        let zeros = vec![0; 8 << 20];
        let deb = make_deb(&[control()], &[raw_entry(b"x", b'0', b"", &zeros)], suffix);
        assert!(deb.len() < 100_000);
        let error = read_all(&deb, 1 << 20).unwrap_err();
        assert!(error.to_string().contains("p unpacks to more than it may"), "{error}");
        assert_eq!(exit_code(&error), 2);
        read_all(&deb, 9 << 20).unwrap();
        // After the archive's end, where nothing but its checksum should be.
        let deb = make_deb(&[control()], &[vec![0; 1024], zeros], suffix);
        assert!(read_all(&deb, 1 << 20).is_err());
    }
    let many = raw_entry(b"junk", b'0', b"", &vec![0; 17 << 20]);
    let deb = make_deb(&[control(), many], &[], ".xz");
    assert!(open_package(&deb[..], "p", 1 << 30).is_err());
}

#[test]
fn a_package_cut_anywhere_is_refused() {
    for suffix in ["", ".gz", ".xz", ".zst"] {
        let noise: Vec<u8> =
            (0..5000u32).map(|n| (n.wrapping_mul(2654435761) >> 13) as u8).collect();
        let deb = make_deb(&[control()], &[raw_entry(b"x", b'0', b"", &noise)], suffix);
        // The last byte may be padding of the ar archive.
        for cut in (0..deb.len() - 1).step_by(61).chain([deb.len() - 4]) {
            assert!(read_all(&deb[..cut], 1 << 20).is_err(), "{suffix} {cut}");
        }
    }
}

#[test]
fn a_flipped_bit_is_noticed() {
    for suffix in [".gz", ".xz", ".zst"] {
        let deb = make_deb(&[control()], &[raw_entry(b"x", b'0', b"", &[7; 3000])], suffix);
        let good = read_all(&deb, 1 << 20).unwrap();
        let data = deb.windows(8).rposition(|window| window == b"data.tar").unwrap() + 60;
        for at in (data..deb.len() - 1).step_by(3) {
            let mut bad = deb.clone();
            bad[at] ^= 0x10;
            // zstd frames made here have no checksum; gzip's header has bits for nothing.
            match read_all(&bad, 1 << 20) {
                Ok(files) => {
                    assert!(suffix != ".xz" && (suffix == ".zst" || files == good), "{suffix} {at}")
                }
                Err(_) => continue,
            }
        }
    }
}

#[test]
fn what_is_no_package_is_refused() {
    refuse(b"", "first bytes");
    refuse(b"!<arch>\n", "debian-binary");
    refuse(b"PK\x03\x04aaaaaaaa", "not an ar");
    let other = [b"!<arch>\n".to_vec(), ar_member("debian-binary", b"3.0\n")].concat();
    refuse(&other, "format 3.0");
    let swapped =
        [b"!<arch>\n".to_vec(), ar_member("debian-binary", b"2.0\n"), ar_member("data.tar", b"")]
            .concat();
    refuse(&swapped, "control.tar");
    refuse(&make_deb(&[], &[], ".gz"), "no file `control`");
    refuse(&make_deb(&[control(), control()], &[], ".gz"), "twice");
    refuse(&make_deb(&[control(), raw_entry(b"a/b", b'0', b"", b"")], &[], ".gz"), "folder");
    refuse(&make_deb(&[control(), raw_entry(b"a", b'2', b"b", b"")], &[], ".gz"), "no file");
    let huge = b"!<arch>\ndebian-binary   0           0     0     100644  9999999999`\n2.0\n";
    refuse(huge, "bytes");
}

#[test]
fn a_plain_tar_is_read_whatever_its_compression() {
    for suffix in ["", ".gz", ".xz", ".zst"] {
        let tar =
            compress(&[&raw_entry(b"x", b'0', b"", b"hello")[..], &[0; 1024]].concat(), suffix);
        let mut seen = 0;
        archive::read_entries(open_tar(&tar[..], "x", 1 << 20).unwrap(), |_, _| {
            seen += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, 1);
    }
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400)) {
        let _ = read_all(&bytes, 1 << 16);
        let _ = read_all(&[b"!<arch>\n".to_vec(), ar_member("debian-binary", b"2.0\n"), bytes].concat(), 1 << 16);
    }
}
