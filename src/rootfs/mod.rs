//! The root file system: extract packages, build a layer, make its bytes reproducible.

pub mod extract;
pub mod pack;
