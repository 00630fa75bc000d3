//! The seed: who a node is, and the secrets that its roles need.

pub mod document;

pub use document::Seed;
