//! Binary packages: an ar archive of `debian-binary`, `control.tar.*` and `data.tar.*`
//! (deb(5), ar(5)). Both tar archives are streamed; only the control members, which are
//! small, are kept.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read};

use anyhow::{Context, Result, bail};

use super::archive::{self, Kind};
use crate::error::UserError;

/// Bytes that the control archive may unpack to, tar headers included.
const MAX_CONTROL: u64 = 16 << 20;
/// xz -9 needs 65 MiB to decompress; more is an attack or a mistake.
const MAX_XZ_MEMORY: u64 = 256 << 20;
/// Few large reads: most of an image's build time is decompression.
const BUFFER: usize = 256 * 1024;

/// Mode (permission bits) and content of the members of `control.tar`, by their names:
/// `control`, `conffiles`, `postinst` ...
pub type ControlMembers = BTreeMap<String, (u32, Vec<u8>)>;

/// A decompressed stream.
pub type Stream<'a> = Box<dyn Read + Send + 'a>;

/// A package whose control members have been read and whose files come next.
pub struct Package<'a> {
    pub control: ControlMembers,
    data: Stream<'a>,
}

impl<'a> Package<'a> {
    /// The data archive, from its first entry; [`archive::read_entries`] reads it.
    pub fn into_data(self) -> tar::Archive<Stream<'a>> {
        tar::Archive::new(self.data)
    }
}

/// Bytes that a package's data archive may unpack to: twice the index's Installed-Size,
/// which counts every file in whole KiB but not the archive's headers and padding of up
/// to 1 KiB an entry, and 64 MiB for the fields that are known to be wrong.
pub fn limit_data(installed_size_kib: u64) -> u64 {
    installed_size_kib.saturating_mul(2 * 1024).saturating_add(64 << 20)
}

/// Reads a .deb up to the first entry of its data archive. `name` is for messages;
/// `limit` is what the data archive may unpack to, in bytes ([`limit_data`]).
///
/// Errors: an archive that is damaged, cut short or not in format 2.x; control members of
/// more than 16 MiB. Reading the data gives an error that names the package when it
/// unpacks to more than `limit` ([`lift_user_error`]).
pub fn open_package<'a>(
    reader: impl Read + Send + 'a,
    name: &str,
    limit: u64,
) -> Result<Package<'a>> {
    let open = || -> Result<Package<'a>> {
        let mut ar = Ar::new(BufReader::with_capacity(BUFFER, reader))?;
        let version = ar.next_member()?.filter(|member| member.name == "debian-binary");
        let version = ar.read_small(version.context("the first member is not debian-binary")?)?;
        if !version.starts_with(b"2.") {
            bail!("format {}, not 2.x", version.trim_ascii().escape_ascii());
        }
        let member = ar.next_named()?.context("no control.tar")?;
        let compression = Compression::of_member(&member.name, "control.tar")?;
        let control = {
            let content = Exactly { inner: &mut ar.inner, left: member.size };
            let mut content = BufReader::new(content);
            let stream = decompress(&mut content, compression)?;
            let control = read_control(Limited::new(stream, MAX_CONTROL, name))
                .context("reading control.tar")?;
            io::copy(&mut content, &mut io::sink()).context("reading control.tar")?;
            control
        };
        ar.skip_padding(member.size)?;
        let member = ar.next_named()?.context("no data.tar")?;
        let compression = Compression::of_member(&member.name, "data.tar")?;
        let content = Exactly { inner: ar.inner, left: member.size };
        let stream = decompress(BufReader::with_capacity(BUFFER, content), compression)?;
        let data = BufReader::with_capacity(BUFFER, Limited::new(stream, limit, name));
        Ok(Package { control, data: Box::new(data) })
    };
    open().map_err(lift_user_error).with_context(|| format!("reading the package {name}"))
}

/// Decompresses a tar archive that is no package: gzip, xz, zstd or plain, told apart by
/// its first bytes. `limit` as in [`open_package`].
pub fn open_tar<'a>(
    mut reader: impl Read + Send + 'a,
    name: &str,
    limit: u64,
) -> Result<tar::Archive<Stream<'a>>> {
    let mut magic = Vec::new();
    (&mut reader).take(6).read_to_end(&mut magic).with_context(|| format!("reading {name}"))?;
    let compression = match &magic[..] {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        b"\xfd7zXZ\0" => Compression::Xz,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        _ => Compression::None,
    };
    let whole = BufReader::with_capacity(BUFFER, io::Cursor::new(magic).chain(reader));
    let stream = decompress(whole, compression)?;
    let stream = BufReader::with_capacity(BUFFER, Limited::new(stream, limit, name));
    Ok(tar::Archive::new(Box::new(stream)))
}

/// Brings a [`UserError`] that went through `std::io` (an archive that unpacks to too
/// much) to where `crate::error` finds it.
pub fn lift_user_error(error: anyhow::Error) -> anyhow::Error {
    let found = error.chain().find_map(|cause| {
        cause.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref::<UserError>().cloned()
    });
    found.map_or(error, anyhow::Error::new)
}

