//! What a seed says.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::cluster::{Cluster, Node};
use crate::secrets::Secret;

/// The form of a seed that this program writes and reads.
pub const FORMAT: u32 = 1;

/// A node's identity, its cluster, and its secrets.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seed {
    /// [`FORMAT`].
    pub format: u32,
    /// When it was made, in seconds since 1970, UTC.
    pub issued: u64,
    /// The node's name.
    pub node: String,
    pub cluster: Cluster,
    /// By name; those that the node's roles need and no others.
    pub secrets: BTreeMap<String, Secret>,
    /// The cluster's CA, PEM.
    pub ca: String,
    /// The node's own certificate, PEM.
    pub certificate: String,
    /// The certificate's key, PKCS #8 in PEM.
    pub key: String,
    /// What edges show users; only theirs have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<Site>,
}

/// Where the certificate comes from that users see.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    /// The certificate of the site CA, PEM; its key is the secret `site_key`. There is none
    /// when the CA can certify none, and the operator brings a certificate.
    pub authority: Option<String>,
    pub brought: Option<Brought>,
}

/// A certificate for users that the operator brings.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Brought {
    /// PEM, the site's own certificate first.
    pub chain: String,
    /// PEM.
    pub key: String,
}

impl Seed {
    /// The node's entry in the cluster; an accepted seed has it.
    pub fn entry(&self) -> Option<&Node> {
        self.cluster.find_node(&self.node)
    }
}

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seed")
            .field("node", &self.node)
            .field("cluster", &self.cluster.name)
            .field("issued", &self.issued)
            .field("secrets", &self.secrets.keys())
            .finish_non_exhaustive()
    }
}

/// The file: the seed's text and the CA's signature over it. There is one way to write it,
/// so that no byte of the file can be changed unseen.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Envelope {
    /// A [`Seed`] in JSON.
    pub seed: String,
    /// Base64 of the signature over the bytes of that text.
    pub signature: String,
}
