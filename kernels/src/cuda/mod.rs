//! The CUDA backend. CUDA's libraries are found at run time: nothing of them is needed to build, and [`available`] says
//! in one line what is missing where.
//!
//! Weights are bf16, whatever their format in the file; activations and sums are f32; the KV cache is what its
//! [`KvSpec`](crate::KvSpec) says. Everything runs on one stream. The ops between a step's [`Backend::batch`] and its
//! sampling allocate nothing and wait for nothing, so they can be captured in a graph.
//!
//! [`Backend::batch`]: crate::Backend::batch

mod activation;
mod attention;
mod backend;
mod batch;
mod blas;
mod buffer;
mod candidates;
mod compile;
mod device;
mod embedding;
mod error;
mod fp8;
mod kv_cache;
mod launch;
mod library;
mod linear;
mod memory;
mod norm;
mod rotary;
mod shape;
mod units;
mod weight;

pub use backend::{CudaBackend, CudaOptions};
pub use batch::CudaBatch;
pub use buffer::{CudaBuffer, CudaVector};
pub use compile::{KernelCache, Origin, WarmKernel, WarmRequest, warm};
pub use device::{DeviceInfo, devices};
pub use kv_cache::CudaKvCache;
pub use library::{CudaUnavailable, Library, available, require};
pub use weight::CudaWeight;
