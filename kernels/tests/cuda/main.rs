//! The CUDA backend. What is ignored needs a device: `soft_gpu` runs it on the soft GPU, and
//! `cargo test -p phalanx-kernels --test cuda -- --ignored` on this machine's own.

mod attention;
mod conformance;
mod features;
mod fp8;
mod kernel_cache;
mod libraries;
mod memory;
mod quantized;
mod soft_gpu;
mod support;
