//! The CPU backend.

mod attention;
mod backend;
mod batch;
mod buffer;
mod candidates;
mod count;
mod embedding;
mod exec;
mod gemm;
mod kv_cache;
pub mod limits;
pub mod linear;
mod math;
pub mod memory;
mod norm;
mod pack;
pub mod pool;
pub mod quant;
mod rotary;
mod silu;
mod simd;

pub use backend::{CpuBackend, CpuVector};
pub use batch::CpuBatch;
pub use buffer::CpuBuffer;
pub use kv_cache::CpuKvCache;

pub(crate) use candidates::gumbel;
