//! Matrix products by cublasLt: bf16 times bf16 or E4M3 times E4M3, summed and written in f32.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::result::{self as lt, CublasError};
use cudarc::cublaslt::sys;

use super::device::Device;
use super::error::device as device_error;
use super::memory::{Arena, Region};
use crate::{KernelError, Result};

const OP: &str = "linear";
/// NVIDIA's advice: 32 MiB from Hopper on, 4 MiB before.
const WORKSPACE_BYTES: [usize; 2] = [4 << 20, 32 << 20];
const HOPPER: i32 = 9;
/// Products of fewer rows are done as products of so many.
const MIN_ROWS: usize = 16;

/// What is multiplied. E4M3 needs `m`, `n`, `k` and the leading dimensions in multiples of 16, and has no bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Operands {
    Bf16,
    E4m3,
}

/// `out[m, n] = x[m, k] · weightᵀ + bias`, all row-major in device memory. Leading dimensions are in elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub(crate) operands: Operands,
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// Rows of `x` and of `weight` are `ld` elements apart.
    pub(crate) x: u64,
    pub(crate) weight: u64,
    pub(crate) ld: usize,
    /// f32; rows are `out_ld` elements apart.
    pub(crate) out: u64,
    pub(crate) out_ld: usize,
    /// `n` f32.
    pub(crate) bias: Option<u64>,
}

/// What decides an algorithm. The number of rows is rounded up to a power of two, so that a row is mostly summed in the
/// same order whatever else is in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    operands: Operands,
    m: usize,
    n: usize,
    k: usize,
    ld: usize,
    out_ld: usize,
    /// Bytes that the address and the rows of the output are multiples of, up to 16.
    alignment: u32,
    bias: bool,
}

impl Product {
    fn shape(&self, m: usize) -> Shape {
        let places = self.out | (self.out_ld * size_of::<f32>()) as u64 | 16;
        Shape {
            operands: self.operands,
            m,
            n: self.n,
            k: self.k,
            ld: self.ld,
            out_ld: self.out_ld,
            alignment: 1 << places.trailing_zeros(),
            bias: self.bias.is_some(),
        }
    }

    fn error(&self, error: CublasError) -> KernelError {
        let Self {
            operands, m, n, k, ..
        } = self;
        device_error(
            OP,
            format!(
                "cublasLtMatmul of {operands:?} [{m}, {k}] and [{n}, {k}]: {:?}",
                error.0
            ),
        )
    }
}

/// A handle of cublasLt, its workspace, and the algorithms it has chosen.
pub(crate) struct Blas {
    handle: Handle,
    workspace: Region,
    algorithms: RefCell<HashMap<Shape, sys::cublasLtMatmulAlgo_t>>,
}

impl Blas {
    pub(crate) fn new(device: &Device) -> Result<Self> {
        let bytes = WORKSPACE_BYTES[usize::from(device.generation >= HOPPER)];
        let workspace = Arena::growing("the workspace of cublasLt", bytes).alloc(device, bytes)?;
        Ok(Self {
            handle: Handle::new().map_err(|e| device_error(OP, format!("cublasLtCreate: {:?}", e.0)))?,
            workspace,
            algorithms: RefCell::default(),
        })
    }

    /// Queues the product.
    ///
    /// # Safety
    /// The addresses must be of device memory that holds what [`Product`] says, and stay so until the stream has done
    /// this work.
    pub(crate) unsafe fn product(&self, device: &Device, product: &Product) -> Result<()> {
        let bucket = product.shape(product.m.next_power_of_two().max(MIN_ROWS));
        let algorithm = self
            .algorithm(bucket, product.bias)
            .map_err(|e| product.error(e))?;
        // SAFETY: the caller's promise.
        let done = unsafe { self.run(device, product, &algorithm) };
        if done.is_ok() || bucket.m == product.m {
            return done.map_err(|e| product.error(e));
        }
        // Not every algorithm takes fewer rows than it was chosen for.
        let exact = self
            .algorithm(product.shape(product.m), product.bias)
            .map_err(|e| product.error(e))?;
        // SAFETY: the caller's promise.
        unsafe { self.run(device, product, &exact) }.map_err(|e| product.error(e))
    }

