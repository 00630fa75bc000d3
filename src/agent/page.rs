//! The cluster at a glance as a page for a browser: one HTML file without script or
//! anything that it would have to fetch, for wide screens and phones, light and dark.

use anyhow::{Context, Result};
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};
use serde::Serialize;

use super::advice::find_page;
use super::table::{
    Remark, Row, TITLES, Table, count_ready, list_cells, list_problems, list_warnings,
};
use crate::debian::release::format_date;

const TEMPLATE: &str = include_str!("page/page.html.j2");
const STYLE: &str = include_str!("page/page.css");
/// Seconds until the browser asks again.
const REFRESH: u32 = 10;

/// What a browser may do with the page: show it, with the style that is in it.
pub const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; \
     base-uri 'none'; form-action 'none'";

/// Something that one node has, or that a few have.
#[derive(Debug, PartialEq, Serialize)]
struct Fact {
    what: &'static str,
    who: String,
    /// Nobody has it, and somebody should.
    missing: bool,
}

#[derive(Serialize)]
struct Remarks {
    title: &'static str,
    class: &'static str,
    items: Vec<Alarm>,
}

#[derive(Serialize)]
struct Alarm {
    #[serde(flatten)]
    remark: Remark,
    /// The page that helps.
    page: &'static str,
}

fn advise(remarks: Vec<Remark>) -> Vec<Alarm> {
    let advise = |remark: Remark| Alarm { page: find_page(&remark.text), remark };
    remarks.into_iter().map(advise).collect()
}

/// What the template sees.
#[derive(Serialize)]
struct View<'a> {
    cluster: &'a str,
    verdict: Verdict,
    facts: Vec<Fact>,
    remarks: [Remarks; 2],
    titles: [&'static str; TITLES.len()],
    rows: Vec<Line>,
    asked: &'a str,
    date: String,
    refresh: u32,
    style: &'static str,
}

#[derive(Serialize)]
struct Verdict {
    class: &'static str,
    /// For the browser's tab.
    short: &'static str,
    long: String,
}

#[derive(Serialize)]
struct Line {
    ready: bool,
    cells: Vec<String>,
}

/// Write the page of `table` as the node `asked` saw it at `now`, in seconds since 1970.
/// `vip` is the cluster's, if it has one.
///
/// # Errors
/// Only when the template is wrong, which a test would show.
pub fn write_page(table: &Table, vip: Option<&str>, asked: &str, now: u64) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    let rows: Vec<Line> =
        table.nodes.iter().map(|row| Line { ready: row.ready, cells: list_cells(row) }).collect();
    let remarks = [
        Remarks { title: "Not ready", class: "problems", items: advise(list_problems(table)) },
        Remarks { title: "Warnings", class: "warnings", items: advise(list_warnings(table)) },
    ];
    let verdict = match (table.ready, table.single) {
        (true, _) => Verdict { class: "ready", short: "Ready", long: "Ready".to_string() },
        (false, true) => Verdict {
            class: "not-ready",
            short: "Not HA",
            long: "A development cluster of one node: not highly available".to_string(),
        },
        (false, false) => {
            Verdict { class: "not-ready", short: "NOT ready", long: count_ready(table) }
        }
    };
    let view = View {
        cluster: &table.cluster,
        verdict,
        facts: list_facts(table, vip),
        remarks,
        titles: TITLES,
        rows,
        asked,
        date: format_date(now),
        refresh: REFRESH,
        style: STYLE,
    };
    environment.render_str(TEMPLATE, Serde(view)).context("writing the status page")
}

/// Who leads, for those roles that the cluster has.
fn list_facts(table: &Table, vip: Option<&str>) -> Vec<Fact> {
    let find = |is: &dyn Fn(&Row) -> bool| {
        let names: Vec<&str> = table
            .nodes
            .iter()
            .filter(|row| row.silent.is_none() && is(row))
            .map(|row| row.name.as_str())
            .collect();
        names.join(", ")
    };
    let has =
        |role: &str| table.nodes.iter().any(|row| row.roles.iter().any(|one| one.name() == role));
    let mut facts = Vec::new();
    let mut add = |what, who: String, at: &str| {
        let missing = who.is_empty();
        let who = match (missing, at) {
            (true, _) => "nobody".to_string(),
            (false, "") => who,
            (false, at) => format!("{who} ({at})"),
        };
        facts.push(Fact { what, who, missing });
    };
    if has("db") {
        add("PostgreSQL leader", find(&|row| row.postgres.starts_with("leader")), "");
        if !table.single {
            let standby = find(&|row| row.postgres.starts_with("sync_standby"));
            add("Synchronous standby", standby, "");
        }
        add("etcd leader", find(&|row| row.etcd == "leader"), "");
    }
    if has("cache") {
        add("Redis master", find(&|row| row.redis == "master"), "");
    }
    if let Some(vip) = vip.filter(|_| has("edge")) {
        add("VIP", find(&|row| row.vip), vip);
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::cluster::Role;

    fn row(name: &str, postgres: &str) -> Row {
        Row {
            name: name.into(),
            zone: "z".into(),
            roles: vec![Role::Db, Role::Edge],
            phase: None,
            ready: true,
            etcd: "follower".into(),
            postgres: postgres.into(),
            lag: None,
            redis: String::new(),
            web: String::new(),
            vip: name == "n2",
            version: "1".into(),
            silent: None,
            registered: true,
            reasons: Vec::new(),
            warnings: Default::default(),
        }
    }

    fn table(nodes: Vec<Row>) -> Table {
        let ready = nodes.iter().all(|row| row.ready);
        Table { cluster: "netbox".into(), ready, single: false, nodes }
    }

    #[test]
    fn leaders_are_named_and_what_is_missing_stands_out() {
        let table = table(vec![row("n1", "leader running"), row("n2", "sync_standby streaming")]);
        let facts = list_facts(&table, Some("10.0.0.10"));
        let told: Vec<(&str, &str, bool)> =
            facts.iter().map(|fact| (fact.what, fact.who.as_str(), fact.missing)).collect();
        assert_eq!(
            told,
            [
                ("PostgreSQL leader", "n1", false),
                ("Synchronous standby", "n2", false),
                ("etcd leader", "nobody", true),
                ("VIP", "n2 (10.0.0.10)", false),
            ]
        );
    }

    #[test]
    fn a_leader_that_does_not_answer_is_not_named() {
        let mut dead = row("n1", "leader running");
        dead.silent = Some("no route".into());
        let facts = list_facts(&table(vec![dead]), None);
        assert!(facts[0].missing);
    }

    #[test]
    fn what_came_from_outside_is_text() {
        let mut evil = row("<script>alert(1)</script>", "leader");
        evil.ready = false;
        evil.reasons = vec!["<img src=x onerror=alert(2)>\"'".into()];
        let page = write_page(&table(vec![evil]), None, "n1", 0).unwrap();
        assert!(!page.contains("<script") && !page.contains("<img"), "{page}");
        assert!(page.contains("&lt;img src=x onerror=alert(2)&gt;"));
    }

    #[test]
    fn a_page_asks_for_nothing_from_elsewhere() {
        let page = write_page(&table(vec![row("n1", "leader")]), None, "n1", 0).unwrap();
        assert!(!page.contains("http://") && !page.contains("https://"));
        assert!(!page.contains("src=") && !page.contains("@import") && !page.contains("url("));
    }
}
