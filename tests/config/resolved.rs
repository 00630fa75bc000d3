use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use stanchion::config::Format;
use stanchion::config::Profile;
use stanchion::config::layer::{Group, PackageWish, User};
use stanchion::config::profile::Disk;
use stanchion::config::tree::{TreeFile, TreeKind};

use crate::Sandbox;

fn list_layers(profile: &Profile) -> Vec<&str> {
    profile.layers.iter().map(|layer| layer.name.as_str()).collect()
}

#[test]
fn a_profile_has_defaults_for_what_it_does_not_say() {
    let profile = Sandbox::new(&[]).profile();
    assert_eq!(profile.formats, [Format::Qcow2]);
    assert_eq!(profile.disk, Disk { size: 8 << 30, slot: 2 << 30, esp: 256 << 20 });
    assert!(profile.variables.is_empty() && profile.cmdline.is_empty());
    let layer = &profile.layers[0];
    assert!(!layer.recommends && layer.files.is_empty() && layer.initrd.is_none());
}

#[test]
fn what_is_written_is_what_is_read() {
    let profile = Sandbox::with_layer(
        "packages = [\"patroni\", \"etcd-server=3.5.16-4\"]\nprovides = [\"locales\", \"ssl-cert (= 1.1.3)\"]\n[[user]]\nname = \"netbox\"\nid = 980\n[[group]]\nname = \"kvm\"\nid = 815\n",
    )
    .profile();
    let wish = |name: &str, version: Option<&str>| PackageWish {
        name: name.to_string(),
        version: version.map(str::to_string),
    };
    let layer = &profile.layers[0];
    assert_eq!(layer.packages, [wish("patroni", None), wish("etcd-server", Some("3.5.16-4"))]);
    let user = User {
        name: "netbox".to_string(),
        id: 980,
        home: PathBuf::from("/nonexistent"),
        shell: PathBuf::from("/usr/sbin/nologin"),
        groups: Vec::new(),
    };
    assert_eq!(layer.users, [user]);
    assert_eq!(layer.groups, [Group { name: "kvm".to_string(), id: 815 }]);
    assert_eq!(layer.provides, ["locales", "ssl-cert (= 1.1.3)"]);
}

#[test]
fn required_layers_come_before_those_that_require_them() {
    let sandbox = Sandbox::new(&[
        ("profiles/p.toml", "description = \"p\"\nlayers = [\"web\", \"kernel\", \"base\"]"),
        ("layers/web/layer.toml", "description = \"\\u0077\"\nrequires = [\"tls\", \"base\"]"),
        ("layers/tls/layer.toml", "description = \"t\"\nrequires = [\"base\"]"),
        ("layers/kernel/layer.toml", "description = \"k\""),
        ("layers/base/layer.toml", "description = \"b\""),
    ]);
    assert_eq!(list_layers(&sandbox.profile()), ["base", "tls", "web", "kernel"]);
}

#[test]
fn later_variables_lie_over_earlier_ones() {
    let sandbox = Sandbox::new(&[
        (
            "profiles/p.toml",
            "description = \"p\"\nlayers = [\"a\", \"b\"]\n[variables]\ndb.pool = 9\nlist = [3]",
        ),
        (
            "layers/a/layer.toml",
            "description = \"a\"\nexclude = [\"/x\"]\nkernel.cmdline = [\"quiet\"]\n[variables]\nlist = [1, 2]\ndb = { port = 1, host = \"h\", pool = 1 }\nonly = true",
        ),
        (
            "layers/b/layer.toml",
            "description = \"b\"\nexclude = [\"/y\"]\nkernel.cmdline = [\"console=ttyS0\"]\n[variables]\ndb.port = 2",
        ),
    ]);
    let profile = sandbox.profile();
    let expected = "list = [3]\ndb = { port = 2, host = \"h\", pool = 9 }\nonly = true";
    assert_eq!(profile.variables, expected.parse::<toml::Table>().unwrap());
    assert_eq!(profile.cmdline, ["quiet", "console=ttyS0"]);
    assert_eq!(profile.layers[0].exclude, ["/x"]);
    assert_eq!(profile.layers[1].exclude, ["/x", "/y"]);
}

fn make_file(target: &str, source: &str, template: bool, mode: u32) -> TreeFile {
    TreeFile {
        target: PathBuf::from(target),
        kind: TreeKind::File { source: PathBuf::from(source), template },
        mode,
        owner: "root".to_string(),
        group: "root".to_string(),
    }
}

