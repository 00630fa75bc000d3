//! The merged tree of several layers, as overlayfs would show it.
//!
//! mkfs.erofs can merge too, but up to 1.9.1 it forgets a whiteout or an opaque folder in
//! a middle layer when a layer above has the same folder again, and what had been removed
//! comes back; and it gives the root folder the mode 0777.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context, Result, ensure};

use super::erofs_read::{Attribute, Erofs, Inode};

/// Folders inside folders; a path has at most 4096 bytes anyway.
const MAX_DEPTH: usize = 512;
const TRUSTED: u8 = 4;
const USER: u8 = 1;

/// Something in the merged tree; several names may stand for one.
#[derive(Debug)]
pub struct Node {
    /// The layer whose owner, mode, attributes and content it has, counted from 0.
    pub layer: usize,
    pub inode: Inode,
    /// Without those of overlayfs.
    pub attributes: Vec<Attribute>,
    /// The target of a symbolic link.
    pub target: Vec<u8>,
    /// Names in a folder, and their nodes' places in the list.
    pub children: BTreeMap<Vec<u8>, usize>,
    /// The folder that a folder is in; the root is in itself.
    pub parent: usize,
    pub links: u32,
}

/// Merge layers, the lowest first. The root folder is the first node, and every folder
/// stands before what is in it.
pub fn merge_layers(layers: &[Erofs]) -> Result<Vec<Node>> {
    ensure!(!layers.is_empty(), "no layers to merge");
    let mut merge =
        Merge { layers, nodes: Vec::new(), files: HashMap::new(), folders: HashSet::new() };
    let mut roots = Vec::new();
    for (number, layer) in layers.iter().enumerate().rev() {
        let root = layer.root().with_context(|| format!("reading layer {number}"))?;
        ensure!(root.is_folder(), "layer {number} has no root folder");
        let is_opaque = is_opaque(&layer.attributes(&root)?);
        roots.push((number, root));
        if is_opaque {
            break;
        }
    }
    merge.add_folder(roots, 0, 0)?;
    Ok(merge.nodes)
}

struct Merge<'a> {
    layers: &'a [Erofs<'a>],
    nodes: Vec<Node>,
    /// Nodes of what is not a folder, by layer and inode: a second name is a hard link.
    files: HashMap<(usize, u64), usize>,
    /// Folders that have been read: each has one place, or a damaged layer runs in circles.
    folders: HashSet<(usize, u64)>,
}

impl Merge<'_> {
    /// Add the folder that these folders of several layers, the topmost first, make up.
    fn add_folder(
        &mut self,
        folders: Vec<(usize, Inode)>,
        parent: usize,
        depth: usize,
    ) -> Result<usize> {
        ensure!(depth < MAX_DEPTH, "folders more than {MAX_DEPTH} deep");
        let mut names: BTreeMap<Vec<u8>, Vec<(usize, u64)>> = BTreeMap::new();
        for (layer, folder) in &folders {
            let is_new = self.folders.insert((*layer, folder.number));
            ensure!(is_new, "a folder of layer {layer} is in two places");
            for (name, number) in self.layers[*layer].list(folder)? {
                let found = names.entry(name).or_default();
                ensure!(
                    found.last().is_none_or(|(last, _)| last != layer),
                    "layer {layer} has a name twice in one folder"
                );
                found.push((*layer, number));
            }
        }
        let (layer, inode) = folders.into_iter().next().context("a folder of no layer")?;
        let this = self.add_node(layer, inode, parent)?;
        for (name, candidates) in names {
            let add = |merge: &mut Self| merge.add_topmost(&candidates, this, depth);
            let added = add(self).with_context(|| String::from_utf8_lossy(&name).into_owned())?;
            if let Some(child) = added {
                let is_folder = self.nodes[child].inode.is_folder();
                self.nodes[child].links += 1;
                // A folder's ".." is a link to this one.
                self.nodes[this].links += u32::from(is_folder);
                self.nodes[this].children.insert(name, child);
            }
        }
        Ok(this)
    }

    /// Add what the topmost layer has under a name; nothing when that is a whiteout.
    fn add_topmost(
        &mut self,
        candidates: &[(usize, u64)],
        parent: usize,
        depth: usize,
    ) -> Result<Option<usize>> {
        let mut folders = Vec::new();
        for (layer, number) in candidates {
            let inode = self.layers[*layer].read_inode(*number)?;
            if !inode.is_folder() {
                if !folders.is_empty() || inode.is_whiteout() {
                    break;
                }
                if let Some(known) = self.files.get(&(*layer, *number)) {
                    return Ok(Some(*known));
                }
                let node = self.add_node(*layer, inode, parent)?;
                self.files.insert((*layer, *number), node);
                return Ok(Some(node));
            }
            let is_opaque = is_opaque(&self.layers[*layer].attributes(&inode)?);
            folders.push((*layer, inode));
            if is_opaque {
                break;
            }
        }
        if folders.is_empty() {
            return Ok(None);
        }
        self.add_folder(folders, parent, depth + 1).map(Some)
    }

    fn add_node(&mut self, layer: usize, inode: Inode, parent: usize) -> Result<usize> {
        let erofs = &self.layers[layer];
        let mut attributes = erofs.attributes(&inode)?;
        attributes.retain(|attribute| !is_of_overlay(attribute));
        attributes.sort();
        let target = if inode.is_link() { erofs.read(&inode, 4096)? } else { Vec::new() };
        // A folder's "." is a link to itself, and the root's ".." too.
        let links = u32::from(inode.is_folder()) + u32::from(self.nodes.is_empty());
        let children = BTreeMap::new();
        self.nodes.push(Node { layer, inode, attributes, target, children, parent, links });
        Ok(self.nodes.len() - 1)
    }
}

fn is_of_overlay(attribute: &Attribute) -> bool {
    matches!(attribute.kind, TRUSTED | USER) && attribute.name.starts_with(b"overlay.")
}

fn is_opaque(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        is_of_overlay(attribute) && attribute.name == b"overlay.opaque" && attribute.value == b"y"
    })
}
