//! Replication slots whose log is gone already (`max_slot_wal_keep_size`): no use to the
//! replica, and Patroni does not make the slot anew while the old one is there.

use std::collections::BTreeSet;
use std::time::Duration;

use super::board::{Board, log};
use super::node::Node;
use super::psql::{SOCKET, run_psql};
use crate::config::cluster::Role;

const PAUSE: Duration = Duration::from_secs(60);
const THING: &str = "replication slots";
const LIST: &str = "select slot_name, slot_type, active, temporary from pg_replication_slots \
                    where wal_status = 'lost'";

/// One lost slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    pub name: String,
    pub physical: bool,
    pub active: bool,
    pub temporary: bool,
}

/// Those that are dropped, and those that are only told: what is not Patroni's own may be
/// waited for by somebody.
pub fn choose_slots<'s>(
    lost: &'s [Slot],
    nodes: &BTreeSet<String>,
) -> (Vec<&'s str>, Vec<&'s str>) {
    let (mut drop, mut tell) = (Vec::new(), Vec::new());
    for slot in lost.iter().filter(|slot| !slot.active && !slot.temporary) {
        let ours = slot.physical && nodes.iter().any(|node| name_slot(node) == slot.name);
        if ours { drop.push(slot.name.as_str()) } else { tell.push(slot.name.as_str()) }
    }
    (drop, tell)
}

/// The name that Patroni gives to the slot of a member whose name is one of ours.
fn name_slot(node: &str) -> String {
    node.to_lowercase().replace(['-', '.'], "_")
}

/// Drop lost slots of this node's PostgreSQL, for ever.
pub async fn drop_lost_slots(board: Board, nodes: BTreeSet<String>) {
    loop {
        tokio::time::sleep(PAUSE).await;
        // A PostgreSQL that does not answer is told by readiness.
        if let Ok(text) = run_psql(SOCKET, LIST).await {
            let lost = read_slots(&text);
            let (drop, tell) = choose_slots(&lost, &nodes);
            for name in drop {
                drop_slot(name).await;
            }
            match tell.as_slice() {
                [] => board.clear(THING),
                names => board.raise(
                    THING,
                    format!(
                        "their log is gone, and they are not Patroni's: {}; drop them with \
                         pg_drop_replication_slot",
                        names.join(", ")
                    ),
                ),
            }
        }
    }
}

/// The names of the db nodes of the cluster file.
pub fn list_owners(node: &Node) -> BTreeSet<String> {
    node.seed.cluster.list_nodes(Role::Db).map(|entry| entry.name.clone()).collect()
}

async fn drop_slot(name: &str) {
    // The name is a node's: letters, digits and underscores.
    let statement = format!(
        "select pg_drop_replication_slot(slot_name) from pg_replication_slots \
         where slot_name = '{name}' and wal_status = 'lost' and not active"
    );
    match run_psql(SOCKET, &statement).await {
        Ok(_) => log(&format!("postgres: dropped the slot {name}, whose log was gone")),
        Err(error) => log(&format!("postgres: dropping the slot {name}: {error:#}")),
    }
}

fn read_slots(text: &str) -> Vec<Slot> {
    let slot = |line: &str| {
        let mut fields = line.split('|');
        Some(Slot {
            name: fields.next()?.to_string(),
            physical: fields.next()? == "physical",
            active: fields.next()? == "t",
            temporary: fields.next()? == "t",
        })
    };
    text.lines().filter_map(slot).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_slots_of_nodes_that_nobody_uses_are_dropped() {
        let lost = read_slots(
            "n2|physical|f|f\nn3|physical|t|f\ndb_4|physical|f|f\nbackup|physical|f|f\n\
             n5|logical|f|f\nn6|physical|f|t\n",
        );
        assert_eq!(lost.len(), 6);
        let nodes = ["n2", "n3", "db-4", "n5", "n6"].map(String::from).into();
        let (drop, tell) = choose_slots(&lost, &nodes);
        assert_eq!(drop, ["n2", "db_4"]);
        assert_eq!(tell, ["backup", "n5"]);
        assert!(read_slots("\n").is_empty());
    }
}
