//! Backends that are small, because tests open many.

use phalanx_kernels::cuda::{CudaBackend, CudaOptions};

pub(crate) const WORKSPACE_BYTES: usize = 4 << 20;

/// Of the first device.
pub(crate) fn options() -> CudaOptions {
    CudaOptions {
        workspace_bytes: WORKSPACE_BYTES,
        step_bytes: 4 << 20,
        staging_bytes: 1 << 20,
        ..CudaOptions::new(0)
    }
}

pub(crate) fn open() -> CudaBackend {
    CudaBackend::open(options()).unwrap()
}
