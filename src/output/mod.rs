//! Output formats, one file each, and the readers of finished images.

pub mod compare;
pub mod inspect;
pub mod qcow2;
pub mod raw_image;
