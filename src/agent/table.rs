//! The whole cluster in one table, made of what its agents say: a pure function of their
//! pages, and its rendering for a person. `stanchion status` and `stanchion-agent status
//! --cluster` show the same.

use std::collections::BTreeMap;

use serde::Serialize;

use super::board::Phase;
use super::registry::Registration;
use super::server::Page;
use crate::config::cluster::{Node, Role};

/// What came of asking a node's agent.
#[derive(Debug)]
pub enum Answer {
    Page(Box<Page>),
    /// It does not answer, and why.
    Silent(String),
}

/// The cluster as it was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Table {
    pub cluster: String,
    /// Every row is ready, and there is one.
    pub ready: bool,
    /// It has one node, and can never be highly available.
    pub single: bool,
    pub nodes: Vec<Row>,
}

/// One node. What nobody knows is empty.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    pub name: String,
    pub zone: String,
    pub roles: Vec<Role>,
    pub phase: Option<Phase>,
    pub ready: bool,
    pub etcd: String,
    pub postgres: String,
    /// Bytes of the leader's log that it has not replayed.
    pub lag: Option<u64>,
    pub redis: String,
    pub web: String,
    pub vip: bool,
    pub version: String,
    /// Why it did not answer, when it was asked and did not.
    pub silent: Option<String>,
    /// It is in the registry, so its agent lived some seconds ago.
    pub registered: bool,
    pub reasons: Vec<String>,
    /// What is poor and keeps it from nothing, by the thing concerned.
    pub warnings: BTreeMap<String, String>,
}

/// Make the table of `members`, in their order, with nodes after them that only the registry
/// knows. A node's own page counts most, then what it registered, as its own page or else
/// the first other one has it. A node without an answer was not asked.
pub fn make_table(cluster: &str, members: &[Node], answers: &BTreeMap<String, Answer>) -> Table {
    let pages: Vec<(&str, &Page)> = answers
        .iter()
        .filter_map(|(name, answer)| match answer {
            Answer::Page(page) => Some((name.as_str(), &**page)),
            Answer::Silent(_) => None,
        })
        .collect();
    let find = |name: &str| {
        let own = pages.iter().filter(|(owner, _)| *owner == name);
        let others = pages.iter().filter(|(owner, _)| *owner != name);
        own.chain(others)
            .find_map(|(_, page)| page.nodes.iter().find(|node| node.node.name == name))
    };
    let mut nodes: Vec<Row> = members
        .iter()
        .map(|node| make_row(node, find(&node.name), answers.get(&node.name)))
        .collect();
    let mut late: Vec<&Registration> = Vec::new();
    for registration in pages.iter().flat_map(|(_, page)| &page.nodes) {
        let name = &registration.node.name;
        let is_new = !late.iter().any(|one| one.node.name == *name)
            && !members.iter().any(|member| member.name == *name);
        // With the file that a page was made from, all members are known.
        if is_new {
            late.push(registration);
        }
    }
    late.sort_by(|a, b| a.node.name.cmp(&b.node.name));
    nodes.extend(late.into_iter().map(|registration| {
        let view = &registration.node;
        let node = Node {
            name: view.name.clone(),
            address: view.address,
            zone: view.zone.clone(),
            profile: view.profile.clone(),
            roles: view.roles.clone(),
        };
        make_row(&node, Some(registration), answers.get(&view.name))
    }));
    Table {
        cluster: cluster.to_string(),
        ready: !nodes.is_empty() && nodes.iter().all(|row| row.ready),
        single: members.len() == 1,
        nodes,
    }
}

fn make_row(node: &Node, registered: Option<&Registration>, answer: Option<&Answer>) -> Row {
    let mut row = Row {
        name: node.name.clone(),
        zone: node.zone.clone(),
        roles: node.roles.clone(),
        phase: None,
        ready: false,
        etcd: String::new(),
        postgres: String::new(),
        lag: None,
        redis: String::new(),
        web: String::new(),
        vip: false,
        version: String::new(),
        silent: None,
        registered: registered.is_some(),
        reasons: Vec::new(),
        warnings: BTreeMap::new(),
    };
    if let Some(told) = registered {
        row.phase = Some(told.phase);
        row.ready = told.ready;
        row.etcd = told.etcd.clone();
        row.postgres = told.postgres.clone();
        row.lag = told.lag;
        row.redis = told.redis.clone();
        row.web = told.web.clone();
        row.vip = told.vip;
        row.version = told.version.clone();
        row.reasons = told.reasons.clone();
    }
    match answer {
        Some(Answer::Page(page)) => {
            let status = &page.status;
            row.phase = Some(status.phase);
            row.ready = status.ready;
            row.version = status.version.clone();
            row.reasons = status.reasons.clone();
            row.warnings = status.warnings.clone();
        }
        Some(Answer::Silent(why)) => {
            row.ready = false;
            row.reasons.insert(0, format!("its agent does not answer: {why}"));
            row.silent = Some(why.clone());
        }
        None if registered.is_none() => {
            row.reasons.push("it is not there: the registry does not have it".to_string());
        }
        None => {}
    }
    row
}

