//! The certificate that the operator brings, and secrets that a newer version needs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{CertificateParams, KeyPair};

use crate::project::Project;
use crate::{make_project, three};

/// Write `NAME.pem` and `NAME.key`: valid from and until so many days from now.
pub fn write_certificate(project: &Project, name: &str, names: &[&str], days: (i64, i64)) {
    let mut params =
        CertificateParams::new(names.iter().map(|name| name.to_string()).collect::<Vec<_>>())
            .unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let at = |days: i64| {
        let second = now.saturating_add_signed(days * 86_400) + 3600;
        rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(second)
    };
    (params.not_before, params.not_after) = (at(days.0), at(days.1));
    let key = KeyPair::generate().unwrap();
    project.write(&format!("{name}.pem"), &params.self_signed(&key).unwrap().pem());
    project.write(&format!("{name}.key"), &key.serialize_pem());
    let path = project.root().join(format!("{name}.key"));
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

fn name_files(chain: &str, key: &str) -> String {
    format!("{}[certificate]\nchain = \"{chain}\"\nkey = \"{key}\"\n", three())
}

#[test]
fn a_certificate_that_is_brought_goes_with_the_seeds_of_edges() {
    let project = make_project();
    write_certificate(&project, "site", &["*.test", "www.lab.test"], (-1, 90));
    let nodes = three().replacen("profile = \"node\"", "profile = \"db\"", 1);
    project.write("cluster.toml", &name_files("site.pem", "site.key").replace(&three(), &nodes));
    let shown = project.run(&["cluster", "check"]).expect(0, &[]).stdout.clone();
    assert!(shown.contains("ok    certificate for *.test, www.lab.test, valid for 90 more days"));
    project.run(&["cluster", "init"]).expect(0, &[]);
    project.run(&["seed", "--all", "--format", "file", "--out", "."]).expect(0, &[]);
    let key = fs::read_to_string(project.root().join("site.key")).unwrap();
    let line = key.lines().nth(1).unwrap();
    for (node, is_edge) in [("n1", false), ("n2", true), ("n3", true)] {
        let seed = project.root().join(format!("{node}.seed.json"));
        let seed = fs::read_to_string(seed).unwrap();
        assert_eq!(seed.contains(line), is_edge, "{node}");
        assert_eq!(seed.contains("authority"), is_edge, "{node}");
    }
    write_certificate(&project, "site", &["lab.test"], (-1, 20));
    let shown = project.run(&["cluster", "check"]).expect(0, &[]).stdout.clone();
    assert!(shown.contains("WARN  certificate for lab.test, valid for 20 more days"), "{shown}");
}

#[test]
fn a_certificate_that_cannot_be_shown_is_told_before_anything_is_made() {
    let project = make_project();
    let write = |name: &str, names: &[&str], days| write_certificate(&project, name, names, days);
    write("good", &["lab.test"], (-1, 90));
    write("other", &["lab.test"], (-1, 90));
    write("foreign", &["netbox.test", "*.lab.test"], (-1, 90));
    write("nameless", &[], (-1, 90));
    write("past", &["lab.test"], (-90, -3));
    write("future", &["lab.test"], (2, 90));
    let root = project.root();
    fs::copy(root.join("good.key"), root.join("chain.key")).unwrap();
    fs::write(root.join("chain.key"), fs::read(root.join("good.pem")).unwrap()).unwrap();
    project.write("cluster.toml", &three());
    project.run(&["cluster", "init"]).expect(0, &[]);
    for (chain, key, said) in [
        ("good.pem", "other.key", "the key is not that of the first certificate"),
        ("good.key", "good.key", "the chain holds no certificate"),
        ("good.pem", "chain.key", "holds no private key"),
        ("none.pem", "good.key", "there is no file none.pem"),
        ("good.pem", "none.key", "there is no file none.key"),
        ("foreign.pem", "foreign.key", "it is for netbox.test, *.lab.test"),
        ("nameless.pem", "nameless.key", "it has no DNS name"),
        ("past.pem", "past.key", "the certificate has expired"),
        ("future.pem", "future.key", "the certificate is not valid yet"),
    ] {
        project.write("cluster.toml", &name_files(chain, key));
        let lines = project.run(&["cluster", "check"]);
        lines.expect(2, &[said, "cluster.toml:"]);
        project.run(&["seed", "--all"]).expect(2, &[said]);
    }
    assert!(!project.root().join("lab/seeds").exists());
    let key = project.root().join("good.key");
    fs::set_permissions(key, fs::Permissions::from_mode(0o644)).unwrap();
    project.write("cluster.toml", &name_files("good.pem", "good.key"));
    project.run(&["cluster", "check"]).expect(2, &["open to everybody", "0644", "chmod 600"]);
    project.write("cluster.toml", &format!("{}[certificate]\nchain = \"a\"\n", three()));
    project.run(&["cluster", "check"]).expect(2, &["missing key `key`"]);
}

#[test]
fn secrets_of_a_newer_version_are_added_and_all_others_stay() {
    let project = make_project();
    project.write("cluster.toml", &three());
    project.run(&["cluster", "init", "--missing"]).expect(2, &["has no secrets yet"]);
    project.run(&["cluster", "init"]).expect(0, &[]);
    let path = project.root().join("lab/secrets.toml");
    let whole = fs::read_to_string(&path).unwrap();
    project.run(&["cluster", "init", "--missing"]).expect(0, &["lab has all secrets"]);
    assert_eq!(fs::read_to_string(&path).unwrap(), whole);

    let without = |prefix: &str| -> String {
        let kept = whole.lines().filter(|line| !line.starts_with(prefix));
        kept.map(|line| format!("{line}\n")).collect()
    };
    let old = without("site_");
    fs::write(&path, &old).unwrap();
    let ran = project.run(&["seed", "--all"]);
    ran.expect(2, &["the secret `site_key` is missing", "stanchion cluster init --missing"]);
    let ran = project.run(&["cluster", "init", "--missing"]);
    ran.expect(0, &["added site_key, site_seal to lab"]);
    let new = fs::read_to_string(&path).unwrap();
    let added = new.strip_prefix(&old).expect("the others are as they were");
    assert_eq!(added.lines().count(), 2);
    assert!(!whole.contains(added.lines().next().unwrap()));
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    project.run(&["seed", "--all"]).expect(0, &[]);

    // What was there from the beginning is lost, not new.
    fs::write(&path, without("redis")).unwrap();
    let ran = project.run(&["cluster", "init", "--missing"]);
    ran.expect(2, &["the secret `redis` is missing", "from a copy"]);
    assert_eq!(fs::read_to_string(&path).unwrap(), without("redis"));
}
