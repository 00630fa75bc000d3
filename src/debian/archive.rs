//! The entries of a tar archive (tar(5), and pax in POSIX.1-2017 `pax`), read with
//! bounds: `tar::Archive` does the blocks and the header's checksum, and is asked for raw
//! headers, because it would read an extension of any size into memory.

use std::io::{self, Read};

use anyhow::{Context, Result, bail};

/// Bytes of one GNU long name or pax header.
const MAX_EXTENSION: u64 = 1 << 20;
const MAX_PATH: usize = 4096;
const MAX_NAME: usize = 255;
const MAX_DEPTH: usize = 128;
const MAX_XATTRS: usize = 64;
/// The kernel's limit for one value (xattr(7)).
const MAX_XATTR: usize = 64 * 1024;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    File,
    Directory,
    /// Its target, as written.
    Symlink(Vec<u8>),
    /// The path of an earlier entry, normalised like [`Entry::path`].
    HardLink(Vec<u8>),
    /// A device node or a fifo, by its name in error messages.
    Special(&'static str),
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Without `./` and slashes at its ends; empty for the root itself.
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky; no file type.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: u64,
    /// Bytes of content; 0 for all but files.
    pub size: u64,
    /// Names and values of extended attributes, from `SCHILY.xattr.NAME`.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What pax records and GNU long names say of the entry after them.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<u64>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Calls `visit` for every entry with a reader of its content, then reads on to the end,
/// so that a compressed archive's own checksums are verified.
///
/// Errors: what `visit` returns; and for an archive that is damaged, cut short, or says
/// what no honest archive says (absolute paths, `..`, negative numbers, two sizes).
pub fn read_entries<R: Read>(
    mut archive: tar::Archive<R>,
    mut visit: impl FnMut(&Entry, &mut dyn Read) -> Result<()>,
) -> Result<()> {
    let mut extension = None;
    for raw in archive.entries().context("reading the archive")?.raw(true) {
        let mut raw = raw.context("reading an archive header")?;
        let size = read_number(&raw.header().as_old().size, "size")?;
        if raw.header().entry_size().ok() != Some(size) {
            bail!("a size that two readers would not agree on");
        }
        match raw.header().entry_type().as_byte() {
            b'L' => extension.get_or_insert_with(Extension::default).path = Some(read_name(raw)?),
            b'K' => extension.get_or_insert_with(Extension::default).link = Some(read_name(raw)?),
            b'x' => read_pax(&mut raw, extension.get_or_insert_with(Extension::default))?,
            b'g' => check_global(&mut raw)?,
            _ => {
                let entry = make_entry(raw.header(), size, extension.take().unwrap_or_default())?;
                let mut content = Content { inner: &mut raw, left: entry.size };
                visit(&entry, &mut content).with_context(|| show(&entry.path))?;
                // What the caller did not want must still be there.
                io::copy(&mut content, &mut io::sink()).with_context(|| show(&entry.path))?;
            }
        }
    }
    if extension.is_some() {
        bail!("the archive ends after the long name of an entry that is not there");
    }
    io::copy(&mut archive.into_inner(), &mut io::sink()).context("reading the archive's end")?;
    Ok(())
}

/// A path for messages: `./usr/bin/x`, with odd bytes escaped.
pub fn show(path: &[u8]) -> String {
    format!("./{}", path.escape_ascii())
}

/// The components of an archive's path joined again, without `.` and empty ones.
///
/// Errors: an absolute path, `..`, NUL, a line break (dpkg's lists cannot hold one), or
/// more than a file system takes.
pub fn normalise_path(path: &[u8]) -> Result<Vec<u8>> {
    let wrong = |what: &str| format!("{}: {what}", path[..path.len().min(80)].escape_ascii());
    if path.starts_with(b"/") {
        bail!(wrong("an absolute path"));
    }
    if path.len() > MAX_PATH {
        bail!(wrong("a path that is too long"));
    }
    if path.iter().any(|byte| matches!(byte, 0 | b'\n')) {
        bail!(wrong("a path with a NUL or a line break"));
    }
    let parts: Vec<&[u8]> =
        path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.contains(&&b".."[..]) {
        bail!(wrong("a path with `..`"));
    }
    if parts.len() > MAX_DEPTH || parts.iter().any(|part| part.len() > MAX_NAME) {
        bail!(wrong("a name that is too long, or too many folders"));
    }
    Ok(parts.join(&b'/'))
}

/// An entry's content; an archive that ends before it does is an error.
struct Content<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Content<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let n = self.inner.read(&mut buffer[..most])?;
        if n == 0 && most > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive is cut short"));
        }
        self.left -= n as u64;
        Ok(n)
    }
}

