//! docs/profiles-and-layers.md against the reader: the same keys, and examples that work.

use std::collections::BTreeSet;

use crate::Sandbox;

const PAGE: &str = include_str!("../../docs/profiles-and-layers.md");
const PROFILE: &str = "`profiles/<name>.toml`";
const LAYER: &str = "`layers/<name>/layer.toml`";
/// Near to no key.
const UNKNOWN: &str = "zzzzzzzzzzzz = 1";

/// The keys that the page describes below one of its headings, with their examples.
fn read_page(section: &str) -> Vec<(String, Vec<String>)> {
    let body = PAGE.split("\n## ").find(|part| part.starts_with(section)).expect("the section");
    body.split("\n### `")
        .skip(1)
        .map(|part| {
            let (key, text) = part.split_once("`\n").expect("a heading with a key");
            let examples = text.split("```toml\n").skip(1);
            let examples = examples.map(|text| text.split("```").next().unwrap().to_string());
            (key.to_string(), examples.collect())
        })
        .collect()
}

fn sandbox(section: &str, lines: &str) -> Sandbox {
    if section == PROFILE { Sandbox::with_profile(lines) } else { Sandbox::with_layer(lines) }
}

/// The keys that a table has, from what is said about an unknown one in it.
fn list_keys(section: &str, lines: &str) -> Option<Vec<String>> {
    let message = sandbox(section, lines).mistake();
    let (_, keys) = message.split_once("help: the keys are: ")?;
    Some(keys.split(", ").map(str::to_string).collect())
}

/// All keys that the reader knows, tables inside with dots.
fn list_all_keys(section: &str) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for key in list_keys(section, UNKNOWN).expect("the keys of the file") {
        // A table, an array of tables, or tables under names of the user's choice.
        let tables = [
            (format!("[{key}]\n{UNKNOWN}"), format!("{key}.")),
            (format!("[[{key}]]\n{UNKNOWN}"), format!("{key}.")),
            (format!("[{key}]\n\"/x\" = {{ {UNKNOWN} }}"), format!("{key}.PATH.")),
        ];
        if key != "variables" {
            let inner = tables
                .iter()
                .find_map(|(lines, prefix)| Some((list_keys(section, lines)?, prefix)));
            let (inner, prefix) = inner.unwrap_or((Vec::new(), &key));
            all.extend(inner.iter().map(|inner| format!("{prefix}{inner}")));
        }
        all.insert(key);
    }
    all
}

#[test]
fn every_key_is_documented_and_every_documented_key_exists() {
    for (section, some) in [(PROFILE, "disk.slot"), (LAYER, "owners.PATH.mode")] {
        let documented = read_page(section).into_iter().map(|(key, _)| key);
        let documented: BTreeSet<String> = documented.collect();
        assert!(documented.contains(some));
        assert_eq!(documented, list_all_keys(section));
    }
}

#[test]
fn every_key_has_an_example_that_uses_it_and_is_accepted() {
    for section in [PROFILE, LAYER] {
        for (key, examples) in read_page(section) {
            assert!(!examples.is_empty(), "`{key}` has no example");
            for example in examples {
                let table: toml::Table = example.parse().unwrap();
                assert!(uses(&toml::Value::Table(table.clone()), &key), "{key}: {example}");
                accept(section, &example, &table);
            }
        }
    }
}

fn uses(value: &toml::Value, key: &str) -> bool {
    let (first, rest) = match key.split_once('.') {
        Some((first, rest)) => (first, Some(rest)),
        None => (key, None),
    };
    let inner: Vec<&toml::Value> = match value {
        toml::Value::Table(table) if first == "PATH" => table.values().collect(),
        toml::Value::Table(table) => table.get(first).into_iter().collect(),
        toml::Value::Array(items) => return items.iter().any(|item| uses(item, key)),
        _ => return false,
    };
    inner.into_iter().any(|value| rest.is_none_or(|rest| uses(value, rest)))
}

/// Load an example, with the keys that a file needs and the files that it speaks of.
fn accept(section: &str, example: &str, table: &toml::Table) {
    let mut lines = String::new();
    for (key, needed) in [("description", "\"x\""), ("layers", "[\"a\"]")] {
        if !table.contains_key(key) && (key == "description" || section == PROFILE) {
            lines.push_str(&format!("{key} = {needed}\n"));
        }
    }
    let path = if section == PROFILE { "profiles/p.toml" } else { "layers/a/layer.toml" };
    let sandbox = Sandbox::new(&[(path, &format!("{lines}{example}"))]);
    for key in ["layers", "requires"] {
        let names = table.get(key).and_then(toml::Value::as_array).into_iter().flatten();
        for name in names.map(|name| name.as_str().unwrap()) {
            sandbox.write(&format!("layers/{name}/layer.toml"), "description = \"x\"");
        }
    }
    let owned = table.get("owners").and_then(toml::Value::as_table).into_iter().flatten();
    for (path, _) in owned {
        sandbox.write(&format!("layers/a/tree{path}"), "");
    }
    sandbox.profile();
}
