//! One rank: attaches to the coordinator, loads its shard, joins a group, and runs steps until it is told to stop.
//!
//! A worker keeps weights and KV and nothing else. It never sees text and never decides what to run.
#![forbid(unsafe_code)]

pub mod assignment;
pub mod error;
pub mod layers;
pub mod models;
pub mod runner;
pub mod sampler;
pub mod workspace;

pub use assignment::{Assignment, AssignmentError, MAX_LOGPROBS, step_limits};
pub use error::{PlanError, RunError};
pub use runner::{LoadedModel, ModelRunner};
