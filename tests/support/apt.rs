//! apt-get as an oracle: it solves against lists of packages given as text, in a directory
//! of its own, and touches nothing of the machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use stanchion::command::{Command, Failed};

/// An apt-get that knows only the lists it was given.
pub struct Apt {
    root: tempfile::TempDir,
    start: Box<dyn Fn() -> Command>,
}

/// What apt-get would install: name to version. The error is its complaint.
pub type Answer = Result<BTreeMap<String, String>, String>;

impl Apt {
    /// `start` begins a command line of apt-get. The lists of the suites (texts of
    /// `Packages` files) come in their order, `status` has the paragraphs of what is
    /// installed (a dpkg status file; may be empty).
    pub fn new(start: impl Fn() -> Command + 'static, lists: &[&str], status: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let make = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let mut sources = String::new();
        for (i, list) in lists.iter().enumerate() {
            // Laid where `apt-get update` would put what it fetches from there.
            sources += &format!("deb [trusted=yes] copy:/list/{i} ./\n");
            make(&format!("var/lib/apt/lists/_list_{i}_._Packages"), list);
        }
        make("etc/apt/sources.list", &sources);
        make("etc/apt/preferences", "");
        make("var/lib/dpkg/status", status);
        for path in
            ["var/lib/apt/lists/partial", "var/cache/apt/archives/partial", "etc/apt/apt.conf.d"]
        {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        make("apt.conf", &configure(root.path()));
        Apt { root, start: Box::new(start) }
    }

    /// What `apt-get install` of these names would add.
    pub fn solve(&self, wanted: &[String], recommends: bool) -> Answer {
        // The second: nothing stays that was tried in vain and is only recommended.
        let options = [
            format!("APT::Install-Recommends={recommends}"),
            format!("APT::AutoRemove::RecommendsImportant={recommends}"),
        ];
        let options = options.iter().flat_map(|option| ["-o", option]);
        let command = self.command().arg("-s").args(options).arg("install").args(wanted);
        let output = match command.run() {
            Ok(output) => output,
            Err(error) => match error.downcast::<Failed>() {
                Ok(failed) => return Err(failed.tail),
                Err(error) => panic!("{error:#}"),
            },
        };
        // `Inst name (version source [architecture])`
        let text = String::from_utf8(output.stdout).unwrap();
        let lines = text.lines().filter_map(|line| line.strip_prefix("Inst "));
        Ok(lines
            .map(|line| {
                let (name, rest) = line.split_once(" (").unwrap();
                let version = rest.split(' ').next().unwrap();
                (name.to_string(), version.to_string())
            })
            .collect())
    }

    fn command(&self) -> Command {
        (self.start)().env("APT_CONFIG", self.root.path().join("apt.conf"))
    }
}

fn configure(root: &Path) -> String {
    let root = root.display();
    format!(
        r#"
Dir "{root}";
Dir::Etc "etc/apt";
Dir::State "var/lib/apt";
Dir::State::status "{root}/var/lib/dpkg/status";
Dir::Cache "var/cache/apt";
Dir::Log "{root}/log";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Sandbox::User "root";
APT::Install-Suggests "false";
APT::AutoRemove::SuggestsImportant "false";
APT::Solver "internal";
Acquire::Languages "none";
pkgCacheGen::ForceEssential ",";
"#
    )
}
