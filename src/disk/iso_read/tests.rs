use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;

/// Where the sectors of the hand-made volume are.
const ROOT: usize = 20;
const JOLIET_ROOT: usize = 21;
const CONTINUATION: usize = 22;
const DATA: usize = 23;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Flavour {
    Plain,
    RockRidge,
    Joliet,
}

fn both_ends(number: usize) -> Vec<u8> {
    let number = number as u32;
    [number.to_le_bytes(), number.to_be_bytes()].concat()
}

fn make_record(name: &[u8], sector: usize, size: usize, system_use: &[u8]) -> Vec<u8> {
    let mut record = vec![0, 0];
    record.extend(both_ends(sector));
    record.extend(both_ends(size));
    record.extend([0; 7]);
    record.extend([0, 0, 0, 1, 0, 0, 1, name.len() as u8]);
    record.extend(name);
    if name.len() % 2 == 0 {
        record.push(0);
    }
    record.extend(system_use);
    record[0] = record.len() as u8;
    record
}

fn make_name(piece: &str, goes_on: bool) -> Vec<u8> {
    let mut field = vec![b'N', b'M', 5 + piece.len() as u8, 1, u8::from(goes_on)];
    field.extend(piece.as_bytes());
    field
}

/// A volume with the file `user-data`, which holds `content`.
fn make_volume(flavour: Flavour, content: &[u8]) -> File {
    let mut sectors = vec![vec![0u8; 2048]; DATA + 1];
    let describe = |kind: u8, root: usize, escape: &[u8]| {
        let mut bytes = vec![0u8; 2048];
        bytes[0] = kind;
        bytes[1..7].copy_from_slice(b"CD001\x01");
        bytes[40..72].fill(b' ');
        bytes[40..46].copy_from_slice(b"cidata");
        bytes[88..88 + escape.len()].copy_from_slice(escape);
        bytes[128..132].copy_from_slice(&[0, 8, 8, 0]);
        bytes[156..190].copy_from_slice(&make_record(&[0], root, 2048, &[]));
        bytes
    };
    sectors[16] = describe(1, ROOT, b"");
    sectors[17] = match flavour {
        Flavour::Joliet => describe(2, JOLIET_ROOT, b"%/E"),
        _ => describe(255, 0, b""),
    };
    sectors[18] = describe(255, 0, b"");
    let (share, name) = match flavour {
        Flavour::RockRidge => {
            let mut name = make_name("user-", true);
            name.extend([b'C', b'E', 28, 1]);
            let rest = make_name("data", false);
            for number in [CONTINUATION, 4, rest.len()] {
                name.extend(both_ends(number));
            }
            sectors[CONTINUATION][4..4 + rest.len()].copy_from_slice(&rest);
            (vec![b'S', b'P', 7, 1, 0xbe, 0xef, 0], name)
        }
        _ => Default::default(),
    };
    let folder = [
        make_record(&[0], ROOT, 2048, &share),
        make_record(&[1], ROOT, 2048, &[]),
        make_record(b"META_DAT.;1", DATA, 0, &[]),
        make_record(b"USER_DAT.;1", DATA, content.len(), &name),
    ]
    .concat();
    sectors[ROOT][..folder.len()].copy_from_slice(&folder);
    let name: Vec<u8> = "user-data;1".encode_utf16().flat_map(u16::to_be_bytes).collect();
    let folder = make_record(&name, DATA, content.len(), &[]);
    sectors[JOLIET_ROOT][..folder.len()].copy_from_slice(&folder);
    sectors[DATA][..content.len()].copy_from_slice(content);
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&sectors.concat(), 0).unwrap();
    file
}

const FLAVOURS: [Flavour; 3] = [Flavour::Plain, Flavour::RockRidge, Flavour::Joliet];

#[test]
fn a_file_is_found_by_its_name_in_each_flavour() {
    for flavour in FLAVOURS {
        let file = make_volume(flavour, b"a seed");
        let volume = Volume::open(Region::whole(&file).unwrap()).unwrap();
        assert_eq!(volume.label(), "cidata");
        let entry = volume.find("user-data").unwrap();
        let is_short = matches!(entry.name, Name::Short(_));
        assert_eq!(is_short, flavour == Flavour::Plain);
        assert_eq!(volume.read(entry, entry.size).unwrap(), b"a seed");
        assert!(volume.read(entry, 7).is_err());
        assert_eq!(volume.find("network-config"), None);
    }
}

#[test]
fn short_names_are_those_that_writers_make() {
    for (short, full) in [
        ("USER_DAT.;1", "user-data"),
        ("USER_DATA.;1", "user-data"),
        ("user_data", "user-data"),
        ("STANCHIO.JSO;1", "stanchion-seed.json"),
        ("STANCHION_SEED.JSON;1", "stanchion-seed.json"),
    ] {
        assert!(shortens(short, full), "{short}");
    }
    for short in ["USER_DAT.TXT;1", "USER.;1", "META_DAT.;1", "", ";1", "."] {
        assert!(!shortens(short, "user-data"), "{short}");
    }
}

#[test]
fn what_is_no_volume_is_refused() {
    let file = tempfile::tempfile().unwrap();
    for length in [0, 2048, 100_000] {
        file.set_len(length).unwrap();
        assert!(Volume::open(Region::whole(&file).unwrap()).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_damaged_volume_never_panics(
        flavour in prop::sample::select(FLAVOURS.to_vec()),
        root in prop::collection::vec((0usize..256, any::<u8>()), 0..12),
        descriptor in prop::collection::vec((0usize..192, any::<u8>()), 0..3),
        other in prop::collection::vec((0usize..64, any::<u8>()), 0..6),
    ) {
        let file = make_volume(flavour, &[7; 2000]);
        let sectors = [(ROOT, root.clone()), (JOLIET_ROOT, root), (16, descriptor), (CONTINUATION, other)];
        for (sector, changes) in sectors {
            for (at, value) in changes {
                file.write_all_at(&[value], (sector * 2048 + at) as u64).unwrap();
            }
        }
        if let Ok(volume) = Volume::open(Region::whole(&file).unwrap()) {
            for name in ["user-data", "stanchion-seed.json"] {
                if let Some(entry) = volume.find(name) {
                    let _ = volume.read(entry, entry.size.min(65_537));
                }
            }
        }
    }
}
