//! A real etcd, of the packages that the project's lock names.

use std::path::{Path, PathBuf};

use stanchion::config::Project;
use stanchion::debian::package::limit_data;
use stanchion::lock::Lock;
use stanchion::pipeline::{FetchOptions, Source, lock_path};
use stanchion::progress::{Mode, Progress};
use stanchion::rootfs::exclude::Excludes;
use stanchion::rootfs::extract::{DebFile, Options, Purpose, unpack_all};

/// The server's program with its client beside it, unpacked into `folder`, which is made. `None`, with a line that says why, where the package
/// cannot be had.
pub fn provide_etcd(folder: &Path) -> Option<PathBuf> {
    let project = Project::find(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
    let lock = Lock::load(&lock_path(&project)).unwrap().unwrap();
    let packages = ["etcd-server", "etcd-client"].map(|name| lock.find_package(name).unwrap());
    let source = Source::open(&FetchOptions::default(), &Progress::new(Mode::Quiet)).unwrap();
    if let Err(error) = source.fetch_packages(&packages) {
        eprintln!("skipped: etcd cannot be had: {error:#}");
        return None;
    }
    let debs = packages.map(|package| DebFile {
        name: package.name.clone(),
        path: source.store.file_path(&package.sha256),
        limit: limit_data(package.installed_size),
    });
    let excludes = Excludes::default();
    let options = Options { purpose: Purpose::Tools, threads: 1, excludes: &excludes };
    std::fs::create_dir(folder).unwrap();
    unpack_all(&debs, folder, &options).unwrap();
    Some(folder.join("usr/bin/etcd"))
}
