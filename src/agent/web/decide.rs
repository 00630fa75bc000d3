//! What is to be done to NetBox's database before this node may serve: a pure function of
//! the node's version and of what the database says.

use std::fmt;

/// A version of NetBox, such as 4.6.8; what stands behind the numbers does not count.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(Vec<u32>);

impl Version {
    /// `None` when it does not begin with two numbers or more, with dots between.
    pub fn read(text: &str) -> Option<Self> {
        let text = text.trim().trim_start_matches('v');
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let numbers = text[..end].split('.').take(4).map(str::parse::<u32>);
        let numbers = numbers.collect::<Result<Vec<_>, _>>().ok()?;
        (numbers.len() >= 2).then_some(Version(numbers))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<String> = self.0.iter().map(u32::to_string).collect();
        f.write_str(&numbers.join("."))
    }
}

/// What the database holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Schema {
    /// No table of NetBox.
    Empty,
    /// Tables that no node of this cluster has made or changed.
    Foreign,
    /// What a node of this cluster has brought it to last.
    Of(Version),
}

/// What this node does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Lay the schema down that the image brings.
    Restore,
    /// Run NetBox's migrations.
    Upgrade,
    /// The database is of this node's version.
    Serve,
    /// It must not be touched; why, in words.
    Refuse(String),
}

/// Decide. Only one node at a time may restore or upgrade.
pub fn decide(code: &Version, schema: &Schema) -> Decision {
    match schema {
        Schema::Empty => Decision::Restore,
        Schema::Foreign => Decision::Upgrade,
        Schema::Of(version) if version == code => Decision::Serve,
        Schema::Of(version) if version < code => Decision::Upgrade,
        Schema::Of(version) => Decision::Refuse(format!(
            "the database is of NetBox {version}, and this node brings the older {code}, which \
             would damage it: start the node from an image with NetBox {version} or newer, or \
             restore a backup from before the upgrade"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        Version::read(text).unwrap()
    }

    #[test]
    fn versions_are_read_and_compared_by_number() {
        assert!(version("4.10.0") > version("4.9.9"));
        assert_eq!(version("v4.6.8-dev\n"), version("4.6.8"));
        assert_eq!(version("4.6.8").to_string(), "4.6.8");
        for text in ["", "4", "x.y", "4..6", "99999999999.1", "-4.6"] {
            assert_eq!(Version::read(text), None, "{text}");
        }
    }

    #[test]
    fn an_older_node_never_touches_a_newer_database() {
        let code = version("4.6.8");
        let of = |text| Schema::Of(version(text));
        assert_eq!(decide(&code, &Schema::Empty), Decision::Restore);
        assert_eq!(decide(&code, &Schema::Foreign), Decision::Upgrade);
        assert_eq!(decide(&code, &of("4.6.8")), Decision::Serve);
        assert_eq!(decide(&code, &of("4.5.9")), Decision::Upgrade);
        for newer in ["4.6.9", "4.7.0", "5.0.0"] {
            let Decision::Refuse(why) = decide(&code, &of(newer)) else { panic!("{newer}") };
            assert!(why.contains(newer) && why.contains("4.6.8"), "{why}");
        }
    }
}
