//! The root file system: extract packages, build a layer, make its bytes reproducible.

pub mod accounts;
mod claims;
mod diversions;
pub mod dpkg;
pub mod exclude;
pub mod extract;
mod installed;
pub mod layer;
pub mod pack;
mod place;
mod seal;
pub mod stage;
mod stand_in;
mod unpacker;
