//! The root file system: extract packages, build a layer, make its bytes reproducible.

pub mod dpkg;
pub mod exclude;
pub mod extract;
mod installed;
pub mod pack;
mod place;
mod unpacker;
mod claims;
