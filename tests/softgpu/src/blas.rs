//! libcublas: `GemmEx` and its strided batch.

use std::sync::{Arc, Mutex};

use libc::{c_int, c_longlong, c_void};

use crate::{
    formats::Format,
    gemm::{Epilogue, Gemm, Matrix, Refusal},
    graph::Kind,
    handles::{Handles, lock},
    status::{self, Out},
    stream,
};

/// `cublasStatus_t`, of libcublasLt too.
pub(crate) type BlasStatus = c_int;
pub(crate) const SUCCESS: BlasStatus = 0;
pub(crate) const NOT_INITIALIZED: BlasStatus = 1;
pub(crate) const INVALID_VALUE: BlasStatus = 7;
pub(crate) const EXECUTION_FAILED: BlasStatus = 13;
pub(crate) const NOT_SUPPORTED: BlasStatus = 15;

/// `CUBLAS_COMPUTE_32F`, and its variants that may use tensor cores in a smaller format.
const COMPUTE_32F: [c_int; 4] = [68, 74, 75, 77];

pub(crate) fn is_f32_compute(compute: c_int) -> bool {
    COMPUTE_32F.contains(&compute)
}

pub(crate) fn put<T>(out: Out<'_, T>, value: T) -> BlasStatus {
    match status::put(out, value) {
        status::SUCCESS => SUCCESS,
        _ => INVALID_VALUE,
    }
}

/// Checks a product and enqueues it. Memory that is not there is refused now; cuBLAS would fault later.
pub(crate) fn enqueue(gemm: Gemm, stream: usize) -> BlasStatus {
    match gemm.check() {
        Ok(()) => {}
        Err(Refusal::Shape) => return INVALID_VALUE,
        Err(Refusal::Memory) => return EXECUTION_FAILED,
    }
    match stream::enqueue(stream, Kind::Kernel, Arc::new(move || gemm.run())) {
        status::SUCCESS => SUCCESS,
        _ => EXECUTION_FAILED,
    }
}

/// The library's handle.
#[derive(Default)]
struct Library {
    stream: Mutex<usize>,
}

static LIBRARIES: Handles<Library> = Handles::new();

