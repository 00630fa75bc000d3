//! Debian's formats: archives, metadata, versions, and what depends on what.

pub mod archive;
pub mod deb822;
pub mod index;
pub mod mirror;
pub mod package;
pub mod relation;
pub mod release;
pub mod solve;
pub mod version;
