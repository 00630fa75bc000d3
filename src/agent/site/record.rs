//! The record in etcd: a certificate with its key, sealed so that only edges can read it.

use anyhow::{Context, Result, anyhow, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use crate::secrets::Secret;

/// Characters that a sealed record may have.
const MAX_SEALED: usize = 64 << 10;
/// Before the sealed text; another form would begin with another word.
const FORM: &str = "1:";

/// What the edges show, and where it comes from.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The operator brought it.
    pub brought: bool,
    /// When the seed was issued that it goes back to, in seconds since 1970, UTC.
    pub issued: u64,
    /// The edge that wrote it.
    pub by: String,
    /// PEM, the server's certificate first.
    pub chain: String,
    /// PEM.
    pub key: String,
}

/// The key that seals records: derived from a secret that only edges have.
pub struct Seal {
    key: LessSafeKey,
    /// Where the record lies: one that was moved does not open.
    place: String,
}

impl Seal {
    /// For the record at this key in etcd.
    pub fn new(secret: &Secret, place: &str) -> Result<Self> {
        let salt = Salt::new(HKDF_SHA256, b"stanchion site certificate 1");
        let info = [place.as_bytes()];
        let pseudo = salt.extract(secret.reveal().as_bytes());
        let okm = pseudo.expand(&info, &AES_256_GCM).map_err(|_| anyhow!("deriving a key"))?;
        Ok(Seal { key: LessSafeKey::new(UnboundKey::from(okm)), place: place.to_string() })
    }

    pub fn seal(&self, record: &Record) -> Result<String> {
        let mut bytes = serde_json::to_vec(record).context("writing the record")?;
        // Fewer are ever written than would let two random nonces meet.
        let mut nonce = [0; NONCE_LEN];
        let filled = SystemRandom::new().fill(&mut nonce);
        filled.map_err(|_| anyhow!("the kernel gives no random bytes"))?;
        let aad = Aad::from(self.place.as_bytes());
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad, &mut bytes)
            .map_err(|_| anyhow!("sealing the record"))?;
        let sealed = [nonce.as_slice(), &bytes].concat();
        Ok(format!("{FORM}{}", BASE64_STANDARD.encode(sealed)))
    }

    /// # Errors
    /// When it was sealed with another key, for another place, or was changed.
    pub fn open(&self, text: &str) -> Result<Record> {
        ensure!(text.len() <= MAX_SEALED, "the record is too long");
        let text = text.strip_prefix(FORM).context("the record is of another version")?;
        let mut bytes = BASE64_STANDARD.decode(text).ok().context("the record is no base64")?;
        ensure!(bytes.len() > NONCE_LEN, "the record is too short");
        let mut sealed = bytes.split_off(NONCE_LEN);
        let nonce = Nonce::try_assume_unique_for_key(&bytes)
            .map_err(|_| anyhow!("the record is too short"))?;
        let aad = Aad::from(self.place.as_bytes());
        let opened = self
            .key
            .open_in_place(nonce, aad, &mut sealed)
            .map_err(|_| anyhow!("the record was changed, or sealed with another secret"))?;
        // The reader's own messages may show what it read.
        serde_json::from_slice(opened).ok().context("the record is of another version")
    }
}
