use serde::{Deserialize, Serialize};

/// What an image can be written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk, byte by byte, with holes
    Raw,
    /// QEMU's, compressed with zstd
    Qcow2,
}

impl Format {
    pub const ALL: [Format; 2] = [Format::Raw, Format::Qcow2];

    /// Its name, and the extension of its files.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
