//! Programs of the project's own tools roots.

use std::path::Path;

use stanchion::config::Project;
use stanchion::lock::Lock;
use stanchion::pipeline::{FetchOptions, Source, lock_path, provide_tools};
use stanchion::progress::{Mode, Progress};
use stanchion::tools::{Tools, set};

/// The tools root that has all these programs. Without a network and with an empty store
/// the test says so and is skipped.
pub fn find_tools(programs: &[&str]) -> Option<Tools> {
    let project = Project::find(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
    let lock = Lock::load(&lock_path(&project)).unwrap().unwrap();
    let source = Source::open(&FetchOptions::default(), &Progress::new(Mode::Quiet)).unwrap();
    for set in [set::BUILD, set::CHECK] {
        let tools = match provide_tools(&source, &lock, set) {
            Ok(tools) => tools,
            Err(error) => {
                eprintln!("skipped: {set} cannot be had: {error:#}");
                return None;
            }
        };
        if programs.iter().all(|program| tools.command(program).is_ok()) {
            return Some(tools);
        }
    }
    panic!("no set of tools has all of {programs:?}");
}
