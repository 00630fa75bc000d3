//! Unified kernel images: systemd's UEFI stub with the kernel and what belongs to it
//! appended as PE sections.
//!
//! Sources: the UAPI Group's Unified Kernel Image specification; Microsoft's PE format;
//! systemd's ukify, whose order of sections and placement this follows.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, ensure};

/// What is appended to the stub, in the order of the image.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// The image's os-release.
    pub os_release: &'a [u8],
    /// The kernel command line.
    pub cmdline: &'a str,
    /// The kernel's release, as in `uname -r`.
    pub uname: &'a str,
    /// The kernel, a bzImage with its own PE header.
    pub linux: &'a [u8],
    /// One or more initrds, one after the other.
    pub initrd: &'a [u8],
}

/// No header of an image that we make or read is larger.
pub const MAX_HEADERS: usize = 64 << 10;

const SECTION: usize = 40;
/// Within the optional header of a 64-bit image.
const SIZE_OF_DATA: usize = 8;
const SECTION_ALIGNMENT: usize = 32;
const FILE_ALIGNMENT: usize = 36;
const SIZE_OF_IMAGE: usize = 56;
const SIZE_OF_HEADERS: usize = 60;
const CHECKSUM: usize = 64;
const DLL_FLAGS: usize = 70;
/// The fifth data directory: signatures.
const SECURITY: usize = 112 + 4 * 8;

const NX_COMPATIBLE: u16 = 0x100;
const CODE: u32 = 0x20;
const INITIALIZED_DATA: u32 = 0x40;
const READABLE: u32 = 0x4000_0000;

/// Where things are in a PE image.
struct Headers {
    /// Offset of the file header, after `PE\0\0`.
    file: usize,
    optional: usize,
    table: usize,
    sections: Vec<Section>,
}

struct Section {
    name: String,
    /// Address and size when loaded.
    address: u32,
    loaded: u32,
    /// Offset and size in the file.
    offset: u32,
    size: u32,
}

