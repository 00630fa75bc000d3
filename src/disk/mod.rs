//! What a disk image is made of: erofs, dm-verity, the ESP with its UKI, the GPT.

pub mod erofs;
pub mod esp;
pub mod gpt;
pub mod initrd;
pub mod uki;
pub mod verity;
