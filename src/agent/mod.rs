//! `stanchion-agent`: the program in every image that makes a node of it.
//!
//! Three phases (`runner`): pre-start, bootstrap, main. What can be decided without
//! looking is decided by pure functions (`join`, `failover`, `ready`); elections are
//! etcd's, Patroni's, Sentinel's and keepalived's.

pub mod apply;
pub mod board;
pub mod checks;
pub mod etcd;
pub mod failover;
pub mod files;
pub mod find_seed;
pub mod join;
pub mod join_act;
pub mod node;
pub mod places;
pub mod registry;
pub mod render;
pub mod roles;
pub mod runner;
pub mod systemd;
pub mod tls;
