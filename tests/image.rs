//! The finished `db` image, looked at with the programs that others use, without booting it.

mod image {
    pub mod again;
    pub mod disk;
    pub mod root;
}
#[allow(dead_code, reason = "labs use other images")]
#[path = "support/image.rs"]
mod support;
