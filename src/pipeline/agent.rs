//! The agent of an image: a copy of the running builder, so that both are of one version.

use std::fs;

use anyhow::{Context, Result};

use crate::error::UserError;

/// Where an image has it; by this name the program knows what it is to be.
pub const PATH: &str = "/usr/bin/stanchion-agent";
pub const MODE: u32 = 0o755;

/// The running program without what only debuggers read.
///
/// # Errors
/// A [`UserError`] when the program is no executable as the image's kernel takes it.
pub fn read_program() -> Result<Vec<u8>> {
    // Not by its path: a new build may lie there by now.
    let program = fs::read("/proc/self/exe").context("reading the running program")?;
    strip(program).ok_or_else(|| {
        UserError::new("the running program cannot be an image's agent")
            .why("it is no 64-bit little-endian ELF executable")
            .into()
    })
}

/// Cut an ELF executable after the last byte that a kernel loads: names, debugging data and
/// the table of sections lie behind it. `None` when it is none, or not whole.
fn strip(mut program: Vec<u8>) -> Option<Vec<u8>> {
    const HEADER: usize = 64;
    const SEGMENT: usize = 56;
    if program.len() < HEADER || !program.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let table = usize::try_from(read_u64(&program, 32)?).ok()?;
    let count = usize::from(u16::from_le_bytes([program[56], program[57]]));
    let mut end = table.checked_add(count.checked_mul(SEGMENT)?)?.max(HEADER);
    for number in 0..count {
        let segment = table.checked_add(number * SEGMENT)?;
        let offset = read_u64(&program, segment.checked_add(8)?)?;
        let size = read_u64(&program, segment.checked_add(32)?)?;
        end = end.max(usize::try_from(offset.checked_add(size)?).ok()?);
    }
    if count == 0 || end > program.len() {
        return None;
    }
    program.truncate(end);
    // Place, number and name table of the sections, which are gone.
    program[40..48].fill(0);
    program[60..64].fill(0);
    Some(program)
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(field.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::command::Command;
    use proptest::prelude::*;

    #[test]
    fn what_is_cut_off_is_not_needed_to_run() {
        let whole = fs::metadata("/proc/self/exe").unwrap().len();
        let program = read_program().unwrap();
        assert!((program.len() as u64) < whole, "{} of {whole}", program.len());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        fs::write(&path, &program).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(MODE)).unwrap();
        // This is the program of the tests: it lists them.
        let listed = Command::new(&path).args(["--list", "what_is_cut_off"]).run().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        assert!(listed.contains("what_is_cut_off_is_not_needed_to_run: test"), "{listed}");
        assert_eq!(strip(program.clone()), Some(program), "a stripped program stays as it is");
    }

    proptest! {
        #[test]
        fn whatever_the_bytes_it_never_panics(
            head in proptest::collection::vec(any::<u8>(), 0..160),
            is_elf: bool,
        ) {
            let mut program = head;
            if is_elf {
                program.splice(..program.len().min(6), *b"\x7fELF\x02\x01");
            }
            let length = program.len();
            prop_assert!(strip(program).is_none_or(|stripped| stripped.len() <= length));
        }
    }
}
