//! Laying rendered files in their places: only what changed, only what its service's own
//! check takes, and a reload for those it concerns.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};

use super::board::{Board, log};
use super::files::{Access, read_bounded, write_file};
use super::places::Places;
use super::render::Rendered;
use super::roles::{OnChange, Service};
use super::systemd::{Active, query_unit, reload_unit, restart_unit, run_program};

const MAX_FILE: u64 = 16 << 20;
const MAX_UNTOLD: u64 = 64 << 10;
/// The other services' files do not wait longer for one that is slow to reload.
const PATIENCE: Duration = Duration::from_secs(20);

/// What was laid down in this boot.
#[derive(Debug, Default)]
pub struct Applied {
    /// Targets that are as they were rendered at some time of this boot.
    accepted: BTreeSet<String>,
    /// Candidates that their service refused last, which are not asked about again.
    refused: BTreeMap<String, Vec<u8>>,
    /// Units with changed files that have not taken them in yet. A file has them, too, for an
    /// agent that is restarted meanwhile.
    untold: BTreeSet<&'static str>,
}

/// What became of telling a service that its files have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    Done,
    /// It is starting: which files it has read, nobody knows.
    Later,
}

impl Applied {
    /// What an agent before this one has left undone in this boot.
    pub fn read(places: &Places, services: &[Service]) -> Self {
        // Without the file, or with nonsense, it is as after a boot.
        let bytes = read_bounded(&places.untold(), MAX_UNTOLD).ok().flatten().unwrap_or_default();
        let names: Vec<String> = serde_json::from_slice(&bytes).unwrap_or_default();
        let units = services.iter().map(|service| service.unit);
        let untold = units.filter(|unit| names.iter().any(|name| name == unit)).collect();
        Applied { untold, ..Applied::default() }
    }

    fn write_untold(&self, places: &Places) -> Result<()> {
        write_file(&places.untold(), &serde_json::to_vec(&self.untold)?, Access::PRIVATE, false)
    }

    /// Lay a file whose services are to be told; they are written down first.
    fn lay(
        &mut self,
        places: &Places,
        services: &[Service],
        target: &str,
        file: &Rendered,
    ) -> Result<()> {
        let before = self.untold.clone();
        let concerned = services.iter().filter(|service| service.is_concerned(target));
        self.untold.extend(concerned.map(|service| service.unit));
        let write = || {
            if self.untold != before {
                self.write_untold(places)?;
            }
            write_file(&places.join(&file.target), &file.bytes, file.access, false)
        };
        let written = write();
        if written.is_err() {
            self.untold = before;
        }
        written
    }

    /// Let refused candidates be asked about again: what a check says hangs on more than the
    /// file, such as the network.
    pub fn forget_refusals(&mut self) {
        self.refused.clear();
    }

    /// A target of this service that could not be laid and of which there is no earlier good
    /// one.
    pub fn find_obstacle(&self, service: &Service) -> Option<&str> {
        self.refused
            .keys()
            .find(|target| service.is_concerned(target) && !self.accepted.contains(*target))
            .map(String::as_str)
    }

    fn accept(&mut self, target: String) {
        self.refused.remove(&target);
        self.accepted.insert(target);
    }
}

/// Lay down what differs from what is there. `tell` lets a service take in a file of its
/// own that has changed; it is tried again at every call until it has worked. Returns the
/// targets that changed.
pub async fn apply(
    places: &Places,
    board: &Board,
    services: &[Service],
    applied: &mut Applied,
    files: Vec<Rendered>,
    tell: impl AsyncFn(&Service) -> Result<Told>,
) -> Result<Vec<String>> {
    let mut changed = Vec::new();
    for file in files {
        let target = file.target.to_string_lossy().into_owned();
        let path = places.join(&file.target);
        // What cannot be read is written anew, and keeps no other file back.
        if is_same(&path, &file).unwrap_or(false) {
            applied.accept(target.clone());
            board.clear(&target);
            continue;
        }
        if applied.refused.get(&target) == Some(&file.bytes) {
            continue;
        }
        let laid = match check_candidate(places, services, &target, &file).await {
            Ok(()) => applied
                .lay(places, services, &target, &file)
                .map_err(|error| format!("the new file could not be written: {error:#}")),
            Err(reason) => Err(format!("the new file was refused, the old one is kept: {reason}")),
        };
        if let Err(reason) = laid {
            board.raise(&target, reason);
            applied.refused.insert(target, file.bytes);
            continue;
        }
        board.clear(&target);
        applied.accept(target.clone());
        changed.push(target);
    }
    if !changed.is_empty() {
        log(&format!("changed files: {}", changed.join(", ")));
    }
    for service in services {
        if !applied.untold.contains(service.unit) {
            continue;
        }
        match tell(service).await {
            Ok(Told::Done) => {
                applied.untold.remove(service.unit);
                // At worst it is told once more.
                let _ = applied.write_untold(places);
                board.clear(service.unit);
            }
            Ok(Told::Later) => {}
            Err(error) => {
                board.raise(service.unit, format!("its files changed, but {error:#}"));
            }
        }
    }
    Ok(changed)
}

