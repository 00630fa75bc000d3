use std::time::{Duration, SystemTime};

use pgp::composed::{
    ArmorOptions, CleartextSignedMessage, EncryptionCaps, KeyType, SecretKeyParamsBuilder,
    SignedPublicKey, SignedSecretKey, SubkeyParamsBuilder,
};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{SignatureConfig, SignatureType, Subpacket, SubpacketData};
use pgp::types::{KeyDetails, Password, SigningKey, Timestamp};
use proptest::prelude::*;

use super::*;
use crate::error::exit_code;

const REAL: &str = include_str!("testdata/trixie-security.InRelease");
/// The day on which `REAL` was made, at noon.
const REAL_DAY: &str = "Fri, 20 Nov 2026 12:00:00 UTC";
const TEXT: &str = "Codename: trixie\n- dashed\nlast\n";

/// An archive key of a test's own: a primary key that signs, and a signing subkey.
pub(crate) struct Archive {
    secret: SignedSecretKey,
}

impl Archive {
    pub(crate) fn new() -> Self {
        Self::with_primary(KeyType::Ed25519Legacy)
    }

    fn with_primary(primary: KeyType) -> Self {
        let mut subkey = SubkeyParamsBuilder::default();
        subkey.key_type(KeyType::Ed25519Legacy).can_sign(true).can_encrypt(EncryptionCaps::None);
        let mut key = SecretKeyParamsBuilder::default();
        key.key_type(primary)
            .can_certify(true)
            .can_sign(true)
            .primary_user_id("An archive <archive@example.org>".into())
            .subkeys(vec![subkey.build().unwrap()]);
        Archive { secret: key.build().unwrap().generate(rand::thread_rng()).unwrap() }
    }

    pub(crate) fn keyring(&self) -> Keyring {
        pin(&SignedPublicKey::from(self.secret.clone()))
    }

    /// A cleartext message, signed by the subkey.
    pub(crate) fn sign(&self, text: &str) -> String {
        let key = &self.secret.secret_subkeys[0].key;
        sign_with(text, key, None, HashAlgorithm::Sha512, SystemTime::now())
    }

    fn sign_by_primary(&self, text: &str) -> String {
        let key = &self.secret.primary_key;
        sign_with(text, key, None, HashAlgorithm::Sha256, SystemTime::now())
    }
}

fn pin(key: &SignedPublicKey) -> Keyring {
    let armored = key.to_armored_string(ArmorOptions::default()).unwrap();
    Keyring::new(&[(&format!("{:X}", key.fingerprint()), &armored)]).unwrap()
}

fn sign_with(
    text: &str,
    key: &impl SigningKey,
    condition: Option<SubpacketData>,
    hash: HashAlgorithm,
    at: SystemTime,
) -> String {
    let mut config = SignatureConfig::v4(SignatureType::Text, key.algorithm(), hash);
    config.hashed_subpackets = vec![
        Subpacket::regular(SubpacketData::SignatureCreationTime(Timestamp::try_from(at).unwrap()))
            .unwrap(),
        Subpacket::regular(SubpacketData::IssuerFingerprint(key.fingerprint())).unwrap(),
    ];
    config.hashed_subpackets.extend(condition.map(|data| Subpacket::critical(data).unwrap()));
    // The line end before the signature is not signed.
    let text = text.strip_suffix('\n').unwrap_or(text);
    let message = CleartextSignedMessage::new(text, config, key, &Password::empty()).unwrap();
    message.to_armored_string(ArmorOptions::default()).unwrap()
}

fn verify_now(keyring: &Keyring, message: &str) -> Result<String> {
    verify_in_release(keyring, message.as_bytes(), SystemTime::now())
}

fn on(date: &str) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(parse_date(date).unwrap())
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(result: Result<T>, part: &str) {
    let error = result.unwrap_err();
    assert_eq!(exit_code(&error), 2, "{error:?}");
    assert!(format!("{error:#}").contains(part), "{error:#}");
}

