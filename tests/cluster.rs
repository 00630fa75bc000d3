//! The cluster file, the cluster's directory and the seeds, as a user meets them.

#[path = "cluster/certificate.rs"]
mod certificate;
#[path = "cluster/checked.rs"]
mod checked;
#[path = "cluster/documented.rs"]
mod documented;
#[path = "cluster/made.rs"]
mod made;
#[path = "cluster/mistakes.rs"]
mod mistakes;
#[path = "support/project.rs"]
#[allow(dead_code, reason = "other tests build images with it")]
mod project;
#[path = "cluster/status.rs"]
mod status;

use crate::project::Project;

/// The file's keys before its nodes.
pub const HEAD: &str = "name = \"lab\"\ndomain = \"lab.test\"\nnetwork = \"10.0.0.0/24\"\n\
    vip = \"10.0.0.100\"\n";

/// A project with a profile for each role, `node` for all but web, and `none` for none.
pub fn make_project() -> Project {
    let mut files = Vec::new();
    for role in ["db", "cache", "web", "edge"] {
        files.push((
            format!("layers/{role}/layer.toml"),
            format!("description = \"{role}\"\nrole = \"{role}\"\n"),
        ));
        files.push((format!("profiles/{role}.toml"), profile(&[role])));
    }
    files.push(("layers/plain/layer.toml".into(), "description = \"plain\"\n".into()));
    files.push(("profiles/none.toml".into(), profile(&["plain"])));
    files.push(("profiles/node.toml".into(), profile(&["plain", "edge", "cache", "db"])));
    let files: Vec<(&str, &str)> =
        files.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
    Project::new(&files)
}

fn profile(layers: &[&str]) -> String {
    format!("description = \"p\"\nlayers = {layers:?}\n")
}

/// The table of the node `n<number>`, each in a zone of its own.
pub fn node(number: u8, profile: &str) -> String {
    format!(
        "[[node]]\nname = \"n{number}\"\naddress = \"10.0.0.{number}\"\nzone = \"z{number}\"\nprofile = \"{profile}\"\n"
    )
}

/// A good cluster of three.
pub fn three() -> String {
    let nodes: String = (1..=3).map(|number| node(number, "node")).collect();
    format!("{HEAD}{nodes}")
}
