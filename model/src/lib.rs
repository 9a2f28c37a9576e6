//! What a model is, as data: configuration, tensor directory, who holds what, and how many bytes that is.
//! No device, no arithmetic on weights, no I/O but what the caller's mapping function does.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod config;
pub mod cost;
pub mod format;
pub mod geometry;
pub mod gguf;
pub mod int4;
pub mod memory;
pub mod quantization;
pub mod role;
pub mod safetensors;
pub mod shard;

pub use checkpoint::{Checkpoint, CheckpointError, TensorInfo, TensorLayout};
pub use config::{ConfigError, ModelConfig, RopeConfig, RopeLayout, RopeScaling};
pub use cost::{Floors, MachineLimits, TokenCost};
pub use format::{KvDtype, TensorFormat};
pub use geometry::Geometry;
pub use memory::{
    GpuBudget, GpuMemory, GpuPlacement, MemoryBudget, MemoryError, MemoryPlan, MemoryRequest, Placement,
    RankBudget,
};
pub use quantization::{Quantization, QuantizationMethod};
pub use role::{LayerTensor, TensorFormats, TensorRole};
pub use shard::{
    RankShard, RowSplitBlocks, Shard, ShardError, ShardPlan, TensorParallelOptions, TensorParallelStyle,
    TensorSlice,
};
