//! What is in the root, read file by file, against the packages it was made of.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use stanchion::config::Project;
use stanchion::disk::erofs_read::{Erofs, Inode};
use stanchion::rootfs::exclude::Excludes;
use stanchion::store::Store;
use stanchion::tools::set;

use crate::support::{self, Image, PROFILE};

const MOST: u64 = 256 << 20;

/// Run `look` on the root of the image.
fn look_into(look: impl FnOnce(&Image, &Root)) {
    let Some(image) = support::provide(&[set::CHECK, set::BUILD]) else { return };
    let disk = File::open(&image.raw).unwrap();
    let erofs = Erofs::open(support::open_partition(&disk, "root-a")).unwrap();
    let mut files = BTreeMap::new();
    let mut folders = vec![(String::new(), erofs.root().unwrap())];
    while let Some((path, folder)) = folders.pop() {
        for (name, number) in erofs.list(&folder).unwrap() {
            let name = String::from_utf8(name).unwrap();
            let path = if path.is_empty() { name } else { format!("{path}/{name}") };
            let inode = erofs.read_inode(number).unwrap();
            if inode.is_folder() {
                folders.push((path.clone(), inode.clone()));
            }
            files.insert(path, inode);
        }
        files.insert(path, folder);
    }
    look(image, &Root { erofs, files });
}

struct Root<'a> {
    erofs: Erofs<'a>,
    /// By path, without a slash at the beginning.
    files: BTreeMap<String, Inode>,
}

impl Root<'_> {
    fn read(&self, path: &str) -> Vec<u8> {
        let inode = self.files.get(path).unwrap_or_else(|| panic!("no /{path}"));
        self.erofs.read(inode, MOST).unwrap()
    }

    fn read_text(&self, path: &str) -> String {
        String::from_utf8(self.read(path)).unwrap()
    }

    /// Paths that begin so.
    fn list(&self, start: &str) -> Vec<&str> {
        let paths = self.files.keys().map(String::as_str);
        paths.filter(|path| path.starts_with(start)).collect()
    }
}

fn show(inode: &Inode) -> String {
    format!("{:06o} {}:{}", inode.mode, inode.uid, inode.gid)
}

#[test]
fn nothing_in_the_root_is_secret_or_of_one_machine() {
    look_into(|_, root| {
        for path in ["etc/machine-id", "etc/hostname", "etc/adjtime", "etc/random-seed"] {
            assert!(!root.files.contains_key(path), "/{path} is there");
        }
        for start in ["var/", "run/", "tmp/", "dev/", "proc/", "sys/", "root/", "home/", "boot/"] {
            assert_eq!(root.list(start), [""; 0], "something is in /{start}");
        }
        for path in root.files.keys() {
            let name = path.rsplit('/').next().unwrap();
            assert!(name != "sshd" && !name.starts_with("ssh_host_"), "/{path} is there");
            assert!(!name.ends_with(".pyc") || path.contains("__pycache__"), "/{path} is there");
        }
        let small = root.files.iter().filter(|(_, inode)| inode.is_file() && inode.size < 1 << 20);
        for (path, inode) in small {
            let content = root.erofs.read(inode, MOST).unwrap();
            let has_key = content.windows(16).any(|text| text == b"PRIVATE KEY-----");
            // Libraries and scripts know the words.
            let is_code = path.starts_with("usr/lib/") || path.starts_with("usr/share/perl");
            assert!(!has_key || is_code, "/{path} holds a private key");
        }
    });
}