/// Reload or restart a running service, and wait for what comes of it. One that does not
/// run reads its files when it starts.
pub async fn tell_service(service: &Service) -> Result<Told> {
    if service.on_change == OnChange::Nothing {
        return Ok(Told::Done);
    }
    match query_unit(service.unit).await? {
        Active::Running => {}
        Active::Starting => return Ok(Told::Later),
        Active::Stopped | Active::Failed | Active::Missing => return Ok(Told::Done),
    }
    let done = async {
        match service.on_change {
            OnChange::Restart => restart_unit(service.unit).await,
            OnChange::Reload | OnChange::Nothing => reload_unit(service.unit).await,
        }
    };
    match tokio::time::timeout(PATIENCE, done).await {
        Ok(done) => done.map(|()| Told::Done),
        Err(_) => bail!("{} has not taken them in within {} s", service.unit, PATIENCE.as_secs()),
    }
}

fn is_same(path: &Path, file: &Rendered) -> Result<bool> {
    let Ok(meta) = std::fs::symlink_metadata(path) else { return Ok(false) };
    let same_owner =
        file.access.owner.is_none_or(|(user, group)| (meta.uid(), meta.gid()) == (user, group));
    if !meta.is_file() || !same_owner || meta.mode() & 0o7777 != file.access.mode {
        return Ok(false);
    }
    Ok(meta.len() <= MAX_FILE && read_bounded(path, MAX_FILE)? == Some(file.bytes.clone()))
}

/// Let the service look at a candidate, in a folder for root alone.
async fn check_candidate(
    places: &Places,
    services: &[Service],
    target: &str,
    file: &Rendered,
) -> Result<(), String> {
    let Some(check) =
        services.iter().filter_map(|service| service.check).find(|check| check.file == target)
    else {
        return Ok(());
    };
    let candidate = places.candidates().join(target.trim_start_matches('/'));
    let access = Access { mode: 0o600, ..file.access };
    write_file(&candidate, &file.bytes, access, false).map_err(|error| format!("{error:#}"))?;
    let shown = candidate.to_string_lossy();
    let words: Vec<String> = check.program.iter().map(|word| word.replace("{}", &shown)).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let checked = run_program(&words).await;
    // It may hold secrets.
    let _ = super::files::remove_file(&candidate);
    checked.map(drop).map_err(|error| shorten(&format!("{error:#}")))
}

