//! From the layers that a profile names to all its layers, in order.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use toml::Spanned;

use super::check::{check_name, check_unique};
use super::layer::{Layer, Loaded, load_layer};
use super::project::{explain_missing, list_layers};
use super::raw::Text;
use super::source::Source;
use crate::error::{UserError, find_nearest};

/// Load the layers in the order given, each after what it requires, and check them
/// against each other.
pub(super) fn resolve_layers(
    root: &Path,
    source: &Source,
    wanted: &Spanned<Vec<Text>>,
) -> Result<Vec<Layer>> {
    if wanted.get_ref().is_empty() {
        return Err(source.error(wanted.span(), "`layers` is empty").into());
    }
    let pairs = wanted.get_ref().iter().map(|text| (text.get_ref().as_str(), text.span()));
    check_unique(source, "layer", pairs)?;
    let mut placed: Vec<Loaded> = Vec::new();
    for text in wanted.get_ref() {
        let name = check_name(source, "layer", text)?;
        let place = (source.path(), source.line(text.span().start));
        place_layer(root, &name, place, &mut placed)?;
    }
    check_ids(&placed)?;
    check_artifacts(&placed)?;
    check_initrds(&placed)?;
    check_over(&placed)?;
    let mut exclude = Vec::new();
    let layers = placed.into_iter().map(|loaded| {
        let mut layer = loaded.layer;
        exclude.append(&mut layer.exclude);
        layer.exclude = exclude.clone();
        layer
    });
    Ok(layers.collect())
}

/// Place a layer after all that it requires, depth first; `place` is the line that asks
/// for it.
fn place_layer(
    root: &Path,
    name: &str,
    place: (&Path, usize),
    placed: &mut Vec<Loaded>,
) -> Result<()> {
    let is_placed =
        |placed: &[Loaded], name: &str| placed.iter().any(|loaded| loaded.layer.name == name);
    if is_placed(placed, name) {
        return Ok(());
    }
    // A layer and how many of its requirements have been seen to.
    let mut open = vec![(load(root, name, place)?, 0)];
    while let Some((top, seen)) = open.last_mut() {
        let Some(required) = top.layer.requires.get(*seen).cloned() else {
            placed.extend(open.pop().map(|(loaded, _)| loaded));
            continue;
        };
        let place = (top.file.clone(), top.requires[*seen]);
        *seen += 1;
        if is_placed(placed, &required) {
            continue;
        }
        let names: Vec<&str> = open.iter().map(|(loaded, _)| loaded.layer.name.as_str()).collect();
        if let Some(start) = names.iter().position(|name| *name == required) {
            return Err(explain_cycle(&names[start..], &required, place).into());
        }
        open.push((load(root, &required, (&place.0, place.1))?, 0));
    }
    Ok(())
}

fn load(root: &Path, name: &str, (file, line): (&Path, usize)) -> Result<Loaded> {
    let known = list_layers(root)?;
    if !known.iter().any(|known| known == name) {
        return Err(explain_missing("layer", name, "layers/", &known).at(file, line).into());
    }
    let folder = Path::new("layers").join(name);
    if !root.join(&folder).join("layer.toml").is_file() {
        let error = UserError::new(format!("the layer `{name}` has no `layer.toml`"));
        return Err(error.in_file(folder).help("write one with a `description`").into());
    }
    load_layer(root, name)
}

fn explain_cycle(names: &[&str], again: &str, (file, line): (PathBuf, usize)) -> UserError {
    UserError::new("the layers require each other in a circle")
        .at(file, line)
        .why(format!("{} -> {again}", names.join(" -> ")))
        .help("remove one of them from `requires`")
}

/// No two accounts of an image share a name or an id; a user brings a group of its own.
fn check_ids(placed: &[Loaded]) -> Result<()> {
    let mut names = BTreeMap::new();
    let mut ids = BTreeMap::new();
    for loaded in placed {
        let layer = &loaded.layer;
        let users = layer.users.iter().map(|user| ("user", &user.name, user.id));
        let groups = layer.groups.iter().map(|group| ("group", &group.name, group.id));
        let accounts = users.zip(&loaded.users).chain(groups.zip(&loaded.groups));
        for ((kind, name, id), line) in accounts {
            let place = (loaded, *line);
            if let Some((other, first)) = names.insert(name, (kind, place)) {
                let what = match kind == other {
                    true => format!("the {kind} `{name}` is there twice"),
                    false => {
                        format!("`{name}` is both a user, which brings its group, and a group")
                    }
                };
                return Err(explain_twice(what, place, first).into());
            }
            if let Some((other, first)) = ids.insert(id, (kind, place)) {
                let what = match kind == other {
                    true => format!("two {kind}s have the id {id}"),
                    false => format!("a user, and so its group, and a group have the id {id}"),
                };
                return Err(explain_twice(what, place, first).into());
            }
        }
    }
    Ok(())
}

/// No two artifacts of an image share a name.
fn check_artifacts(placed: &[Loaded]) -> Result<()> {
    let mut names = BTreeMap::new();
    for loaded in placed {
        for (artifact, line) in loaded.layer.artifacts.iter().zip(&loaded.artifacts) {
            if let Some(first) = names.insert(artifact.name.as_str(), (loaded, *line)) {
                let what = format!("the artifact `{}` is there twice", artifact.name);
                return Err(explain_twice(what, (loaded, *line), first).into());
            }
        }
    }
    Ok(())
}

/// A build stage begins on a layer that comes before its own.
fn check_over(placed: &[Loaded]) -> Result<()> {
    for (index, loaded) in placed.iter().enumerate() {
        let over = loaded.layer.build.as_ref().and_then(|build| build.over.as_deref());
        let Some(over) = over else { continue };
        let below = || placed[..index].iter().map(|below| below.layer.name.as_str());
        if below().any(|name| name == over) {
            continue;
        }
        let error = UserError::new(format!("`{over}` is no layer below `{}`", loaded.layer.name))
            .at(&loaded.file, loaded.over)
            .why("a build stage begins on a layer that comes before its own");
        return Err(match find_nearest(over, below()) {
            Some(nearest) => error.help(format!("did you mean `{nearest}`?")),
            None => error.help(format!("add `{over}` to `requires`")),
        }
        .into());
    }
    Ok(())
}

/// An image has one initrd.
fn check_initrds(placed: &[Loaded]) -> Result<()> {
    let mut with = placed.iter().filter(|loaded| loaded.layer.initrd.is_some());
    let (Some(first), Some(second)) = (with.next(), with.next()) else { return Ok(()) };
    let what = "two layers of the profile have `[initrd]`".to_string();
    Err(explain_twice(what, (second, second.initrd), (first, first.initrd)).into())
}

fn explain_twice(what: String, second: (&Loaded, usize), first: (&Loaded, usize)) -> UserError {
    UserError::new(what).at(&second.0.file, second.1).why(format!(
        "{}:{} has it already",
        first.0.file.display(),
        first.1
    ))
}
