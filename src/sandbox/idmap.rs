//! Which ids outside stand behind ids 0 to 65535 inside.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::command::Command;
use crate::error::UserError;

/// Ids inside, 0 included; 65534 is `nobody` of Debian, 65535 the last of 16 bits.
const INSIDE: u32 = 65536;

/// How to fill `uid_map` and `gid_map` (`user_namespaces(7)`).
#[derive(Debug)]
pub enum IdMap {
    /// Root writes the maps: every id is itself.
    Identity,
    /// `newuidmap(1)` and `newgidmap(1)` write them.
    Subordinate { newuidmap: PathBuf, newgidmap: PathBuf, uids: Vec<Extent>, gids: Vec<Extent> },
}

/// `count` ids from `outside` on are those from `inside` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub inside: u32,
    pub outside: u32,
    pub count: u32,
}

impl IdMap {
    /// What this user may map.
    ///
    /// # Errors
    /// A [`UserError`] that says what is missing and the commands that mend it.
    pub fn plan() -> Result<Self> {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        if uid.is_root() {
            return Ok(IdMap::Identity);
        }
        let name = find_name(uid.as_raw());
        let find = |program| find_program(program).ok_or_else(|| need_program(program));
        let (newuidmap, newgidmap) = (find("newuidmap")?, find("newgidmap")?);
        let plan = |file: &str, own: u32| {
            // A missing file is one without entries.
            let text = std::fs::read_to_string(file).unwrap_or_default();
            let ranges = parse_ranges(&text, name.as_deref(), uid.as_raw());
            lay_extents(own, &ranges).ok_or_else(|| {
                need_ids(file, name.as_deref().unwrap_or("NAME"), ranges.iter().map(|r| r.1))
            })
        };
        let uids = plan("/etc/subuid", uid.as_raw())?;
        let gids = plan("/etc/subgid", gid.as_raw())?;
        Ok(IdMap::Subordinate { newuidmap, newgidmap, uids, gids })
    }

    /// Fill the maps of a process that has just unshared its user namespace.
    pub fn write(&self, pid: u32) -> Result<()> {
        match self {
            IdMap::Identity => ["uid_map", "gid_map"].iter().try_for_each(|map| {
                std::fs::write(format!("/proc/{pid}/{map}"), format!("0 0 {INSIDE}"))
                    .map_err(|error| refuse_identity(map, &error).into())
            }),
            IdMap::Subordinate { newuidmap, newgidmap, uids, gids } => {
                write_extents(newuidmap, pid, uids)?;
                write_extents(newgidmap, pid, gids)
            }
        }
    }

    pub fn describe(&self) -> String {
        match self {
            IdMap::Identity => "root: ids 0 to 65535 are themselves".to_string(),
            IdMap::Subordinate { uids, .. } => {
                let first = uids.get(1).map_or(0, |extent| extent.outside);
                format!("0 is this user, 1 to 65535 are subordinate ids from {first} on")
            }
        }
    }
}

fn write_extents(program: &Path, pid: u32, extents: &[Extent]) -> Result<()> {
    let numbers = extents.iter().flat_map(|e| [e.inside, e.outside, e.count]);
    Command::new(program)
        .arg(pid.to_string())
        .args(numbers.map(|number| number.to_string()))
        .run()
        .context("mapping subordinate ids")?;
    Ok(())
}

/// The own id as 0, then as much of the ranges as is needed. `None`: there is too little.
fn lay_extents(own: u32, ranges: &[(u32, u32)]) -> Option<Vec<Extent>> {
    let mut extents = vec![Extent { inside: 0, outside: own, count: 1 }];
    let mut inside = 1;
    for &(outside, count) in ranges {
        let count = count.min(INSIDE - inside);
        // A range over the own id would map it twice, which the kernel refuses.
        if count == 0 || (outside..outside.saturating_add(count)).contains(&own) {
            continue;
        }
        extents.push(Extent { inside, outside, count });
        inside += count;
    }
    (inside == INSIDE).then_some(extents)
}