/// The bytes of the unified kernel image. The same inputs give the same bytes.
pub fn assemble(stub: &[u8], parts: &Parts) -> Result<Vec<u8>> {
    let headers = read_headers(stub).context("reading the UEFI stub")?;
    let mut image = stub.to_vec();
    check_stub(&image, &headers)?;
    let field = |at: usize| take_u32(stub, headers.optional + at);
    let (section_alignment, file_alignment) = (field(SECTION_ALIGNMENT)?, field(FILE_ALIGNMENT)?);
    ensure!(
        section_alignment.is_power_of_two() && (512..=4096).contains(&file_alignment),
        "the UEFI stub has odd alignments: {section_alignment}, {file_alignment}"
    );
    let sections: [(&str, &[u8], u32); 5] = [
        (".osrel", parts.os_release, INITIALIZED_DATA),
        (".cmdline", parts.cmdline.as_bytes(), INITIALIZED_DATA),
        (".uname", parts.uname.as_bytes(), INITIALIZED_DATA),
        (".linux", parts.linux, CODE),
        (".initrd", parts.initrd, INITIALIZED_DATA),
    ];

    let table_end = headers.table + (headers.sections.len() + sections.len()) * SECTION;
    let room = (field(SIZE_OF_HEADERS)? as usize).next_multiple_of(file_alignment as usize);
    let first = headers.sections.iter().filter(|section| section.size > 0).map(|s| s.offset).min();
    ensure!(
        table_end <= room && room <= stub.len() && first.is_none_or(|first| room <= first as usize),
        "the UEFI stub has no header room for {} more sections",
        sections.len()
    );
    let mut address = headers.sections.iter().try_fold(0u32, |end, section| {
        section.address.checked_add(section.loaded).map(|next| next.max(end))
    });
    let mut place = headers.table + headers.sections.len() * SECTION;
    // As ukify counts: the kernel, too.
    let mut data = u64::from(field(SIZE_OF_DATA)?);
    for (name, content, kind) in sections {
        ensure!(
            headers.sections.iter().all(|section| section.name != name),
            "the UEFI stub already has a section {name}"
        );
        let size = u32::try_from(content.len()).ok();
        let start = address.and_then(|end| end.checked_next_multiple_of(section_alignment));
        let end = size.zip(start).and_then(|(size, start)| start.checked_add(size));
        image.resize(image.len().next_multiple_of(file_alignment as usize), 0);
        let offset = u32::try_from(image.len()).ok();
        let (Some(size), Some(start), Some(_), Some(offset)) = (size, start, end, offset) else {
            anyhow::bail!("the unified kernel image grows beyond 4 GiB at {name}");
        };
        let stored = size.next_multiple_of(file_alignment);
        let mut entry = [0; SECTION];
        entry[..name.len()].copy_from_slice(name.as_bytes());
        for (at, value) in [(8, size), (12, start), (16, stored), (20, offset)] {
            entry[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        entry[36..].copy_from_slice(&(kind | READABLE).to_le_bytes());
        image[place..place + SECTION].copy_from_slice(&entry);
        place += SECTION;
        image.extend_from_slice(content);
        image.resize(image.len().next_multiple_of(file_alignment as usize), 0);
        address = end;
        data += u64::from(size);
    }
    let size_of_image = address.and_then(|end| end.checked_next_multiple_of(section_alignment));
    let size_of_image = size_of_image.context("the unified kernel image grows beyond 4 GiB")?;

    let count = (headers.sections.len() + sections.len()) as u16;
    image[headers.file + 2..headers.file + 4].copy_from_slice(&count.to_le_bytes());
    let optional = &mut image[headers.optional..headers.table];
    for (at, value) in [
        (SIZE_OF_DATA, u32::try_from(data).unwrap_or(u32::MAX)),
        (SIZE_OF_IMAGE, size_of_image),
        (SIZE_OF_HEADERS, room as u32),
        (CHECKSUM, 0),
    ] {
        optional[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    // The stub loads the kernel in its own name, so it may promise no more than the kernel
    // does; firmware that enforces the flag fails otherwise.
    if !promises_nx(parts.linux) {
        optional[DLL_FLAGS + 1] &= !((NX_COMPATIBLE >> 8) as u8);
    }
    Ok(image)
}

/// A stub is unsigned, aligned and has nothing after its sections.
fn check_stub(stub: &[u8], headers: &Headers) -> Result<()> {
    let size_of_optional = headers.table - headers.optional;
    if size_of_optional >= SECURITY + 8 {
        let signed = take_u32(stub, headers.optional + SECURITY)? != 0;
        ensure!(!signed, "the UEFI stub is signed; take the unsigned one");
    }
    let symbols = take_u32(stub, headers.file + 8)?;
    ensure!(symbols == 0, "the UEFI stub has a symbol table; take a stripped one");
    Ok(())
}

fn promises_nx(kernel: &[u8]) -> bool {
    let Ok(headers) = read_headers(kernel) else { return false };
    take_u16(kernel, headers.optional + DLL_FLAGS).is_ok_and(|flags| flags & NX_COMPATIBLE != 0)
}

/// The sections of a PE image as byte ranges of the file, without the padding. `head` is
/// the beginning of the image ([`MAX_HEADERS`] bytes are enough), `length` that of all of
/// it. Of several sections with one name the first counts.
pub fn read_sections(head: &[u8], length: u64) -> Result<BTreeMap<String, Range<u64>>> {
    let mut found = BTreeMap::new();
    for section in read_headers(head)?.sections {
        let start = u64::from(section.offset);
        let end = start + u64::from(section.size.min(section.loaded));
        ensure!(end <= length, "section {} reaches beyond the image", section.name);
        found.entry(section.name).or_insert(start..end);
    }
    Ok(found)
}

fn read_headers(image: &[u8]) -> Result<Headers> {
    ensure!(image.starts_with(b"MZ"), "no PE image");
    let pe = take_u32(image, 0x3c)? as usize;
    ensure!(pe <= MAX_HEADERS && take(image, pe)? == *b"PE\0\0", "no PE image");
    let file = pe + 4;
    let count = take_u16(image, file + 2)? as usize;
    let optional = file + 20;
    let size_of_optional = take_u16(image, file + 16)? as usize;
    ensure!(
        size_of_optional >= 112 && take_u16(image, optional)? == 0x20b,
        "not a 64-bit PE image"
    );
    let table = optional + size_of_optional;
    // The loader's own limit (Microsoft's PE format, "Number of sections").
    ensure!(count <= 96, "a PE image with {count} sections");
    let sections = (0..count)
        .map(|i| {
            let at = table + i * SECTION;
            let name: [u8; 8] = take(image, at)?;
            Ok(Section {
                name: String::from_utf8_lossy(&name).trim_end_matches('\0').to_string(),
                loaded: take_u32(image, at + 8)?,
                address: take_u32(image, at + 12)?,
                size: take_u32(image, at + 16)?,
                offset: take_u32(image, at + 20)?,
            })
        })
        .collect::<Result<_>>()?;
    ensure!(table <= image.len(), "the PE image ends in its headers");
    Ok(Headers { file, optional, table, sections })
}

fn take<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    let taken = at.checked_add(N).and_then(|end| bytes.get(at..end));
    let taken = taken.and_then(|taken| taken.try_into().ok());
    taken.context("the PE image ends in its headers")
}

fn take_u16(bytes: &[u8], at: usize) -> Result<u16> {
    take(bytes, at).map(u16::from_le_bytes)
}

fn take_u32(bytes: &[u8], at: usize) -> Result<u32> {
    take(bytes, at).map(u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The smallest image with a stub's shape: one section, room for `room` more.
    fn make_stub(room: usize) -> Vec<u8> {
        let mut stub = vec![0; 0x40];
        stub[..2].copy_from_slice(b"MZ");
        stub[0x3c] = 0x40;
        stub.extend(b"PE\0\0");
        let mut file = [0; 20];
        file[2] = 1;
        file[16..18].copy_from_slice(&240u16.to_le_bytes());
        stub.extend(file);
        let mut optional = [0; 240];
        optional[..2].copy_from_slice(&0x20bu16.to_le_bytes());
        let headers = (0x40 + 24 + 240 + (1 + room) * SECTION).next_multiple_of(512) as u32;
        for (at, value) in [
            (SECTION_ALIGNMENT, 4096u32),
            (FILE_ALIGNMENT, 512),
            (SIZE_OF_HEADERS, headers),
            (DLL_FLAGS, u32::from(NX_COMPATIBLE)),
        ] {
            optional[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        stub.extend(optional);
        let mut section = [0; SECTION];
        section[..5].copy_from_slice(b".text");
        for (at, value) in [(8, 700u32), (12, 4096), (16, 1024), (20, headers)] {
            section[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        stub.extend(section);
        stub.resize(headers as usize + 1024, 0xcc);
        stub
    }

    const PARTS: Parts = Parts {
        os_release: b"ID=test\n",
        cmdline: "console=ttyS0",
        uname: "6.12",
        linux: &[7; 5000],
        initrd: b"",
    };

    #[test]
    fn sections_come_back_as_they_went_in_and_do_not_overlap() {
        let image = assemble(&make_stub(5), &PARTS).unwrap();
        let sections = read_sections(&image, image.len() as u64).unwrap();
        let read = |name: &str| {
            let range = sections[name].clone();
            &image[range.start as usize..range.end as usize]
        };
        assert_eq!(read(".osrel"), PARTS.os_release);
        assert_eq!(read(".cmdline"), PARTS.cmdline.as_bytes());
        assert_eq!(read(".uname"), PARTS.uname.as_bytes());
        assert_eq!(read(".linux"), PARTS.linux);
        assert_eq!(read(".initrd"), PARTS.initrd);
        assert_eq!(read(".text").len(), 700);

        let headers = read_headers(&image).unwrap();
        for pair in headers.sections.windows(2) {
            assert!(pair[0].address + pair[0].loaded <= pair[1].address);
            assert!(pair[0].offset + pair[0].size <= pair[1].offset);
            assert!(pair[1].address.is_multiple_of(4096) && pair[1].offset.is_multiple_of(512));
        }
        let last = headers.sections.last().unwrap();
        let size = take_u32(&image, headers.optional + SIZE_OF_IMAGE).unwrap();
        assert_eq!(size, (last.address + last.loaded).next_multiple_of(4096));
    }

    #[test]
    fn the_image_promises_nx_only_when_the_kernel_does() {
        let flags = |linux: &[u8]| {
            let image = assemble(&make_stub(5), &Parts { linux, ..PARTS }).unwrap();
            let at = read_headers(&image).unwrap().optional + DLL_FLAGS;
            take_u16(&image, at).unwrap() & NX_COMPATIBLE
        };
        assert_eq!(flags(b"no PE image"), 0);
        assert_eq!(flags(&make_stub(0)), NX_COMPATIBLE);
    }

    #[test]
    fn a_stub_without_header_room_or_already_assembled_is_refused() {
        let error = assemble(&make_stub(0), &PARTS).unwrap_err().to_string();
        assert!(error.contains("no header room"), "{error}");
        let twice = assemble(&assemble(&make_stub(10), &PARTS).unwrap(), &PARTS).unwrap_err();
        assert!(twice.to_string().contains("already has"), "{twice}");
    }

    #[test]
    fn a_section_beyond_the_end_is_refused() {
        let image = assemble(&make_stub(5), &PARTS).unwrap();
        assert!(read_sections(&image, image.len() as u64 - 1024).is_err());
        assert!(read_sections(&image[..300], image.len() as u64).is_err());
    }

    proptest! {
        #[test]
        fn mutated_images_never_panic_and_ranges_stay_inside(
            changes in prop::collection::vec((0usize..700, any::<u8>()), 1..6), cut in 0usize..3000,
        ) {
            let mut image = assemble(&make_stub(5), &PARTS).unwrap();
            for (at, value) in changes {
                image[at] = value;
            }
            image.truncate(cut.max(1));
            if let Ok(sections) = read_sections(&image, image.len() as u64) {
                prop_assert!(sections.values().all(|range| range.end <= image.len() as u64));
            }
            let _ = assemble(&image, &PARTS);
        }

        #[test]
        fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = read_sections(&bytes, bytes.len() as u64);
            let _ = assemble(&bytes, &PARTS);
        }
    }
}
