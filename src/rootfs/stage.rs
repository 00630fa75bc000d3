//! A layer's build stage: what is made with programs that the image does not hold. This
//! code runs inside the sandbox, over the trees of the layers below the stage.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::layer::{
    Artifact, Common, PackagesJob, Placed, Sealed, describe_failure, install_packages,
    place_artifact, place_files,
};
use super::seal;
use crate::error::UserError;
use crate::sandbox::{Inside, Program};

#[derive(Debug, Serialize, Deserialize)]
pub struct StageJob {
    /// What is installed into the stage.
    pub packages: PackagesJob,
    pub artifacts: Vec<Artifact>,
    pub files: Vec<Placed>,
    pub environments: Vec<Environment>,
    pub commands: Vec<String>,
    pub keep: Vec<PathBuf>,
    /// An empty folder of the host, beside the stage's upper side, for what is kept.
    pub into: PathBuf,
}

/// A virtualenv to make.
#[derive(Debug, Serialize, Deserialize)]
pub struct Environment {
    pub path: PathBuf,
    /// Where programs of the stage see the distributions' files.
    pub files: String,
    pub distributions: Vec<Distribution>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Distribution {
    pub name: String,
    pub version: String,
    pub file: String,
    pub is_source: bool,
}

/// The end of a stage: its kept paths become a layer.
#[derive(Debug, Serialize, Deserialize)]
pub struct KeepJob {
    pub common: Common,
}

/// Where wheels are made of source archives.
const WHEELS: &str = "/var/tmp/stanchion-wheels";

/// Bytecode and sets come out the same on every run, and none is written on the side.
const PYTHON_ENV: [(&str, &str); 4] = [
    ("PYTHONDONTWRITEBYTECODE", "1"),
    ("PYTHONHASHSEED", "0"),
    ("PIP_CONFIG_FILE", "/dev/null"),
    ("PIP_ROOT_USER_ACTION", "ignore"),
];

pub fn build_stage(job: &StageJob, inside: &mut Inside) -> Result<()> {
    let root = inside.root()?;
    let layer = &job.packages.common.layer;
    install_packages(&job.packages, inside, &root)?;
    for artifact in &job.artifacts {
        inside.say("unpacking artifacts")?;
        place_artifact(&root, artifact)
            .with_context(|| format!("placing {} of layer `{layer}`", artifact.target.display()))?;
    }
    place_files(&root, &job.files)?;
    for environment in &job.environments {
        let what = format!("making {} failed in layer `{layer}`", environment.path.display());
        make_environment(job, inside, environment, &what)?;
    }
    for command in &job.commands {
        let first = command.lines().next().unwrap_or_default();
        inside.say(first)?;
        let program = Program::new("/bin/sh").args(["-e", "-c", command]);
        let what = format!("a command failed in the build stage of layer `{layer}`: {first}");
        run(job, inside, program, &what)?;
    }
    inside.say("keeping")?;
    let upper = inside.spec().upper.clone().context("a stage is built on an upper side")?;
    for path in &job.keep {
        keep(&root, &upper, &job.into, path, layer)?;
    }
    Ok(())
}

/// Pack what was kept; it lies on the upper side already.
pub fn seal_kept(job: &KeepJob, inside: &mut Inside) -> Result<Sealed> {
    seal::seal(&job.common, &[], inside, "build")
}

fn run(job: &StageJob, inside: &mut Inside, program: Program, what: &str) -> Result<()> {
    let program =
        PYTHON_ENV.iter().fold(program, |program, (name, value)| program.env(*name, *value));
    let ran = inside.watch_and_say(&program);
    if ran.is_err() && job.packages.common.debug_shell {
        inside.open_shell()?;
    }
    ran.map_err(|error| describe_failure(&job.packages.common, error, what))
}

fn make_environment(
    job: &StageJob,
    inside: &mut Inside,
    environment: &Environment,
    what: &str,
) -> Result<()> {
    let path = environment.path.to_str().context("a virtualenv's path is text")?;
    let python = || Program::new("/usr/bin/python3");
    inside.say("making a virtualenv")?;
    run(job, inside, python().args(["-m", "venv", "--without-pip", "--symlinks", path]), what)?;
    let pip = |arguments: &[&str]| {
        python().args(["-m", "pip"]).args(arguments.to_vec()).args([
            "--no-index",
            "--no-deps",
            "--no-cache-dir",
            "--disable-pip-version-check",
        ])
    };
    let sources = environment.distributions.iter().filter(|one| one.is_source);
    let sources: Vec<String> =
        sources.map(|one| format!("{}/{}", environment.files, one.file)).collect();
    if !sources.is_empty() {
        let program = pip(&["wheel", "--no-build-isolation", "--wheel-dir", WHEELS]);
        run(job, inside, program.args(sources), what)?;
    }
    let names = environment.distributions.iter();
    let names: Vec<String> = names.map(|one| format!("{}=={}", one.name, one.version)).collect();
    let interpreter = format!("{path}/bin/python");
    let program =
        pip(&["--python", &interpreter, "install", "--no-compile", "--only-binary=:all:"])
            .args(["--no-warn-script-location", "--find-links", &environment.files])
            .args(["--find-links", WHEELS])
            .args(names);
    run(job, inside, program, what)?;
    inside.say("compiling the virtualenv")?;
    // Each file by itself and in one process: what a process compiled before shows in what
    // it writes.
    let program = python()
        .args(["-m", "compileall", "-q", "-f", "-j", "1"])
        .args(["--invalidation-mode", "unchecked-hash"])
        .arg(format!("{path}/lib"));
    run(job, inside, program, what)
}

/// Move `path` from the stage's upper side to `into`, as root's, with the folders above it.
fn keep(root: &Path, upper: &Path, into: &Path, path: &Path, layer: &str) -> Result<()> {
    let missing = || {
        let what = format!("the build stage of layer `{layer}` made no {}", path.display());
        UserError::new(what)
            .why("`build.keep` names it")
            .help("let a command make it, or name what the commands make")
    };
    let inner = path.strip_prefix("/").context("a kept path begins with `/`")?;
    let mut above = PathBuf::new();
    for part in inner.parent().into_iter().flat_map(Path::iter) {
        above.push(part);
        let from = upper.join(&above);
        match fs::symlink_metadata(&from) {
            Ok(metadata) if metadata.is_dir() => {}
            _ => return Err(missing().into()),
        }
        let to = into.join(&above);
        if to.is_dir() {
            continue;
        }
        let shown = fs::symlink_metadata(root.join(&above))?;
        fs::create_dir(&to)
            .and_then(|()| chown(&to, Some(shown.uid()), Some(shown.gid())))
            .and_then(|()| {
                fs::set_permissions(&to, fs::Permissions::from_mode(shown.mode() & 0o7777))
            })
            .with_context(|| format!("making {}", above.display()))?;
    }
    let (from, to) = (upper.join(inner), into.join(inner));
    match fs::symlink_metadata(&from) {
        // A deletion, as an overlay writes it.
        Ok(metadata) if is_deletion(&metadata) => return Err(missing().into()),
        Ok(_) => {}
        Err(_) => return Err(missing().into()),
    }
    fs::rename(&from, &to).with_context(|| format!("keeping {}", path.display()))?;
    give_to_root(&to, 0).with_context(|| format!("keeping {}", path.display()))
}

fn is_deletion(metadata: &fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt;
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

/// Accounts of the stage are not those of the image.
fn give_to_root(path: &Path, depth: usize) -> Result<()> {
    if depth > 256 {
        bail!("folders that are too deep");
    }
    let metadata = fs::symlink_metadata(path)?;
    if (metadata.uid(), metadata.gid()) != (0, 0) {
        lchown(path, Some(0), Some(0))?;
    }
    if metadata.is_dir() {
        for entry in fs::read_dir(path)? {
            give_to_root(&entry?.path(), depth + 1)?;
        }
    }
    Ok(())
}
