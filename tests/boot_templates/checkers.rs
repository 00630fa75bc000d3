//! The programs that read the configurations, unpacked from the lock's packages and run in
//! the sandbox, where they see a node's files at their places.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rcgen::{CertificateParams, KeyPair};
use stanchion::command::Command;
use stanchion::config::tree::TreeKind;
use stanchion::error::UserError;
use stanchion::lock::Lock;
use stanchion::pipeline::{FetchOptions, Source, provide_tools};
use stanchion::progress::{Mode, Progress};
use stanchion::sandbox::{Program, Sandbox, Spec};
use tempfile::TempDir;

use crate::contexts::{Kind, list_kinds};
use crate::firewall::list_rules;
use crate::{find, load, render, root};

/// Trees of what the layers of the profile `edge` install, bottom first.
fn find_trees() -> Option<&'static [PathBuf]> {
    static TREES: OnceLock<Option<Vec<PathBuf>>> = OnceLock::new();
    TREES.get_or_init(|| unpack().map_err(|why| eprintln!("skipped: {why}")).ok()).as_deref()
}

fn unpack() -> Result<Vec<PathBuf>, String> {
    let source = Source::open(&FetchOptions::default(), &Progress::new(Mode::Quiet)).unwrap();
    let checks = make_sandbox().probe(source.store.root());
    if let Some(check) = checks.into_iter().find(|check| !check.ok) {
        return Err(format!("{}: {}", check.name, check.detail));
    }
    let lock = Lock::load(&root().join("stanchion.lock")).unwrap().expect("a lock");
    let layers = load("edge").layers;
    let names: Vec<&str> = layers.iter().map(|layer| layer.name.as_str()).collect();
    let mut trees = Vec::new();
    for (index, layer) in layers.iter().enumerate() {
        if layer.packages.is_empty() || layer.name == "kernel" {
            continue;
        }
        let set = names[..=index].join("+");
        let tools = provide_tools(&source, &lock, &set).map_err(|error| {
            match error.downcast_ref::<UserError>() {
                Some(missing) => missing.summary(),
                None => panic!("{error:?}"),
            }
        })?;
        trees.push(tools.root().to_owned());
    }
    Ok(trees)
}

fn make_sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_stanchion"))
}

/// A node's files over the packages.
struct Node {
    folder: TempDir,
    spec: Spec,
}

