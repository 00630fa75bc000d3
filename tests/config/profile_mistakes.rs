use std::fs;

use stanchion::config::Project;

use crate::Sandbox;

/// Lines of a profile's file, from line 3 on, and what is said about them.
fn check(lines: &str, expected: &str) {
    assert_eq!(Sandbox::with_profile(lines).mistake(), expected, "{lines}");
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest() {
    check(
        "layer = []",
        "unknown key `layer`\n  at: profiles/p.toml:3\n  why: a profile has no such key\n  help: did you mean `layers`?",
    );
    check(
        "[disk]\nsiez = \"8GiB\"",
        "unknown key `siez`\n  at: profiles/p.toml:4\n  why: `disk` has no such key\n  help: did you mean `size`?",
    );
}

#[test]
fn sizes_need_a_unit_and_must_leave_room() {
    check(
        "[disk]\nsize = 8",
        "`disk.size` must be a size in quotes with its unit such as \"8GiB\", not the number `8`\n  at: profiles/p.toml:4",
    );
    check(
        "[disk]\nslot = \"2GB\"",
        "bad size `2GB`\n  at: profiles/p.toml:4\n  help: write a whole number with its unit: `512MiB`, `8GiB` or `1TiB`",
    );
    check(
        "[disk]\nsize = \"4GiB\"\nesp = \"512MiB\"",
        "the disk is too small\n  at: profiles/p.toml:4\n  why: two slots and the ESP take 4608 MiB of 4096 MiB, and `/var` needs room too\n  help: raise `disk.size`, or lower `disk.slot`",
    );
}

#[test]
fn formats_are_known_and_named_once() {
    check(
        "formats = [\"qcow\"]",
        "there is no format `qcow`\n  at: profiles/p.toml:3\n  help: did you mean `qcow2`?",
    );
    check(
        "formats = [\"floppydisk\"]",
        "there is no format `floppydisk`\n  at: profiles/p.toml:3\n  help: the formats are: raw, qcow2",
    );
    check(
        "formats = [\"raw\", \"raw\"]",
        "the format `raw` is there twice\n  at: profiles/p.toml:3\n  why: line 3 has it already",
    );
    check("formats = []", "`formats` is empty\n  at: profiles/p.toml:3");
}

#[test]
fn a_profile_that_is_not_there_is_told_with_those_that_are() {
    let sandbox = Sandbox::new(&[
        ("profiles/db.toml", ""),
        ("profiles/web.toml", ""),
        ("profiles/README.md", "not a profile"),
    ]);
    let project = Project::find(sandbox.path()).unwrap();
    assert_eq!(project.list_profiles().unwrap(), ["db", "p", "web"]);
    let mistake = |name| project.load_profile(name).unwrap_err().to_string();
    assert_eq!(
        mistake("bd"),
        "there is no profile `bd`\n  why: profiles/ holds: db, p, web\n  help: did you mean `db`?"
    );
    assert_eq!(mistake("cache"), "there is no profile `cache`\n  why: profiles/ holds: db, p, web");
    assert_eq!(
        mistake("../layers/a/layer"),
        "there is no profile `../layers/a/layer`\n  why: profiles/ holds: db, p, web\n  help: a name has lower-case letters, digits and `-`, at most 60"
    );
}

#[test]
fn a_layer_that_is_not_there_is_told_with_the_line_that_asks_for_it() {
    let profile = "description = \"p\"\nlayers = [\n  \"a\",\n  \"bsae\",\n]\n";
    let sandbox = Sandbox::new(&[
        ("profiles/p.toml", profile),
        ("layers/base/layer.toml", "description = \"base\""),
    ]);
    assert_eq!(
        sandbox.mistake(),
        "there is no layer `bsae`\n  at: profiles/p.toml:4\n  why: layers/ holds: a, base\n  help: did you mean `base`?"
    );
    let sandbox = Sandbox::with_layer("requires = [\"zookeeper\"]");
    assert_eq!(
        sandbox.mistake(),
        "there is no layer `zookeeper`\n  at: layers/a/layer.toml:2\n  why: layers/ holds: a"
    );
    let sandbox = Sandbox::new(&[]);
    fs::remove_file(sandbox.path().join("layers/a/layer.toml")).unwrap();
    assert_eq!(
        sandbox.mistake(),
        "the layer `a` has no `layer.toml`\n  at: layers/a\n  help: write one with a `description`"
    );
    let sandbox = Sandbox::with_layer("requires = [\"../../x\"]");
    assert_eq!(
        sandbox.mistake(),
        "bad layer name `../../x`\n  at: layers/a/layer.toml:2\n  help: a name has lower-case letters, digits and `-`, at most 60"
    );
}

#[test]
fn a_circle_of_layers_is_shown() {
    let sandbox = Sandbox::new(&[
        ("layers/a/layer.toml", "description = \"a\"\nrequires = [\"b\"]"),
        ("layers/b/layer.toml", "description = \"b\"\nrequires = [\"c\"]"),
        ("layers/c/layer.toml", "description = \"c\"\n\nrequires = [\n\"d\",\n\"b\"]"),
        ("layers/d/layer.toml", "description = \"d\""),
    ]);
    assert_eq!(
        sandbox.mistake(),
        "the layers require each other in a circle\n  at: layers/c/layer.toml:5\n  why: b -> c -> b\n  help: remove one of them from `requires`"
    );
    assert_eq!(
        Sandbox::with_layer("requires = [\"a\"]").mistake(),
        "the layers require each other in a circle\n  at: layers/a/layer.toml:2\n  why: a -> a\n  help: remove one of them from `requires`"
    );
}

#[test]
fn a_profile_names_layers_once() {
    let sandbox =
        Sandbox::new(&[("profiles/p.toml", "description = \"p\"\nlayers = [\"a\",\n\"a\"]")]);
    assert_eq!(
        sandbox.mistake(),
        "the layer `a` is there twice\n  at: profiles/p.toml:3\n  why: line 2 has it already"
    );
    let sandbox = Sandbox::new(&[("profiles/p.toml", "description = \"p\"\nlayers = []")]);
    assert_eq!(sandbox.mistake(), "`layers` is empty\n  at: profiles/p.toml:2");
}

#[test]
fn two_layers_may_not_give_the_same_account_artifact_or_initrd() {
    let check = |first: &str, second: &str, expected: &str| {
        let sandbox = Sandbox::new(&[
            ("layers/a/layer.toml", &format!("description = \"a\"\nrequires = [\"b\"]\n{first}")),
            ("layers/b/layer.toml", &format!("description = \"b\"\n{second}")),
        ]);
        assert_eq!(sandbox.mistake(), expected);
    };
    check(
        "[[user]]\nname = \"x\"\nid = 980",
        "[[user]]\nname = \"y\"\nid = 980",
        "two users have the id 980\n  at: layers/a/layer.toml:4\n  why: layers/b/layer.toml:3 has it already",
    );
    check(
        "[[user]]\nname = \"x\"\nid = 980",
        "[[user]]\nname = \"x\"\nid = 981",
        "the user `x` is there twice\n  at: layers/a/layer.toml:4\n  why: layers/b/layer.toml:3 has it already",
    );
    check(
        "[[group]]\nname = \"x\"\nid = 980",
        "[[group]]\nname = \"x\"\nid = 981",
        "the group `x` is there twice\n  at: layers/a/layer.toml:4\n  why: layers/b/layer.toml:3 has it already",
    );
    check(
        "[[group]]\nname = \"x\"\nid = 980",
        "[[user]]\nname = \"y\"\nid = 980",
        "a user, and so its group, and a group have the id 980\n  at: layers/a/layer.toml:4\n  why: layers/b/layer.toml:3 has it already",
    );
    check(
        "[[user]]\nname = \"x\"\nid = 980",
        "[[group]]\nname = \"x\"\nid = 981",
        "`x` is both a user, which brings its group, and a group\n  at: layers/a/layer.toml:4\n  why: layers/b/layer.toml:3 has it already",
    );
    check(
        "[initrd]",
        "[initrd]\n",
        "two layers of the profile have `[initrd]`\n  at: layers/a/layer.toml:3\n  why: layers/b/layer.toml:2 has it already",
    );
    let artifact = format!(
        "[[artifact]]\nname = \"x\"\nurl = \"https://example.org/x\"\nsha256 = \"{}\"\npath = \"/opt/x\"",
        "00".repeat(32)
    );
    check(
        &artifact,
        &artifact,
        "the artifact `x` is there twice\n  at: layers/a/layer.toml:4\n  why: layers/b/layer.toml:3 has it already",
    );
}

#[test]
fn a_project_is_found_from_below_and_missed_elsewhere() {
    let sandbox = Sandbox::new(&[("layers/a/tree/etc/x", "")]);
    let root = sandbox.path().canonicalize().unwrap();
    assert_eq!(Project::find(&root.join("layers/a/tree")).unwrap().root, root);
    let elsewhere = tempfile::tempdir().unwrap();
    let elsewhere = elsewhere.path().canonicalize().unwrap();
    fs::create_dir(elsewhere.join("profiles")).unwrap();
    assert_eq!(
        Project::find(&elsewhere).unwrap_err().to_string(),
        format!(
            "there is no project here\n  at: {}\n  why: neither this directory nor one above it holds both `profiles/` and `layers/`\n  help: change to the project's directory, or name it with `--project DIR`",
            elsewhere.display()
        )
    );
    assert_eq!(
        Project::find("no-such-directory".as_ref()).unwrap_err().to_string(),
        "there is no directory `no-such-directory`"
    );
}