#[test]
fn the_real_archive_is_believed_by_its_pinned_keys() {
    let keyring = Keyring::debian().unwrap();
    let text = verify_in_release(&keyring, REAL.as_bytes(), on(REAL_DAY)).unwrap();
    let release = Release::parse(&text).unwrap();
    assert_eq!((&*release.origin, &*release.codename), ("Debian", "trixie-security"));
    assert_eq!(format_date(release.date), "Fri, 20 Nov 2026 00:12:42 UTC");
    assert_eq!(release.valid_until.unwrap() - release.date, 7 * 86_400);
    assert!(release.acquire_by_hash);
    let (_, size) = release.find_file("main/binary-amd64/Packages.xz").unwrap();
    assert!(size > 10_000);
}

#[test]
fn a_real_release_with_one_changed_digit_is_refused() {
    let keyring = Keyring::debian().unwrap();
    let changed = REAL.replacen("main/binary-amd64", "main/binary-amd65", 1);
    assert_ne!(changed, REAL);
    assert_refused(
        verify_in_release(&keyring, changed.as_bytes(), on(REAL_DAY)),
        "is not what the key",
    );
}

#[test]
fn a_real_key_is_not_believed_after_its_end_nor_before_its_beginning() {
    let keyring = Keyring::debian().unwrap();
    let late = on("Mon, 20 Nov 2040 12:00:00 UTC");
    assert_refused(verify_in_release(&keyring, REAL.as_bytes(), late), "expired on");
    let early = on("Mon, 20 Nov 2023 12:00:00 UTC");
    assert_refused(verify_in_release(&keyring, REAL.as_bytes(), early), "no valid signature");
}

#[test]
fn a_key_with_another_fingerprint_than_the_pinned_one_is_refused() {
    let key = SignedPublicKey::from(Archive::new().secret);
    let armored = key.to_armored_string(ArmorOptions::default()).unwrap();
    assert!(Keyring::new(&[("41587F7DB8C774BCCF131416762F67A0B2C39DE4", &armored)]).is_err());
}

#[test]
fn the_primary_key_and_its_signing_subkey_are_believed() {
    let archive = Archive::new();
    assert_eq!(verify_now(&archive.keyring(), &archive.sign(TEXT)).unwrap(), TEXT);
    assert_eq!(verify_now(&archive.keyring(), &archive.sign_by_primary(TEXT)).unwrap(), TEXT);
}

#[test]
fn a_stranger_is_not_believed() {
    let message = Archive::new().sign(TEXT);
    assert_refused(verify_now(&Archive::new().keyring(), &message), "unknown key");
}

#[test]
fn a_strangers_subkey_under_a_pinned_primary_is_not_believed() {
    let (archive, stranger) = (Archive::new(), Archive::new());
    let mut key = SignedPublicKey::from(archive.secret);
    key.public_subkeys = SignedPublicKey::from(stranger.secret.clone()).public_subkeys;
    assert_refused(verify_now(&pin(&key), &stranger.sign(TEXT)), "is not bound to it");
}

#[test]
fn a_subkey_that_does_not_answer_for_its_primary_is_not_believed() {
    let (archive, stranger) = (Archive::new(), Archive::new());
    let subkey = &stranger.secret.secret_subkeys[0].key;
    let primary = &archive.secret.primary_key;
    let mut config = SignatureConfig::v4(
        SignatureType::SubkeyBinding,
        primary.algorithm(),
        HashAlgorithm::Sha256,
    );
    let mut flags = pgp::packet::KeyFlags::default();
    flags.set_sign(true);
    config.hashed_subpackets = vec![
        Subpacket::regular(SubpacketData::SignatureCreationTime(Timestamp::now())).unwrap(),
        Subpacket::regular(SubpacketData::KeyFlags(flags)).unwrap(),
    ];
    let binding = config
        .sign_subkey_binding(
            primary,
            primary.public_key(),
            &Password::empty(),
            &subkey.public_key(),
        )
        .unwrap();
    let mut key = SignedPublicKey::from(archive.secret.clone());
    key.public_subkeys = SignedPublicKey::from(stranger.secret.clone()).public_subkeys;
    key.public_subkeys[0].signatures = vec![binding];
    assert_refused(verify_now(&pin(&key), &stranger.sign(TEXT)), "does not answer for it");
}

