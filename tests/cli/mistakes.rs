//! Mistakes in what the user wrote, found before anything is fetched.

use crate::project::{Project, load_lock};

fn project(files: &[(&str, &str)]) -> Project {
    let project = Project::new(&[
        ("profiles/tiny.toml", "description = \"t\"\nlayers = [\"a\"]\n"),
        ("layers/a/layer.toml", "description = \"a\"\n"),
    ]);
    files.iter().for_each(|(path, text)| project.write(path, text));
    project
}

/// What `build tiny --offline` says of the mistake.
#[track_caller]
fn check(files: &[(&str, &str)], expected: &str) {
    let ran = project(files).run(&["build", "tiny", "--offline"]);
    ran.expect(2, &[]);
    assert_eq!(ran.stderr, format!("error: {expected}\n"));
    assert_eq!(ran.stdout, "");
}

#[test]
fn an_unknown_profile_is_answered_with_the_nearest() {
    let ran = project(&[]).run(&["build", "tniy"]);
    assert_eq!(
        ran.expect(2, &[]).stderr,
        "error: there is no profile `tniy`\n  why: profiles/ holds: tiny\n  help: did you mean `tiny`?\n"
    );
}

#[test]
fn broken_toml_is_shown_with_file_and_line() {
    check(
        &[("profiles/tiny.toml", "description = \"t\"\nlayers = [\"a\"\n")],
        "TOML syntax: unclosed array, expected `]`\n  at: profiles/tiny.toml:2",
    );
}

#[test]
fn an_unknown_key_of_a_layer_is_answered_with_the_nearest() {
    check(
        &[("layers/a/layer.toml", "description = \"a\"\n\npacakges = []\n")],
        "unknown key `pacakges`\n  at: layers/a/layer.toml:3\n  why: a layer has no such key\n  help: did you mean `packages`?",
    );
}

#[test]
fn a_missing_layer_is_answered_with_the_nearest() {
    check(
        &[
            ("profiles/tiny.toml", "description = \"t\"\nlayers = [\"bsae\"]\n"),
            ("layers/base/layer.toml", "description = \"b\"\n"),
        ],
        "there is no layer `bsae`\n  at: profiles/tiny.toml:2\n  why: layers/ holds: a, base\n  help: did you mean `base`?",
    );
}

#[test]
fn layers_in_a_circle_are_shown() {
    check(
        &[
            ("layers/a/layer.toml", "description = \"a\"\nrequires = [\"b\"]\n"),
            ("layers/b/layer.toml", "description = \"b\"\nrequires = [\"a\"]\n"),
        ],
        "the layers require each other in a circle\n  at: layers/b/layer.toml:2\n  why: a -> b -> a\n  help: remove one of them from `requires`",
    );
}

#[test]
fn there_must_be_a_project() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = project(&[]).command(&["build", "tiny"]);
    command.current_dir(&folder);
    crate::project::run(command).expect(2, &["there is no project here", "--project DIR"]);
}

#[test]
fn a_lock_that_was_edited_badly_is_no_crash() {
    let project = project(&[("stanchion.lock", "version = 1\nepoch = \"x\"\n")]);
    let ran = project.run(&["build", "tiny", "--offline"]);
    ran.expect(
        2,
        &["the lock cannot be used", "stanchion.lock", "restore it from version control"],
    );
}

#[test]
fn a_lock_that_lacks_a_set_is_refused_when_it_must_not_change() {
    let project = project(&[]);
    let ran = project.run(&["build", "tiny", "--locked", "--offline"]);
    ran.expect(2, &["the lock does not hold", "why: there is none", "run `stanchion lock`"]);
    load_lock().save(&project.root().join("stanchion.lock")).unwrap();
    let ran = project.run(&["build", "tiny", "--locked", "--offline"]);
    ran.expect(2, &["the lock does not hold", "why: these changed: a"]);
    let ran = project.run(&["build", "tiny", "--offline"]);
    ran.expect(2, &["why: these changed: a", "run `stanchion lock` with a network"]);
}

#[test]
fn flags_that_do_not_exist_end_with_2() {
    let ran = project(&[]).run(&["build", "--lokced"]);
    ran.expect(2, &["--lokced", "--locked"]);
    project(&[]).run(&["bulid"]).expect(2, &["build"]);
    project(&[]).run(&["store", "gc", "--keep", "many"]).expect(2, &["20G"]);
    project(&[]).run(&["build", "--format", "vdi"]).expect(2, &["raw", "qcow2"]);
}
