//! `stanchion explain` and `stanchion build --timings`.

use std::collections::BTreeMap;

use crate::project::{Project, can_build, take_turn};

/// What is said of each step: whether it is cached, and its changes.
fn explain(project: &Project) -> BTreeMap<String, (bool, Vec<String>)> {
    let ran = project.run(&["explain", "tiny", "--offline", "--json"]);
    ran.expect(0, &[]);
    let steps = ran.events().into_iter().filter(|event| event["changes"].is_array());
    let read = |step: serde_json::Value| {
        let changes = step["changes"].as_array().unwrap().iter();
        let changes = changes.map(|change| change.as_str().unwrap().to_string()).collect();
        (step["step"].as_str().unwrap().to_string(), (step["cached"].as_bool().unwrap(), changes))
    };
    steps.map(read).collect()
}

#[test]
fn every_change_is_named_where_it_counts_and_nowhere_else() {
    let _turn = take_turn();
    if !can_build() {
        return;
    }
    let project = Project::tiny("commands = [\"true\"]");
    project.copy_store();
    project.write("layers/extra/tree/usr/share/extra/text", "before");
    let ran = project.run(&["build", "tiny", "--offline", "--timings"]);
    ran.expect(0, &[]);
    assert!(ran.stdout.contains("* extra files"), "{}", ran.stdout);
    assert!(ran.stdout.contains("critical path (*): "), "{}", ran.stdout);
    let steps = explain(&project);
    assert!(steps.len() >= 6, "{steps:?}");
    assert!(steps.values().all(|(cached, changes)| *cached && changes.is_empty()), "{steps:?}");

    project.write("layers/extra/tree/usr/share/extra/text", "after");
    project.write("layers/extra/tree/usr/share/extra/more", "");
    project.write_extra("commands = [\"true\", \"true\"]");
    let steps = explain(&project);
    for (name, (cached, changes)) in &steps {
        let expected: &[&str] = match name.as_str() {
            "extra files" => &["command changed", "/usr/share/extra/more", "/usr/share/extra/text"],
            "image" => &["extra files changed"],
            _ => &[],
        };
        assert_eq!(*cached, expected.is_empty(), "{name}: {changes:?}");
        for part in expected {
            assert!(changes.iter().any(|change| change.contains(part)), "{part}: {changes:?}");
        }
        if expected.is_empty() {
            assert!(changes.is_empty(), "{name}: {changes:?}");
        }
    }

    // What the store has lost is no change.
    project.run(&["build", "tiny", "--offline"]).expect(0, &[]);
    std::fs::remove_dir_all(project.store().join("steps/initrd")).unwrap();
    assert_eq!(explain(&project)["initrd"], (false, Vec::new()));
    let ran = project.run(&["explain", "tiny", "--offline"]);
    assert!(ran.stdout.contains("the store has lost it"), "{}", ran.stdout);
}
