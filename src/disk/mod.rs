//! What a disk image is made of: erofs, dm-verity, the ESP with its UKI, the GPT.

pub mod erofs;
pub mod erofs_merge;
pub mod erofs_read;
pub mod erofs_write;
pub mod esp;
pub mod fat16;
mod fat_entry;
pub mod fat_read;
pub mod gpt;
pub mod guid;
pub mod image;
pub mod initrd;
pub mod iso_read;
pub mod region;
pub mod uki;
pub mod verity;

pub use image::{Assembled, Plan, assemble_disk};

/// Partitions, and the sizes of what fills them, are multiples of this.
pub const MIB: u64 = 1 << 20;