#[test]
fn nobody_can_log_in_and_every_owner_has_a_name() {
    look_into(|_, root| {
        let shadow = root.read_text("etc/shadow");
        let passwords: BTreeMap<&str, &str> = shadow
            .lines()
            .map(|line| (line.split(':').next().unwrap(), line.split(':').nth(1).unwrap()))
            .collect();
        assert!(passwords["root"].starts_with('!'), "{shadow}");
        for (user, password) in &passwords {
            assert!(password.starts_with(['!', '*']), "{user} has the password {password}");
        }
        assert_eq!(show(&root.files["etc/shadow"]), "100640 0:42");
        assert_eq!(show(&root.files["etc/gshadow"]), "100640 0:42");

        let read_ids = |path: &str| -> BTreeMap<u32, String> {
            let text = root.read_text(path);
            let lines = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
            lines.map(|fields| (fields[2].parse().unwrap(), fields[0].to_string())).collect()
        };
        let (users, groups) = (read_ids("etc/passwd"), read_ids("etc/group"));
        for (id, name) in &users {
            assert!(*id < 1000 || name == "nobody", "{name} has the id {id}");
            assert!(passwords.contains_key(name.as_str()), "{name} has no line in /etc/shadow");
        }
        for (path, inode) in &root.files {
            let known = users.contains_key(&inode.uid) && groups.contains_key(&inode.gid);
            assert!(known, "/{path} belongs to {}", show(inode));
        }
    });
}

#[test]
fn only_tmp_is_open_to_everyone() {
    look_into(|_, root| {
        let open: Vec<String> = root
            .files
            .iter()
            .filter(|(_, inode)| !inode.is_link() && inode.mode & 0o002 != 0)
            .map(|(path, inode)| format!("/{path} {}", show(inode)))
            .collect();
        assert_eq!(open, ["/tmp 041777 0:0"]);
        assert_eq!(show(&root.files[""]), "040755 0:0");
        assert!(
            root.files
                .values()
                .all(|inode| { inode.is_file() || inode.is_folder() || inode.is_link() })
        );
    });
}

#[test]
fn documentation_and_languages_are_left_out() {
    look_into(|_, root| {
        for start in [
            "usr/share/doc/",
            "usr/share/man/",
            "usr/share/info/",
            "usr/share/locale/",
            "usr/share/i18n/",
            "usr/share/lintian/",
        ] {
            assert_eq!(root.list(start), [""; 0]);
        }
        let locales: BTreeSet<&str> =
            root.list("usr/lib/locale/").iter().filter_map(|path| path.split('/').nth(3)).collect();
        assert_eq!(locales, BTreeSet::from(["C.utf8"]));
    });
}

#[test]
fn units_are_masked_enabled_and_disabled_as_the_layers_say() {
    look_into(|_, root| {
        let units = "etc/systemd/system";
        for unit in [
            "autovt@.service",
            "console-getty.service",
            "debug-shell.service",
            "getty@.service",
            "serial-getty@.service",
            "postgresql.service",
            "postgresql@.service",
        ] {
            let path = format!("{units}/{unit}");
            assert!(root.files[&path].is_link(), "{unit}");
            assert_eq!(root.read_text(&path), "/dev/null", "{unit}");
        }
        let wanted: Vec<&str> = root
            .list(units)
            .into_iter()
            .filter(|path| path.contains(".wants/"))
            .filter_map(|path| path.rsplit('/').next())
            .collect();
        for unit in ["chrony.service", "nftables.service", "systemd-networkd.service"] {
            assert!(wanted.contains(&unit), "{unit} is not enabled: {wanted:?}");
        }
        // A mask wins over what the package enabled.
        for unit in ["etcd.service", "patroni.service"] {
            assert!(!wanted.contains(&unit), "{unit} is enabled");
        }
    });
}

/// Files of packages that the image replaces by its own, or whose script gives them away.
const REPLACED: [&str; 3] =
    ["usr/lib/os-release", "etc/default/prometheus-postgres-exporter", "etc/pgbackrest.conf"];

