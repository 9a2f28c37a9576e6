//! The CUDA backend. What is ignored needs a device, and runs with
//! `cargo test -p phalanx-kernels --test cuda -- --ignored`.

mod conformance;
mod features;
mod kernel_cache;
mod libraries;
mod memory;
mod support;
