//! The program as a user meets it: what it says about mistakes and mishaps, and with which
//! exit code it ends (2: the user can mend it; 1: it is ours; never a panic).

#[path = "cli/artifacts.rs"]
mod artifacts;
#[path = "cli/explain.rs"]
mod explain;
#[path = "cli/faces.rs"]
mod faces;
#[path = "cli/hostile.rs"]
mod hostile;
#[path = "cli/images.rs"]
mod images;
#[path = "cli/layers.rs"]
mod layers;
#[path = "cli/mirror.rs"]
mod mirror;
#[path = "cli/mistakes.rs"]
mod mistakes;
#[path = "support/project.rs"]
mod project;
#[path = "cli/room.rs"]
mod room;
#[path = "../src/fetch/tests/server.rs"]
#[allow(dead_code, reason = "the library's own tests use more of it")]
mod server;
#[path = "cli/shell.rs"]
mod shell;
#[path = "cli/stage.rs"]
mod stage;
#[path = "cli/stores.rs"]
mod stores;
#[path = "cli/why.rs"]
mod why;
