use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use stanchion::pki::Certificate;
use stanchion::seed::volume::read_seed;
use stanchion::seed::{Identity, Seed, Verdict, verify_seed};

use crate::project::Project;
use crate::{HEAD, make_project, node, three};

fn make_cluster(text: &str) -> Project {
    let project = make_project();
    project.write("cluster.toml", text);
    project.run(&["cluster", "init"]).expect(0, &["made lab"]);
    project
}

fn verify(bytes: &[u8], remembered: Option<&Identity>) -> Verdict {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    verify_seed(Some(bytes), now, remembered)
}

#[track_caller]
fn accept(bytes: &[u8]) -> Seed {
    match verify(bytes, None) {
        Verdict::Accepted(seed) => *seed,
        refused => panic!("{refused}"),
    }
}

fn read_volume(path: &Path) -> Vec<u8> {
    read_seed(&File::open(path).unwrap()).unwrap().expect("a seed on the volume")
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().mode() & 0o777
}

fn list(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn from_a_new_file_to_the_seeds() {
    let project = make_project();
    project.run(&["cluster", "new"]).expect(0, &[]);
    project.run(&["cluster", "init"]).expect(0, &["made netbox"]);
    project.run(&["seed", "--all"]).expect(0, &["netbox/seeds/n1.seed.img (db, cache, edge)"]);
    let seeds = project.root().join("netbox/seeds");
    assert_eq!(list(&seeds), ["n1.seed.img", "n2.seed.img", "n3.seed.img"]);
    for name in ["n1", "n2", "n3"] {
        let seed = accept(&read_volume(&seeds.join(format!("{name}.seed.img"))));
        assert_eq!((seed.node.as_str(), seed.cluster.name.as_str()), (name, "netbox"));
    }
}

#[test]
fn what_is_made_is_for_its_owner_alone_whatever_the_umask() {
    let project = make_project();
    project.write("cluster.toml", &three());
    // A shell, because a umask is that of the whole process.
    let run = |line: &str| {
        let program = env!("CARGO_BIN_EXE_stanchion");
        let done = std::process::Command::new("sh")
            .args(["-c", &format!("umask 0; exec {program} {line}")])
            .current_dir(project.root())
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    };
    run("cluster init");
    run("seed --all");
    run("seed n1 --format file --out out/seeds");
    let root = project.root();
    for folder in ["lab", "lab/seeds", "out/seeds"] {
        assert_eq!(mode(&root.join(folder)), 0o700, "{folder}");
        for name in list(&root.join(folder)).iter().filter(|name| *name != "seeds") {
            assert_eq!(mode(&root.join(folder).join(name)), 0o600, "{folder}/{name}");
        }
    }
    assert_eq!(
        list(&root.join("lab")),
        [".gitignore", "ca.key", "ca.pem", "operator.key", "operator.pem", "secrets.toml", "seeds"]
    );
    // Nothing half-made is left beside them.
    assert!(list(&root).iter().all(|name| !name.starts_with('.')), "{:?}", list(&root));
}

#[test]
fn a_second_init_changes_nothing() {
    let project = make_cluster(&three());
    let folder = project.root().join("lab");
    let read = || -> BTreeMap<String, Vec<u8>> {
        list(&folder).into_iter().map(|n| (n.clone(), fs::read(folder.join(n)).unwrap())).collect()
    };
    let before = read();
    let ran = project.run(&["cluster", "init"]);
    ran.expect(2, &["lab exists already", "lock the cluster out of its own data", "seed"]);
    assert_eq!(read(), before);
    // Not even over an empty folder, a file, or a link that leads nowhere.
    let root = project.root();
    fs::create_dir(root.join("empty")).unwrap();
    fs::write(root.join("file"), "mine").unwrap();
    std::os::unix::fs::symlink("nowhere", root.join("link")).unwrap();
    for name in ["empty", "file", "link"] {
        project.run(&["cluster", "init", "--dir", name]).expect(2, &["exists already"]);
    }
    assert_eq!(list(&root.join("empty")), [""; 0]);
    project.run(&["cluster", "init", "--dir", "no/such"]).expect(2, &["no directory no"]);
    project.run(&["cluster", "init", "--dir", "other"]).expect(0, &[]);
    assert!(list(&root).iter().all(|name| !name.starts_with('.')));
}

#[test]
fn each_role_gets_its_own_secrets_and_no_others() {
    let nodes: String = (1..=3).map(|number| node(number, "db")).collect();
    let others = ["cache", "web", "edge"];
    let others: String = (4..).zip(others).map(|(number, role)| node(number, role)).collect();
    let project = make_cluster(&format!("{HEAD}{nodes}{others}"));
    project.run(&["seed", "--all"]).expect(0, &[]);
    let all = fs::read_to_string(project.root().join("lab/secrets.toml")).unwrap();
    let all: BTreeMap<String, String> = toml::from_str(&all).unwrap();
    assert_eq!(all.len(), 16);
    assert!(all.values().all(|secret| secret.len() >= 32));
    for (name, expected) in [
        (
            "n1",
            "fingerprint patroni_rest postgres_netbox postgres_replication postgres_rewind postgres_superuser",
        ),
        ("n4", "fingerprint redis sentinel"),
        ("n5", "fingerprint netbox_admin netbox_pepper netbox_secret_key postgres_netbox redis"),
        ("n6", "fingerprint haproxy_stats keepalived redis site_key site_seal"),
    ] {
        let image = project.root().join(format!("lab/seeds/{name}.seed.img"));
        let bytes = read_volume(&image);
        let seed = accept(&bytes);
        let got: Vec<&str> = seed.secrets.keys().map(String::as_str).collect();
        assert_eq!(got.join(" "), expected, "{name}");
        // Nor anywhere else on the volume.
        let image = String::from_utf8_lossy(&fs::read(image).unwrap()).into_owned();
        for (secret, text) in &all {
            assert_eq!(image.contains(text), seed.secrets.contains_key(secret), "{name} {secret}");
        }
        let key = fs::read_to_string(project.root().join("lab/ca.key")).unwrap();
        assert!(!image.contains(key.lines().nth(1).unwrap()), "{name} has the CA's key");
    }
}

#[test]
fn keys_that_somebody_else_has_made_are_brought() {
    let text = format!(
        "{}[storage]\nendpoint = \"https://s3.test\"\nbucket = \"media\"\nregion = \"eu\"\n",
        three()
    );
    let project = make_project();
    project.write("cluster.toml", &text);
    let refused = project.run(&["cluster", "init"]);
    refused.expect(2, &["`s3_access_key` is not given", "--s3-key-file FILE"]);
    let path = project.root().join("s3.keys");
    let init = ["cluster", "init", "--s3-key-file", "s3.keys"];
    project.run(&init).expect(2, &["there is no file s3.keys"]);
    for (keys, mode, said) in [
        ("GKabc\nsecret+/=\n", 0o644, "open to others"),
        ("GKabc\n", 0o600, "it must be 2 lines"),
        ("GKabc\nhunter 2\n", 0o600, "it must be 2 lines"),
    ] {
        project.write("s3.keys", keys);
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        project.run(&init).expect(2, &[said]).expect_not("hunter");
    }
    project.write("s3.keys", "GKabc\nsecret+/=\n");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    project.run(&init).expect(0, &["made lab"]);
    let all = fs::read_to_string(project.root().join("lab/secrets.toml")).unwrap();
    assert!(all.contains("s3_access_key = \"GKabc\"\ns3_secret_key = \"secret+/=\"\n"), "{all}");

    // A storage that comes later.
    project.write("cluster.toml", &three());
    project.run(&["cluster", "init", "--dir", "later"]).expect(0, &[]);
    project.write("cluster.toml", &text);
    project.run(&["cluster", "init", "--missing", "--dir", "later"]).expect(2, &["s3_access_key"]);
    let add = [&init[..], &["--missing", "--dir", "later"]].concat();
    project.run(&add).expect(0, &["added s3_access_key, s3_secret_key"]);
}

#[test]
fn each_run_issues_a_fresh_certificate_of_the_same_ca() {
    let project = make_cluster(&three());
    let image = project.root().join("lab/seeds/n2.seed.img");
    project.run(&["seed", "n2"]).expect(0, &["n2.seed.img"]);
    let first = accept(&read_volume(&image));
    let identity = Identity::of(&first).unwrap();
    project.run(&["seed", "n2"]).expect(0, &[]);
    let bytes = read_volume(&image);
    let second = accept(&bytes);
    assert_ne!((&first.certificate, &first.key), (&second.certificate, &second.key));
    assert_eq!((&first.ca, &first.secrets), (&second.ca, &second.secrets));
    assert!(matches!(verify(&bytes, Some(&identity)), Verdict::Accepted(_)));

    let ca = Certificate::read(&first.ca).unwrap();
    let own = Certificate::read(&second.certificate).unwrap();
    assert!(ca.has_issued(&own) && own.fits(&second.key));
    for name in ["n2", "n2.lab.test", "lab.test", "db.lab.test", "cache.lab.test", "localhost"] {
        assert!(own.dns_names.iter().any(|own| own == name), "{name}");
    }
    for address in ["10.0.0.2", "10.0.0.100", "127.0.0.1"] {
        assert!(own.addresses.contains(&address.parse().unwrap()), "{address}");
    }
    let operator = fs::read_to_string(project.root().join("lab/operator.pem")).unwrap();
    assert!(ca.has_issued(&Certificate::read(&operator).unwrap()));

    // The seed of a namesake.
    project.run(&["cluster", "init", "--dir", "namesake"]).expect(0, &[]);
    project.run(&["seed", "n2", "--dir", "namesake"]).expect(0, &[]);
    let foreign = read_volume(&project.root().join("namesake/seeds/n2.seed.img"));
    assert!(matches!(verify(&foreign, Some(&identity)), Verdict::Foreign(_)));
}

#[test]
fn a_seed_may_be_a_file_and_go_elsewhere() {
    let project = make_cluster(&three());
    let args = ["seed", "n1", "--format", "file", "--out", ".", "--json"];
    let ran = project.run(&args);
    ran.expect(0, &[]);
    let [event] = &ran.events()[..] else { panic!("{}", ran.stdout) };
    assert_eq!((&event["event"], &event["node"]), (&"seed".into(), &"n1".into()));
    let path = project.root().join(event["path"].as_str().unwrap());
    assert_eq!(path.file_name().unwrap(), "n1.seed.json");
    let bytes = fs::read(&path).unwrap();
    assert!(bytes.len() < 8192, "{} bytes", bytes.len());
    assert_eq!(accept(&bytes).node, "n1");
    for secret in accept(&bytes).secrets.values() {
        assert!(!ran.stdout.contains(secret.reveal()));
    }
    // Written somewhere else, under another name, for a cluster file elsewhere.
    fs::rename(project.root().join("cluster.toml"), project.root().join("berlin.toml")).unwrap();
    project.run(&["seed", "n1"]).expect(2, &["there is no cluster file `cluster.toml`"]);
    project.run(&["seed", "n1", "--cluster", "berlin.toml", "--quiet"]).expect(0, &[]);
    project.run(&["cluster", "check", "berlin.toml"]).expect(0, &[]);
}

#[test]
fn mistakes_with_seeds_are_told() {
    let project = make_project();
    project.write("cluster.toml", &three());
    let ran = project.run(&["seed", "--all"]);
    ran.expect(2, &["the cluster `lab` has no secrets yet", "stanchion cluster init"]);
    project.run(&["cluster", "init"]).expect(0, &[]);
    project.run(&["seed", "n9"]).expect(2, &["the cluster `lab` has no node `n9`", "`n1`"]);
    project.run(&["seed"]).expect(2, &["--all"]);
    project.run(&["seed", "n1", "--all"]).expect(2, &["cannot be used with"]);

    let (root, folder) = (project.root(), project.root().join("lab"));
    let secrets = folder.join("secrets.toml");
    let whole = fs::read_to_string(&secrets).unwrap();
    fs::set_permissions(&secrets, fs::Permissions::from_mode(0o644)).unwrap();
    let open = project.run(&["seed", "n1"]);
    open.expect(2, &["a file with secrets is open to others", "0644", "chmod 600"]);
    fs::set_permissions(&secrets, fs::Permissions::from_mode(0o600)).unwrap();

    // No message shows a line of the file.
    for (text, said) in [
        (whole.replace("redis = \"", "redis = \"has blank "), "the secrets cannot be read"),
        (whole.replace("redis = ", "redis "), "the secrets cannot be read"),
        (format!("{whole}numbers = 424242\n"), "the secrets cannot be read"),
        (
            whole.lines().filter(|l| !l.starts_with("redis")).collect::<Vec<_>>().join("\n"),
            "`redis` is missing",
        ),
    ] {
        fs::write(&secrets, text).unwrap();
        let ran = project.run(&["seed", "n1"]);
        ran.expect(2, &[said, "secrets.toml"]).expect_not("424242");
        for line in whole.lines().filter_map(|line| line.split('"').nth(1)) {
            ran.expect_not(line);
        }
    }
    fs::write(&secrets, &whole).unwrap();
    project.run(&["seed", "n1"]).expect(0, &[]);

    project.write("other.toml", &three().replace("name = \"lab\"", "name = \"other\""));
    project
        .run(&["seed", "n1", "--cluster", "other.toml", "--dir", "lab"])
        .expect(2, &["lab belongs to another cluster", "`lab`, and the file says `other`"]);
    project.run(&["cluster", "init", "--dir", "second"]).expect(0, &[]);
    fs::copy(root.join("second/ca.key"), folder.join("ca.key")).unwrap();
    project.run(&["seed", "n1"]).expect(2, &["the CA's key is not that of its certificate"]);
    fs::write(folder.join("ca.key"), "-----BEGIN PRIVATE KEY-----\nhunter2\n").unwrap();
    project.run(&["seed", "n1"]).expect(2, &["CA cannot be used"]).expect_not("hunter2");
    fs::remove_file(folder.join("ca.pem")).unwrap();
    project.run(&["seed", "n1"]).expect(2, &["there is no lab/ca.pem", "from a copy"]);
}

#[test]
fn openssl_finds_nothing_wrong_with_the_certificates() {
    let has = std::process::Command::new("openssl").arg("version").output();
    if !has.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: there is no openssl here");
        return;
    }
    let project = make_cluster(&three());
    project.run(&["seed", "n1", "--format", "file", "--out", "."]).expect(0, &[]);
    let seed = accept(&fs::read(project.root().join("n1.seed.json")).unwrap());
    project.write("n1.pem", &seed.certificate);
    for (purpose, file) in
        [("sslserver", "n1.pem"), ("sslclient", "n1.pem"), ("sslclient", "lab/operator.pem")]
    {
        let output = std::process::Command::new("openssl")
            .args(["verify", "-x509_strict", "-CAfile", "lab/ca.pem", "-purpose", purpose, file])
            .current_dir(project.root())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
