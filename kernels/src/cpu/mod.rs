//! The CPU backend.

pub mod gemm;
pub mod linear;
pub mod memory;
pub mod pack;
pub mod pool;
pub mod quant;
