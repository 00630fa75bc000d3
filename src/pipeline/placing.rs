//! The files of a layer as they are laid into a root: templates rendered, all in the key.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::templates;
use crate::config::profile::Profile;
use crate::config::tree::{TreeFile, TreeKind};
use crate::digest::{Digest, Key};
use crate::rootfs::layer::{Placed, PlacedKind};

/// Describe files and add each to `key`. Templates are rendered; with
/// `scratch` the results are written there.
pub fn place(
    profile: &Profile,
    files: &[TreeFile],
    scratch: Option<&Path>,
    key: &mut Key,
) -> Result<Vec<Placed>> {
    let mut placed = Vec::new();
    for (number, file) in files.iter().enumerate() {
        let name = file.target.display();
        let kind = match &file.kind {
            TreeKind::File { source, template: true } => {
                let text = templates::render(profile, source)?;
                key.add(format!("file {name}"), &text);
                let rendered = match scratch {
                    Some(scratch) => {
                        let rendered = scratch.join(format!("rendered-{number}"));
                        fs::write(&rendered, text)
                            .with_context(|| format!("writing {}", rendered.display()))?;
                        rendered
                    }
                    None => source.clone(),
                };
                PlacedKind::File(rendered)
            }
            TreeKind::File { source, template: false } => {
                let source = profile.root.join(source);
                key.add(format!("file {name}"), Digest::of_file(&source)?.as_bytes());
                PlacedKind::File(source)
            }
            TreeKind::Symlink(to) => {
                key.add(format!("link {name}"), to);
                PlacedKind::Link(to.into())
            }
            TreeKind::Directory { keep_existing } => {
                key.add(format!("directory {name}"), [u8::from(*keep_existing)]);
                PlacedKind::Directory { keep_existing: *keep_existing }
            }
        };
        key.add(
            format!("owner and mode {name}"),
            format!("{}:{} {:o}", file.owner, file.group, file.mode),
        );
        placed.push(Placed {
            target: file.target.clone(),
            kind,
            mode: file.mode,
            owner: file.owner.clone(),
            group: file.group.clone(),
        });
    }
    Ok(placed)
}
