//! Return codes of the driver, and how a value is handed to a C caller.

use std::{ffi::CStr, mem::MaybeUninit};

use libc::c_int;

/// `CUresult`.
pub(crate) type Status = c_int;

pub(crate) const SUCCESS: Status = 0;
pub(crate) const INVALID_VALUE: Status = 1;
pub(crate) const OUT_OF_MEMORY: Status = 2;
pub(crate) const NO_DEVICE: Status = 100;
pub(crate) const INVALID_DEVICE: Status = 101;
pub(crate) const INVALID_IMAGE: Status = 200;
pub(crate) const INVALID_CONTEXT: Status = 201;
pub(crate) const NO_BINARY_FOR_GPU: Status = 209;
pub(crate) const PEER_ACCESS_UNSUPPORTED: Status = 217;
pub(crate) const INVALID_PTX: Status = 218;
pub(crate) const FILE_NOT_FOUND: Status = 301;
pub(crate) const INVALID_HANDLE: Status = 400;
pub(crate) const NOT_FOUND: Status = 500;
pub(crate) const NOT_READY: Status = 600;
pub(crate) const ILLEGAL_ADDRESS: Status = 700;
pub(crate) const LAUNCH_FAILED: Status = 719;
pub(crate) const NOT_SUPPORTED: Status = 801;
pub(crate) const CAPTURE_UNSUPPORTED: Status = 900;
pub(crate) const CAPTURE_INVALIDATED: Status = 901;
pub(crate) const CAPTURE_UNMATCHED: Status = 903;
pub(crate) const CAPTURE_ISOLATION: Status = 905;
pub(crate) const CAPTURED_EVENT: Status = 907;
pub(crate) const GRAPH_EXEC_UPDATE_FAILURE: Status = 910;

/// The driver's name of a status.
pub(crate) fn name(status: Status) -> &'static CStr {
    match status {
        SUCCESS => c"CUDA_SUCCESS",
        INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
        OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        NO_DEVICE => c"CUDA_ERROR_NO_DEVICE",
        INVALID_DEVICE => c"CUDA_ERROR_INVALID_DEVICE",
        INVALID_IMAGE => c"CUDA_ERROR_INVALID_IMAGE",
        INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
        NO_BINARY_FOR_GPU => c"CUDA_ERROR_NO_BINARY_FOR_GPU",
        PEER_ACCESS_UNSUPPORTED => c"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
        INVALID_PTX => c"CUDA_ERROR_INVALID_PTX",
        FILE_NOT_FOUND => c"CUDA_ERROR_FILE_NOT_FOUND",
        INVALID_HANDLE => c"CUDA_ERROR_INVALID_HANDLE",
        NOT_FOUND => c"CUDA_ERROR_NOT_FOUND",
        NOT_READY => c"CUDA_ERROR_NOT_READY",
        ILLEGAL_ADDRESS => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        LAUNCH_FAILED => c"CUDA_ERROR_LAUNCH_FAILED",
        NOT_SUPPORTED => c"CUDA_ERROR_NOT_SUPPORTED",
        CAPTURE_UNSUPPORTED => c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        CAPTURE_INVALIDATED => c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
        CAPTURE_UNMATCHED => c"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
        CAPTURE_ISOLATION => c"CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
        CAPTURED_EVENT => c"CUDA_ERROR_CAPTURED_EVENT",
        GRAPH_EXEC_UPDATE_FAILURE => c"CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE",
        _ => c"CUDA_ERROR_UNKNOWN",
    }
}

/// A C out-parameter: null or room for one `T`, not necessarily initialised.
pub(crate) type Out<'a, T> = Option<&'a mut MaybeUninit<T>>;

/// Stores `value` for the caller; a null out-parameter is an invalid value.
pub(crate) fn put<T>(out: Out<'_, T>, value: T) -> Status {
    match out {
        Some(out) => {
            out.write(value);
            SUCCESS
        }
        None => INVALID_VALUE,
    }
}

/// [`put`] of a result.
pub(crate) fn put_result<T>(out: Out<'_, T>, value: Result<T, Status>) -> Status {
    match value {
        Ok(value) => put(out, value),
        Err(status) => status,
    }
}

/// A result without a value, as a status.
pub(crate) fn of(result: Result<(), Status>) -> Status {
    result.err().unwrap_or(SUCCESS)
}