#[test]
fn a_revoked_key_and_a_revoked_subkey_are_not_believed() {
    let archive = Archive::new();
    let primary = &archive.secret.primary_key;
    let revoke = |typ| {
        let mut config = SignatureConfig::v4(typ, primary.algorithm(), HashAlgorithm::Sha256);
        config.hashed_subpackets = vec![
            Subpacket::regular(SubpacketData::SignatureCreationTime(Timestamp::now())).unwrap(),
        ];
        config
    };
    let mut key = SignedPublicKey::from(archive.secret.clone());
    let revocation = revoke(SignatureType::SubkeyRevocation)
        .sign_subkey_binding(
            primary,
            primary.public_key(),
            &Password::empty(),
            &key.public_subkeys[0].key,
        )
        .unwrap();
    key.public_subkeys[0].signatures.push(revocation);
    assert_refused(verify_now(&pin(&key), &archive.sign(TEXT)), "its subkey is revoked");
    verify_now(&pin(&key), &archive.sign_by_primary(TEXT)).unwrap();

    let revocation = revoke(SignatureType::KeyRevocation)
        .sign_key(primary, &Password::empty(), primary.public_key())
        .unwrap();
    key.details.revocation_signatures.push(revocation);
    assert_refused(verify_now(&pin(&key), &archive.sign_by_primary(TEXT)), "the key is revoked");
}

#[test]
fn a_weak_an_expired_a_future_and_a_strangely_bound_signature_do_not_count() {
    // rpgp makes no weak signatures by the newer kinds of keys.
    let archive = Archive::with_primary(KeyType::Rsa(2048));
    let key = &archive.secret.primary_key;
    let now = SystemTime::now();
    let good = sign_with(TEXT, key, None, HashAlgorithm::Sha256, now);
    verify_now(&archive.keyring(), &good).unwrap();
    let weak = sign_with(TEXT, key, None, HashAlgorithm::Sha1, now);
    assert_refused(verify_now(&archive.keyring(), &weak), "weak hash");
    let unknown = Some(SubpacketData::Experimental(101, vec![1].into()));
    let unknown = sign_with(TEXT, key, unknown, HashAlgorithm::Sha256, now);
    assert_refused(verify_now(&archive.keyring(), &unknown), "not understood");
    let short = SubpacketData::SignatureExpirationTime(pgp::types::Duration::from_secs(60));
    let hour_ago = now - Duration::from_secs(3_600);
    let expired = sign_with(TEXT, key, Some(short), HashAlgorithm::Sha256, hour_ago);
    assert_refused(verify_now(&archive.keyring(), &expired), "the signature expired");
    let tomorrow = now + Duration::from_secs(86_400);
    let future = sign_with(TEXT, key, None, HashAlgorithm::Sha256, tomorrow);
    assert_refused(verify_now(&archive.keyring(), &future), "from the future");
}

#[test]
fn text_smuggled_outside_the_signature_is_refused() {
    let archive = Archive::new();
    let (good, keyring) = (archive.sign(TEXT), archive.keyring());
    verify_now(&keyring, &good).unwrap();
    let begin = "-----BEGIN PGP SIGNED MESSAGE-----\n";
    let body = good.find("\n\n").unwrap() + 2;
    for bad in [
        format!("Codename: evil\n{good}"),
        format!("\n{good}"),
        format!("{good}Codename: evil\n"),
        format!("{good}{good}"),
        good.replacen(begin, &format!("{begin}Codename: evil\n"), 1),
        good.replacen(begin, &format!("{begin}Comment: evil\n"), 1),
        format!("{}Codename: evil\n{}", &good[..body], &good[body..]),
        format!("{}\n{}", &good[..body], &good[body..]),
        good.replacen("- - dashed", "- dashed", 1),
        good.replacen("- - dashed", "-dashed", 1),
        good.replace("-----BEGIN PGP SIGNATURE-----", "more\n-----BEGIN PGP SIGNATURE-----"),
        good.replace("-----BEGIN PGP SIGNATURE-----", "-----BEGIN PGP SIGNATURE----- "),
        good.replace('\n', "\r\n"),
        good.replacen("last", "la\rst", 1),
        good.replacen("last", "la\0st", 1),
        good[..good.len() / 2].to_string(),
        good[..body].to_string(),
        String::new(),
        TEXT.to_string(),
    ] {
        assert_refused(verify_now(&keyring, &bad), "does not hold");
    }
    // Trailing blanks are not signed, and so are not given back.
    let blank = good.replacen("last", "last \t", 1);
    assert_eq!(verify_now(&keyring, &blank).unwrap(), TEXT);
}

