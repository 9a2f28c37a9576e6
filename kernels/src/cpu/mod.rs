//! The CPU backend.

pub mod linear;
pub mod memory;
pub mod pool;
pub mod quant;