/// `cublasOperation_t`: whether it transposes. A conjugate transpose of real numbers is a transpose.
pub(crate) fn transposes(operation: c_int) -> Option<bool> {
    match operation {
        0 => Some(false),
        1 | 2 => Some(true),
        _ => None,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cublasCreate_v2(out: Out<'_, usize>) -> BlasStatus {
    put(out, LIBRARIES.insert(Library::default()))
}

#[unsafe(no_mangle)]
extern "C" fn cublasDestroy_v2(handle: usize) -> BlasStatus {
    LIBRARIES.remove(handle).map_or(NOT_INITIALIZED, |_| SUCCESS)
}

#[unsafe(no_mangle)]
extern "C" fn cublasSetStream_v2(handle: usize, stream: usize) -> BlasStatus {
    let Some(library) = LIBRARIES.get(handle) else {
        return NOT_INITIALIZED;
    };
    *lock(&library.stream) = stream;
    SUCCESS
}

/// The stand-in needs no workspace.
#[unsafe(no_mangle)]
extern "C" fn cublasSetWorkspace_v2(handle: usize, _workspace: *mut c_void, _bytes: usize) -> BlasStatus {
    LIBRARIES.get(handle).map_or(NOT_INITIALIZED, |_| SUCCESS)
}

/// Always sums in f32, whatever less is allowed.
#[unsafe(no_mangle)]
extern "C" fn cublasSetMathMode(handle: usize, _mode: c_int) -> BlasStatus {
    LIBRARIES.get(handle).map_or(NOT_INITIALIZED, |_| SUCCESS)
}

/// alpha and beta are taken from host memory.
#[unsafe(no_mangle)]
extern "C" fn cublasSetPointerMode_v2(handle: usize, mode: c_int) -> BlasStatus {
    match (LIBRARIES.get(handle), mode) {
        (None, _) => NOT_INITIALIZED,
        (Some(_), 0) => SUCCESS,
        (Some(_), _) => NOT_SUPPORTED,
    }
}

/// One operand as it comes: address, `cudaDataType_t`, leading dimension, stride.
struct Raw {
    address: usize,
    data_type: c_int,
    ld: c_int,
    stride: c_longlong,
}

impl Raw {
    fn matrix(self, transposed: bool) -> Result<Matrix, BlasStatus> {
        Ok(Matrix {
            address: self.address,
            format: Format::of(self.data_type).ok_or(NOT_SUPPORTED)?,
            ld: usize::try_from(self.ld).map_err(|_| INVALID_VALUE)?,
            stride: usize::try_from(self.stride).map_err(|_| INVALID_VALUE)?,
            transposed,
        })
    }
}

fn gemm(
    sizes: [c_int; 4],
    operations: [c_int; 2],
    scalars: [Option<&f32>; 2],
    [a, b, c]: [Raw; 3],
) -> Result<Gemm, BlasStatus> {
    let size = |index: usize| usize::try_from(sizes[index]).map_err(|_| INVALID_VALUE);
    let transposed = |index: usize| transposes(operations[index]).ok_or(INVALID_VALUE);
    let scalar = |index: usize| scalars[index].copied().ok_or(INVALID_VALUE);
    let c = c.matrix(false)?;
    Ok(Gemm {
        m: size(0)?,
        n: size(1)?,
        k: size(2)?,
        batch: size(3)?,
        a: a.matrix(transposed(0)?)?,
        b: b.matrix(transposed(1)?)?,
        c,
        d: c,
        alpha: scalar(0)?,
        beta: scalar(1)?,
        epilogue: Epilogue::default(),
        scales: [0; 2],
    })
}

#[unsafe(no_mangle)]
extern "C" fn cublasGemmStridedBatchedEx(
    handle: usize,
    operation_a: c_int,
    operation_b: c_int,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: Option<&f32>,
    a: usize,
    type_a: c_int,
    lda: c_int,
    stride_a: c_longlong,
    b: usize,
    type_b: c_int,
    ldb: c_int,
    stride_b: c_longlong,
    beta: Option<&f32>,
    c: usize,
    type_c: c_int,
    ldc: c_int,
    stride_c: c_longlong,
    batch: c_int,
    compute: c_int,
    _algorithm: c_int,
) -> BlasStatus {
    let Some(library) = LIBRARIES.get(handle) else {
        return NOT_INITIALIZED;
    };
    if !is_f32_compute(compute) {
        return NOT_SUPPORTED;
    }
    let operands = [
        Raw {
            address: a,
            data_type: type_a,
            ld: lda,
            stride: stride_a,
        },
        Raw {
            address: b,
            data_type: type_b,
            ld: ldb,
            stride: stride_b,
        },
        Raw {
            address: c,
            data_type: type_c,
            ld: ldc,
            stride: stride_c,
        },
    ];
    match gemm(
        [m, n, k, batch],
        [operation_a, operation_b],
        [alpha, beta],
        operands,
    ) {
        Ok(gemm) => enqueue(gemm, *lock(&library.stream)),
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cublasGemmEx(
    handle: usize,
    operation_a: c_int,
    operation_b: c_int,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: Option<&f32>,
    a: usize,
    type_a: c_int,
    lda: c_int,
    b: usize,
    type_b: c_int,
    ldb: c_int,
    beta: Option<&f32>,
    c: usize,
    type_c: c_int,
    ldc: c_int,
    compute: c_int,
    algorithm: c_int,
) -> BlasStatus {
    cublasGemmStridedBatchedEx(
        handle,
        operation_a,
        operation_b,
        m,
        n,
        k,
        alpha,
        a,
        type_a,
        lda,
        0,
        b,
        type_b,
        ldb,
        0,
        beta,
        c,
        type_c,
        ldc,
        0,
        1,
        compute,
        algorithm,
    )
}
