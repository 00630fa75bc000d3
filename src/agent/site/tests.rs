use super::*;
use crate::secrets::Secret;

const DAY: u64 = 86_400;
const NOW: u64 = 1_800_000_000;

fn held() -> Held {
    Held {
        brought: false,
        issued: 100,
        chain: "old".into(),
        fits: true,
        not_before: NOW,
        not_after: NOW + 90 * DAY,
    }
}

fn own(issued: u64) -> Own {
    Own { issued, brought: None, brings: false, next_end: Some(NOW + 300 * DAY) }
}

fn bringing(issued: u64, chain: &str) -> Own {
    Own { brought: Some(chain.into()), brings: true, ..own(issued) }
}

#[test]
fn a_certificate_is_made_when_there_is_none_and_renewed_in_its_last_third() {
    assert_eq!(decide(None, &own(100), NOW), Decision::Make);
    for (days, expected) in [
        (0, Decision::Keep),
        (59, Decision::Keep),
        (60, Decision::Make),
        (90, Decision::Make),
        (900, Decision::Make),
    ] {
        let own = Own { next_end: Some(NOW + (days + 90) * DAY), ..own(100) };
        assert_eq!(decide(Some(&held()), &own, NOW + days * DAY), expected, "{days}");
    }
    // Its CA ends as soon: a new one would be due at once.
    let last = Own { next_end: Some(NOW + 90 * DAY), ..own(100) };
    assert_eq!(decide(Some(&held()), &last, NOW + 80 * DAY), Decision::Keep);
    let unable = Own { next_end: None, ..own(100) };
    assert_eq!(decide(None, &unable, NOW), Decision::Keep);
    assert_eq!(decide(Some(&held()), &unable, NOW + 80 * DAY), Decision::Keep);
}

#[test]
fn the_newest_seed_has_the_word() {
    let brought = Held { brought: true, chain: "mine".into(), fits: false, ..held() };
    let moved = Held { fits: false, ..held() };
    for (held, own, expected) in [
        (None, bringing(1, "mine"), Decision::Bring),
        (Some(held()), bringing(101, "mine"), Decision::Bring),
        (Some(held()), bringing(100, "mine"), Decision::Keep),
        (Some(held()), bringing(99, "mine"), Decision::Keep),
        (Some(brought.clone()), bringing(101, "mine"), Decision::Keep),
        (Some(brought.clone()), bringing(101, "newer"), Decision::Bring),
        (Some(brought.clone()), bringing(99, "older"), Decision::Keep),
        // The operator takes it back, on one edge.
        (Some(brought.clone()), own(101), Decision::Make),
        (Some(brought.clone()), own(99), Decision::Keep),
        // The cluster file has another VIP.
        (Some(moved.clone()), own(101), Decision::Make),
        (Some(moved), own(100), Decision::Keep),
    ] {
        assert_eq!(decide(held.as_ref(), &own, NOW), expected, "{held:?} {own:?}");
    }
    // One that is brought and not valid (any more) replaces nothing.
    let expired = Own { brought: None, brings: true, ..own(101) };
    assert_eq!(decide(Some(&brought), &expired, NOW), Decision::Keep);
    assert_eq!(decide(None, &expired, NOW), Decision::Make);
    // What the operator brings is not renewed here.
    assert_eq!(decide(Some(&brought), &own(99), NOW + 89 * DAY), Decision::Keep);
}

#[test]
fn an_end_that_comes_near_is_told() {
    let brought = Held { brought: true, ..held() };
    let left = |days: u64| judge_expiry(&brought, brought.not_after - days * DAY);
    assert_eq!(left(22), Expiry::Far);
    assert!(matches!(left(21), Expiry::Near(text) if text.contains("expires in 21 days")));
    let past = judge_expiry(&brought, brought.not_after + 2 * DAY);
    assert!(matches!(past, Expiry::Past(text) if text.contains("has expired 2 days ago")));
}

#[test]
fn only_edges_open_the_record_and_only_where_it_lies() {
    let record = Record {
        brought: true,
        issued: 7,
        by: "n1".into(),
        chain: "the chain".into(),
        key: "the key".into(),
    };
    let secret = Secret::make().unwrap();
    let seal = Seal::new(&secret, "/stanchion/a/site/certificate").unwrap();
    let sealed = seal.seal(&record).unwrap();
    assert!(seal.open(&sealed).unwrap() == record);
    assert_ne!(seal.seal(&record).unwrap(), sealed);
    let elsewhere = Seal::new(&secret, "/stanchion/b/site/certificate").unwrap();
    let other = Seal::new(&Secret::make().unwrap(), "/stanchion/a/site/certificate").unwrap();
    assert!(elsewhere.open(&sealed).is_err() && other.open(&sealed).is_err());
    for at in [2, 10, 30, sealed.len() - 6] {
        let mut changed = sealed.clone().into_bytes();
        changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(changed).unwrap();
        assert!(seal.open(&changed).is_err(), "{at}");
    }
    for bad in ["", "1:", "1:AAAA", "2:AAAA", "1:?", &sealed[..sealed.len() - 4]] {
        let error = seal.open(bad).err().unwrap().to_string();
        assert!(!error.contains("the key"), "{error}");
    }
}