fn make_entry(header: &tar::Header, size: u64, extension: Extension) -> Result<Entry> {
    let raw_path = extension.path.unwrap_or_else(|| header.path_bytes().into_owned());
    let path = normalise_path(&raw_path)?;
    let check = || -> Result<Entry> {
        let link = extension
            .link
            .or_else(|| header.link_name_bytes().map(|name| name.into_owned()))
            .unwrap_or_default();
        let kind = match header.entry_type().as_byte() {
            b'0' | 0 | b'7' if raw_path.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' => Kind::File,
            b'1' => Kind::HardLink(normalise_path(&link).context("the target of a hard link")?),
            b'2' if link.is_empty() || link.len() >= MAX_PATH || link.contains(&0) => {
                bail!("a symbolic link without a proper target");
            }
            b'2' => Kind::Symlink(link),
            b'3' => Kind::Special("character device"),
            b'4' => Kind::Special("block device"),
            b'5' => Kind::Directory,
            b'6' => Kind::Special("fifo"),
            other => bail!("an entry of the unknown type `{}`", other.escape_ascii()),
        };
        if kind != Kind::File && size != 0 {
            bail!("content where there must be none");
        }
        if extension.size.is_some_and(|pax| pax != size) {
            bail!("its two headers give different sizes");
        }
        let old = header.as_old();
        let read_id =
            |bytes: &[u8], what| -> Result<u32> { check_id(read_number(bytes, what)?, what) };
        Ok(Entry {
            path: path.clone(),
            mode: u32::try_from(read_number(&old.mode, "mode")? & 0o7777).expect("12 bits"),
            uid: extension.uid.map_or_else(|| read_id(&old.uid, "uid"), Ok)?,
            gid: extension.gid.map_or_else(|| read_id(&old.gid, "gid"), Ok)?,
            mtime: extension.mtime.map_or_else(|| read_number(&old.mtime, "mtime"), Ok)?,
            size,
            kind,
            xattrs: extension.xattrs,
        })
    };
    let entry = check().with_context(|| show(&path))?;
    if path.is_empty() && entry.kind != Kind::Directory {
        bail!("an entry without a name that is no directory");
    }
    Ok(entry)
}

/// Octal digits between spaces and NULs, or GNU's binary form (first bit set).
fn read_number(field: &[u8], what: &str) -> Result<u64> {
    let first = field[0];
    if first & 0x80 != 0 {
        let (head, tail) = field.split_at(field.len() - 8);
        // The second bit is the sign; what does not fit into 63 bits is nonsense.
        let high = head.iter().enumerate().any(
            |(i, byte)| {
                if i == 0 { byte & 0x7f != 0 } else { *byte != 0 }
            },
        );
        let mut bytes: [u8; 8] = tail.try_into().expect("8 bytes");
        if head.is_empty() {
            bytes[0] &= 0x7f;
        }
        let value = u64::from_be_bytes(bytes);
        if first & 0x40 != 0 || high || value > i64::MAX as u64 {
            bail!("a negative or too large {what}");
        }
        return Ok(value);
    }
    let text = field.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = std::str::from_utf8(text).unwrap_or("?").trim_matches(' ');
    if text.is_empty() {
        return Ok(0);
    }
    if !text.bytes().all(|byte| matches!(byte, b'0'..=b'7')) {
        bail!("a {what} that is no octal number");
    }
    u64::from_str_radix(text, 8).with_context(|| format!("a {what} that is too large"))
}

