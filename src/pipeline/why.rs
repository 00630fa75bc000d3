//! Why a package is in an image: the chain of dependencies from what a layer asks for.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::fs::File;

use anyhow::{Context, Result};
use serde::Serialize;

use super::locking::load_current;
use super::sets::{list_requests, name_initrd_set, name_layer_set};
use super::source::Source;
use crate::config::Project;
use crate::config::profile::Profile;
use crate::debian::deb822;
use crate::debian::package::open_package;
use crate::debian::relation::{self, Relations};
use crate::error::{UserError, find_nearest};
use crate::lock::{LockedPackage, SetRequest};
use crate::progress::format_bytes;

/// Where a package is, and what brought it there.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Presence {
    pub package: String,
    pub version: String,
    /// Bytes that it says it takes when unpacked.
    pub installed_size: u64,
    /// `layer postgres`, or `the initrd of layer kernel`.
    pub place: String,
    /// From what is asked for to the package itself.
    pub chain: Vec<Link>,
    /// All packages of the same place that need it, or could not do without it otherwise.
    pub needed_by: Vec<String>,
}

/// A step of the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Link {
    pub package: String,
    /// The relation by which the one before it needs it; empty for the first.
    pub by: String,
    /// Why the first is there: `asked for` or `essential`.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub root: &'static str,
}

/// What a package says of others.
#[derive(Debug, Clone, Default)]
struct Member {
    name: String,
    essential: bool,
    provides: Vec<String>,
    /// Relation and its field's verb, in their order.
    needs: Vec<(&'static str, Relations)>,
}

/// Find out why `name` is in the images of `profile`, for each place where it is. Packages
/// that the store lacks are fetched.
///
/// # Errors
/// A [`UserError`] when it is nowhere in them, and when the lock is older than the profile.
pub fn explain_presence(
    project: &Project,
    source: &Source,
    profile: &Profile,
    name: &str,
) -> Result<Vec<Presence>> {
    let lock = load_current(project, profile)?;
    let requests = list_requests(std::slice::from_ref(profile));
    let places = list_places(profile);
    let mut found = Vec::new();
    let mut known: Vec<String> = Vec::new();
    for (set, place) in &places {
        let Some(request) = requests.iter().find(|request| request.name == *set) else { continue };
        let packages = lock.list_set(set)?;
        known.extend(packages.iter().map(|package| package.name.clone()));
        let Some(locked) = packages.iter().find(|package| package.name == name) else { continue };
        source.fetch_packages(&packages)?;
        let members = packages.iter().map(|package| read_member(source, package));
        let members: Vec<Member> =
            members.collect::<Result<_>>().map_err(|error| source.explain_rot(&packages, error))?;
        found.push(Presence {
            package: name.to_string(),
            version: locked.version.to_string(),
            installed_size: locked.installed_size.saturating_mul(1024),
            place: place.clone(),
            chain: find_chain(&members, request, name),
            needed_by: list_needing(&members, request.recommends, name),
        });
    }
    if found.is_empty() {
        let what = format!("the package `{}` is not in `{}`", name.escape_debug(), profile.name);
        let error = UserError::new(what);
        let nearest = find_nearest(name, known.iter().map(String::as_str));
        return Err(match nearest {
            Some(nearest) => error.help(format!("did you mean `{nearest}`?")).into(),
            None => {
                error.help(format!("see what is: stanchion profile show {}", profile.name)).into()
            }
        });
    }
    Ok(found)
}

/// Sets of the profile, and what people call them.
fn list_places(profile: &Profile) -> Vec<(String, String)> {
    let mut places = Vec::new();
    for (index, layer) in profile.layers.iter().enumerate() {
        places.push((name_layer_set(profile, index), format!("layer {}", layer.name)));
        if layer.initrd.is_some() {
            let set = name_initrd_set(&layer.name);
            places.push((set, format!("the initrd of layer {}", layer.name)));
        }
    }
    places
}

fn read_member(source: &Source, locked: &LockedPackage) -> Result<Member> {
    let path = source.store.file_path(&locked.sha256);
    let file = File::open(&path).with_context(|| format!("reading {}", path.display()))?;
    // Nothing of its files is read.
    let package = open_package(file, &locked.name, u64::MAX)?;
    let (_, control) = package
        .control
        .get("control")
        .with_context(|| format!("the package {} has no control file", locked.name))?;
    let text = String::from_utf8_lossy(control);
    let paragraph = deb822::parse_one(&text)
        .with_context(|| format!("reading the control file of {}", locked.name))?;
    let relations = |field| Relations::new(paragraph.get(field).unwrap_or(""));
    let provides = relations("Provides");
    Ok(Member {
        name: locked.name.clone(),
        essential: paragraph.get("Essential").is_some_and(|v| v.eq_ignore_ascii_case("yes")),
        provides: provides.names().map(str::to_string).collect(),
        needs: vec![
            ("pre-depends on", relations("Pre-Depends")),
            ("depends on", relations("Depends")),
            (RECOMMENDS, relations("Recommends")),
        ],
    })
}

const RECOMMENDS: &str = "recommends";

/// The members that `member` needs, each with the words of the relation.
fn list_needs<'a>(
    by_name: &BTreeMap<&str, Vec<&'a Member>>,
    member: &Member,
    recommends: bool,
) -> Vec<(&'a Member, String)> {
    let mut needs = Vec::new();
    for (verb, relations) in &member.needs {
        if *verb == RECOMMENDS && !recommends {
            continue;
        }
        // What the archive's own list could not be read by would not have been locked.
        for alternatives in relations.parse().unwrap_or_default() {
            for relation in alternatives {
                for needed in by_name.get(relation.name).into_iter().flatten() {
                    needs.push((*needed, format!("{verb} {}", show(&relation))));
                }
            }
        }
    }
    needs
}

