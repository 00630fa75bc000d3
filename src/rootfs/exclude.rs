//! Which files of a package stay out of the root: dpkg's `path-exclude` and
//! `path-include` (dpkg(1)), with its meaning to the letter (`filter_should_skip` in
//! dpkg's src/main/filters.c).

use crate::debian::archive::Kind;

/// Glob patterns in order; the last one that matches a path decides.
#[derive(Debug, Clone, Default)]
pub struct Excludes {
    rules: Vec<Rule>,
}

#[derive(Debug, Clone)]
struct Rule {
    pattern: Vec<u8>,
    include: bool,
}

impl Excludes {
    /// Leave out what matches: `/usr/share/doc/*`. `*` and `?` match `/` too (fnmatch(3)
    /// without `FNM_PATHNAME`).
    pub fn exclude(mut self, pattern: &str) -> Self {
        self.rules.push(Rule { pattern: pattern.into(), include: false });
        self
    }

    /// Take back in what matches: `/usr/share/doc/*/copyright`.
    pub fn include(mut self, pattern: &str) -> Self {
        self.rules.push(Rule { pattern: pattern.into(), include: true });
        self
    }

    /// Whether this path (beginning with `/`) stays out. Directories and symbolic links
    /// stay in when a pattern that includes begins where they are, as in dpkg.
    pub fn skips(&self, path: &[u8], kind: &Kind) -> bool {
        let last = self.rules.iter().rev().find(|rule| matches_glob(&rule.pattern, path));
        if last.is_none_or(|rule| rule.include) {
            return false;
        }
        let may_hold = matches!(kind, Kind::Directory | Kind::Symlink(_));
        !(may_hold
            && self.rules.iter().filter(|rule| rule.include).any(|rule| {
                let wild = rule.pattern.iter().position(|byte| b"*?[\\".contains(byte));
                let mut fixed = &rule.pattern[..wild.unwrap_or(rule.pattern.len())];
                while let Some(shorter) = fixed.strip_suffix(b"/") {
                    fixed = shorter;
                }
                path.starts_with(fixed)
            }))
    }
}

/// fnmatch(3) without flags: `*`, `?`, `[a-z]`, `[!a-z]`, `\x`. Linear in memory, at
/// most pattern times path in time.
fn matches_glob(pattern: &[u8], path: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < path.len() {
        let step = match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
                continue;
            }
            Some(_) => match_one(&pattern[p..], path[t]),
            None => None,
        };
        match (step, star) {
            (Some(length), _) => {
                p += length;
                t += 1;
            }
            // The last star takes one byte more.
            (None, Some((at, from))) => {
                star = Some((at, from + 1));
                p = at + 1;
                t = from + 1;
            }
            (None, None) => return false,
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// Whether the pattern's first element, which is no star, matches this byte: its length.
fn match_one(pattern: &[u8], byte: u8) -> Option<usize> {
    match pattern {
        [b'?', ..] => Some(1),
        [b'\\', escaped, ..] => (*escaped == byte).then_some(2),
        [b'[', rest @ ..] => match match_bracket(rest, byte) {
            Some((true, length)) => Some(length + 1),
            Some((false, _)) => None,
            None => (byte == b'[').then_some(1),
        },
        [literal, ..] => (*literal == byte).then_some(1),
        [] => None,
    }
}

/// What stands behind `[`: whether it matches, and its length with the `]`. `None` when
/// there is no `]`: then `[` is a plain byte.
fn match_bracket(rest: &[u8], byte: u8) -> Option<(bool, usize)> {
    let negated = matches!(rest.first(), Some(b'!' | b'^'));
    let start = usize::from(negated);
    // A `]` in the first place is a plain byte.
    let end = start + 1 + rest.get(start + 1..)?.iter().position(|byte| *byte == b']')?;
    let set = &rest[start..end];
    let mut found = false;
    let mut i = 0;
    while i < set.len() {
        match set[i..] {
            [low, b'-', high, ..] => {
                found |= (low..=high).contains(&byte);
                i += 3;
            }
            _ => {
                found |= set[i] == byte;
                i += 1;
            }
        }
    }
    Some((found != negated, end + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_matches_slashes_as_in_dpkg() {
        for (pattern, path, wanted) in [
            ("/usr/share/doc/*", "/usr/share/doc/a/b", true),
            ("/usr/share/doc/*", "/usr/share/doc", false),
            ("*/x", "/a/b/x", true),
            ("/a?c", "/abc", true),
            ("/a?c", "/a/c", true),
            ("/[a-c]x", "/bx", true),
            ("/[!a-c]x", "/bx", false),
            ("/[]x]", "/]", true),
            ("/[x", "/[x", true),
            ("/\\*", "/*", true),
            ("/\\*", "/a", false),
            ("/a*b*c", "/aXbXbXc", true),
            ("/a*b*c", "/aXbXbX", false),
            ("", "", true),
            ("*", "", true),
        ] {
            assert_eq!(
                matches_glob(pattern.as_bytes(), path.as_bytes()),
                wanted,
                "{pattern} {path}"
            );
        }
    }

    #[test]
    fn the_last_match_decides_and_folders_on_the_way_stay() {
        let excludes =
            Excludes::default().exclude("/usr/share/doc/*").include("/usr/share/doc/*/copyright");
        let skips = |path: &str, kind: Kind| excludes.skips(path.as_bytes(), &kind);
        assert!(skips("/usr/share/doc/a/README", Kind::File));
        assert!(!skips("/usr/share/doc/a/copyright", Kind::File));
        assert!(!skips("/usr/share/doc/a", Kind::Directory));
        assert!(!skips("/usr/bin/a", Kind::File));
        let without = Excludes::default().exclude("/usr/share/doc/*");
        assert!(without.skips(b"/usr/share/doc/a", &Kind::Directory));
    }

    proptest::proptest! {
        #[test]
        fn a_path_matches_itself_and_itself_with_a_star(path in "/[a-z/.]{0,30}", cut in 0usize..30) {
            proptest::prop_assert!(matches_glob(path.as_bytes(), path.as_bytes()));
            let cut = cut.min(path.len());
            let starred = format!("{}*", &path[..cut]);
            proptest::prop_assert!(matches_glob(starred.as_bytes(), path.as_bytes()));
        }
    }
}
