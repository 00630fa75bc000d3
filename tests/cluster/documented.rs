//! docs/clusters.md against the reader: the same keys, and examples that work.

use std::collections::BTreeSet;

use crate::certificate::write_certificate;
use crate::project::Project;
use crate::{make_project, node};

const PAGE: &str = include_str!("../../docs/clusters.md");
/// Near to no key.
const UNKNOWN: &str = "zzzzzzzzzzzz = 1";

/// The keys that the page describes, with their examples.
fn read_page() -> Vec<(String, String)> {
    let body = PAGE.split("\n## ").find(|part| part.starts_with("`cluster.toml`")).unwrap();
    body.split("\n### `")
        .skip(1)
        .map(|part| {
            let (key, text) = part.split_once("`\n").expect("a heading with a key");
            let example = text.split("```toml\n").nth(1).expect("an example");
            (key.to_string(), example.split("```").next().unwrap().to_string())
        })
        .collect()
}

/// The keys that a table has, from what is said about an unknown one in it.
fn list_keys(project: &Project, text: &str) -> Vec<String> {
    project.write("cluster.toml", text);
    let said = project.run(&["cluster", "check"]).stderr;
    let (_, keys) = said.split_once("help: the keys are: ").expect(&said);
    keys.trim().split(", ").map(str::to_string).collect()
}

#[test]
fn every_key_is_documented_and_every_documented_key_exists() {
    let project = make_project();
    let mut known: BTreeSet<String> = list_keys(&project, UNKNOWN).into_iter().collect();
    for (table, header) in [
        ("node", "[[node]]"),
        ("storage", "[storage]"),
        ("external", "[external]"),
        ("external.postgres", "[external.postgres]"),
        ("external.redis", "[external.redis]"),
        ("backup", "[backup]"),
        ("certificate", "[certificate]"),
        ("tuning", "[tuning]"),
    ] {
        assert!(known.contains(table));
        let keys = list_keys(&project, &format!("{header}\n{UNKNOWN}"));
        known.extend(keys.iter().map(|key| format!("{table}.{key}")));
    }
    let documented: BTreeSet<String> = read_page().into_iter().map(|(key, _)| key).collect();
    assert_eq!(documented, known);
}

#[test]
fn every_key_has_an_example_that_uses_it_and_is_accepted() {
    let project = make_project();
    write_certificate(&project, "site", &["lab.test"], (-1, 90));
    for name in ["postgres-ca.pem", "redis-ca.pem"] {
        std::fs::copy(project.root().join("site.pem"), project.root().join(name)).unwrap();
    }
    for (key, example) in read_page() {
        let table: toml::Table = example.parse().unwrap();
        let mut value = &toml::Value::Table(table.clone());
        for part in key.split('.') {
            value = value.get(part).or_else(|| value.get(0)?.get(part)).expect(&key);
        }
        let mut text = String::new();
        for (key, needed) in [("name", "lab"), ("domain", "lab.test"), ("network", "192.0.2.0/24")]
        {
            if !table.contains_key(key) {
                text.push_str(&format!("{key} = \"{needed}\"\n"));
            }
        }
        text.push_str(&example);
        if !table.contains_key("node") {
            text.push_str(&node(11, "node").replace("10.0.0.", "192.0.2."));
        }
        project.write("cluster.toml", &text);
        let ran = project.run(&["cluster", "check"]);
        assert_eq!(ran.code, Some(0), "{key}:\n{text}\n{}", ran.stderr);
    }
}

#[test]
fn the_page_names_every_secret_with_its_roles() {
    for (name, roles) in stanchion::secrets::SECRETS {
        let row =
            PAGE.lines().find(|line| line.starts_with('|') && line.contains(&format!("`{name}`")));
        let said = row.expect(name).rsplit('|').nth(1).unwrap().trim().to_string();
        let roles: Vec<&str> = roles.iter().map(|role| role.name()).collect();
        let expected = if roles.len() == 4 { "all".to_string() } else { roles.join(", ") };
        assert_eq!(said, expected, "{name}");
    }
}
