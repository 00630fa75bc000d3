//! What every verb shows: help, completions, quiet, JSON, and no escape sequences where no
//! terminal is.

use crate::project::{Project, can_build, take_turn};

const VERBS: [&[&str]; 49] = [
    &[],
    &["build"],
    &["lock"],
    &["inspect"],
    &["diff"],
    &["profile"],
    &["profile", "list"],
    &["profile", "show"],
    &["why"],
    &["explain"],
    &["cluster"],
    &["cluster", "new"],
    &["cluster", "check"],
    &["cluster", "init"],
    &["seed"],
    &["status"],
    &["switchover"],
    &["renew-certificate"],
    &["backup"],
    &["backup", "list"],
    &["backup", "verify"],
    &["restore"],
    &["maintenance"],
    &["maintenance", "on"],
    &["maintenance", "off"],
    &["node"],
    &["node", "replace"],
    &["node", "reinit"],
    &["node", "force-quorum"],
    &["support-bundle"],
    &["doctor"],
    &["store"],
    &["store", "gc"],
    &["store", "path"],
    &["completions"],
    &["lab"],
    &["lab", "up"],
    &["lab", "status"],
    &["lab", "exec"],
    &["lab", "console"],
    &["lab", "logs"],
    &["lab", "kill"],
    &["lab", "stop"],
    &["lab", "start"],
    &["lab", "partition"],
    &["lab", "heal"],
    &["lab", "freeze"],
    &["lab", "thaw"],
    &["lab", "down"],
];

fn small() -> Project {
    Project::new(&[
        ("profiles/tiny.toml", "description = \"tiny one\"\nlayers = [\"a\"]\n"),
        ("layers/a/layer.toml", "description = \"a\"\n"),
    ])
}

#[test]
fn the_help_of_every_verb_has_an_example() {
    let project = small();
    for verb in VERBS {
        let ran = project.run(&[verb, &["--help"]].concat());
        ran.expect(0, &[]);
        let example = ran.stdout.split("Example").nth(1).unwrap_or_default();
        let start = ["stanchion", verb.first().copied().unwrap_or_default()].join(" ");
        assert!(example.contains(&start), "{verb:?}:\n{}", ran.stdout);
    }
    // No verb is left out above.
    let help = project.run(&["--help"]).stdout;
    let listed = help.split("Commands:").nth(1).unwrap().split("Options:").next().unwrap();
    for line in listed.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   ")) {
        let name = line.split_whitespace().next().unwrap();
        assert!(name == "help" || VERBS.iter().any(|verb| verb.first() == Some(&name)), "{name}");
    }
}

#[test]
fn completions_know_the_verbs_in_each_shell() {
    let project = small();
    for (shell, mark) in
        [("bash", "complete -F"), ("zsh", "#compdef stanchion"), ("fish", "complete -c stanchion")]
    {
        let ran = project.run(&["completions", shell]);
        ran.expect(0, &[]);
        for part in [mark, "build", "inspect", "debug-shell"] {
            assert!(ran.stdout.contains(part), "{shell} lacks `{part}`");
        }
    }
    project.run(&["completions", "tcsh"]).expect(2, &["bash", "zsh"]);
}

#[test]
fn json_is_one_object_a_line_and_ends_with_the_error() {
    let project = small();
    let ran = project.run(&["build", "tniy", "--json"]);
    assert_eq!(ran.code, Some(2));
    assert_eq!(ran.stderr, "");
    let events = ran.events();
    let last = events.last().unwrap();
    assert_eq!(last["event"], "error");
    assert_eq!(last["exit_code"], 2);
    assert!(last["text"].as_str().unwrap().contains("did you mean `tiny`?"));

    for args in [
        &["profile", "list"][..],
        &["profile", "show", "tiny"],
        &["store", "path"],
        &["store", "gc"],
    ] {
        let ran = project.run(&[args, &["--json"]].concat());
        ran.expect(0, &[]);
        assert_eq!(ran.events().len(), 1, "{args:?}: {}", ran.stdout);
        assert_eq!(ran.stderr, "", "{args:?}");
    }
    let listed = project.run(&["--json", "profile", "list"]).events();
    assert_eq!(
        (&listed[0]["name"], &listed[0]["description"]),
        (&"tiny".into(), &"tiny one".into())
    );
}

#[test]
fn a_build_is_quiet_when_told_and_speaks_json_when_told() {
    let _turn = take_turn();
    if !can_build() {
        return;
    }
    let project = Project::tiny("");
    project.copy_store();
    let ran = project.run(&["build", "tiny", "--offline", "--quiet"]);
    ran.expect(0, &[]);
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("", ""));
    for args in [&["lock", "-q", "--offline"][..], &["build", "-q", "--offline", "tiny"]] {
        let ran = project.run(args);
        ran.expect(0, &[]);
        assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("", ""));
    }

    project.write_extra("commands = [\"true\"]");
    let ran = project.run(&["build", "tiny", "--offline", "--json"]);
    ran.expect(0, &[]);
    assert_eq!(ran.stderr, "");
    let events = ran.events();
    assert!(events.iter().any(|event| event["event"] == "step" && event["step"] == "extra files"));
    let last = events.last().unwrap();
    assert_eq!((&last["event"], &last["profile"]), (&"built".into(), &"tiny".into()));
    let outputs = last["outputs"].as_array().unwrap();
    assert_eq!(outputs.len(), 2);
    for output in outputs {
        let path = project.root().join(output["path"].as_str().unwrap());
        if let Some(sha256) = output["sha256"].as_str() {
            let digest = stanchion::digest::Digest::of_file(&path).unwrap();
            assert_eq!(sha256, digest.to_string());
        }
    }
    assert!(outputs.iter().any(|output| output["sha256"].is_string()));
    let ran = project.run(&["build", "tiny", "--offline", "--locked"]);
    ran.expect(0, &["cached", "nothing had changed"]);
}
