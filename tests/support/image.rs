//! Real images: built by the program itself over the user's own store, once for all tests
//! that look at them, with the tools to look.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::FlockOperation;
use stanchion::command::Command;
use stanchion::config::Project;
use stanchion::disk::gpt::{self, Partition};
use stanchion::disk::region::Region;
use stanchion::error::UserError;
use stanchion::pipeline::{FetchOptions, Manifest, Source, prepare_lock, provide_tools};
use stanchion::progress::{Mode, Progress};
use stanchion::sandbox::Sandbox;
use stanchion::tools::{Tools, set};

#[path = "copy.rs"]
mod copy;

pub use copy::copy_project;
use copy::leave_web_out;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_stanchion");
pub const PROFILE: &str = "db";

/// A finished image.
pub struct Image {
    pub manifest: Manifest,
    pub raw: PathBuf,
    /// The sets that were asked for.
    pub tools: Vec<Tools>,
}

/// The `db` image, and the tools of `sets`. `None`, with a line that says why, where it
/// cannot be built: no sandbox, or packages that are neither in the store nor to be had.
pub fn provide(sets: &[&str]) -> Option<&'static Image> {
    static IMAGE: OnceLock<Result<Image, String>> = OnceLock::new();
    show_skipped(IMAGE.get_or_init(|| prepare(PROFILE, sets)))
}

/// The image of all roles but web, likewise: its profile is `node` without the layers that
/// need NetBox, which not every machine can have.
pub fn provide_node(sets: &[&str]) -> Option<&'static Image> {
    static IMAGE: OnceLock<Result<Image, String>> = OnceLock::new();
    show_skipped(IMAGE.get_or_init(|| prepare("node", sets)))
}

/// The image of edges alone, likewise.
pub fn provide_edge() -> Option<&'static Image> {
    static IMAGE: OnceLock<Result<Image, String>> = OnceLock::new();
    show_skipped(IMAGE.get_or_init(|| prepare("edge", &[])))
}

/// The images of the profiles `node` and `web` as they are shipped, with NetBox from this
/// tarball; the copy of the project is called `netbox`.
pub fn provide_netbox(tarball: &Path) -> Option<[&'static Image; 2]> {
    static IMAGES: OnceLock<Result<[Image; 2], String>> = OnceLock::new();
    let build = |profile| prepare_as("netbox", profile, &[set::LAB], Some(tarball));
    match IMAGES.get_or_init(|| Ok([build("node")?, build("web")?])) {
        Ok([node, web]) => Some([node, web]),
        Err(why) => {
            eprintln!("skipped: {}", why.replace('\n', "; "));
            None
        }
    }
}

fn show_skipped(image: &'static Result<Image, String>) -> Option<&'static Image> {
    match image {
        Ok(image) => Some(image),
        Err(why) => {
            eprintln!("skipped: {}", why.replace('\n', "; "));
            None
        }
    }
}

/// The folder for what tests leave behind: on the disk with the build, never in memory.
pub fn scratch() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// The project that the image of a profile is built from.
pub fn project(profile: &str) -> PathBuf {
    scratch().join(format!("project-{profile}"))
}

fn prepare(profile: &str, sets: &[&str]) -> Result<Image, String> {
    prepare_as(profile, profile, sets, None)
}

/// Build `profile` in a copy of the project called `copy`, with NetBox if there is a tarball.
fn prepare_as(
    copy: &str,
    profile: &str,
    sets: &[&str],
    netbox: Option<&Path>,
) -> Result<Image, String> {
    // Other test programs may want the same image at the same time.
    let turn = File::create(scratch().join("image.lock")).unwrap();
    rustix::fs::flock(&turn, FlockOperation::LockExclusive).unwrap();

    let source = Source::open(&FetchOptions::default(), &Progress::new(Mode::Quiet)).unwrap();
    let checks = Sandbox::new(PROGRAM).probe(source.store.root());
    if let Some(check) = checks.into_iter().find(|check| !check.ok) {
        return Err(format!("{}: {}", check.name, check.detail));
    }
    // A copy, because a lock whose packages have left the mirror is renewed.
    let folder = project(copy);
    copy_project(&folder);
    if profile == "node" && netbox.is_none() {
        leave_web_out(&folder);
    }
    if let Some(tarball) = netbox {
        // Of whatever version it is.
        let lock = Command::new(PROGRAM)
            .args(["--quiet", "lock", "--project"])
            .arg(&folder)
            .arg("--artifact")
            .arg(format!("netbox={}", tarball.display()));
        lock.run().map_err(|error| format!("{error:#}"))?;
    }
    let project = Project::find(&folder).unwrap();
    let loaded = project.load_profile(profile).unwrap();
    let fetch = || -> anyhow::Result<Vec<Tools>> {
        let (lock, mut failures) = prepare_lock(&project, &source, &[loaded], false)?;
        if let Some(error) = failures.remove(profile) {
            return Err(error);
        }
        let lock = lock.unwrap();
        sets.iter().map(|set| provide_tools(&source, &lock, set)).collect()
    };
    let tools = fetch().map_err(|error| match error.downcast_ref::<UserError>() {
        Some(missing) => missing.summary(),
        None => panic!("{error:?}"),
    })?;
    drop(source);

    let out = scratch().join(if netbox.is_some() { "image-netbox" } else { "image" });
    let mut build = Command::new(PROGRAM).args(["--quiet", "build", profile]);
    if profile != PROFILE {
        // What is shipped of them is looked at nowhere.
        build = build.args(["--format", "raw"]);
    }
    if let Some(tarball) = netbox {
        build = build.arg("--artifact").arg(format!("netbox={}", tarball.display()));
    }
    let done = build.arg("--project").arg(&folder).arg("--out").arg(&out).run();
    done.unwrap_or_else(|error| panic!("{error:?}"));
    let manifest = Manifest::load(&out, profile).unwrap();
    Ok(Image { manifest, raw: out.join(format!("{profile}.raw")), tools })
}

/// The partition with this label.
pub fn find_partition(disk: &File, label: &str) -> Partition {
    let table = gpt::read(&Region::whole(disk).unwrap()).unwrap();
    let mut found = table.partitions.into_iter().filter(|partition| partition.label == label);
    found.next().unwrap_or_else(|| panic!("no partition {label}"))
}

/// The bytes of a partition.
pub fn open_partition<'a>(disk: &'a File, label: &str) -> Region<'a> {
    let partition = find_partition(disk, label);
    Region::new(disk, partition.start, partition.size)
}
