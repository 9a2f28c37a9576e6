//! Sizes as kernels take them.

use crate::{KernelError, Result};

/// A size as a kernel's `u32`.
pub(crate) fn u32_of(op: &'static str, size: usize) -> Result<u32> {
    u32::try_from(size).map_err(|_| KernelError::Shape {
        op,
        message: format!("a size of {size}"),
    })
}
