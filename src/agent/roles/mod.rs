//! Services as data: which units a role has, in the order in which they start, and what
//! happens when one of their files changes.

mod cache;
mod db;
mod edge;
pub mod web;

use crate::config::cluster::Role;

/// A unit that the agent starts and keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Service {
    pub unit: &'static str,
    /// Targets whose change concerns it; one that ends with `/` stands for all below it.
    pub files: &'static [&'static str],
    /// The service's own check of a candidate.
    pub check: Option<Check>,
    pub on_change: OnChange,
}

/// A program that says whether a candidate of `file` is right; `{}` stands for its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    pub file: &'static str,
    pub program: &'static [&'static str],
}

/// What a running service needs when one of its files has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnChange {
    Reload,
    Restart,
    /// It reads its files only when it starts.
    Nothing,
}

/// What runs on every node.
const EVERYWHERE: &[Service] = &[
    Service {
        unit: "systemd-networkd.service",
        files: &["/etc/systemd/network/"],
        check: None,
        on_change: OnChange::Reload,
    },
    Service {
        unit: "nftables.service",
        files: &["/etc/nftables.conf"],
        check: Some(Check { file: "/etc/nftables.conf", program: &["nft", "-c", "-f", "{}"] }),
        on_change: OnChange::Reload,
    },
    Service {
        unit: "chrony.service",
        files: &["/etc/chrony/"],
        check: None,
        on_change: OnChange::Restart,
    },
    Service {
        unit: "systemd-resolved.service",
        files: &["/etc/systemd/resolved.conf.d/"],
        check: None,
        on_change: OnChange::Restart,
    },
    Service {
        unit: "prometheus-node-exporter.service",
        files: &[],
        check: None,
        on_change: OnChange::Nothing,
    },
];

/// The services of a node with these roles, those of the system first.
pub fn list_services(roles: &[Role]) -> Vec<Service> {
    let mut services = EVERYWHERE.to_vec();
    services.extend(list_role_services(roles));
    services
}

/// The services of these roles alone, in the order in which they start.
pub fn list_role_services(roles: &[Role]) -> impl Iterator<Item = Service> {
    roles
        .iter()
        .copied()
        .flat_map(|role| match role {
            Role::Db => db::SERVICES,
            Role::Cache => cache::SERVICES,
            Role::Edge => edge::SERVICES,
            Role::Web => web::SERVICES,
        })
        .copied()
}

impl Service {
    /// Whether a change of `target` concerns this service.
    pub fn is_concerned(&self, target: &str) -> bool {
        self.files.iter().any(|file| match file.strip_suffix('/') {
            Some(_) => target.starts_with(file),
            None => target == *file,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_has_at_most_one_service_that_checks_it() {
        let services = list_services(&Role::ALL);
        for service in &services {
            if let Some(check) = &service.check {
                assert!(service.is_concerned(check.file), "{}", service.unit);
                assert!(check.program.iter().any(|word| word.contains("{}")), "{}", service.unit);
            }
        }
        let mut units: Vec<_> = services.iter().map(|service| service.unit).collect();
        units.sort_unstable();
        units.dedup();
        assert_eq!(units.len(), services.len());
        let concerned: Vec<_> = services
            .iter()
            .filter(|service| service.is_concerned("/etc/haproxy/haproxy.cfg"))
            .map(|service| service.unit)
            .collect();
        assert_eq!(concerned, ["haproxy.service"]);
    }
}
