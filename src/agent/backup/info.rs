//! What pgBackRest says of its repository.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// One stanza: the backups of one database cluster.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct Info {
    #[serde(default)]
    backup: Vec<RawBackup>,
    /// The database clusters that it was of, the last one now.
    #[serde(default)]
    db: Vec<Database>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Database {
    #[serde(rename = "system-id")]
    system: u64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct RawBackup {
    label: String,
    #[serde(rename = "type")]
    kind: String,
    timestamp: Span,
    info: Sizes,
    #[serde(default)]
    error: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Span {
    start: u64,
    stop: u64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Sizes {
    #[serde(default)]
    size: u64,
    #[serde(default)]
    repository: Stored,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
struct Stored {
    #[serde(default)]
    delta: u64,
}

/// A finished backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backup {
    /// Such as `20261121-183005F`.
    pub label: String,
    /// `full`, `diff` or `incr`.
    pub kind: String,
    /// Seconds since 1970, UTC.
    pub start: u64,
    pub stop: u64,
    /// Bytes of the database, and those that this backup takes in the repository.
    pub size: u64,
    pub stored: u64,
    /// It found pages with wrong checksums.
    pub damaged: bool,
}

impl Info {
    /// Read what `pgbackrest info --output=json` says of a stanza.
    pub fn read(text: &str, stanza: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Named {
            name: String,
            #[serde(flatten)]
            info: Info,
        }
        let all: Vec<Named> =
            serde_json::from_str(text.trim()).context("reading what pgBackRest says")?;
        let mut found = all.into_iter().filter(|named| named.name == stanza);
        Ok(found.next().map(|named| named.info).unwrap_or_default())
    }

    /// In the order in which they ended.
    pub fn list_backups(&self) -> Vec<Backup> {
        let mut backups: Vec<Backup> = self
            .backup
            .iter()
            .map(|raw| Backup {
                label: raw.label.clone(),
                kind: raw.kind.clone(),
                start: raw.timestamp.start,
                stop: raw.timestamp.stop,
                size: raw.info.size,
                stored: raw.info.repository.delta,
                damaged: raw.error == Some(true),
            })
            .collect();
        backups.sort_by_key(|backup| backup.stop);
        backups
    }

    /// The system identifier of the database that the repository belongs to.
    pub fn find_system(&self) -> Option<u64> {
        self.db.last().map(|db| db.system)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"[{"archive":[{"database":{"id":1},"id":"17-1","max":null,"min":null}],
        "backup":[
          {"label":"20261121-183005F_20261122-183005D","type":"diff","error":true,
           "timestamp":{"start":30,"stop":40},"info":{"size":9,"repository":{"delta":1}}},
          {"label":"20261121-183005F","type":"full","error":false,"reference":null,
           "timestamp":{"start":10,"stop":20},"info":{"size":7,"repository":{"delta":3}}}],
        "db":[{"id":1,"repo-key":1,"system-id":7710679436893311470,"version":"17"}],
        "name":"lab","status":{"code":0,"message":"ok"}}]"#;

    #[test]
    fn backups_are_read_in_their_order() {
        let info = Info::read(TEXT, "lab").unwrap();
        assert_eq!(info.find_system(), Some(7710679436893311470));
        let backups = info.list_backups();
        assert_eq!((backups[0].kind.as_str(), backups[0].stop, backups[0].stored), ("full", 20, 3));
        assert!(backups[1].damaged && !backups[0].damaged);
    }

    #[test]
    fn a_repository_without_the_stanza_is_empty() {
        assert!(Info::read(TEXT, "other").unwrap().list_backups().is_empty());
        assert!(Info::read("[]", "lab").unwrap().find_system().is_none());
        assert!(Info::read("ERROR", "lab").is_err());
    }
}