/// The last lines of what a check said; the whole stands in no status.
fn shorten(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let first = lines.first().copied().unwrap_or("");
    let last = lines[lines.len().saturating_sub(4).max(1).min(lines.len())..].join(" | ");
    let mut short = format!("{first} {last}");
    let end = (0..=short.len().min(600)).rev().find(|i| short.is_char_boundary(*i)).unwrap_or(0);
    short.truncate(end);
    short
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;
    use std::path::PathBuf;

    use anyhow::anyhow;

    use super::*;
    use crate::agent::roles::Check;

    const SERVICES: [Service; 1] = [Service {
        unit: "stanchion-no-such-unit.service",
        files: &["/etc/x/"],
        check: Some(Check { file: "/etc/x/main", program: &["grep", "-q", "good", "{}"] }),
        on_change: OnChange::Reload,
    }];

    fn rendered(bytes: &str) -> Vec<Rendered> {
        vec![Rendered {
            target: PathBuf::from("/etc/x/main"),
            bytes: bytes.into(),
            access: Access { mode: 0o644, owner: None },
        }]
    }

    #[tokio::test]
    async fn a_refused_file_leaves_the_old_one_and_says_so() {
        let root = tempfile::tempdir().unwrap();
        let (places, board) = (Places::under(root.path()), Board::default());
        let mut applied = Applied::default();
        let lay = async |text: &str, applied: &mut Applied| {
            let tell = async |_: &Service| Ok(Told::Done);
            apply(&places, &board, &SERVICES, applied, rendered(text), tell).await.unwrap()
        };
        assert!(lay("bad", &mut applied).await.is_empty());
        assert_eq!(applied.find_obstacle(&SERVICES[0]), Some("/etc/x/main"));
        assert_eq!(lay("good 1", &mut applied).await, ["/etc/x/main"]);
        assert_eq!(applied.find_obstacle(&SERVICES[0]), None);
        assert!(lay("good 1", &mut applied).await.is_empty());
        assert!(lay("worse", &mut applied).await.is_empty());
        assert_eq!(applied.find_obstacle(&SERVICES[0]), None);
        let kept = std::fs::read_to_string(root.path().join("etc/x/main")).unwrap();
        assert_eq!(kept, "good 1");
        assert!(board.snapshot().problems["/etc/x/main"].contains("refused"));
        assert!(lay("good 1", &mut applied).await.is_empty());
        assert!(!board.snapshot().problems.contains_key("/etc/x/main"));
    }

    #[tokio::test]
    async fn a_service_is_told_until_it_has_taken_the_file_in() {
        let root = tempfile::tempdir().unwrap();
        let (places, board) = (Places::under(root.path()), Board::default());
        let mut applied = Applied::default();
        let answers = RefCell::new(VecDeque::from([
            Err(anyhow!("it refuses to reload")),
            Ok(Told::Later),
            Ok(Told::Done),
        ]));
        let mut lay = async |text: &str| {
            let tell = async |_: &Service| answers.borrow_mut().pop_front().unwrap();
            apply(&places, &board, &SERVICES, &mut applied, rendered(text), tell).await.unwrap();
            answers.borrow().len()
        };
        assert_eq!(lay("good").await, 2);
        assert!(board.snapshot().problems[SERVICES[0].unit].contains("refuses to reload"));
        // The file is as it should be by now; the service is not.
        assert_eq!(lay("good").await, 1);
        assert!(board.snapshot().problems.contains_key(SERVICES[0].unit));
        assert_eq!(lay("good").await, 0);
        assert!(!board.snapshot().problems.contains_key(SERVICES[0].unit));
        assert_eq!(lay("good").await, 0);
    }

    #[tokio::test]
    async fn a_restarted_agent_tells_what_the_one_before_it_could_not() {
        let root = tempfile::tempdir().unwrap();
        let (places, board) = (Places::under(root.path()), Board::default());
        let told = RefCell::new(0);
        let lay = async |works: bool| {
            let mut applied = Applied::read(&places, &SERVICES);
            let tell = async |_: &Service| {
                *told.borrow_mut() += 1;
                if works { Ok(Told::Done) } else { Err(anyhow!("it refuses to reload")) }
            };
            apply(&places, &board, &SERVICES, &mut applied, rendered("good"), tell).await.unwrap();
            *told.borrow()
        };
        assert_eq!(lay(false).await, 1);
        assert_eq!(lay(true).await, 2);
        assert_eq!(lay(true).await, 2);
        std::fs::write(places.untold(), "nonsense").unwrap();
        assert_eq!(lay(true).await, 2);
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_written_does_not_keep_others_back() {
        let root = tempfile::tempdir().unwrap();
        let (places, board) = (Places::under(root.path()), Board::default());
        let mut applied = Applied::default();
        // A file where a folder should be.
        std::fs::write(root.path().join("srv"), "").unwrap();
        let mut files = rendered("good");
        files.insert(0, Rendered { target: "/srv/y/z".into(), ..rendered("y").remove(0) });
        let tell = async |_: &Service| Ok(Told::Done);
        let changed = apply(&places, &board, &SERVICES, &mut applied, files, tell).await.unwrap();
        assert_eq!(changed, ["/etc/x/main"]);
        assert!(board.snapshot().problems["/srv/y/z"].contains("could not be written"));
    }
}
