//! The pages for people that help with what readiness says: carried by the program, since
//! whoever needs them at night may reach nothing but a node.

/// The pages of `docs/operations/`, by name.
pub const PAGES: [(&str, &str); 13] = [
    ("README", include_str!("../../docs/operations/README.md")),
    ("backup", include_str!("../../docs/operations/backup.md")),
    ("certificates", include_str!("../../docs/operations/certificates.md")),
    ("cold-start", include_str!("../../docs/operations/cold-start.md")),
    ("etcd-quorum-lost", include_str!("../../docs/operations/etcd-quorum-lost.md")),
    ("maintenance", include_str!("../../docs/operations/maintenance.md")),
    ("node-lost", include_str!("../../docs/operations/node-lost.md")),
    ("node-replaced", include_str!("../../docs/operations/node-replaced.md")),
    ("pitfalls", include_str!("../../docs/operations/pitfalls.md")),
    ("replica-reinit", include_str!("../../docs/operations/replica-reinit.md")),
    ("restore", include_str!("../../docs/operations/restore.md")),
    ("support-bundle", include_str!("../../docs/operations/support-bundle.md")),
    ("switchover", include_str!("../../docs/operations/switchover.md")),
];

/// Words of a reason or warning, and the page for it; the first that fits counts.
const TOPICS: [(&str, &str); 22] = [
    ("maintenance", "maintenance"),
    ("restore", "restore"),
    ("another database", "restore"),
    ("backup", "backup"),
    ("archive", "backup"),
    ("repository", "backup"),
    ("no quorum", "etcd-quorum-lost"),
    ("nodes are not there", "node-lost"),
    ("it is not there", "node-lost"),
    ("no sign of life", "node-lost"),
    ("agent does not answer", "node-lost"),
    ("voting members", "node-replaced"),
    ("still learning", "node-replaced"),
    ("has no leader", "cold-start"),
    ("paus", "pitfalls"),
    ("synchronous standby", "replica-reinit"),
    ("PostgreSQL does not run", "replica-reinit"),
    ("certificate", "certificates"),
    ("VIP", "pitfalls"),
    ("Sentinel", "pitfalls"),
    ("Redis", "pitfalls"),
    ("not HA", "pitfalls"),
];

/// The name of the page that helps with this reason or warning; how to ask for help, where
/// none is about it.
pub fn find_page(reason: &str) -> &'static str {
    let topic = TOPICS.iter().find(|(words, _)| reason.contains(words));
    topic.map_or("support-bundle", |(_, page)| page)
}

/// The text of a page, in Markdown.
pub fn read_page(name: &str) -> Option<&'static str> {
    PAGES.iter().find(|(page, _)| *page == name).map(|(_, text)| *text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_pages_are_carried_and_all_topics_have_one() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/operations");
        let mut there: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .map(|name| name.strip_suffix(".md").unwrap().to_string())
            .collect();
        there.sort();
        assert_eq!(there, PAGES.map(|(name, _)| name));
        for (words, page) in TOPICS {
            assert!(read_page(page).is_some(), "{words}: {page}");
        }
    }

    #[test]
    fn reasons_lead_to_the_page_that_says_what_to_do() {
        for (reason, page) in [
            ("etcd has no quorum: nothing can be written or elected", "etcd-quorum-lost"),
            ("not HA: 1 of 3 nodes are not there: n3", "node-lost"),
            ("not HA: etcd has 2 voting members of 3", "node-replaced"),
            ("PostgreSQL has no leader: no writes", "cold-start"),
            ("not HA: there is no synchronous standby; what is written", "replica-reinit"),
            ("not HA: all db nodes are in one zone, which fails as one", "pitfalls"),
            ("certificate: this node's certificate has expired", "certificates"),
            ("stanchion-sentinel.service does not run", "support-bundle"),
        ] {
            assert_eq!(find_page(reason), page, "{reason}");
        }
    }
}
