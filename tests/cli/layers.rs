//! Layers that fail while they are built, over Debian's real base.

use crate::project::{Project, TINY, add_set, can_build, load_lock, take_turn};

/// A project with a store in which all below `extra` is built.
fn project(extra: &str) -> Option<Project> {
    can_build().then(|| {
        let project = Project::tiny(extra);
        project.copy_store();
        project
    })
}

#[test]
fn a_failing_command_shows_its_layer_itself_and_the_end_of_what_it_said() {
    let _turn = take_turn();
    let command = "seq -f 'line %g' 100; echo boom >&2; exit 3";
    let Some(project) = project(&format!("commands = [\"true\", \"{command}\"]")) else { return };
    let ran = project.run(&["build", "tiny", "--offline"]);
    ran.expect(
        2,
        &[
            "building profile `tiny`",
            &format!("a command failed in layer `extra`: {command}"),
            "ended with exit code 3",
            "           line 62\n",
            "           line 100\n",
            "           boom\n",
            "`stanchion build --debug-shell PROFILE` opens a shell in that state",
        ],
    );
    ran.expect_not("line 61\n");
    assert!(!project.out().join("tiny.raw").exists());
    assert_eq!(std::fs::read_dir(project.out()).unwrap().count(), 0);
}

#[test]
fn a_unit_that_does_not_exist_is_named() {
    let _turn = take_turn();
    let Some(project) = project("[units]\nenable = [\"no-such.service\"]") else { return };
    project.run(&["build", "tiny", "--offline"]).expect(
        2,
        &["`systemctl enable` failed in layer `extra`", "no-such.service", "does not exist"],
    );
}

#[test]
fn an_undefined_variable_is_shown_with_file_and_line() {
    let _turn = take_turn();
    let Some(project) = project("[variables]\nname = \"x\"") else { return };
    project.write("layers/extra/tree/etc/x.conf.j2", "first\nsecond {{ nmae }}\n");
    project
        .run(&["build", "tiny", "--offline"])
        .expect(2, &["layers/extra/tree/etc/x.conf.j2:2", "nmae"]);
    project.write("layers/extra/tree/etc/x.conf.j2", "{% if name %}\n");
    project.run(&["build", "tiny", "--offline"]).expect(2, &["layers/extra/tree/etc/x.conf.j2:"]);
}

#[test]
fn a_file_of_an_unknown_owner_is_named() {
    let _turn = take_turn();
    let Some(project) = project("[owners]\n\"/etc/x.conf\" = { owner = \"nobdoy\" }") else {
        return;
    };
    project.write("layers/extra/tree/etc/x.conf", "x\n");
    project.run(&["build", "tiny", "--offline"]).expect(2, &["/etc/x.conf", "nobdoy"]);
}

#[test]
fn profiles_that_fail_do_not_keep_the_others_from_being_built() {
    let _turn = take_turn();
    let Some(project) = project("") else { return };
    project.write("profiles/broken.toml", "description = \"b\"\nlayers = [\"bsae\"]\n");
    project.write("profiles/failing.toml", &TINY.replace("extra", "failing"));
    project.write("layers/failing/layer.toml", "description = \"f\"\ncommands = [\"exit 7\"]\n");
    let mut lock = load_lock();
    for name in ["base+kernel+extra", "base+kernel+failing"] {
        add_set(&mut lock, name, Some("base+kernel"), &[], false);
    }
    lock.save(&project.root().join("stanchion.lock")).unwrap();
    project.write("profiles/unlocked.toml", &TINY.replace("extra", "unlocked"));
    project.write("layers/unlocked/layer.toml", "description = \"u\"\npackages = [\"hello\"]\n");
    let args = ["build", "--offline", "broken", "failing", "unlocked", "tiny", "tiny"];
    let ran = project.run(&args);
    ran.expect(
        2,
        &[
            "tiny.raw",
            "error: 3 of 4 profiles failed",
            "unlocked: the lock does not hold what the profiles ask for",
            "these changed: base+kernel+unlocked",
            "broken: there is no layer `bsae`",
            "failing: building profile `failing`",
            "a command failed in layer `failing`: exit 7",
        ],
    );
    assert!(project.out().join("tiny.qcow2").exists());
    let ran = project.run(&[&args[..], &["--json"]].concat());
    assert_eq!(ran.code, Some(2));
    let events = ran.events();
    let kinds: Vec<_> = events.iter().rev().take(2).map(|event| event["event"].clone()).collect();
    assert_eq!(kinds, ["error", "built"]);
    assert!(events.last().unwrap()["text"].as_str().unwrap().contains("3 of 4 profiles failed"));
}
