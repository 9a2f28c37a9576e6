//! Weight matrices: bf16 in device memory, whatever their format in the file, but for E4M3 on devices that multiply it.

use phalanx_model::TensorFormat;

use super::backend::CudaBackend;
use super::fp8::{self, Fp8Weight};
use super::launch::{
    Arg::{Pointer, U32, U64},
    Grid,
};
use super::memory::Region;
use super::shape::u32_of;
use crate::error::check;
use crate::{KernelError, Result, WeightSource};

const OP: &str = "weight";
/// Rows start at multiples of so many elements: 16 bytes, as cublasLt's fast kernels want it.
const ROW_ALIGNMENT: usize = 8;
pub(crate) const BF16_BYTES: usize = 2;

/// A matrix `[rows = outputs, cols = inputs]` in device memory.
pub struct CudaWeight {
    storage: Storage,
    rows: usize,
    cols: usize,
}

enum Storage {
    Bf16(Region),
    Fp8(Fp8Weight),
}

/// Elements from one row of bf16 to the next.
pub(crate) fn padded(cols: usize) -> usize {
    cols.next_multiple_of(ROW_ALIGNMENT)
}

impl CudaWeight {
    /// Converts the rows of `parts` on the device, a bounded number of bytes at a time.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the parts differ in width or are shorter than they say, [`KernelError::OutOfMemory`].
    pub(crate) fn load(backend: &CudaBackend, parts: &[WeightSource<'_>]) -> Result<Self> {
        let cols = parts.first().map_or(0, |part| part.cols);
        let mut rows = 0usize;
        for part in parts {
            check_source(part, cols)?;
            rows = rows.saturating_add(part.rows);
        }
        let bytes = rows
            .checked_mul(padded(cols))
            .and_then(|n| n.checked_mul(BF16_BYTES))
            .ok_or(KernelError::OutOfMemory {
                what: "weights",
                requested: usize::MAX,
                free: 0,
            })?;
        if is_fp8(parts) && fp8::is_native(&backend.device) {
            let storage = Storage::Fp8(Fp8Weight::load(backend, parts)?);
            return Ok(Self { storage, rows, cols });
        }
        let region = backend.weights.alloc(&backend.device, bytes)?;
        let mut first = 0;
        for part in parts {
            let out = region.ptr() + (first * padded(cols) * BF16_BYTES) as u64;
            match part.format {
                TensorFormat::F8_E4M3 => fp8::dequantize(backend, part, out, padded(cols))?,
                _ => convert(backend, part, out)?,
            }
            first += part.rows;
        }
        let storage = Storage::Bf16(region);
        Ok(Self { storage, rows, cols })
    }

    /// Outputs.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Elements from one row to the next.
    pub(crate) fn ld(&self) -> usize {
        padded(self.cols)
    }

    /// The matrix of bf16.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if it is of E4M3, which only [`linear`](super::linear) reads.
    pub(crate) fn bf16(&self, op: &'static str) -> Result<u64> {
        match &self.storage {
            Storage::Bf16(region) => Ok(region.ptr()),
            Storage::Fp8(_) => Err(KernelError::Shape {
                op,
                message: "a matrix of E4M3".to_owned(),
            }),
        }
    }

    pub(crate) fn fp8(&self) -> Option<&Fp8Weight> {
        match &self.storage {
            Storage::Bf16(_) => None,
            Storage::Fp8(weight) => Some(weight),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match &self.storage {
            Storage::Bf16(region) => region.bytes(),
            Storage::Fp8(weight) => weight.bytes(),
        }
    }
}

/// Mixed parts become bf16.
fn is_fp8(parts: &[WeightSource<'_>]) -> bool {
    !parts.is_empty() && parts.iter().all(|part| part.format == TensorFormat::F8_E4M3)
}

/// Writes the rows of `part` from address `out` on, as bf16.
fn convert(backend: &CudaBackend, part: &WeightSource<'_>, out: u64) -> Result<()> {
    let (row_bytes, ld) = (row_bytes(part)?, padded(part.cols));
    let most = backend.staging.slot_bytes().min(backend.scratch.bytes());
    let per_chunk = most / row_bytes.max(1);
    check(OP, per_chunk > 0, || {
        format!("rows of {row_bytes} bytes; at most {most} can be loaded")
    })?;
    for start in (0..part.rows).step_by(per_chunk) {
        let count = per_chunk.min(part.rows - start);
        let range = (0, count * row_bytes);
        backend
            .staging
            .upload_with(&backend.device, (&backend.scratch, range), |slot| {
                for (row, bytes) in slot.chunks_exact_mut(row_bytes.max(1)).enumerate() {
                    let at = (start + row) * part.row_stride;
                    bytes.copy_from_slice(&part.data[at..at + row_bytes]);
                }
            })?;
        let args = [
            Pointer(out + (start * ld * BF16_BYTES) as u64),
            U32(u32_of(OP, ld)?),
            Pointer(backend.scratch.ptr()),
            U64(row_bytes as u64),
            U32(part.format.gguf_type()),
            U32(u32_of(OP, part.cols)?),
        ];
        // SAFETY: the parameters of `dequantize_rows`; the scratch memory holds `count` rows of the file, and the
        // caller has as many from `out` on.
        unsafe { backend.launch("dequantize_rows", Grid::rows(count, 256), &args)? };
    }
    Ok(())
}

fn row_bytes(part: &WeightSource<'_>) -> Result<usize> {
    part.format
        .row_bytes(part.cols)
        .ok_or_else(|| KernelError::Shape {
            op: OP,
            message: format!("{} columns cut a block of {}", part.cols, part.format),
        })
}

fn check_source(part: &WeightSource<'_>, cols: usize) -> Result<()> {
    check(OP, part.cols == cols, || {
        format!("{} columns beside {cols}", part.cols)
    })?;
    part.check_scales(OP)?;
    let row_bytes = row_bytes(part)?;
    let end = match part.rows {
        0 => Some(0),
        rows => (rows - 1)
            .checked_mul(part.row_stride)
            .and_then(|last| last.checked_add(row_bytes)),
    };
    check(
        OP,
        end.is_some_and(|end| end <= part.data.len()) && (part.rows < 2 || part.row_stride >= row_bytes),
        || {
            format!(
                "{} rows of {row_bytes} bytes, {} apart, in {} bytes",
                part.rows,
                part.row_stride,
                part.data.len()
            )
        },
    )
}
