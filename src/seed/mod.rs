//! The seed: who a node is, and the secrets that its roles need.
//!
//! [`issue_seed`] makes the file for a node, [`verify_seed`] judges what a node has found,
//! [`read_brought`] reads the operator's own certificate for users, [`volume`] writes and reads the small disk that carries it.

mod brought;
mod document;
mod issue;
mod verify;
pub mod volume;

pub use brought::read_brought;
pub use document::{Brought, FORMAT, Seed, Site};
pub use issue::issue_seed;
pub use verify::{Identity, Verdict, verify_seed};

/// The file that holds a seed, on a volume and elsewhere.
pub const FILE_NAME: &str = "stanchion-seed.json";

/// Bytes that the file may have.
pub const MAX_BYTES: usize = 64 << 10;

#[cfg(test)]
mod tests;
