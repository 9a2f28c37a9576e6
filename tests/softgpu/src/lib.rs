//! A soft GPU: one shared library that stands in for libcuda, libnvrtc, libcublas, libcublasLt and libnccl, and runs
//! the very same CUDA sources on the CPU. The CUDA backend finds its libraries at run time by name; put
//! [`LibraryDir`] into the `LD_LIBRARY_PATH` of a process and it finds these instead, unmodified.
//!
//! | module | stands for |
//! | --- | --- |
//! | `device`, `memory`, `copy`, `stream`, `event`, `graph`, `module` | libcuda |
//! | `nvrtc` | libnvrtc: the host's C++ compiler and `device/*.h` |
//! | `blas`, `lt` over `gemm` | libcublas, libcublasLt |
//! | `nccl` | libnccl, between processes of one host |
//!
//! It proves that the backend is correct, not that it is fast. What a GPU reports badly or not at all is reported
//! well: deadlocks with the thread and the place, accesses outside of an allocation, uninitialised memory (NaN),
//! missing waits, mismatched collectives. What it cannot see: the PTX inside the wrappers of the device dialect,
//! races between warps that its schedule does not provoke, registers and occupancy, speed.
//!
//! Handles given to the caller are numbers looked up in a table, never addresses, so a destroyed or foreign handle is
//! an error and not a crash.
#![allow(
    non_snake_case,
    reason = "the C functions have the names of the libraries they stand for"
)]

mod blas;
mod copy;
mod device;
mod event;
mod fault;
mod formats;
mod gemm;
mod graph;
mod handles;
mod lt;
mod memory;
mod module;
mod nccl;
mod nvrtc;
mod pool;
mod settings;
mod setup;
mod status;
mod stream;

pub use settings::Env;
pub use setup::LibraryDir;
