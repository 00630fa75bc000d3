//! Whether the edges' certificate is to be changed, and by what: pure functions.

const DAY: u64 = 86_400;
/// A certificate that the operator must renew is spoken of so long before its end.
const NOTICE: u64 = 21 * DAY;

/// What the record holds. Times are in seconds since 1970, UTC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The operator brought it.
    pub brought: bool,
    /// When the seed was issued that it goes back to.
    pub issued: u64,
    /// What it consists of.
    pub chain: String,
    /// It has the names that the cluster file of this node's seed asks for.
    pub fits: bool,
    pub not_before: u64,
    pub not_after: u64,
}

/// What this node's seed says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Own {
    pub issued: u64,
    /// The chain that the operator brings, when it is valid now.
    pub brought: Option<String>,
    /// The operator brings one, valid or not.
    pub brings: bool,
    /// When a certificate would end that was made now; `None` when none can be made.
    pub next_end: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    Keep,
    /// Make one with the site CA.
    Make,
    /// Take the one that this node's seed brings.
    Bring,
}

/// What is to be done about the record. The newest seed has the word: it brings a
/// certificate, or it does not. What the cluster itself has made is renewed when a third of
/// its life is left.
pub fn decide(held: Option<&Held>, own: &Own, now: u64) -> Decision {
    let make = if own.next_end.is_some() { Decision::Make } else { Decision::Keep };
    let Some(held) = held else {
        return if own.brought.is_some() { Decision::Bring } else { make };
    };
    if own.issued > held.issued {
        match &own.brought {
            Some(chain) if held.brought && *chain == held.chain => return Decision::Keep,
            Some(_) => return Decision::Bring,
            None if held.brought && !own.brings => return make,
            None if !held.brought && !held.fits => return make,
            None => {}
        }
    }
    // Near the end of the CA itself a new one would not last longer.
    let lasts = own.next_end.is_some_and(|end| end >= held.not_after.saturating_add(DAY));
    if !held.brought && is_due(held, now) && lasts { Decision::Make } else { Decision::Keep }
}

fn is_due(held: &Held, now: u64) -> bool {
    let life = held.not_after.saturating_sub(held.not_before);
    now.saturating_add(life / 3) >= held.not_after
}

/// What there is to say of the end of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expiry {
    Far,
    Near(String),
    Past(String),
}

/// What readiness says of what the edges show.
pub fn judge_expiry(held: &Held, now: u64) -> Expiry {
    let help = match held.brought {
        true => "bring a newer one in `[certificate]` and make a new seed for an edge",
        false => "the edges have not renewed it; their seeds may be too old",
    };
    if now >= held.not_after {
        let days = (now - held.not_after) / DAY;
        return Expiry::Past(format!("what users see has expired {days} days ago: {help}"));
    }
    let left = held.not_after - now;
    if left > NOTICE {
        return Expiry::Far;
    }
    Expiry::Near(format!("what users see expires in {} days: {help}", left / DAY))
}
