//! The finished `db` image, looked at with the programs that others use, without booting it.

mod image {
    pub mod again;
    pub mod disk;
    pub mod root;
}
#[path = "support/image.rs"]
mod support;
