//! Relations between packages: what stands in Depends, Conflicts and their like
//! (deb-control(5), deb-src-control(5) for the restrictions).

use std::fmt;

use anyhow::{Result, bail};

use super::version;

/// The architecture that everything is built for.
pub const ARCHITECTURE: &str = "amd64";

/// The text of one relation field, parsed when it is asked for: of the 70,000 packages
/// of a suite, a build looks at some hundreds.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Relations(Box<str>);

/// How the version of a package must compare to the one named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    Less,
    LessEqual,
    Equal,
    GreaterEqual,
    Greater,
}

/// One package that a relation names: `name:qualifier (>= version)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relation<'a> {
    pub name: &'a str,
    /// `any`, `native`, or an architecture.
    pub qualifier: Option<&'a str>,
    pub constraint: Option<(Comparison, &'a str)>,
}

impl Relations {
    pub fn new(text: &str) -> Self {
        Relations(text.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Every name without a qualifier, or with ours, in the order of the text; faster
    /// than [`Relations::parse`], and passes over what is wrong.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.split([',', '|']).filter_map(|item| {
            let item = item.trim_ascii();
            let end = item.bytes().position(|byte| b" \t\n([<".contains(&byte));
            let head = &item[..end.unwrap_or(item.len())];
            match head.split_once(':') {
                None => Some(head),
                Some((name, ARCHITECTURE | "native")) => Some(name),
                Some(_) => None,
            }
        })
    }

    /// All of the list must hold, and of each item one of its alternatives.
    pub fn parse(&self) -> Result<Vec<Vec<Relation<'_>>>> {
        parse_relations(&self.0)
    }
}

impl fmt::Debug for Relations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl Comparison {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "<<" => Comparison::Less,
            // `<` and `>` are old spellings, with the equal sign left to be understood.
            "<=" | "<" => Comparison::LessEqual,
            "=" => Comparison::Equal,
            ">=" | ">" => Comparison::GreaterEqual,
            ">>" => Comparison::Greater,
            _ => return None,
        })
    }

    fn holds(self, left: &str, right: &str) -> bool {
        let order = version::compare(left, right);
        match self {
            Comparison::Less => order.is_lt(),
            Comparison::LessEqual => order.is_le(),
            Comparison::Equal => order.is_eq(),
            Comparison::GreaterEqual => order.is_ge(),
            Comparison::Greater => order.is_gt(),
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Comparison::Less => "<<",
            Comparison::LessEqual => "<=",
            Comparison::Equal => "=",
            Comparison::GreaterEqual => ">=",
            Comparison::Greater => ">>",
        })
    }
}

impl<'a> Relation<'a> {
    /// Whether a package or a provision of this version fits; `None` is a provision
    /// without a version, which fits no versioned relation.
    pub fn admits(&self, version: Option<&str>) -> bool {
        match (self.constraint, version) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some((comparison, wanted)), Some(version)) => comparison.holds(version, wanted),
        }
    }

    fn parse(text: &'a str) -> Result<Option<Self>> {
        let wrong = || format!("not a relation: `{}`", text.chars().take(80).collect::<String>());
        let end = text.find(|c: char| c.is_ascii_whitespace() || "([<".contains(c));
        let (head, mut rest) = text.split_at(end.unwrap_or(text.len()));
        rest = rest.trim_ascii_start();
        let (name, qualifier) = match head.split_once(':') {
            Some((name, qualifier)) => (name, Some(qualifier)),
            None => (head, None),
        };
        if !is_package_name(name) || qualifier.is_some_and(|qualifier| !is_package_name(qualifier))
        {
            bail!(wrong());
        }
        let mut constraint = None;
        if let Some(inner) = rest.strip_prefix('(') {
            let Some((inner, after)) = inner.split_once(')') else { bail!(wrong()) };
            let inner = inner.trim_ascii();
            let end = inner.find(|c| !"<>=".contains(c)).unwrap_or(inner.len());
            let (comparison, version) = (Comparison::parse(&inner[..end]), inner[end..].trim());
            match comparison {
                Some(comparison) if version.parse::<version::Version>().is_ok() => {
                    constraint = Some((comparison, version));
                }
                _ => bail!(wrong()),
            }
            rest = after.trim_ascii_start();
        }
        let mut applies = true;
        if let Some(inner) = rest.strip_prefix('[') {
            let Some((inner, after)) = inner.split_once(']') else { bail!(wrong()) };
            applies &= applies_to_architecture(inner);
            rest = after.trim_ascii_start();
        }
        let mut profiles: Option<bool> = None;
        while let Some(inner) = rest.strip_prefix('<') {
            let Some((inner, after)) = inner.split_once('>') else { bail!(wrong()) };
            // No build profile is active: only negated terms hold.
            let holds = inner.split_ascii_whitespace().all(|term| term.starts_with('!'));
            profiles = Some(profiles.unwrap_or(false) || holds);
            rest = after.trim_ascii_start();
        }
        if !rest.is_empty() {
            bail!(wrong());
        }
        let applies = applies && profiles.unwrap_or(true);
        Ok(applies.then_some(Relation { name, qualifier, constraint }))
    }
}