/// What [`list_cells`] lists.
pub const TITLES: [&str; 12] = [
    "node",
    "zone",
    "roles",
    "phase",
    "ready",
    "etcd",
    "PostgreSQL",
    "lag",
    "Redis",
    "NetBox",
    "VIP",
    "version",
];

/// Something that is wrong or poor, and the nodes that say so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Remark {
    pub text: String,
    pub nodes: Vec<String>,
}

/// Why nodes are not ready, each reason once.
pub fn list_problems(table: &Table) -> Vec<Remark> {
    gather_remarks(table, |row| row.reasons.clone())
}

/// What is poor and keeps nobody from anything, each once.
pub fn list_warnings(table: &Table) -> Vec<Remark> {
    gather_remarks(table, |row| {
        row.warnings.iter().map(|(thing, warning)| format!("{thing}: {warning}")).collect()
    })
}

/// How many nodes are ready, on one line.
pub fn count_ready(table: &Table) -> String {
    let count = table.nodes.iter().filter(|row| row.ready).count();
    format!("{count} of {} nodes are ready", table.nodes.len())
}

/// The table as text: a line for each node, then in words what is wrong and with whom.
pub fn show_table(table: &Table) -> String {
    let mut lines = vec![TITLES.map(str::to_string).to_vec()];
    lines.extend(table.nodes.iter().map(list_cells));
    let width =
        |column: usize| lines.iter().map(|cells| cells[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    let mut text = format!("{}: {}\n\n", clean(&table.cluster), count_ready(table));
    for cells in &lines {
        let padded: Vec<String> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text += padded.join("  ").trim_end();
        text.push('\n');
    }
    if table.single {
        text += "\nTHIS IS A CLUSTER OF ONE NODE, FOR DEVELOPMENT: NOT HIGHLY AVAILABLE\n";
    }
    text += &show_remarks("not ready", &list_problems(table));
    text += &show_remarks("warnings", &list_warnings(table));
    text
}

/// What a table shows of a node, in the order of [`TITLES`]; `-` for nothing.
pub fn list_cells(row: &Row) -> Vec<String> {
    let roles: Vec<&str> = row.roles.iter().map(|role| role.name()).collect();
    let phase = match (&row.silent, row.phase) {
        (Some(_), _) => "no answer",
        (None, Some(phase)) => phase.name(),
        (None, None) => "not there",
    };
    let lag = row.lag.map_or(String::new(), show_bytes);
    let cells: [&str; 12] = [
        &row.name,
        &row.zone,
        &roles.join(","),
        phase,
        if row.ready { "yes" } else { "NO" },
        &row.etcd,
        &row.postgres,
        &lag,
        &row.redis,
        &row.web,
        if row.vip { "here" } else { "" },
        &row.version,
    ];
    let show = |cell: &str| if cell.is_empty() { "-".to_string() } else { clean(cell) };
    cells.into_iter().map(show).collect()
}

fn gather_remarks(table: &Table, list: impl Fn(&Row) -> Vec<String>) -> Vec<Remark> {
    let mut remarks: Vec<Remark> = Vec::new();
    for row in &table.nodes {
        for said in list(row) {
            let text = clean(&said);
            match remarks.iter_mut().find(|known| known.text == text) {
                Some(known) => known.nodes.push(clean(&row.name)),
                None => remarks.push(Remark { text, nodes: vec![clean(&row.name)] }),
            }
        }
    }
    remarks
}

fn show_remarks(title: &str, remarks: &[Remark]) -> String {
    let mut text = String::new();
    for remark in remarks {
        if text.is_empty() {
            text = format!("\n{title}:\n");
        }
        let said = remark.text.replace('\n', "\n    ");
        text += &format!("  {}: {said}\n", remark.nodes.join(", "));
    }
    text
}

fn show_bytes(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

/// What came over the network must not move a terminal's cursor.
fn clean(text: &str) -> String {
    text.replace(|c: char| c.is_control() && c != '\n', "?")
}

#[cfg(test)]
#[path = "table/tests.rs"]
mod tests;
