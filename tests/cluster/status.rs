use std::fs;

use crate::project::Project;
use crate::{make_project, three};

fn make_cluster() -> Project {
    let project = make_project();
    project.write("cluster.toml", &three());
    project.run(&["cluster", "init"]).expect(0, &[]);
    project
}

#[test]
fn what_the_operator_lacks_is_told_with_what_to_do() {
    let project = make_project();
    project.run(&["status"]).expect(2, &["there is no cluster file `cluster.toml`"]);
    project.write("cluster.toml", &three());
    project.run(&["status"]).expect(
        2,
        &["there is no operator's certificate for `lab`", "help: name the cluster's directory"],
    );
    project.run(&["cluster", "init"]).expect(0, &[]);
    project
        .run(&["status", "--node", "n11"])
        .expect(2, &["the cluster `lab` has no node `n11`", "did you mean `n1`?"]);
    fs::write(project.root().join("lab/operator.pem"), "nonsense").unwrap();
    project
        .run(&["status"])
        .expect(2, &["the operator's certificate cannot be used", "lab/operator.pem"]);
    fs::remove_file(project.root().join("lab/operator.key")).unwrap();
    project.run(&["status"]).expect(2, &["there is no lab/operator.key", "from a copy"]);
}

#[test]
fn the_certificate_of_another_cluster_is_not_shown_to_this_ones_nodes() {
    let project = make_cluster();
    project.write("other.toml", &three().replacen("\"lab\"", "\"other\"", 1));
    project
        .run(&["status", "--cluster", "other.toml", "--dir", "lab"])
        .expect(2, &["lab belongs to another cluster", "that of `lab`, and the file says `other`"]);
}

#[test]
fn when_no_node_answers_each_is_named_with_why() {
    let project = make_cluster();
    // Neither the CA's key nor the secrets are needed to look.
    for name in ["ca.key", "secrets.toml"] {
        fs::remove_file(project.root().join("lab").join(name)).unwrap();
    }
    let ran = project.run(&["status"]);
    ran.expect(2, &["no node of `lab` answers", "n1: 10.0.0.1:7443", "n3: ", "port 7443"]);
    let ran = project.run(&["status", "--json", "--node", "n2"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(2), ""));
    let events = ran.events();
    assert_eq!((&events[0]["event"], &events[0]["exit_code"]), (&"error".into(), &2.into()));
}