impl fmt::Display for Relation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        if let Some(qualifier) = self.qualifier {
            write!(f, ":{qualifier}")?;
        }
        match self.constraint {
            Some((comparison, version)) => write!(f, " ({comparison} {version})"),
            None => Ok(()),
        }
    }
}

/// Parse `a (>= 1) | b:any [amd64] <!nocheck>, c`. Alternatives that are not for
/// [`ARCHITECTURE`], or need a build profile, are left out.
pub fn parse_relations(text: &str) -> Result<Vec<Vec<Relation<'_>>>> {
    let mut all = Vec::new();
    for item in text.split(',').map(str::trim_ascii).filter(|item| !item.is_empty()) {
        let mut alternatives = Vec::new();
        for alternative in item.split('|') {
            alternatives.extend(Relation::parse(alternative.trim_ascii())?);
        }
        if !alternatives.is_empty() {
            all.push(alternatives);
        }
    }
    Ok(all)
}

/// What can be a package's name without being a danger in a path or a command line.
pub fn is_package_name(text: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || b"+-._".contains(&byte);
    text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && text.bytes().all(is_inner)
}

fn applies_to_architecture(list: &str) -> bool {
    let is_ours = |term: &str| [ARCHITECTURE, "any", "linux-any", "any-amd64"].contains(&term);
    let mut terms = list.split_ascii_whitespace().peekable();
    match terms.peek() {
        Some(first) if first.starts_with('!') => {
            !terms.any(|term| is_ours(term.trim_start_matches('!')))
        }
        _ => terms.any(is_ours),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn show(text: &str) -> String {
        let show_item = |item: &Vec<Relation>| {
            item.iter().map(|r| r.to_string()).collect::<Vec<_>>().join(" | ")
        };
        parse_relations(text).unwrap().iter().map(show_item).collect::<Vec<_>>().join(", ")
    }

    #[test]
    fn relations_are_read_with_all_their_parts() {
        assert_eq!(show("a(>=1)|b:any [amd64] <!nocheck>,c"), "a (>= 1) | b:any, c");
        assert_eq!(show(" a (<< 1:2.0~) ,\n b ( = 1 ),"), "a (<< 1:2.0~), b (= 1)");
        assert_eq!(show("a (< 1), b (> 2)"), "a (<= 1), b (>= 2)");
        assert_eq!(show(""), "");
    }

    #[test]
    fn restrictions_leave_out_what_is_not_for_us() {
        assert_eq!(show("a [i386], b [!amd64], c [!i386 !arm64], d [linux-any]"), "c, d");
        assert_eq!(show("a <nocheck>, b <!nocheck> <cross>, c <!nocheck !cross>"), "b, c");
        assert_eq!(show("a [i386] | b"), "b");
    }

    #[test]
    fn a_relation_admits_the_versions_it_names() {
        let parse = |text| parse_relations(text).unwrap()[0][0];
        for (text, version, expected) in [
            ("a", None, true),
            ("a (>= 1)", None, false),
            ("a (>= 1)", Some("1"), true),
            ("a (>> 1)", Some("1.0"), true),
            ("a (>> 1)", Some("1-0"), false),
            ("a (<< 2)", Some("2~rc"), true),
            ("a (<= 2)", Some("2-1"), false),
            ("a (= 2)", Some("0:2"), true),
        ] {
            assert_eq!(parse(text).admits(version), expected, "{text} {version:?}");
        }
    }

    #[test]
    fn names_are_listed_in_order() {
        let relations = Relations::new("a (>= 1)| b:any,c(<< 2),\n d:amd64 [i386], e:i386");
        assert_eq!(relations.names().collect::<Vec<_>>(), ["a", "c", "d"]);
    }

    #[test]
    fn what_is_no_relation_is_refused() {
        for text in [
            "a b",
            "a (1)",
            "a (>= )",
            "a (>= 1",
            "a [amd64",
            "a <x",
            "a | | b",
            "|",
            "é",
            "../x",
            "a:",
            ":any",
            "a (=> 1)",
            "a (>= 1) x",
            "a (>= ${v})",
        ] {
            assert!(parse_relations(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[a-c0-9é<>=!|,:()\\[\\] ]{0,30}") {
            if let Ok(all) = parse_relations(&text) {
                let shown = all
                    .iter()
                    .map(|item| item.iter().map(ToString::to_string).collect::<Vec<_>>().join("|"))
                    .collect::<Vec<_>>()
                    .join(",");
                prop_assert_eq!(parse_relations(&shown).unwrap(), all);
            }
        }
    }
}