fn read_control(stream: impl Read) -> Result<ControlMembers> {
    let mut members = ControlMembers::new();
    archive::read_entries(tar::Archive::new(stream), |entry, content| {
        match entry.kind {
            Kind::File => {}
            Kind::Directory if entry.path.is_empty() => return Ok(()),
            _ => bail!("a control member that is no file"),
        }
        let name = std::str::from_utf8(&entry.path).context("a control member's name")?;
        if name.contains('/') {
            bail!("a control member in a folder");
        }
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes)?;
        match members.insert(name.to_string(), (entry.mode, bytes)) {
            Some(_) => bail!("a control member that is there twice"),
            None => Ok(()),
        }
    })?;
    if !members.contains_key("control") {
        bail!("no file `control`");
    }
    Ok(members)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Xz,
    Zstd,
}

impl Compression {
    fn of_member(name: &str, wanted: &str) -> Result<Self> {
        match name.strip_prefix(wanted) {
            Some("") => Ok(Compression::None),
            Some(".gz") => Ok(Compression::Gzip),
            Some(".xz") => Ok(Compression::Xz),
            Some(".zst") => Ok(Compression::Zstd),
            _ => bail!("a member `{}` where {wanted} belongs", name.escape_debug()),
        }
    }
}

fn decompress<'a>(
    reader: impl io::BufRead + Send + 'a,
    compression: Compression,
) -> Result<Stream<'a>> {
    Ok(match compression {
        Compression::None => Box::new(reader),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
        Compression::Xz => {
            let stream = liblzma::stream::Stream::new_stream_decoder(
                MAX_XZ_MEMORY,
                liblzma::stream::CONCATENATED,
            )?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(reader, stream))
        }
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(reader)?),
    })
}

struct Ar<R> {
    inner: R,
}

struct Member {
    name: String,
    size: u64,
}

impl<R: Read> Ar<R> {
    fn new(mut inner: R) -> Result<Self> {
        let mut magic = [0; 8];
        inner.read_exact(&mut magic).context("reading the first bytes")?;
        if &magic != b"!<arch>\n" {
            bail!("not an ar archive");
        }
        Ok(Ar { inner })
    }

    /// The header of the next member: name 16, time 12, uid 6, gid 6, mode 8, size 10
    /// bytes, and two that never change. `None` at the end.
    fn next_member(&mut self) -> Result<Option<Member>> {
        let mut header = Vec::new();
        (&mut self.inner).take(60).read_to_end(&mut header).context("reading a member header")?;
        if header.is_empty() {
            return Ok(None);
        }
        if header.len() < 60 || &header[58..] != b"`\n" {
            bail!("a member header that is cut short or wrong");
        }
        let read = |range: std::ops::Range<usize>| -> Result<&str> {
            Ok(std::str::from_utf8(&header[range]).context("a member header")?.trim_end())
        };
        let size = read(48..58)?;
        if size.is_empty() || !size.bytes().all(|byte| byte.is_ascii_digit()) {
            bail!("a member size that is no number");
        }
        let name = read(0..16)?;
        let name = name.strip_suffix('/').unwrap_or(name).to_string();
        Ok(Some(Member { name, size: size.parse().context("a member size")? }))
    }

    /// The next member that counts: a name that begins with `_` is for others (deb(5)).
    fn next_named(&mut self) -> Result<Option<Member>> {
        loop {
            match self.next_member()? {
                Some(member) if member.name.starts_with('_') => {
                    let mut content = Exactly { inner: &mut self.inner, left: member.size };
                    io::copy(&mut content, &mut io::sink()).context("reading a member")?;
                    self.skip_padding(member.size)?;
                }
                other => return Ok(other),
            }
        }
    }

    fn read_small(&mut self, member: Member) -> Result<Vec<u8>> {
        if member.size > 4096 {
            bail!("a member {} of {} bytes", member.name.escape_debug(), member.size);
        }
        let mut bytes = Vec::new();
        Exactly { inner: &mut self.inner, left: member.size }
            .read_to_end(&mut bytes)
            .context("reading a member")?;
        self.skip_padding(member.size)?;
        Ok(bytes)
    }

    /// Members begin at even offsets.
    fn skip_padding(&mut self, size: u64) -> Result<()> {
        if size % 2 == 1 {
            self.inner.read_exact(&mut [0]).context("reading a member")?;
        }
        Ok(())
    }
}

/// Exactly `left` bytes: fewer are an error, more are not read.
struct Exactly<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Exactly<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let n = self.inner.read(&mut buffer[..most])?;
        if n == 0 && most > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is cut short"));
        }
        self.left -= n as u64;
        Ok(n)
    }
}

/// An error that names the package instead of more than `limit` bytes.
struct Limited<R> {
    inner: R,
    limit: u64,
    left: u64,
    name: String,
}

impl<R> Limited<R> {
    fn new(inner: R, limit: u64, name: &str) -> Self {
        Limited { inner, limit, left: limit, name: name.to_string() }
    }
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        let Some(left) = self.left.checked_sub(n as u64) else {
            return Err(io::Error::other(
                UserError::new(format!("{} unpacks to more than it may", self.name))
                    .why(format!("{} bytes are allowed by its size in the index", self.limit))
                    .help("take this package or file from its original source again"),
            ));
        };
        self.left = left;
        Ok(n)
    }
}

#[cfg(test)]
pub(crate) mod tests;