    /// `bias` is any that such a product has: cublasLt wants to see one, but does not choose by its address.
    fn algorithm(&self, shape: Shape, bias: Option<u64>) -> Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        if let Some(algorithm) = self.algorithms.borrow().get(&shape) {
            return Ok(*algorithm);
        }
        let call = Call::new(&shape, bias)?;
        let preference = Preference::new(self.workspace.bytes(), shape.alignment)?;
        // SAFETY: all descriptors are alive.
        let found = unsafe {
            lt::get_matmul_algo_heuristic(
                self.handle.0,
                call.operation.0,
                call.weight.0,
                call.x.0,
                call.out.0,
                call.out.0,
                preference.0,
            )
        }?;
        self.algorithms.borrow_mut().insert(shape, found.algo);
        Ok(found.algo)
    }

    /// # Safety
    /// As [`Blas::product`].
    unsafe fn run(
        &self,
        device: &Device,
        product: &Product,
        algorithm: &sys::cublasLtMatmulAlgo_t,
    ) -> Result<(), CublasError> {
        let call = Call::new(&product.shape(product.m), product.bias)?;
        let (one, zero) = (1f32, 0f32);
        let address = |pointer: u64| pointer as *mut c_void;
        // SAFETY: scalars are read during the call; the memory is the caller's promise.
        unsafe {
            lt::matmul(
                self.handle.0,
                call.operation.0,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                address(product.weight),
                call.weight.0,
                address(product.x),
                call.x.0,
                address(product.out),
                call.out.0,
                address(product.out),
                call.out.0,
                algorithm,
                address(self.workspace.ptr()),
                self.workspace.bytes(),
                device.stream.cu_stream().cast(),
            )
        }
    }
}

/// A row-major product as cublasLt sees it: column-major, so that `outᵀ[n, m] = weight[k, n]ᵀ · x[k, m]`.
struct Call {
    operation: Operation,
    weight: Layout,
    x: Layout,
    out: Layout,
}

impl Call {
    fn new(shape: &Shape, bias: Option<u64>) -> Result<Self, CublasError> {
        use sys::cudaDataType::{CUDA_R_8F_E4M3, CUDA_R_16BF, CUDA_R_32F};
        let Shape {
            m, n, k, ld, out_ld, ..
        } = *shape;
        let operand = match shape.operands {
            Operands::Bf16 => CUDA_R_16BF,
            Operands::E4m3 => CUDA_R_8F_E4M3,
        };
        Ok(Self {
            operation: Operation::new(bias)?,
            weight: Layout::new(operand, [k, n], ld)?,
            x: Layout::new(operand, [k, m], ld)?,
            out: Layout::new(CUDA_R_32F, [n, m], out_ld)?,
        })
    }
}

struct Handle(sys::cublasLtHandle_t);

impl Handle {
    fn new() -> Result<Self, CublasError> {
        lt::create_handle().map(Self)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once.
        let _ = unsafe { lt::destroy_handle(self.0) };
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(data_type: sys::cudaDataType, [rows, cols]: [usize; 2], ld: usize) -> Result<Self, CublasError> {
        lt::create_matrix_layout(data_type, rows as u64, cols as u64, ld as i64).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once.
        let _ = unsafe { lt::destroy_matrix_layout(self.0) };
    }
}

struct Operation(sys::cublasLtMatmulDesc_t);

impl Operation {
    /// The first operand is transposed; a bias of one value per output is added, if there is one.
    fn new(bias: Option<u64>) -> Result<Self, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let operation = lt::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType::CUDA_R_32F,
        )
        .map(Self)?;
        operation.set(
            Attribute::CUBLASLT_MATMUL_DESC_TRANSA,
            &cudarc::cublas::sys::cublasOperation_t::CUBLAS_OP_T,
        )?;
        if let Some(address) = bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            operation.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            operation.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &address)?;
        }
        Ok(operation)
    }

    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), CublasError> {
        // SAFETY: the descriptor is alive, and the value is read during the call.
        unsafe {
            lt::set_matmul_desc_attribute(
                self.0,
                attribute,
                std::ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once.
        let _ = unsafe { lt::destroy_matmul_desc(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    /// cublasLt takes addresses to be multiples of 256 bytes unless it is told otherwise. The operands' are multiples
    /// of 16 by how weights and activations are laid out.
    fn new(workspace_bytes: usize, out_alignment: u32) -> Result<Self, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = lt::create_matmul_pref().map(Self)?;
        preference.set(
            Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            &workspace_bytes,
        )?;
        for (attribute, bytes) in [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, 16),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, 16),
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                out_alignment,
            ),
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                out_alignment,
            ),
        ] {
            preference.set(attribute, &bytes)?;
        }
        Ok(preference)
    }

    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Result<(), CublasError> {
        // SAFETY: the preference is alive, and the value is read during the call.
        unsafe {
            lt::set_matmul_pref_attribute(
                self.0,
                attribute,
                std::ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once.
        let _ = unsafe { lt::destroy_matmul_pref(self.0) };
    }
}