#[test]
fn gpgv_agrees_about_what_is_signed() {
    use crate::command::Command;
    let archive = Archive::new();
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys.gpg");
    let key = SignedPublicKey::from(archive.secret.clone());
    std::fs::write(&keys, pgp::ser::Serialize::to_bytes(&key).unwrap()).unwrap();
    let check = |message: &str| {
        let output = Command::new("gpgv").arg("--keyring").arg(&keys).input(message).run_any();
        output.ok().map(|(status, _)| status.success())
    };
    let good = archive.sign(TEXT);
    let Some(agrees) = check(&good) else {
        eprintln!("skipped: there is no gpgv here");
        return;
    };
    assert!(agrees);
    assert_eq!(check(&good.replacen("last", "lost", 1)), Some(false));
}

const SUM: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn parse_with(lines: &str) -> Result<Release> {
    Release::parse(&format!("Codename: trixie\nDate: {REAL_DAY}\n{lines}"))
}

#[test]
fn a_release_without_what_it_needs_is_refused() {
    let sums = format!("SHA256:\n {SUM} 0 main/a\n");
    assert_eq!(parse_with(&sums).unwrap().files["main/a"], (SUM.parse().unwrap(), 0));
    for bad in [
        "",
        "MD5Sum:\n d41d8cd98f00b204e9800998ecf8427e 0 main/a\n",
        "SHA256:\n 12 0 main/a\n",
        &format!("SHA256:\n {SUM} -1 main/a\n"),
        &format!("SHA256:\n {SUM} 0\n"),
        &format!("SHA256:\n {SUM} 0 main/a b\n"),
        &format!("SHA256:\n {SUM} 0 main/a\n {SUM} 1 main/a\n"),
        &format!("{sums}Date: {REAL_DAY}\n"),
        &format!("{sums}Valid-Until: tomorrow\n"),
        &format!("{sums}no field\n"),
    ] {
        assert!(parse_with(bad).is_err(), "{bad}");
    }
    assert!(Release::parse(&format!(" x\n{sums}")).is_err());
}

#[test]
fn each_reason_not_to_believe_a_release_names_the_mirror_and_the_dates() {
    let until = "Fri, 27 Nov 2026 12:00:00 UTC";
    let release = parse_with(&format!("Valid-Until: {until}\nSHA256:\n {SUM} 0 a\n")).unwrap();
    let url = "http://mirror.example.org/debian/dists/trixie/InRelease";
    let good = Expected {
        url,
        codename: "trixie",
        now: release.date + 60,
        seen: Some(release.date),
        locked: Some(release.date),
    };
    release.check(&good).unwrap();
    release.check(&Expected { now: release.date - 3_600, ..good.clone() }).unwrap();
    let later = "Sat, 21 Nov 2026 12:00:00 UTC";
    let newer = parse_date(later);
    for (expected, part) in [
        (Expected { codename: "bookworm", ..good.clone() }, "`trixie`, not `bookworm`"),
        (Expected { now: release.date - 3_601, ..good.clone() }, "from the future"),
        (Expected { now: parse_date(until).unwrap() + 1, ..good.clone() }, until),
        (Expected { seen: newer, ..good.clone() }, later),
        (Expected { locked: newer, ..good.clone() }, "what the lock was made from"),
    ] {
        let error = release.check(&expected).unwrap_err();
        assert_eq!(exit_code(&error), 2);
        let text = error.to_string();
        assert!(text.contains(part) && text.contains(url) && text.contains("help:"), "{text}");
    }
}

proptest! {
    #[test]
    fn no_text_makes_the_release_parser_panic(text in "(\\PC{0,30}\n| \\PC{0,80}\n|[A-Za-z-]{1,8}:\\PC{0,20}\n){0,12}") {
        let _ = Release::parse(&text);
    }

    #[test]
    fn no_bytes_make_the_verification_panic(at in 0..REAL.len(), byte: u8, cut: bool) {
        let keyring = Keyring::new(&[]).unwrap();
        let mut bytes = REAL.as_bytes().to_vec();
        bytes[at] = byte;
        if cut {
            bytes.truncate(at);
        }
        prop_assert!(verify_in_release(&keyring, &bytes, on(REAL_DAY)).is_err());
    }
}
