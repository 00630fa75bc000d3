//! Profiles and layers: the TOML as it is typed, and what it means once validated.

pub mod layer;
pub mod profile;
mod source;
