//! Stanchion builds immutable appliance images from layers and profiles.
//!
//! Data flows one way, in the order of this list; a module uses only what stands
//! above it, or beside it in its own folder.

// Tests in here and in tests/ share support that names the library.
#[cfg(test)]
extern crate self as stanchion;

pub mod clock;
pub mod command;
pub mod digest;
pub mod error;
pub mod files;
pub mod progress;
pub mod timings;

pub mod debian;
pub mod template;

pub mod config;

pub mod store;

pub mod fetch;
pub mod lock;
pub mod repository;

pub mod sandbox;
pub mod tools;

pub mod rootfs;

pub mod disk;
pub mod output;
pub mod pipeline;

pub mod pki;
pub mod secrets;

pub mod cluster_dir;
pub mod seed;

pub mod agent;

pub mod lab;

pub mod cli;
