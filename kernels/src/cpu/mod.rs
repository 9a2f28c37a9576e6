//! The CPU backend.

pub(crate) mod gemm;
pub mod linear;
pub mod memory;
pub(crate) mod pack;
pub mod pool;
pub mod quant;
