//! The CPU backend.

mod math;
mod simd;