fn make_directory(target: &str) -> TreeFile {
    let kind = TreeKind::Directory { keep_existing: true };
    TreeFile { kind, ..make_file(target, "", false, 0o755) }
}

#[test]
fn files_are_listed_with_target_owner_and_mode() {
    let sandbox = Sandbox::with_layer(
        "[owners]\n\"/etc/secret\" = { group = \"postgres\", mode = \"0640\" }\n\"/etc/d\" = { mode = \"0700\" }\n\"/etc/live\" = { owner = \"etcd\" }\n[initrd]\n",
    );
    let early = "skeleton/etc/early.j2";
    for path in ["tree/etc/secret.j2", "tree/etc/d/x", "boot/etc/live.j2", "initrd/etc/i.j2", early]
    {
        sandbox.write(&format!("layers/a/{path}"), "");
    }
    symlink("../x", sandbox.path().join("layers/a/tree/etc/link")).unwrap();
    let layer = sandbox.profile().layers.remove(0);
    assert_eq!(
        layer.files,
        [
            make_directory("/etc"),
            TreeFile {
                kind: TreeKind::Directory { keep_existing: false },
                mode: 0o700,
                ..make_directory("/etc/d")
            },
            make_file("/etc/d/x", "layers/a/tree/etc/d/x", false, 0o644),
            TreeFile {
                kind: TreeKind::Symlink("../x".to_string()),
                ..make_file("/etc/link", "", false, 0o777)
            },
            TreeFile {
                group: "postgres".to_string(),
                ..make_file("/etc/secret", "layers/a/tree/etc/secret.j2", true, 0o640)
            },
        ]
    );
    assert_eq!(
        layer.skeleton,
        [
            make_directory("/etc"),
            make_file("/etc/early", "layers/a/skeleton/etc/early.j2", true, 0o644)
        ]
    );
    let shipped = "/usr/share/stanchion/boot/a/etc";
    assert_eq!(
        layer.boot,
        [
            make_directory(shipped),
            TreeFile {
                owner: "etcd".to_string(),
                ..make_file(
                    &format!("{shipped}/live.j2"),
                    "layers/a/boot/etc/live.j2",
                    false,
                    0o644
                )
            },
        ]
    );
    assert_eq!(
        layer.initrd.unwrap().files,
        [make_directory("/etc"), make_file("/etc/i", "layers/a/initrd/etc/i.j2", true, 0o644)]
    );
}

#[test]
fn an_artifact_that_is_a_file_has_an_owner_too() {
    let artifact = format!(
        "[[artifact]]\nname = \"x\"\nurl = \"https://example.org/x\"\nsha256 = \"{}\"\npath = \"/usr/bin/x\"\n[owners]\n\"/usr/bin/x\" = {{ group = \"etcd\", mode = \"0755\" }}",
        "00".repeat(32)
    );
    let layer = Sandbox::with_layer(&artifact).profile().layers.remove(0);
    let artifact = &layer.artifacts[0];
    assert_eq!((&*artifact.owner, &*artifact.group, artifact.mode), ("root", "etcd", 0o755));
}

#[test]
fn only_a_layer_that_says_so_carries_the_agent() {
    assert!(Sandbox::with_layer("agent = true\n").profile().layers[0].agent);
    assert!(!Sandbox::with_layer("").profile().layers[0].agent);
}

