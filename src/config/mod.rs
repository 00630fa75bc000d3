//! Profiles, layers and clusters: the TOML as it is typed, and what it means once validated.
//!
//! [`Project::find`] finds the folder with `profiles/` and `layers/`;
//! [`Project::load_profile`] reads one profile with all its layers;
//! [`cluster::load_cluster`] reads a cluster file. The keys are described in
//! `docs/profiles-and-layers.md` and `docs/clusters.md`.

pub mod build;
mod check;
pub mod cluster;
mod explain;
pub mod format;
pub mod layer;
pub mod profile;
pub mod project;
mod raw;
mod resolve;
pub mod role;
mod source;
pub mod tree;

pub use format::Format;
pub use layer::Layer;
pub use profile::Profile;
pub use project::Project;
pub use role::Role;
