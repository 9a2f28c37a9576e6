//! Weight matrices: bf16 in device memory, whatever their format in the file.

use super::backend::CudaBackend;
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
    region: Region,
    rows: usize,
    cols: usize,
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
        let weight = Self {
            region: backend.weights.alloc(&backend.device, bytes)?,
            rows,
            cols,
        };
        let mut first = 0;
        for part in parts {
            weight.convert(backend, part, first)?;
            first += part.rows;
        }
        Ok(weight)
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

    pub(crate) fn ptr(&self) -> u64 {
        self.region.ptr()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.region.bytes()
    }

    /// Writes the rows of `part` from row `first` on.
    fn convert(&self, backend: &CudaBackend, part: &WeightSource<'_>, first: usize) -> Result<()> {
        let row_bytes = row_bytes(part)?;
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
            let out = self.ptr() + ((first + start) * self.ld() * BF16_BYTES) as u64;
            let args = [
                Pointer(out),
                U32(u32_of(OP, self.ld())?),
                Pointer(backend.scratch.ptr()),
                U64(row_bytes as u64),
                U32(part.format.gguf_type()),
                U32(u32_of(OP, self.cols)?),
            ];
            // SAFETY: the parameters of `dequantize_rows`; the scratch memory holds `count` rows of the file, and the
            // matrix has as many from `out` on.
            unsafe { backend.launch("dequantize_rows", Grid::rows(count, 256), &args)? };
        }
        Ok(())
    }
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
