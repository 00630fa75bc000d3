//! Profiles and layers: the TOML as it is typed, and what it means once validated.
//!
//! [`Project::find`] finds the folder with `profiles/` and `layers/`;
//! [`Project::load_profile`] reads one profile with all its layers. The keys are
//! described in `docs/profiles-and-layers.md`.

mod check;
mod explain;
pub mod format;
pub mod layer;
pub mod profile;
pub mod project;
mod raw;
mod resolve;
mod source;
pub mod tree;

pub use format::Format;
pub use layer::Layer;
pub use profile::Profile;
pub use project::Project;
