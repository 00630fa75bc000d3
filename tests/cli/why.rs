//! `stanchion why`.

use crate::project::{Project, can_build, take_turn};

#[test]
fn a_package_has_a_chain_of_reasons() {
    let _turn = take_turn();
    if !can_build() {
        return;
    }
    let project = Project::tiny("");
    project.link_downloads();
    let ran = project.run(&["why", "tiny", "libsystemd0", "--offline"]);
    ran.expect(0, &[]);
    for part in ["is in layer base", "  layer base asks for ", "is in the initrd of layer kernel"] {
        assert!(ran.stdout.contains(part), "{}", ran.stdout);
    }
    let ran = project.run(&["why", "tiny", "dpkg", "--offline", "--json"]);
    let found = ran.expect(0, &[]).events().remove(0);
    assert_eq!(found["chain"][0]["root"], "essential");
}

#[test]
fn a_package_that_is_not_there_and_a_lock_that_is_too_old_are_told() {
    let project = Project::tiny("");
    project
        .run(&["why", "tiny", "libsystemd", "--offline"])
        .expect(2, &["`libsystemd` is not in `tiny`", "did you mean `libsystemd0`?"]);
    project.write_extra("packages = [\"hello\"]");
    project.run(&["why", "tiny", "dpkg", "--offline"]).expect(2, &["run `stanchion lock`"]);
    std::fs::remove_file(project.root().join("stanchion.lock")).unwrap();
    project.run(&["why", "tiny", "dpkg"]).expect(2, &["nothing is locked yet"]);
}
