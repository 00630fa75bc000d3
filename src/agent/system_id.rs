//! Whether the data on this node are those of the cluster's database: PostgreSQL gives each
//! database an identifier when it is made, and Patroni keeps the cluster's in etcd.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use anyhow::{Context, Result};

use super::node::Node;

const CONTROL: &str = "/var/lib/postgresql/17/main/global/pg_control";

/// Why PostgreSQL must not start on the data that this node has; `None` when it may.
pub async fn withhold(node: &Node) -> Result<Option<String>> {
    let Some(own) = read_identifier(&node.places.join(CONTROL))? else { return Ok(None) };
    let key = format!("/service/{}/initialize", node.seed.cluster.name);
    let cluster = node.etcd.get(&key).await?.map(|entry| entry.value);
    Ok(judge_identifier(own, cluster.as_deref()))
}

/// `cluster`: what Patroni has in etcd; empty while the first database is being made.
fn judge_identifier(own: u64, cluster: Option<&str>) -> Option<String> {
    let cluster = cluster.map(str::trim).filter(|cluster| !cluster.is_empty())?;
    if cluster.parse() == Ok(own) {
        return None;
    }
    let cluster: String = cluster.chars().filter(char::is_ascii_alphanumeric).take(32).collect();
    Some(format!(
        "the data on this node are another database's (system identifier {own}, the cluster's is \
         {cluster}); they are left as they are: attach the right disk, or move \
         /var/lib/postgresql/17/main away to copy the cluster's data"
    ))
}

/// The first of what `pg_control` holds; `None` where there are no data, or half of them.
fn read_identifier(path: &Path) -> Result<Option<u64>> {
    let read = || -> std::io::Result<Option<u64>> {
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut bytes = [0; 8];
        match file.read_exact(&mut bytes) {
            Ok(()) => Ok(Some(u64::from_le_bytes(bytes))),
            // A copy that was cut short: PostgreSQL refuses it by itself.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    };
    read().with_context(|| format!("reading {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: u64 = 7_312_345_678_901_234_567;

    #[test]
    fn data_of_another_database_are_withheld_and_nothing_else_is() {
        let said = judge_identifier(OWN, Some("7312345678901234568")).unwrap();
        assert!(said.contains("7312345678901234567"), "{said}");
        assert!(said.contains("7312345678901234568"), "{said}");
        assert!(judge_identifier(OWN, Some("nonsense\n")).is_some());
        for cluster in [None, Some(""), Some("7312345678901234567")] {
            assert_eq!(judge_identifier(OWN, cluster), None, "{cluster:?}");
        }
    }

    #[test]
    fn the_identifier_is_the_first_of_the_control_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pg_control");
        assert_eq!(read_identifier(&path).unwrap(), None);
        std::fs::write(&path, [&OWN.to_le_bytes()[..], &[9; 100]].concat()).unwrap();
        assert_eq!(read_identifier(&path).unwrap(), Some(OWN));
        std::fs::write(&path, [1; 7]).unwrap();
        assert_eq!(read_identifier(&path).unwrap(), None);
    }
}