fn show(relation: &relation::Relation) -> String {
    use relation::Comparison::{Equal, Greater, GreaterEqual, Less, LessEqual};
    let constraint = relation.constraint.map(|(comparison, version)| {
        let sign = match comparison {
            Less => "<<",
            LessEqual => "<=",
            Equal => "=",
            GreaterEqual => ">=",
            Greater => ">>",
        };
        format!(" ({sign} {version})")
    });
    format!("{}{}", relation.name, constraint.unwrap_or_default())
}

fn index(members: &[Member]) -> BTreeMap<&str, Vec<&Member>> {
    let mut by_name: BTreeMap<&str, Vec<&Member>> = BTreeMap::new();
    for member in members {
        by_name.entry(&member.name).or_default().push(member);
        for provided in &member.provides {
            by_name.entry(provided).or_default().push(member);
        }
    }
    by_name
}

/// The shortest chain to `name`, what is asked for before what is essential. Empty when no
/// relation tells.
fn find_chain(members: &[Member], request: &SetRequest, name: &str) -> Vec<Link> {
    let by_name = index(members);
    let mut from: BTreeMap<&str, (Option<&str>, Link)> = BTreeMap::new();
    let mut queue: VecDeque<&Member> = VecDeque::new();
    let wanted = request.wanted.iter().map(|wish| wish.split('=').next().unwrap_or(wish));
    let asked = wanted
        .flat_map(|wish| by_name.get(wish).into_iter().flatten().copied())
        .map(|member| (member, "asked for"));
    let essential = members.iter().filter(|member| request.essential && member.essential);
    for (member, root) in asked.chain(essential.map(|member| (member, "essential"))) {
        if !from.contains_key(member.name.as_str()) {
            let link = Link { package: member.name.clone(), by: String::new(), root };
            from.insert(&member.name, (None, link));
            queue.push_back(member);
        }
    }
    while let Some(member) = queue.pop_front() {
        for (needed, by) in list_needs(&by_name, member, request.recommends) {
            if !from.contains_key(needed.name.as_str()) {
                let link = Link { package: needed.name.clone(), by, root: "" };
                from.insert(&needed.name, (Some(&member.name), link));
                queue.push_back(needed);
            }
        }
    }
    let mut chain = Vec::new();
    let mut at = Some(name);
    while let Some((before, link)) = at.and_then(|name| from.get(name)) {
        chain.push(link.clone());
        at = *before;
    }
    chain.reverse();
    chain
}

