//! NetBox in an image: built from the tarball that STANCHION_TEST_NETBOX names, because not
//! every machine can reach the one in the layer. With an empty store this takes minutes: the
//! schema of an empty database is made.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use stanchion::command::Command;
use stanchion::pipeline::Manifest;
use stanchion::store::Store;

const PROGRAM: &str = env!("CARGO_BIN_EXE_stanchion");

/// What a web image may weigh as it is shipped.
const LIMIT: u64 = 260_000_000;

/// The tarball, or `None` with a line that says so.
fn find_tarball() -> Option<PathBuf> {
    let file = std::env::var_os("STANCHION_TEST_NETBOX").map(PathBuf::from);
    if file.is_none() {
        eprintln!("skipped: STANCHION_TEST_NETBOX names no tarball of NetBox");
    }
    file
}

/// Run the program in the project's folder, over this user's store; what it said.
fn run(folder: &Path, arguments: &[&str]) -> String {
    let (status, output) =
        Command::new(PROGRAM).args(arguments).directory(folder).run_any().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(status.success(), "{arguments:?}: {said}");
    said
}

/// Every file and folder below one, with what kind it is.
fn walk(folder: &Path, visit: &mut dyn FnMut(&Path, &fs::Metadata)) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let metadata = path.symlink_metadata().unwrap();
        visit(&path, &metadata);
        if metadata.is_dir() {
            walk(&path, visit);
        }
    }
}

#[test]
fn netbox_is_in_the_image_and_what_only_builds_it_is_not() {
    let Some(tarball) = find_tarball() else { return };
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for name in ["profiles", "layers", "stanchion.lock"] {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        Command::new("cp").arg("-a").args([&from, folder.path()]).run().unwrap();
    }
    let given = format!("netbox={}", tarball.display());
    run(folder.path(), &["lock", "--artifact", &given]);
    run(folder.path(), &["build", "web", "--format", "qcow2", "--artifact", &given]);
    let again = run(folder.path(), &["build", "web", "--format", "qcow2"]);
    assert!(again.contains("nothing had changed"), "{again}");

    let out = folder.path().join("out");
    let bytes = fs::metadata(out.join("web.qcow2")).unwrap().len();
    assert!(bytes <= LIMIT, "{bytes} bytes");
    let manifest = Manifest::load(&out, "web").unwrap();
    for builder in ["postgresql-17", "redis-server", "python3-pip", "python3-setuptools", "gcc"] {
        assert!(manifest.packages.iter().all(|package| package.name != builder), "{builder}");
    }
    assert!(manifest.pythons.iter().any(|one| one.layer == "netbox" && one.name == "django"));
    assert!(manifest.pythons.iter().any(|one| one.name == "boto3"));
    let is_stage = |layer: &&stanchion::pipeline::LayerEntry| layer.diff == "build";
    let stages: Vec<_> = manifest.layers.iter().filter(is_stage).collect();
    let [stage] = stages[..] else { panic!("{stages:?}") };
    let entry = format!("steps/layer/{}/tree", stage.key);
    let tree = Store::default_root().unwrap().join(entry);
    check_tree(&tree);
    check_schema(&tree.join("usr/share/stanchion/netbox"));
}

fn check_tree(tree: &Path) {
    let netbox = tree.join("opt/netbox");
    let configuration = fs::read_link(netbox.join("netbox/netbox/configuration.py")).unwrap();
    assert_eq!(configuration, Path::new("/etc/netbox/configuration.py"));
    assert!(netbox.join("venv/bin/gunicorn").is_file());
    assert!(netbox.join("netbox/static/netbox.css").is_file());
    for gone in ["docs", "contrib", ".github", "netbox/dcim/tests", "netbox/media/x"] {
        assert!(!netbox.join(gone).exists(), "{gone}");
    }
    let top: Vec<_> = fs::read_dir(tree).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(top.iter().all(|name| name == "opt" || name == "usr"), "{top:?}");
    let (mut sources, mut compiled) = (0, 0);
    walk(tree, &mut |path, metadata| {
        assert_eq!((metadata.uid(), metadata.gid()), (0, 0), "{}", path.display());
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("py") => sources += 1,
            Some("pyc") => {
                compiled += 1;
                // PEP 552: by hash, and without a look at the source.
                assert_eq!(fs::read(path).unwrap()[4..8], [1, 0, 0, 0], "{}", path.display());
            }
            _ => {}
        }
    });
    // One is a link, and templates of code are none.
    assert!(compiled > 4000 && compiled + 100 > sources, "{compiled} of {sources}");
    let botocore = netbox.join("venv/lib/python3.13/site-packages/botocore/data");
    let services = fs::read_dir(botocore).unwrap().map(|entry| entry.unwrap());
    let services = services.filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name());
    assert_eq!(services.collect::<Vec<_>>(), ["s3"]);
}

fn check_schema(folder: &Path) {
    let version = fs::read_to_string(folder.join("version")).unwrap();
    let file = fs::File::open(folder.join("schema.sql.gz")).unwrap();
    let mut schema = String::new();
    flate2::read::GzDecoder::new(file).read_to_string(&mut schema).unwrap();
    assert_eq!(schema.lines().next(), Some(&*format!("-- NetBox {}", version.trim())));
    assert!(schema.contains("CREATE TABLE public.dcim_device ("));
    assert!(schema.contains("INSERT INTO public.django_migrations VALUES"));
    // psql's own commands, owners and superusers' rights.
    for never in ["\\", "ALTER TABLE public.dcim_device OWNER", "COMMENT ON EXTENSION", "COPY "] {
        assert!(!schema.lines().any(|line| line.starts_with(never)), "{never}");
    }
}
