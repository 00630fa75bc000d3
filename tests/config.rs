//! Profiles and layers as a user writes them: what they resolve to, and what is said
//! about each mistake.

#[path = "config/documented.rs"]
mod documented;
#[path = "config/hostile.rs"]
mod hostile;
#[path = "config/layer_mistakes.rs"]
mod layer_mistakes;
#[path = "config/profile_mistakes.rs"]
mod profile_mistakes;
#[path = "config/resolved.rs"]
mod resolved;
#[path = "config/tree_mistakes.rs"]
mod tree_mistakes;

use std::fs;
use std::path::Path;

use stanchion::config::{Profile, Project};
use stanchion::error::exit_code;
use tempfile::TempDir;

/// A project in a directory of its own.
struct Sandbox {
    directory: TempDir,
}

impl Sandbox {
    /// Files by path and text. What a project needs and is not given is added: a profile
    /// `p` of the layer `a`, and the layer `a`.
    fn new(files: &[(&str, &str)]) -> Self {
        let sandbox = Sandbox { directory: TempDir::new().unwrap() };
        sandbox.write("profiles/p.toml", "description = \"p\"\nlayers = [\"a\"]\n");
        sandbox.write("layers/a/layer.toml", "description = \"a\"\n");
        files.iter().for_each(|(path, text)| sandbox.write(path, text));
        sandbox
    }

    /// A project whose layer `a` has these lines after its description.
    fn with_layer(lines: &str) -> Self {
        Sandbox::new(&[("layers/a/layer.toml", &format!("description = \"a\"\n{lines}"))])
    }

    /// A project whose profile `p` has these lines after its description and layers.
    fn with_profile(lines: &str) -> Self {
        let text = format!("description = \"p\"\nlayers = [\"a\"]\n{lines}");
        Sandbox::new(&[("profiles/p.toml", &text)])
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn write(&self, path: &str, text: impl AsRef<[u8]>) {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn load(&self) -> anyhow::Result<Profile> {
        Project::find(self.path())?.load_profile("p")
    }

    fn profile(&self) -> Profile {
        self.load().unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// The message about the mistake in the profile `p`; it must be the user's.
    fn mistake(&self) -> String {
        let error = self.load().expect_err("the profile has a mistake");
        assert_eq!(exit_code(&error), 2, "{error:#}");
        error.to_string()
    }
}