fn check_id(id: u64, what: &str) -> Result<u32> {
    match u32::try_from(id) {
        Ok(id) if id != u32::MAX => Ok(id),
        _ => bail!("a {what} that is too large"),
    }
}

fn read_extension(raw: impl Read) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    raw.take(MAX_EXTENSION + 1).read_to_end(&mut bytes).context("reading a long name")?;
    if bytes.len() as u64 > MAX_EXTENSION {
        bail!("a long name or pax header of more than {MAX_EXTENSION} bytes");
    }
    Ok(bytes)
}

fn read_name(raw: impl Read) -> Result<Vec<u8>> {
    let mut name = read_extension(raw)?;
    while name.last() == Some(&0) {
        name.pop();
    }
    Ok(name)
}

/// Splits pax records: `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record.
fn split_pax(mut bytes: &[u8]) -> Result<Vec<(&[u8], &[u8])>> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let split = || -> Option<(&[u8], &[u8], usize)> {
            let space = bytes.iter().take(8).position(|byte| *byte == b' ')?;
            let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
            let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
            let equals = record.iter().position(|byte| *byte == b'=')?;
            Some((&record[..equals], &record[equals + 1..], length))
        };
        let (key, value, length) = split().context("a pax header with a wrong record")?;
        records.push((key, value));
        bytes = &bytes[length..];
    }
    Ok(records)
}

fn read_pax(raw: impl Read, extension: &mut Extension) -> Result<()> {
    let bytes = read_extension(raw)?;
    for (key, value) in split_pax(&bytes)? {
        let read_decimal = || -> Result<u64> {
            // Times may have a fraction, which no Debian archive has and dpkg drops.
            let whole = value.split(|byte| *byte == b'.').next().unwrap_or_default();
            let text = std::str::from_utf8(whole).unwrap_or("?");
            text.parse().with_context(|| {
                format!("a pax header with {} {}", key.escape_ascii(), value.escape_ascii())
            })
        };
        match key {
            b"path" => extension.path = Some(value.to_vec()),
            b"linkpath" => extension.link = Some(value.to_vec()),
            b"size" => extension.size = Some(read_decimal()?),
            b"uid" => extension.uid = Some(check_id(read_decimal()?, "uid")?),
            b"gid" => extension.gid = Some(check_id(read_decimal()?, "gid")?),
            b"mtime" => extension.mtime = Some(read_decimal()?.min(i64::MAX as u64)),
            _ => {
                if key.starts_with(b"GNU.sparse.") {
                    bail!("a sparse file, which is not supported");
                }
                let Some(name) = key.strip_prefix(b"SCHILY.xattr.") else { continue };
                if name.is_empty() || name.len() > MAX_NAME || name.contains(&0) {
                    bail!("an extended attribute with a wrong name");
                }
                if extension.xattrs.len() >= MAX_XATTRS || value.len() > MAX_XATTR {
                    bail!("too many or too large extended attributes");
                }
                extension.xattrs.push((name.to_vec(), value.to_vec()));
            }
        }
    }
    Ok(())
}

/// A global header may hold comments; what would change entries is refused, because no
/// two readers agree on it.
fn check_global(raw: impl Read) -> Result<()> {
    let bytes = read_extension(raw)?;
    for (key, _) in split_pax(&bytes)? {
        let changes = [&b"path"[..], b"linkpath", b"size", b"uid", b"gid"].contains(&key)
            || key.starts_with(b"GNU.sparse.")
            || key.starts_with(b"SCHILY.xattr.");
        if changes {
            bail!("a global pax header with `{}`", key.escape_ascii());
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
