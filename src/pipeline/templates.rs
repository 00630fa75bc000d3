//! The templates of a profile's layers: those of `tree/`, `skeleton/`, `build/` and `initrd/` are
//! rendered here, those of `boot/` on the node.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::config::profile::Profile;
use crate::config::tree::TreeKind;
use crate::error::UserError;
use crate::template;

/// Find what is wrong with the templates before anything is fetched: render those that
/// the builder renders, and check the others' syntax.
///
/// # Errors
/// A [`UserError`] with the template's file and line.
pub fn check(profile: &Profile) -> Result<()> {
    for layer in &profile.layers {
        let initrd = layer.initrd.iter().flat_map(|initrd| &initrd.files);
        let build = layer.build.iter().flat_map(|build| &build.files);
        for file in layer.skeleton.iter().chain(&layer.files).chain(build).chain(initrd) {
            if let TreeKind::File { source, template: true } = &file.kind {
                render(profile, source)?;
            }
        }
        for file in &layer.boot {
            if let TreeKind::File { source, .. } = &file.kind
                && source.extension().is_some_and(|extension| extension == "j2")
            {
                template::check_syntax(&read(profile, source)?, source)?;
            }
        }
    }
    Ok(())
}

/// The template `source` (relative to the project's root) with the profile's variables.
pub fn render(profile: &Profile, source: &Path) -> Result<String> {
    template::render(&read(profile, source)?, source, &profile.variables)
}

fn read(profile: &Profile, source: &Path) -> Result<String> {
    let bytes = fs::read(profile.root.join(source))
        .with_context(|| format!("reading {}", source.display()))?;
    String::from_utf8(bytes).map_err(|error| {
        let line = 1 + error.as_bytes()[..error.utf8_error().valid_up_to()]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count();
        UserError::new("the template is not UTF-8 text").at(source, line).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Project;
    use crate::error::exit_code;

    /// What is said about a project whose one layer has this file.
    fn check_file(path: &str, text: &[u8]) -> Result<()> {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("layers/a").join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, text).unwrap();
        fs::create_dir(root.path().join("profiles")).unwrap();
        let profile = "description = \"p\"\nlayers = [\"a\"]\nvariables.port = 2379\n";
        fs::write(root.path().join("profiles/p.toml"), profile).unwrap();
        let layer = "description = \"a\"\n[initrd]\n[build]\nkeep = [\"/opt/x\"]\n";
        fs::write(root.path().join("layers/a/layer.toml"), layer).unwrap();
        check(&Project::find(root.path()).unwrap().load_profile("p").unwrap())
    }

    fn explain(path: &str, text: &[u8]) -> String {
        let error = check_file(path, text).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
        error.to_string()
    }

    #[test]
    fn what_the_builder_renders_must_have_its_variables() {
        for folder in ["tree", "skeleton", "build", "initrd"] {
            let path = format!("{folder}/etc/x.j2");
            check_file(&path, b"{{ port }}\n").unwrap();
            assert_eq!(
                explain(&path, b"\n{{ prot }}\n"),
                format!(
                    "undefined variable `prot`\n  at: layers/a/{path}:2\n  help: did you mean `port`?"
                )
            );
        }
    }

    #[test]
    fn what_the_node_renders_needs_no_variables_yet_but_right_syntax() {
        check_file("boot/etc/x.j2", b"{{ node.address }}\n").unwrap();
        check_file("boot/etc/x", b"{% plain text\n").unwrap();
        let message = explain("boot/etc/x.j2", b"\n{% if %}\n");
        assert!(message.starts_with("template syntax: "), "{message}");
        assert!(message.contains("\n  at: layers/a/boot/etc/x.j2:2"), "{message}");
    }

    #[test]
    fn a_template_that_is_no_text_is_told_with_its_line() {
        for folder in ["tree", "boot"] {
            assert_eq!(
                explain(&format!("{folder}/etc/x.j2"), b"a\n\xff"),
                format!("the template is not UTF-8 text\n  at: layers/a/{folder}/etc/x.j2:2")
            );
        }
    }
}
