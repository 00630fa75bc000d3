//! Which text the archive's keys have signed.
//!
//! The cleartext signature framework is RFC 9580, section 7; the framing is read more
//! strictly here than there, so that no two readers can differ over what was signed.

use std::io::Cursor;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use pgp::composed::{Deserializable, DetachedSignature, SignedPublicKey, SignedPublicSubKey};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{Signature, SignatureType, SignatureVersion, SubpacketData};
use pgp::types::{KeyDetails, Tag};

use super::date::format_date;
use crate::error::UserError;

/// How far another clock may be ahead of ours.
pub(super) const CLOCK_SKEW: Duration = Duration::from_secs(3_600);

const SIGNATURES: usize = 16;

/// The archive keys that sign Debian 13, from the package debian-archive-keyring 2025.1.
const DEBIAN: [(&str, &str); 5] = [
    ("04B54C3CDCA79751B16BC6B5225629DF75B188BD", include_str!("../keys/trixie-automatic.asc")),
    ("41587F7DB8C774BCCF131416762F67A0B2C39DE4", include_str!("../keys/trixie-stable.asc")),
    (
        "5E04A1E3223A19A20706E20F9904613D4CCE68C6",
        include_str!("../keys/trixie-security-automatic.asc"),
    ),
    ("B8B80B5B623EAB6AD8775C45B7C5D7D6350947F8", include_str!("../keys/bookworm-automatic.asc")),
    (
        "05AB90340C0C5E797F44A8C8254CF3B5AEC0A8F0",
        include_str!("../keys/bookworm-security-automatic.asc"),
    ),
];

/// The keys whose word is believed.
pub struct Keyring {
    keys: Vec<SignedPublicKey>,
}

impl Keyring {
    /// The keys of the Debian archive that sign trixie, its updates and its security fixes.
    pub fn debian() -> Result<Self> {
        Self::new(&DEBIAN)
    }

    /// From (fingerprint of the primary key in upper-case digits, armored public key).
    pub fn new(pinned: &[(&str, &str)]) -> Result<Self> {
        let mut keys = Vec::new();
        for (fingerprint, armored) in pinned {
            let (key, _) = SignedPublicKey::from_armor_single(Cursor::new(armored))
                .with_context(|| format!("reading the key {fingerprint}"))?;
            let found = format!("{:X}", key.fingerprint());
            ensure!(found == *fingerprint, "the key {fingerprint} is really {found}");
            keys.push(key);
        }
        Ok(Keyring { keys })
    }
}

/// What became of one signature.
enum Verdict {
    Good,
    /// Made by a key that nobody vouches for, or by one that may not sign (any more).
    Useless(String),
    /// Said to be by a key that we trust, but not its signature over this text.
    Forged(String),
}

/// The signed text of an `InRelease` file, lines ended by `\n`, when a key of `keyring`
/// that is valid at the time `at` has signed it. Nothing outside the signature gets in.
///
/// # Errors
/// A [`UserError`] says what is wrong with the file or with its signatures.
pub fn verify_in_release(keyring: &Keyring, bytes: &[u8], at: SystemTime) -> Result<String> {
    let refuse = |why: String| {
        UserError::new("the signature of InRelease does not hold").why(why).help(
            "the mirror, or something on the way to it, gives out another file than Debian signed: try another mirror (--mirror URL)",
        )
    };
    let framed = split_cleartext(bytes).map_err(|error| refuse(format!("{error:#}")))?;
    let signatures = read_signatures(framed.armor).map_err(|error| refuse(format!("{error:#}")))?;
    let canonical = framed.lines.join("\r\n");
    let (mut good, mut reasons) = (false, Vec::new());
    for signature in &signatures {
        match judge(keyring, signature, canonical.as_bytes(), at) {
            Verdict::Good => good = true,
            Verdict::Useless(why) => reasons.push(why),
            Verdict::Forged(why) => return Err(refuse(why).into()),
        }
    }
    if !good {
        reasons.push("no valid signature by a key of the Debian archive".to_string());
        return Err(refuse(reasons.join("\n")).into());
    }
    let mut text = framed.lines.join("\n");
    text.push('\n');
    Ok(text)
}

/// A cleartext message taken apart.
struct Framed<'a> {
    /// Unescaped, without trailing blanks (which are not signed).
    lines: Vec<&'a str>,
    armor: &'a str,
}

