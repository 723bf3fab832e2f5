//! Integration tests of the library and the binary, against metadata made by the kernel.

mod backing;
mod commands;
mod contexts;
mod crash;
mod ctl;
mod damage;
#[cfg(feature = "devtools")]
mod devtools;
mod failures;
#[cfg(feature = "devtools")]
mod faults;
#[cfg(feature = "devtools")]
mod faults_by_chance;
mod fixtures;
mod fuse;
mod fuzzed;
mod hostile;
mod in_place;
mod log_writes;
mod metadata_crash;
mod nbd;
mod pool;
mod pool_metadata;
#[cfg(feature = "devtools")]
mod power;
mod repair;
#[cfg(feature = "devtools")]
mod repair_damage;
mod repair_in_place;
mod replay;
mod replay_answers;
mod replay_fleet;
mod replay_kernel;
mod replay_readers;
mod replay_report;
mod replay_threads;
mod replay_verify;
mod rescue;
#[cfg(feature = "devtools")]
mod rescue_nodes;
mod serve;
mod serve_run;
mod serve_start;
mod shapes;
mod support;
#[cfg(feature = "tls")]
mod tls;
mod undelete;
mod xml_input;