#[test]
fn a_resolved_profile_can_be_shown_as_toml_and_as_json() {
    let sandbox = Sandbox::new(&[
        (
            "profiles/p.toml",
            "description = \"p\"\nlayers = [\"a\"]\nvariables.a.b = [{ c = 1 }, 2]",
        ),
        (
            "layers/a/layer.toml",
            "description = \"a\"\nunits.enable = [\"x.service\"]\n[[user]]\nname = \"u\"\nid = 200\n[initrd]",
        ),
        ("layers/a/tree/etc/motd.j2", ""),
    ]);
    symlink("motd", sandbox.path().join("layers/a/tree/etc/issue")).unwrap();
    let profile = sandbox.profile();
    let shown: toml::Value =
        toml::to_string(&profile).unwrap().parse::<toml::Table>().unwrap().into();
    assert_eq!(shown["disk"]["size"].as_integer(), Some(8 << 30));
    assert_eq!(shown["formats"][0].as_str(), Some("qcow2"));
    let layer = &shown["layer"][0];
    assert_eq!(layer["units"]["enable"][0].as_str(), Some("x.service"));
    assert_eq!(layer["files"][2]["mode"].as_str(), Some("0644"));
    let source = layer["files"][2]["kind"]["file"]["source"].as_str();
    assert_eq!(source, Some("layers/a/tree/etc/motd.j2"));
    assert_eq!(layer["files"][1]["kind"]["symlink"].as_str(), Some("motd"));
    let json = serde_json::to_string(&profile).unwrap();
    // Whoever checks the project out elsewhere sees the same.
    assert!(!json.contains(sandbox.path().to_str().unwrap()));
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn modes_do_not_hang_on_the_umask(umask in 0o000u32..0o100, is_executable: bool) {
        let sandbox = Sandbox::new(&[("layers/a/tree/usr/bin/x", "")]);
        let top = sandbox.path().join("layers/a/tree");
        let full = if is_executable { 0o777 } else { 0o666 };
        set_mode(&top.join("usr/bin/x"), full & !umask);
        set_mode(&top.join("usr/bin"), 0o777 & !umask);
        let files = sandbox.profile().layers.remove(0).files;
        let modes: Vec<u32> = files.iter().map(|file| file.mode).collect();
        prop_assert_eq!(modes, [0o755, 0o755, if is_executable { 0o755 } else { 0o644 }]);
    }

    #[test]
    fn the_order_respects_what_is_required_and_is_always_the_same(
        edges in proptest::collection::vec((0usize..8, 0usize..8), 0..16),
        wanted in proptest::sample::subsequence((0..8).collect::<Vec<usize>>(), 1..8).prop_shuffle(),
    ) {
        // Edges lead from a higher to a lower number only, so there is no circle.
        let requires = |layer: usize| {
            let mut lower: Vec<usize> = edges
                .iter()
                .filter(|(from, to)| *from == layer && to < from)
                .map(|(_, to)| *to)
                .collect();
            lower.dedup();
            lower.sort_by_key(|to| (to * 5) % 8);
            lower.dedup();
            lower
        };
        let list = |numbers: &[usize]| {
            let names: Vec<String> = numbers.iter().map(|n| format!("\"l{n}\"")).collect();
            format!("[{}]", names.join(", "))
        };
        let profile = format!("description = \"p\"\nlayers = {}", list(&wanted));
        let sandbox = Sandbox::new(&[("profiles/p.toml", &profile)]);
        for layer in 0..8 {
            let text = format!("description = \"x\"\nrequires = {}", list(&requires(layer)));
            sandbox.write(&format!("layers/l{layer}/layer.toml"), text);
        }
        let resolved = sandbox.profile();
        let order: Vec<usize> =
            list_layers(&resolved).iter().map(|name| name[1..].parse().unwrap()).collect();
        prop_assert_eq!(&sandbox.profile(), &resolved);
        let place = |layer: usize| order.iter().position(|other| *other == layer);
        for layer in &wanted {
            prop_assert!(place(*layer).is_some());
        }
        for (i, layer) in order.iter().enumerate() {
            prop_assert_eq!(place(*layer), Some(i), "no layer is there twice");
            for required in requires(*layer) {
                prop_assert!(place(required).is_some_and(|place| place < i));
            }
        }
        // Layers are there because the profile or another layer asks for them.
        for layer in &order {
            let is_required = order.iter().any(|other| requires(*other).contains(layer));
            prop_assert!(wanted.contains(layer) || is_required);
        }
    }
}

#[test]
fn a_profile_has_the_roles_of_its_layers_in_their_order() {
    use stanchion::config::Role;
    let layer = |role: &str| format!("description = \"x\"\nrole = \"{role}\"");
    let sandbox = Sandbox::new(&[
        ("profiles/p.toml", "description = \"p\"\nlayers = [\"a\", \"c\", \"b\", \"d\"]"),
        ("layers/b/layer.toml", &layer("db")),
        ("layers/c/layer.toml", &layer("edge")),
        ("layers/d/layer.toml", &layer("db")),
    ]);
    assert_eq!(sandbox.profile().roles(), [Role::Db, Role::Edge]);
    assert_eq!(Sandbox::new(&[]).profile().roles(), []);
}
