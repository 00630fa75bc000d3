//! Output formats, one file each, and the reader of finished images.

pub mod inspect;
pub mod qcow2;
