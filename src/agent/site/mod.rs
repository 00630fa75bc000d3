//! The certificate that all edges show to users: one for all, kept sealed in etcd.
//!
//! ```text
//! /stanchion/<cluster>/site/certificate   the record, which only edges can read
//! /stanchion/<cluster>/locks/site         who changes it now, under a lease
//! ```
//!
//! Whichever edge sees first that one is needed makes it; `decide` says when. Every edge
//! follows the record and gives what it holds to its HAProxy (`show`).

mod decide;
mod keep;
mod record;
mod show;

pub use decide::{Decision, Expiry, Held, Own, decide, judge_expiry};
pub use keep::{Renewal, Site};
pub use record::{Record, Seal};

#[cfg(test)]
mod tests;
