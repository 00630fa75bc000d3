//! A real S3 server for tests: Garage, a program of its own.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use stanchion::command::Command;
use stanchion::config::cluster::Cluster;
use stanchion::lab::Lab;
use stanchion::secrets::{S3_ACCESS_KEY, S3_SECRET_KEY, Secret};
use tempfile::TempDir;

const VERSION: &str = "2.5.0";

/// A server with the bucket and the keys of a cluster, inside a lab's network.
pub struct S3 {
    server: Child,
    _folder: TempDir,
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Garage's program, compiled once below `target/`. `None`, with a line that says why, where
/// it cannot be.
fn provide(scratch: &Path) -> Option<PathBuf> {
    if let Some(given) = std::env::var_os("STANCHION_TEST_GARAGE") {
        return Some(given.into());
    }
    let root = scratch.join("garage");
    let program = root.join("bin/garage");
    if program.is_file() {
        return Some(program);
    }
    eprintln!("compiling the S3 server garage {VERSION}, once");
    let install = Command::new(env!("CARGO"))
        .args(["install", "garage", "--locked", "--quiet", "--no-default-features"])
        .args(["--features", "bundled-libs,sqlite", "--version", VERSION, "--root"])
        .arg(&root);
    match install.run() {
        Ok(_) => Some(program),
        Err(error) => {
            eprintln!("skipped: no S3 server: {}", format!("{error:#}").replace('\n', "; "));
            None
        }
    }
}

impl S3 {
    pub fn start(scratch: &Path, lab: &Lab, cluster: &Cluster) -> Option<Self> {
        let program = provide(scratch)?;
        let storage = cluster.storage.as_ref().unwrap();
        let secrets = fs::read_to_string(lab.secrets().join("secrets.toml")).unwrap();
        let secrets: std::collections::BTreeMap<String, Secret> = toml::from_str(&secrets).unwrap();
        let folder = tempfile::tempdir_in(scratch).unwrap();
        let path = |name: &str| folder.path().join(name);
        let (at, own) = (lab.operator(), folder.path().display());
        let config = format!(
            "metadata_dir = \"{own}/meta\"\ndata_dir = \"{own}/data\"\ndb_engine = \"sqlite\"\n\
             replication_factor = 1\nrpc_bind_addr = \"{at}:3901\"\nrpc_public_addr = \"{at}:3901\"\n\
             rpc_secret = \"{}\"\n[s3_api]\ns3_region = \"{}\"\napi_bind_addr = \"{at}:3900\"\n",
            "0f".repeat(32),
            storage.region,
        );
        fs::write(path("garage.toml"), config).unwrap();
        let command = Command::new(&program)
            .arg("-c")
            .arg(path("garage.toml"))
            .args(["server", "--single-node", "--default-bucket"])
            .env("GARAGE_DEFAULT_ACCESS_KEY", secrets[S3_ACCESS_KEY].reveal())
            .env("GARAGE_DEFAULT_SECRET_KEY", secrets[S3_SECRET_KEY].reveal())
            .env("GARAGE_DEFAULT_BUCKET", &storage.bucket)
            .env("RUST_LOG", "garage=warn");
        let server = lab.spawn_inside(command.output_to(Stdio::null(), Stdio::null())).unwrap();
        let s3 = S3 { server, _folder: folder };
        lab.enter_network(|| wait_for_port(at, 3900)).unwrap();
        Some(s3)
    }
}

fn wait_for_port(address: Ipv4Addr, port: u16) {
    let began = Instant::now();
    while std::net::TcpStream::connect((address, port)).is_err() {
        assert!(began.elapsed() < Duration::from_secs(30), "the S3 server does not listen");
        std::thread::sleep(Duration::from_millis(100));
    }
}