impl Node {
    fn new(kind: &Kind, rendered: &BTreeMap<PathBuf, String>, trees: &[PathBuf]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let files = folder.path().join("files");
        let write = |path: &Path, text: &[u8], mode: u32| {
            let path = files.join(path.strip_prefix("/").unwrap());
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        for layer in load(kind.profile).layers {
            for file in &layer.files {
                if let TreeKind::File { source, template: false } = &file.kind {
                    write(&file.target, &fs::read(root().join(source)).unwrap(), file.mode);
                }
            }
        }
        for (path, text) in rendered {
            write(path, text.as_bytes(), 0o644);
        }
        let users = "root:x:0:0::/:/bin/sh\nkeepalived_script:x:905:905::/:/usr/sbin/nologin\n";
        write(Path::new("/etc/passwd"), users.as_bytes(), 0o644);
        write(Path::new("/etc/group"), b"root:x:0:\nkeepalived_script:x:905:\n", 0o644);

        let key = KeyPair::generate().unwrap();
        let names = vec![format!("n{}", kind.number), kind.address().to_string()];
        let certificate = CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
        let both = certificate.pem() + &key.serialize_pem();
        write(Path::new("/seed/stanchion/tls/haproxy/ca.pem"), certificate.pem().as_bytes(), 0o644);
        for name in ["both.pem", "site.pem"] {
            let path = format!("/seed/stanchion/tls/haproxy/{name}");
            write(Path::new(&path), both.as_bytes(), 0o600);
        }
        write(Path::new("/seed/stanchion-vrrp/interface.conf"), b"$INTERFACE=lo\n", 0o644);
        for name in ["upper", "work", "merged"] {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::set_permissions(folder.path().join(name), fs::Permissions::from_mode(0o755))
                .unwrap();
        }
        let spec = Spec {
            lower: trees.iter().cloned().chain([files]).collect(),
            upper: Some(folder.path().join("upper")),
            work: Some(folder.path().join("work")),
            merged: Some(folder.path().join("merged")),
            ..Spec::default()
        };
        Node { folder, spec }
    }

    /// What a command line says when it does not end well.
    fn try_line(&self, line: &str) -> Result<String, String> {
        // /run is empty memory.
        let line = format!("cp -r /seed/. /run; mkdir /run/haproxy; exec {line}");
        let program = Program::new("/bin/sh").args(["-euc", &line]);
        make_sandbox().read(&self.spec, &program).map_err(|error| format!("{error:#}"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // What root of the sandbox has made may be another's out here.
        for name in ["upper", "work"] {
            let _ = make_sandbox().remove_tree(&self.folder.path().join(name));
        }
    }
}

/// Let `line` read the file at `path` of every kind of node that has one.
fn check(path: &str, line: &str) {
    let Some(trees) = find_trees() else { return };
    let mut checked = 0;
    for kind in list_kinds() {
        let rendered = render(&kind);
        if rendered.get(Path::new(path)).is_none_or(String::is_empty) {
            continue;
        }
        let node = Node::new(&kind, &rendered, trees);
        node.try_line(line).unwrap_or_else(|error| panic!("{}: {error}", kind.label));
        checked += 1;
    }
    assert!(checked > 0);
}

#[test]
fn haproxy_takes_its_configuration() {
    // Warnings are mistakes too.
    check("/etc/haproxy/haproxy.cfg", "haproxy -dW -c -f /etc/haproxy/haproxy.cfg");
}

/// All that keepalived has against a machine with no interface but its loopback.
const LOOPBACK: [&str; 4] = [
    "cannot use a loopback interface (lo) for vrrp - ignoring",
    "no interface for vip 10.9.0.100 - removing",
    "No VIP specified; at least one is sensible",
    "Unknown interface!",
];

#[test]
fn keepalived_takes_its_configuration() {
    check(
        "/etc/keepalived/keepalived.conf",
        &format!(
            "sh -c 'keepalived --config-test --use-file /etc/keepalived/keepalived.conf 2>&1 | \
             grep -vF {}; test $? = 1'",
            LOOPBACK.map(|text| format!("-e \"{text}\"")).join(" ")
        ),
    );
}

#[test]
fn dnsmasq_takes_its_configuration() {
    check(
        "/etc/stanchion-dns/dnsmasq.conf",
        "dnsmasq --test --conf-file=/etc/stanchion-dns/dnsmasq.conf",
    );
}

#[test]
fn chrony_takes_its_configuration() {
    check("/etc/chrony/chrony.conf", "chronyd -p -f /etc/chrony/chrony.conf");
}

#[test]
fn nftables_takes_its_rules() {
    // nft asks the kernel even about rules that it only checks, and the sandbox has no say
    // in its network: here it runs where it lies, and changes nothing.
    let Some(trees) = find_trees() else { return };
    let base = &trees[0];
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("nftables.conf");
    let check = |text: &str| -> Result<(), String> {
        fs::write(&file, text).unwrap();
        let nft = Command::new(base.join("usr/lib64/ld-linux-x86-64.so.2"))
            .arg("--library-path")
            .arg(base.join("usr/lib/x86_64-linux-gnu"))
            .arg(base.join("usr/sbin/nft"))
            .args(["-c", "-f"])
            .arg(&file);
        nft.run().map(drop).map_err(|error| format!("{error:#}"))
    };
    if let Err(why) = check("add table inet probe\n") {
        eprintln!("skipped: nft: {}", why.replace('\n', "; "));
        return;
    }
    let closed = root().join("layers/base/tree/usr/share/stanchion/firewall");
    let kinds = list_kinds();
    let of_kinds = kinds.iter().map(|kind| find(&render(kind), "/etc/nftables.conf").to_string());
    for rules in of_kinds.chain(list_rules()) {
        let rules = rules.replace("/usr/share/stanchion/firewall", closed.to_str().unwrap());
        check(&rules).unwrap_or_else(|error| panic!("{error}:\n{rules}"));
    }
}

#[test]
fn a_sentinel_keeps_what_it_knows_until_it_is_another() {
    let state = tempfile::tempdir().unwrap();
    let script = root().join("layers/redis/tree/usr/libexec/stanchion/seed-sentinel");
    let read = || fs::read_to_string(state.path().join("sentinel.conf")).unwrap();
    let seed = |kind: &Kind| {
        let file = state.path().join("rendered.conf");
        let rendered = render(kind);
        fs::write(&file, find(&rendered, "/etc/stanchion-sentinel/sentinel.conf")).unwrap();
        Command::new(&script).arg(file).arg(state.path()).run().unwrap();
        read()
    };
    let [first, second] = ["10.9.0.1", "10.9.0.2"];
    let kind = list_kinds()[0];
    let unknown = seed(&Kind { redis_master: None, ..kind });
    assert!(!unknown.contains("sentinel monitor"), "{unknown}");
    let known = seed(&Kind { redis_master: Some(first), ..kind });
    assert!(known.contains("sentinel monitor stanchion 10.9.0.1 6380 2\n"), "{known}");
    let mode = fs::metadata(state.path().join("sentinel.conf")).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0);

    let own = known + "sentinel current-epoch 7\n";
    fs::write(state.path().join("sentinel.conf"), &own).unwrap();
    assert_eq!(seed(&Kind { redis_master: Some(second), ..kind }), own, "another master");
    assert_eq!(seed(&Kind { redis_master: None, ..kind }), own, "no master");
    let other = seed(&Kind { number: 2, ..kind });
    assert!(other.contains(&format!("sentinel myid {:040x}\n", 2)), "{other}");
}