fn split_cleartext(bytes: &[u8]) -> Result<Framed<'_>> {
    let text = std::str::from_utf8(bytes).context("it is not UTF-8")?;
    ensure!(!text.contains(['\0', '\r']), "it holds bytes that no Release file has");
    let mut rest = text;
    ensure!(
        take_line(&mut rest) == Some("-----BEGIN PGP SIGNED MESSAGE-----"),
        "it does not begin as a signed message"
    );
    loop {
        match take_line(&mut rest) {
            Some("") => break,
            Some(line) if line.starts_with("Hash: ") => {}
            _ => bail!("a header other than `Hash` stands before the signed text"),
        }
    }
    let mut lines = Vec::new();
    let armor = loop {
        let before = rest;
        let Some(line) = take_line(&mut rest) else { bail!("it ends within the signed text") };
        if line == "-----BEGIN PGP SIGNATURE-----" {
            break before;
        }
        let line = match line.strip_prefix("- ") {
            Some(escaped) => escaped,
            None if line.starts_with('-') => bail!("a dash within the signed text is not escaped"),
            None => line,
        };
        lines.push(line.trim_end_matches([' ', '\t']));
    };
    let end = "\n-----END PGP SIGNATURE-----";
    let Some(at) = armor.find(end) else { bail!("it ends within the signature") };
    let (armor, after) = armor.split_at(at + end.len());
    ensure!(after.trim().is_empty(), "text stands after the signature");
    Ok(Framed { lines, armor })
}

fn take_line<'a>(rest: &mut &'a str) -> Option<&'a str> {
    let (line, after) = rest.split_once('\n')?;
    *rest = after;
    Some(line)
}

fn read_signatures(armor: &str) -> Result<Vec<Signature>> {
    let (found, _) = DetachedSignature::from_armor_many(Cursor::new(armor))
        .context("the signature is not readable")?;
    let mut signatures = Vec::new();
    for signature in found {
        ensure!(signatures.len() < SIGNATURES, "it has more than {SIGNATURES} signatures");
        signatures.push(signature.context("the signature is not readable")?.signature);
    }
    ensure!(!signatures.is_empty(), "it has no signature");
    Ok(signatures)
}

fn judge(keyring: &Keyring, signature: &Signature, text: &[u8], at: SystemTime) -> Verdict {
    for key in &keyring.keys {
        let verified = if names(signature, &key.primary_key) {
            signature.verify(&key.primary_key, text).map(|()| check_primary(key, at))
        } else if let Some(subkey) =
            key.public_subkeys.iter().find(|subkey| names(signature, &subkey.key))
        {
            signature.verify(&subkey.key, text).map(|()| check_subkey(key, subkey, at))
        } else {
            continue;
        };
        let shown = format!("{:X}", key.fingerprint());
        return match verified {
            Err(_) => Verdict::Forged(format!("the text is not what the key {shown} signed")),
            Ok(allowed) => match allowed.and_then(|()| check_data_signature(signature, at)) {
                Ok(()) => Verdict::Good,
                Err(error) => Verdict::Useless(format!("signed by {shown}, but {error:#}")),
            },
        };
    }
    let issuers: Vec<String> =
        signature.issuer_fingerprint().iter().map(|print| format!("{print:X}")).collect();
    Verdict::Useless(format!("signed by an unknown key {}", issuers.join(", ")))
}

/// Whether the signature says that it is by this key.
fn names(signature: &Signature, key: &impl KeyDetails) -> bool {
    signature.issuer_fingerprint().contains(&&key.fingerprint())
        || signature.issuer_key_id().contains(&&key.legacy_key_id())
}

/// Whether a primary key may sign data at that time.
fn check_primary(key: &SignedPublicKey, at: SystemTime) -> Result<()> {
    let bound = check_certificate(key, at)?;
    ensure!(bound.key_flags().sign(), "the primary key is not for signing");
    Ok(())
}

/// Whether a subkey is the primary's own, and may sign data at that time.
fn check_subkey(key: &SignedPublicKey, subkey: &SignedPublicSubKey, at: SystemTime) -> Result<()> {
    check_certificate(key, at)?;
    let revoked = subkey.signatures.iter().any(|signature| {
        signature.typ() == Some(SignatureType::SubkeyRevocation)
            && signature.verify_subkey_binding(&key.primary_key, &subkey.key).is_ok()
    });
    ensure!(!revoked, "its subkey is revoked");
    let binding = find_newest(subkey.signatures.iter().filter(|signature| {
        signature.typ() == Some(SignatureType::SubkeyBinding)
            && check_signature(signature, at).is_ok()
            && signature.verify_subkey_binding(&key.primary_key, &subkey.key).is_ok()
    }))
    .context("its subkey is not bound to it")?;
    ensure!(binding.key_flags().sign(), "its subkey is not for signing");
    // The subkey must say so too, or a stranger's key could be claimed as one's own.
    let back = binding.embedded_signature().context("its subkey does not answer for it")?;
    check_signature(back, at)
        .and_then(|()| Ok(back.verify_primary_key_binding(&subkey.key, &key.primary_key)?))
        .context("its subkey does not answer for it")?;
    check_age(&subkey.key, binding, at)
}