#[test]
fn files_are_those_of_the_packages_with_their_owners_and_modes() {
    look_into(|image, root| {
        let project = Project::find(&support::project(PROFILE)).unwrap();
        let profile = project.load_profile(PROFILE).unwrap();
        let always = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/var/*"];
        let globs = profile.layers.iter().flat_map(|layer| {
            let removed = layer.remove.iter().map(|remove| remove.path.as_str());
            layer.exclude.iter().map(String::as_str).chain(removed)
        });
        let left_out = globs.chain(always).fold(Excludes::default(), Excludes::exclude);
        let store = Store::default_root().unwrap();
        let mut special = BTreeMap::new();
        let mut wrong = Vec::new();
        let mut seen = 0;
        for package in &image.manifest.packages {
            let deb = store.join("files").join(package.sha256.to_string());
            let tar = image.tools[0].command("dpkg-deb").unwrap().arg("--fsys-tarfile").arg(deb);
            let tar = tar.run().unwrap().stdout;
            let mut archive = tar::Archive::new(&tar[..]);
            for entry in archive.entries().unwrap() {
                let mut entry = entry.unwrap();
                let path = merge_usr(&entry.path().unwrap());
                let header = entry.header();
                let mode = header.mode().unwrap() & 0o7777;
                let owner = (header.uid().unwrap() as u32, header.gid().unwrap() as u32);
                let kind = header.entry_type();
                let Some(inode) = root.files.get(&path) else {
                    let shown = format!("/{path}");
                    if !kind.is_dir() && !left_out.matches(shown.as_bytes()) {
                        wrong.push(format!("{shown} of {} is missing", package.name));
                    }
                    continue;
                };
                if !kind.is_file() || REPLACED.contains(&path.as_str()) {
                    continue;
                }
                seen += 1;
                let is = (u32::from(inode.mode) & 0o7777, (inode.uid, inode.gid));
                // Of those that Debian gives to everybody, an image needs none.
                let left = mode & !0o6000;
                if is != (left, owner) {
                    wrong.push(format!(
                        "/{path} of {}: {mode:o} {owner:?} became {}",
                        package.name,
                        show(inode)
                    ));
                }
                if mode & 0o6000 != 0 {
                    special.insert(path.clone(), mode);
                }
                let mut content = Vec::new();
                entry.read_to_end(&mut content).unwrap();
                let same = content.len() as u64 == inode.size
                    && root.erofs.read(inode, MOST).unwrap() == content;
                if !same {
                    wrong.push(format!("/{path} of {} has other content", package.name));
                }
            }
        }
        assert_eq!(wrong, [""; 0], "{}", wrong.join("\n"));
        assert!(seen > 3000, "only {seen} files were compared");
        assert_eq!(special.get("usr/bin/su"), Some(&0o4755), "{special:?}");
        let got = root.files.iter().find(|(_, inode)| inode.is_file() && inode.mode & 0o6000 != 0);
        assert!(got.is_none(), "{got:?} gives its caller other rights");
    });
}

/// A path of a package in the merged `/usr`, without `./` and the slash of a folder.
fn merge_usr(path: &Path) -> String {
    let path = String::from_utf8(path.as_os_str().as_bytes().to_vec()).unwrap();
    let path = path.trim_start_matches("./").trim_end_matches('/').to_string();
    let first = path.split('/').next().unwrap_or_default();
    match ["bin", "sbin", "lib", "lib64"].contains(&first) && path.contains('/') {
        true => format!("usr/{path}"),
        false => path,
    }
}

#[test]
fn every_package_is_installed_in_the_version_of_the_manifest() {
    look_into(|image, _| {
        let top = image.manifest.layers.iter().rfind(|layer| layer.diff == "packages").unwrap();
        let layers = Store::default_root().unwrap().join("steps/layer");
        let status = layers.join(top.key.to_string()).join("tree/var/lib/dpkg/status");
        let status = fs::read_to_string(status).unwrap();
        let mut installed = BTreeMap::new();
        for paragraph in status.split("\n\n").filter(|text| !text.trim().is_empty()) {
            let field = |name: &str| {
                let mut lines = paragraph.lines();
                lines.find_map(|line| line.strip_prefix(name)).unwrap_or_default().to_string()
            };
            assert_eq!(field("Status: "), "install ok installed", "{}", field("Package: "));
            installed.insert(field("Package: "), field("Version: "));
        }
        for package in &image.manifest.packages {
            assert_eq!(installed.remove(&package.name), Some(package.version.clone()));
        }
        // What is left stands for what the layers provide themselves.
        let others: Vec<&String> = installed.keys().collect();
        assert!(others.iter().all(|name| name.starts_with("stanchion-")), "{others:?}");
    });
}
