//! How CUDA's errors become [`KernelError`]s.

use std::fmt::Display;

use cudarc::driver::DriverError;

use super::library::CudaUnavailable;
use crate::KernelError;

/// `op` failed with what the driver, or a library on top of it, says.
pub(crate) fn device(op: &'static str, error: impl Display) -> KernelError {
    KernelError::Device {
        op,
        message: error.to_string(),
    }
}

/// As [`device`], with the names of CUDA's documentation: `CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access …`.
///
/// Errors of a stream are sticky: a kernel's failure may surface at any later call.
pub(crate) fn driver(op: &'static str, error: DriverError) -> KernelError {
    device(op, describe(error))
}

pub(crate) fn describe(error: DriverError) -> String {
    let text = error
        .error_string()
        .map(|text| text.to_string_lossy().into_owned())
        .unwrap_or_default();
    format!("{:?}: {text}", error.0)
}

pub(crate) fn unavailable(op: &'static str, why: CudaUnavailable) -> KernelError {
    device(op, why)
}
