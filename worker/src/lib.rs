//! One rank: attaches to the coordinator, loads its shard, joins a group, and runs steps until it is told to stop.
//!
//! A worker keeps weights and KV and nothing else. It never sees text and never decides what to run.
#![forbid(unsafe_code)]

pub mod assignment;
mod attach;
mod connect;
mod device;
pub mod error;
mod graphs;
mod group;
pub mod layers;
pub mod loader;
pub mod models;
mod numa;
mod platform;
mod process;
mod profile;
mod rank;
pub mod runner;
pub mod sampler;
pub mod trace;
pub mod workspace;

pub use assignment::{Assignment, AssignmentError, Device, step_limits};
pub use attach::{WorkerConfig, run, serve};
pub use device::DeviceChoice;
pub use error::{JoinError, PlanError, RunError, WorkerError};
pub use loader::{LoadError, LoadProgress, allocate_kv, load};
pub use runner::{LoadedModel, ModelRunner};
