//! The CUDA backend. CUDA's libraries are found at run time: nothing of them is needed to build, and [`available`] says
//! in one line what is missing where.
//!
//! Weights are what [`TensorFormat::gpu_bytes`] says of their format; activations and sums are f32; the KV cache is what
//! its [`KvSpec`](crate::KvSpec) says. Everything runs on one stream. The ops between a step's [`Backend::batch`] and its
//! sampling allocate nothing and wait for nothing, so they can be captured in a graph: a decode step is one launch then.
//!
//! [`Backend::batch`]: crate::Backend::batch
//! [`TensorFormat::gpu_bytes`]: phalanx_model::TensorFormat::gpu_bytes

mod activation;
mod attention;
mod backend;
mod batch;
mod blas;
mod buffer;
mod candidates;
mod compile;
mod count;
mod device;
mod embedding;
mod error;
mod fp8;
mod graph;
mod ipc;
mod kv_cache;
mod launch;
mod library;
mod linear;
mod memory;
mod norm;
mod rotary;
mod shape;
mod timing;
mod units;
mod weight;

pub(crate) use device::Device;
pub(crate) use ipc::{HANDLE_BYTES, HostFlag, OpenedMemory, SharedMemory, bus_id, check_peer_access};
pub(crate) use launch::{Arg, Grid, Kernels, Peers};

pub use backend::{CudaBackend, CudaOptions};
pub use batch::CudaBatch;
pub use buffer::{CudaBuffer, CudaVector};
pub use compile::{KernelCache, Origin, WarmKernel, WarmRequest, warm};
pub use device::{DeviceInfo, devices};
pub use graph::CudaGraphCache;
pub use kv_cache::CudaKvCache;
pub use library::{CudaUnavailable, Library, available, require};
pub use weight::CudaWeight;
