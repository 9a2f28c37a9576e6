//! What a model is, as data: configuration, tensor directory, who holds what, and how many bytes that is.
//! No device, no arithmetic on weights, no I/O but what the caller's mapping function does.
#![forbid(unsafe_code)]

pub mod config;
pub mod format;
pub mod shard;

pub use config::{ModelConfig, RopeConfig, RopeLayout, RopeScaling};
pub use format::{KvDtype, TensorFormat};
pub use shard::{RankShard, Shard, ShardPlan, TensorParallelOptions, TensorParallelStyle};
