//! What a node wrote to its console: a file that is put aside when it has grown, so that two
//! of them, the older one with `.1`, hold its end.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes after which the file is put aside.
const LIMIT: u64 = 1 << 20;

/// The writing end.
pub struct Console {
    path: PathBuf,
    file: File,
    written: u64,
}

impl Console {
    /// Go on with the file at `path`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().append(true).create(true).open(path)?;
        let written = file.metadata()?.len();
        Ok(Console { path: path.to_owned(), file, written })
    }

    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.written >= LIMIT {
            fs::rename(&self.path, name_older(&self.path))?;
            self.file = File::options().append(true).create(true).open(&self.path)?;
            self.written = 0;
        }
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Write all that comes out of `pipe`.
    pub fn copy_from(&mut self, mut pipe: impl Read) -> io::Result<()> {
        let mut buffer = vec![0; 16 << 10];
        loop {
            match pipe.read(&mut buffer) {
                Ok(0) => return Ok(()),
                // A full disk must not stop the node: it waits for its console.
                Ok(n) => drop(self.write(&buffer[..n])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn name_older(path: &Path) -> PathBuf {
    let mut older = path.as_os_str().to_owned();
    older.push(".1");
    older.into()
}

/// Everything that is still there, at most two times [`LIMIT`] and a little.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for path in [name_older(path), path.to_owned()] {
        match File::open(path) {
            Ok(file) => drop(file.take(2 * LIMIT).read_to_end(&mut bytes)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}

/// Give what is there and what is added to `show`, until that fails or `is_over` says so
/// when there is nothing more.
pub fn follow(
    path: &Path,
    show: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    is_over: &dyn Fn() -> bool,
) -> io::Result<()> {
    let mut file = open_older_first(path, show)?;
    let mut buffer = vec![0; 16 << 10];
    loop {
        let over = is_over();
        match file.as_mut().map_or(Ok(0), |file| file.read(&mut buffer))? {
            0 if is_current(path, file.as_ref()) => {
                if over {
                    return Ok(());
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            // It was put aside: what came since is in a new one.
            0 => file = File::open(path).ok(),
            n => show(&buffer[..n])?,
        }
    }
}

fn open_older_first(
    path: &Path,
    show: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<Option<File>> {
    if let Ok(older) = fs::read(name_older(path)) {
        show(&older)?;
    }
    Ok(File::open(path).ok())
}

fn is_current(path: &Path, file: Option<&File>) -> bool {
    let identify = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let now = fs::metadata(path).ok().map(identify);
    // While there is no file, what was read is all there is.
    now.is_none() || now == file.and_then(|file| file.metadata().ok()).map(identify)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chatty_console_stays_small_and_keeps_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut console = Console::open(&path).unwrap();
        for n in 0..5000 {
            console.write(format!("{n:>1023}\n").as_bytes()).unwrap();
        }
        let bytes = read(&path).unwrap();
        assert!(bytes.len() as u64 <= 2 * LIMIT + 2048, "{}", bytes.len());
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(text.lines().last().unwrap().trim(), "4999");
        assert!(!text.lines().any(|line| line.trim() == "100"));
    }

    #[test]
    fn a_follower_loses_nothing_when_the_file_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut console = Console::open(&path).unwrap();
        console.write(b"first\n").unwrap();
        console.written = LIMIT;
        console.write(b"second\n").unwrap();
        let mut seen: Vec<u8> = Vec::new();
        let mut show = |bytes: &[u8]| {
            seen.extend(bytes);
            Ok(())
        };
        follow(&path, &mut show, &|| true).unwrap();
        assert_eq!(seen, b"first\nsecond\n");
    }
}
