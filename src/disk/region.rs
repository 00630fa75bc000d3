//! A byte range of a file that is used as if it were a file of its own: a partition of a
//! disk image, so that nothing has to be copied in or out.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;

use crate::digest::{Digest, Hasher};

/// `length` bytes of `file` from `start`. Reads and writes stay inside.
#[derive(Debug)]
pub struct Region<'a> {
    file: &'a File,
    start: u64,
    length: u64,
}

impl<'a> Region<'a> {
    pub fn new(file: &'a File, start: u64, length: u64) -> Self {
        Region { file, start, length }
    }

    pub fn whole(file: &'a File) -> Result<Self> {
        let length = file.metadata().context("asking for the length of a file")?.len();
        Ok(Region::new(file, 0, length))
    }

    /// A part of this region. Fails when it does not lie inside.
    pub fn part(&self, start: u64, length: u64) -> Result<Region<'a>> {
        ensure!(
            start.checked_add(length).is_some_and(|end| end <= self.length),
            "bytes {start} to {start}+{length} lie beyond the end at {}",
            self.length
        );
        Ok(Region::new(self.file, self.start + start, length))
    }

    pub fn length(&self) -> u64 {
        self.length
    }

    /// Exactly `length` bytes at `offset`; nothing is allocated before the range is known
    /// to lie inside.
    pub fn read_at(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let part = self.part(offset, length as u64)?;
        let mut bytes = vec![0; length];
        self.file
            .read_exact_at(&mut bytes, part.start)
            .with_context(|| format!("reading {length} bytes at {offset}"))?;
        Ok(bytes)
    }

    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let part = self.part(offset, bytes.len() as u64)?;
        self.file
            .write_all_at(bytes, part.start)
            .with_context(|| format!("writing {} bytes at {offset}", bytes.len()))
    }

    /// Copy `length` bytes of `from` to `offset`, without the holes: that range must read
    /// as zeros before.
    pub fn write_file_at(&self, offset: u64, from: &File, length: u64) -> Result<()> {
        let part = self.part(offset, length)?;
        let mut position = 0;
        while let Some((start, end)) = find_data(from, position, length)? {
            copy_range(from, start, part.file, part.start + start, end - start)?;
            position = end;
        }
        Ok(())
    }
}

/// The first run of data at or after `from`, as (start, end), both at most `end`; `None`
/// when only a hole is left. On a file system without holes all is data (lseek(2)).
pub fn find_data(file: &File, from: u64, end: u64) -> Result<Option<(u64, u64)>> {
    let seek = |to| rustix::fs::seek(file, to);
    let start = match seek(rustix::fs::SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok((from < end).then_some((from, end))),
        Err(error) => return Err(error).context("looking for data in a file"),
    };
    if start >= end {
        return Ok(None);
    }
    let stop = seek(rustix::fs::SeekFrom::Hole(start)).context("looking for a hole in a file")?;
    Ok(Some((start, stop.min(end))))
}

/// SHA-256 of a whole file, as sha256sum(1) gives it, without reading the holes. Zeros are
/// hashed like other bytes, so that a large disk still takes seconds.
pub fn hash_sparse(file: &File) -> Result<Digest> {
    const PIECE: usize = 1 << 18;
    let length = file.metadata().context("asking for the length of a file")?.len();
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; PIECE];
    let zeros = vec![0; PIECE];
    while hasher.written() < length {
        let position = hasher.written();
        let (start, end) = find_data(file, position, length)?.unwrap_or((length, length));
        while hasher.written() < start {
            let left = start - hasher.written();
            hasher.update(&zeros[..left.min(PIECE as u64) as usize]);
        }
        while hasher.written() < end {
            let left = end - hasher.written();
            let piece = &mut buffer[..left.min(PIECE as u64) as usize];
            file.read_exact_at(piece, hasher.written()).context("reading a file to hash")?;
            hasher.update(piece);
        }
    }
    Ok(hasher.finish())
}

/// copy_file_range(2), which shares the blocks where the file system can, else by hand.
fn copy_range(from: &File, mut at: u64, to: &File, mut target: u64, mut left: u64) -> Result<()> {
    let mut by_hand = false;
    let mut buffer = Vec::new();
    while left > 0 {
        let copied = if by_hand {
            buffer.resize(1 << 20, 0);
            let n = left.min(buffer.len() as u64) as usize;
            let n = from.read_at(&mut buffer[..n], at).context("reading a file to copy")?;
            to.write_all_at(&buffer[..n], target).context("writing a copy")?;
            at += n as u64;
            target += n as u64;
            n as u64
        } else {
            let n = left.min(1 << 30) as usize;
            match rustix::fs::copy_file_range(from, Some(&mut at), to, Some(&mut target), n) {
                Ok(n) => n as u64,
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                    by_hand = true;
                    continue;
                }
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error).context("copying a file range"),
            }
        };
        ensure!(copied > 0, "a file became shorter while it was copied");
        left -= copied;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_neither_reads_nor_writes_beyond_its_ends() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"0123456789", 0).unwrap();
        let region = Region::new(&file, 2, 4);
        assert_eq!(region.read_at(0, 4).unwrap(), b"2345");
        assert!(region.read_at(3, 2).is_err());
        assert!(region.write_at(3, b"xy").is_err());
        region.write_at(3, b"x").unwrap();
        assert!(region.part(u64::MAX, 2).is_err());
        assert_eq!(Region::whole(&file).unwrap().read_at(0, 10).unwrap(), b"01234x6789");
    }

    #[test]
    fn a_sparse_file_hashes_as_its_bytes_do() {
        let file = tempfile::tempfile().unwrap();
        for (length, data) in [(0, None), (5 << 20, None), (5 << 20, Some(3)), (9 << 20, Some(8))] {
            file.set_len(0).unwrap();
            file.set_len(length).unwrap();
            if let Some(at) = data {
                file.write_all_at(b"data", (at << 20) + 77).unwrap();
            }
            let mut bytes = vec![0; length as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!(hash_sparse(&file).unwrap(), Digest::of(&bytes), "{length}");
        }
    }

    #[test]
    fn holes_are_not_copied_and_data_is() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.set_len(8 << 20).unwrap();
        from.write_all_at(b"middle", 4 << 20).unwrap();
        to.set_len(16 << 20).unwrap();
        Region::whole(&to).unwrap().write_file_at(4096, &from, 8 << 20).unwrap();
        let mut bytes = [0; 6];
        to.read_exact_at(&mut bytes, (4 << 20) + 4096).unwrap();
        assert_eq!(&bytes, b"middle");
        let blocks = std::os::unix::fs::MetadataExt::blocks(&to.metadata().unwrap());
        assert!(blocks * 512 < 1 << 20, "{blocks} sectors are allocated");
    }
}