fn list_needing(members: &[Member], recommends: bool, name: &str) -> Vec<String> {
    let by_name = index(members);
    let needs = |member: &&Member| {
        member.name != name
            && list_needs(&by_name, member, recommends).iter().any(|(one, _)| one.name == name)
    };
    members.iter().filter(needs).map(|member| member.name.clone()).collect()
}

impl fmt::Display for Presence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Presence { package, version, place, .. } = self;
        writeln!(f, "{package} {version} is in {place}, {}", format_bytes(self.installed_size))?;
        let mut before = String::new();
        for link in &self.chain {
            match link.root {
                "" => writeln!(f, "  {before} {}", describe(link))?,
                "essential" => writeln!(f, "  {} is essential", link.package)?,
                _ => writeln!(f, "  {place} asks for {}", link.package)?,
            }
            before.clone_from(&link.package);
        }
        if self.chain.is_empty() {
            writeln!(f, "  no relation of a package says why")?;
        }
        if !self.needed_by.is_empty() {
            writeln!(f, "  needed by {}", self.needed_by.join(", "))?;
        }
        Ok(())
    }
}

/// The relation, and whom it led to where that has another name.
fn describe(link: &Link) -> String {
    let named = link.by.split_whitespace().any(|word| word == link.package);
    match named {
        true => link.by.clone(),
        false => format!("{}, which {} provides", link.by, link.package),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, depends: &str, provides: &[&str], essential: bool) -> Member {
        Member {
            name: name.into(),
            essential,
            provides: provides.iter().map(|name| name.to_string()).collect(),
            needs: vec![
                ("depends on", Relations::new(depends)),
                (RECOMMENDS, Relations::new("hint")),
            ],
        }
    }

    fn request(wanted: &[&str], recommends: bool) -> SetRequest {
        SetRequest {
            name: "base".into(),
            parent: None,
            wanted: wanted.iter().map(|name| name.to_string()).collect(),
            provides: Vec::new(),
            recommends,
            essential: true,
        }
    }

    fn members() -> Vec<Member> {
        vec![
            member("app", "lib (>= 1) | other, mail-agent", &[], false),
            member("lib", "libc", &[], false),
            member("libc", "", &[], true),
            member("postfix", "lib", &["mail-agent"], false),
            member("hint", "", &[], false),
        ]
    }

    fn names(chain: &[Link]) -> Vec<&str> {
        chain.iter().map(|link| link.package.as_str()).collect()
    }

    #[test]
    fn the_shortest_chain_is_told_with_its_relations() {
        let chain = find_chain(&members(), &request(&["app=1.2"], false), "lib");
        assert_eq!(names(&chain), ["app", "lib"]);
        assert_eq!((chain[0].root, chain[1].by.as_str()), ("asked for", "depends on lib (>= 1)"));
        let provided = find_chain(&members(), &request(&["app"], false), "postfix");
        assert_eq!(names(&provided), ["app", "postfix"]);
        assert_eq!(describe(&provided[1]), "depends on mail-agent, which postfix provides");
    }

    #[test]
    fn essential_packages_need_no_other_reason() {
        let chain = find_chain(&members(), &request(&["app"], false), "libc");
        assert_eq!((names(&chain), chain[0].root), (vec!["libc"], "essential"));
    }

    #[test]
    fn recommendations_count_only_where_the_layer_takes_them() {
        assert!(find_chain(&members(), &request(&["app"], false), "hint").is_empty());
        let chain = find_chain(&members(), &request(&["app"], true), "hint");
        assert_eq!(names(&chain), ["app", "hint"]);
        assert_eq!(list_needing(&members(), false, "lib"), ["app", "postfix"]);
    }

    #[test]
    fn circles_end() {
        let circle = [member("a", "b", &[], false), member("b", "a", &[], false)];
        assert!(find_chain(&circle, &request(&["x"], false), "a").is_empty());
        assert_eq!(names(&find_chain(&circle, &request(&["a"], false), "b")), ["a", "b"]);
    }
}