/// `(first, count)` of the lines of `subuid(5)` that are this user's, by name or by number.
fn parse_ranges(text: &str, name: Option<&str>, uid: u32) -> Vec<(u32, u32)> {
    let uid = uid.to_string();
    text.lines()
        .filter_map(|line| {
            let mut fields = line.trim().splitn(3, ':');
            let (owner, first, count) = (fields.next()?, fields.next()?, fields.next()?);
            let ours = owner == uid || Some(owner) == name;
            let (first, count) = (first.parse::<u32>().ok()?, count.parse::<u32>().ok()?);
            (ours && first.checked_add(count).is_some()).then_some((first, count))
        })
        .collect()
}

fn find_name(uid: u32) -> Option<String> {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let local = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, number) = (fields.next()?, fields.nth(1)?);
        (number.parse() == Ok(uid)).then(|| name.to_string())
    });
    // Users of a directory service are not in that file.
    local.or_else(|| {
        let output = Command::new("id").args(["-un", &uid.to_string()]).run().ok()?;
        Some(String::from_utf8(output.stdout).ok()?.trim().to_string())
    })
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/bin".into(), "/bin".into()])
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
}

fn need_program(program: &str) -> UserError {
    UserError::new("the sandbox cannot map subordinate ids")
        .why(format!("the program `{program}` is missing"))
        .help("sudo apt install uidmap (other distributions: shadow-utils, shadow)")
}

fn need_ids(file: &str, name: &str, counts: impl Iterator<Item = u32>) -> UserError {
    let count: u64 = counts.map(u64::from).sum();
    UserError::new(format!("user `{name}` has too few subordinate ids"))
        .in_file(file)
        .why(format!("{} are needed and there are {count}", INSIDE - 1))
        .help(format!(
            "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}\n\
             (another range where these ids are somebody else's already)"
        ))
}

fn refuse_identity(map: &str, error: &std::io::Error) -> UserError {
    UserError::new("the sandbox cannot map ids 0 to 65535")
        .why(format!("writing {map}: {error}"))
        .help(
            "this root is confined (a container?): give it ids 0 to 65535 and CAP_SETUID, \
             CAP_SETGID and CAP_SETFCAP, or build as an ordinary user of the host",
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn entries_are_found_by_name_and_by_number_and_others_are_not_taken() {
        let text =
            "ann:100000:65536\nbob:165536:65536\n1000:300000:10\n\nann:x:1\nann:4294967295:9\n";
        assert_eq!(parse_ranges(text, Some("ann"), 1000), [(100000, 65536), (300000, 10)]);
        assert_eq!(parse_ranges(text, None, 7), []);
    }

    #[test]
    fn a_range_that_is_too_short_is_refused_and_two_are_joined() {
        assert_eq!(lay_extents(1000, &[(100000, 65534)]), None);
        assert_eq!(
            lay_extents(1000, &[(100000, 65534), (200000, 500)]).unwrap()[1..],
            [
                Extent { inside: 1, outside: 100000, count: 65534 },
                Extent { inside: 65535, outside: 200000, count: 1 }
            ]
        );
    }

    proptest! {
        #[test]
        fn every_id_inside_is_mapped_once(
            own in 1u32..70000,
            ranges in proptest::collection::vec((0u32..u32::MAX / 2, 0u32..70000), 0..6),
        ) {
            if let Some(extents) = lay_extents(own, &ranges) {
                let mut next = 0;
                for extent in &extents {
                    prop_assert_eq!(extent.inside, next);
                    next += extent.count;
                }
                prop_assert_eq!(next, INSIDE);
                prop_assert_eq!(extents[0], Extent { inside: 0, outside: own, count: 1 });
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,200}", uid in any::<u32>()) {
            parse_ranges(&text, Some("ann"), uid);
        }
    }
}
