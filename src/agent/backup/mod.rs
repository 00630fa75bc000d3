//! Backups of PostgreSQL by pgBackRest, and the way back.
//!
//! ```text
//! schedule     when a backup is due; the leader's agent takes it
//! archive      whether the log reaches the repository
//! take         one backup, with a snapshot of etcd beside it
//! branches     what restores have given up
//! drill        a restore into a scratch folder, to know that backups can be read
//! restore      the cluster as it was at a time: steps that each node does for itself
//! ```
//!
//! Programs of PostgreSQL run as `postgres` in units of their own ([`pgbackrest`]).

mod archive;
mod branches;
mod clock;
mod drill;
mod info;
mod pgbackrest;
mod plan;
mod restore;
mod schedule;
mod scratch;
mod take;

pub use clock::{format_utc, parse_time};
pub use drill::{Drilled, drill, remove_folder};
pub use info::{Backup, Info};
pub use plan::{Target, choose_backup};
pub use restore::{Planned, Record, Stage, restore, start_again, withhold};
pub use schedule::keep_backups;
pub use scratch::Found;
pub use take::{Kind, Taken, list, take_by_verb};