/// Whether the certificate stands at that time; the self-signature that says so.
fn check_certificate(key: &SignedPublicKey, at: SystemTime) -> Result<&Signature> {
    let primary = &key.primary_key;
    let revoked = key.details.revocation_signatures.iter().any(|signature| {
        signature.typ() == Some(SignatureType::KeyRevocation)
            && signature.verify_key(primary).is_ok()
    });
    ensure!(!revoked, "the key is revoked");
    let direct = key.details.direct_signatures.iter().filter(|signature| {
        signature.typ() == Some(SignatureType::Key)
            && check_signature(signature, at).is_ok()
            && signature.verify_key(primary).is_ok()
    });
    let users = key.details.users.iter().flat_map(|user| {
        let own = |signature: &&Signature| {
            names(signature, primary)
                && signature.verify_certification(primary, Tag::UserId, &user.id).is_ok()
        };
        let is_revocation =
            |signature: &Signature| signature.typ() == Some(SignatureType::CertRevocation);
        let revoked =
            user.signatures.iter().any(|signature| is_revocation(signature) && own(&signature));
        user.signatures
            .iter()
            .filter(move |_| !revoked)
            .filter(move |signature| !is_revocation(signature))
            .filter(move |signature| check_signature(signature, at).is_ok())
            .filter(own)
    });
    let newest = find_newest(direct.chain(users)).context("the key has no valid self-signature")?;
    check_age(primary, newest, at)?;
    Ok(newest)
}

fn find_newest<'a>(signatures: impl Iterator<Item = &'a Signature>) -> Option<&'a Signature> {
    signatures.max_by_key(|signature| signature.created())
}

/// Whether the key exists at that time, by the self-signature that bounds its life.
fn check_age(key: &impl KeyDetails, bound: &Signature, at: SystemTime) -> Result<()> {
    let created = SystemTime::from(key.created_at());
    ensure!(created <= at + CLOCK_SKEW, "the key is from the future");
    if let Some(life) = bound.key_expiration_time().map(Duration::from).filter(|d| !d.is_zero()) {
        ensure!(at < created + life, "the key expired on {}", show_time(created + life));
    }
    Ok(())
}

/// Whether a signature over data is of the right kind, on top of [`check_signature`].
fn check_data_signature(signature: &Signature, at: SystemTime) -> Result<()> {
    ensure!(
        matches!(signature.typ(), Some(SignatureType::Text | SignatureType::Binary)),
        "it is not a signature over a text"
    );
    check_signature(signature, at)
}

/// Strength, dates and understood conditions of any signature.
fn check_signature(signature: &Signature, at: SystemTime) -> Result<()> {
    let config = signature
        .config()
        .filter(|config| matches!(config.version(), SignatureVersion::V4 | SignatureVersion::V6))
        .context("the signature is of an unknown version")?;
    ensure!(
        matches!(
            config.hash_alg,
            HashAlgorithm::Sha256
                | HashAlgorithm::Sha384
                | HashAlgorithm::Sha512
                | HashAlgorithm::Sha3_256
                | HashAlgorithm::Sha3_512
        ),
        "the signature uses the weak hash {}",
        config.hash_alg
    );
    let created = SystemTime::from(signature.created().context("the signature has no date")?);
    ensure!(
        created <= at + CLOCK_SKEW,
        "the signature is from the future ({}); is this machine's clock right?",
        show_time(created)
    );
    if let Some(life) =
        signature.signature_expiration_time().map(Duration::from).filter(|life| !life.is_zero())
    {
        ensure!(at < created + life, "the signature expired on {}", show_time(created + life));
    }
    // A condition that we do not know may not be passed over when it is marked critical.
    let understood = config.hashed_subpackets().all(|packet| {
        !packet.is_critical
            || !matches!(
                packet.data,
                SubpacketData::Notation(_)
                    | SubpacketData::Experimental(..)
                    | SubpacketData::Other(..)
            )
    });
    ensure!(understood, "the signature has a condition that is not understood");
    Ok(())
}

fn show_time(time: SystemTime) -> String {
    format_date(super::to_seconds(time))
}
