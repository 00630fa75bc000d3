//! Copies of this project, for tests that build from them.

use std::fs;
use std::path::Path;

/// Copy what a build reads of the repository.
pub fn copy_project(to: &Path) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR"));
    if to.exists() {
        fs::remove_dir_all(to).unwrap();
    }
    fs::create_dir_all(to).unwrap();
    for name in ["layers", "profiles", "stanchion.lock"] {
        copy_tree(&from.join(name), &to.join(name));
    }
}

/// Layers of the role web in the profile `node`.
const WEB_LAYERS: [&str; 3] = ["web-proxy", "nginx", "netbox"];

/// Take the role web from the profile `node` of a copy, for machines that cannot have NetBox.
pub fn leave_web_out(folder: &Path) {
    let path = folder.join("profiles/node.toml");
    let text = fs::read_to_string(&path).unwrap();
    let is_web = |line: &str| WEB_LAYERS.iter().any(|layer| line.trim() == format!("\"{layer}\","));
    let kept: Vec<&str> = text.lines().filter(|line| !is_web(line)).collect();
    assert_eq!(kept.len() + WEB_LAYERS.len(), text.lines().count(), "{text}");
    fs::write(&path, kept.join("\n") + "\n").unwrap();
}

pub fn copy_tree(from: &Path, to: &Path) {
    let kind = fs::symlink_metadata(from).unwrap();
    if kind.is_symlink() {
        std::os::unix::fs::symlink(fs::read_link(from).unwrap(), to).unwrap();
    } else if kind.is_dir() {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let name = entry.unwrap().file_name();
            copy_tree(&from.join(&name), &to.join(&name));
        }
    } else {
        fs::copy(from, to).unwrap();
    }
}
