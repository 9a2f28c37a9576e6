//! Weight matrices in device memory: quantized as in the file where the kernels or cublasLt multiply with it, else bf16.

use std::sync::Arc;

use phalanx_model::TensorFormat;
use phalanx_model::format::BF16_ROW_ALIGN;

use super::backend::CudaBackend;
use super::compile::Variant;
use super::fp8::{self, Fp8Weight};
use super::launch::{
    Arg::{Pointer, U32, U64},
    Grid, Kernels,
};
use super::memory::Region;
use super::shape::u32_of;
use crate::error::check;
use crate::{KernelError, Result, WeightSource};

const OP: &str = "weight";
pub(crate) const BF16_BYTES: usize = 2;
/// Of a block of the packed layout.
const BLOCK_LEN: usize = 32;

/// A matrix `[rows = outputs, cols = inputs]` in device memory.
pub struct CudaWeight {
    /// In the order of their outputs.
    segments: Vec<Segment>,
    rows: usize,
    cols: usize,
}

/// Outputs that follow each other and are stored alike.
pub(crate) struct Segment {
    storage: Storage,
    rows: usize,
    cols: usize,
}

/// How a segment lies in its memory.
pub(crate) enum Storage {
    /// Rows of bf16, [`padded`].
    Bf16(Region),
    /// E4M3, on devices that multiply it.
    Fp8(Fp8Weight),
    /// The packed layout of `kernels/cuda/quant.cuh`: all codes, then all scales.
    Packed {
        region: Region,
        format: TensorFormat,
        /// Specialized for the format.
        kernels: Arc<Kernels>,
    },
}

/// Elements from one row of bf16 to the next.
pub(crate) fn padded(cols: usize) -> usize {
    cols.next_multiple_of(BF16_ROW_ALIGN)
}

impl CudaWeight {
    /// Brings the rows of `parts` to the device, a bounded number of bytes at a time. Parts of different formats may be
    /// stacked.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the parts differ in width or are shorter than they say, [`KernelError::OutOfMemory`],
    /// [`KernelError::Device`] if a format's kernels cannot be compiled.
    pub(crate) fn load(backend: &CudaBackend, parts: &[WeightSource<'_>]) -> Result<Self> {
        let cols = parts.first().map_or(0, |part| part.cols);
        for part in parts {
            check_source(part, cols)?;
        }
        if is_fp8(parts) && fp8::is_native(&backend.device) {
            let weight = Fp8Weight::load(backend, parts)?;
            let rows = parts.iter().map(|part| part.rows).sum();
            let storage = Storage::Fp8(weight);
            return Ok(Self {
                segments: vec![Segment { storage, rows, cols }],
                rows,
                cols,
            });
        }
        let filled: Vec<WeightSource<'_>> = parts.iter().filter(|part| part.rows > 0).copied().collect();
        let alike = filled.chunk_by(|a, b| stored_as(a.format) == stored_as(b.format));
        let segments = alike
            .map(|parts| Segment::load(backend, parts))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            rows: segments.iter().map(|segment| segment.rows).sum(),
            segments,
            cols,
        })
    }

    /// Outputs.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The whole of it, if it is of E4M3.
    pub(crate) fn fp8(&self) -> Option<&Fp8Weight> {
        match &self.segments[..] {
            [
                Segment {
                    storage: Storage::Fp8(weight),
                    ..
                },
            ] => Some(weight),
            _ => None,
        }
    }

    /// Bytes of its memory: the sum of [`TensorFormat::gpu_bytes`] over the parts, or what E4M3 takes.
    pub(crate) fn bytes(&self) -> usize {
        let bytes = |segment: &Segment| match &segment.storage {
            Storage::Bf16(region) | Storage::Packed { region, .. } => region.bytes(),
            Storage::Fp8(weight) => weight.bytes(),
        };
        self.segments.iter().map(bytes).sum()
    }
}

/// Parts of E4M3 beside others become bf16.
fn is_fp8(parts: &[WeightSource<'_>]) -> bool {
    !parts.is_empty() && parts.iter().all(|part| part.format == TensorFormat::F8_E4M3)
}

/// What a format of a file becomes.
fn stored_as(format: TensorFormat) -> TensorFormat {
    if format.stays_quantized_on_gpus() {
        format
    } else {
        TensorFormat::BF16
    }
}

impl Segment {
    /// `parts` are not empty, and stored alike.
    fn load(backend: &CudaBackend, parts: &[WeightSource<'_>]) -> Result<Self> {
        let (format, cols) = (stored_as(parts[0].format), parts[0].cols);
        let rows = parts
            .iter()
            .try_fold(0usize, |rows, part| rows.checked_add(part.rows));
        let bytes = rows.and_then(|rows| format.gpu_bytes(rows, cols));
        let (Some(rows), Some(bytes)) = (rows, bytes) else {
            return Err(KernelError::OutOfMemory {
                what: "weights",
                requested: usize::MAX,
                free: 0,
            });
        };
        let region = backend.weights.alloc(&backend.device, bytes)?;
        let storage = match format {
            TensorFormat::BF16 => Storage::Bf16(region),
            format => Storage::Packed {
                region,
                format,
                kernels: backend.linear_kernels(format)?,
            },
        };
        let segment = Self { storage, rows, cols };
        let mut first = 0;
        for part in parts {
            segment.upload(backend, part, first)?;
            first += part.rows;
        }
        Ok(segment)
    }

    pub(crate) fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Outputs.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The address of row `row` of bf16, or of its codes; 0 for E4M3, which is read as a whole.
    pub(crate) fn row(&self, row: usize) -> u64 {
        let (region, row_bytes) = match &self.storage {
            Storage::Bf16(region) => (region, padded(self.cols) * BF16_BYTES),
            Storage::Packed { region, format, .. } => (region, self.blocks() * code_bytes(*format)),
            Storage::Fp8(_) => return 0,
        };
        region.ptr() + (row * row_bytes) as u64
    }

    /// The address of the scales of row `row` of the packed layout; 0 for others.
    pub(crate) fn scales(&self, row: usize) -> u64 {
        match &self.storage {
            Storage::Bf16(_) | Storage::Fp8(_) => 0,
            Storage::Packed { format, .. } => {
                let scale_bytes = format.block_bytes() - code_bytes(*format);
                self.row(self.rows) + (row * self.blocks() * scale_bytes) as u64
            }
        }
    }

    /// Blocks of a row of the packed layout.
    fn blocks(&self) -> usize {
        self.cols / BLOCK_LEN
    }

    /// Writes the rows of `part` from row `first` on.
    fn upload(&self, backend: &CudaBackend, part: &WeightSource<'_>, first: usize) -> Result<()> {
        if part.format == TensorFormat::F8_E4M3 {
            return fp8::dequantize(backend, part, self.row(first), padded(self.cols));
        }
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
            self.convert(backend, part, first + start..first + start + count)?;
        }
        Ok(())
    }

    /// Writes `rows` from the scratch memory, where they lie as in the file.
    fn convert(
        &self,
        backend: &CudaBackend,
        part: &WeightSource<'_>,
        rows: std::ops::Range<usize>,
    ) -> Result<()> {
        let grid = Grid::rows(rows.len(), 256);
        let source = [
            Pointer(backend.scratch.ptr()),
            U64(row_bytes(part)? as u64),
            U32(part.format.gguf_type()),
            U32(u32_of(OP, self.cols)?),
        ];
        let (name, target) = match &self.storage {
            Storage::Packed { .. } => ("pack_rows", Pointer(self.scales(rows.start))),
            _ => ("dequantize_rows", U32(u32_of(OP, padded(self.cols))?)),
        };
        let args = [&[Pointer(self.row(rows.start)), target], &source[..]].concat();
        // SAFETY: the parameters of either kernel; the scratch memory holds these rows of the file, and the segment has
        // as many from the first address, and their scales from the second, on.
        unsafe { backend.launch(name, grid, &args) }
    }
}

/// Of a block of the packed layout.
fn code_bytes(format: TensorFormat) -> usize {
    if format == TensorFormat::Q8_0 { 32 } else { 16 }
}

impl CudaBackend {
    /// The kernels that multiply with weights of `format`: compiled and loaded once for all matrices.
    fn linear_kernels(&self, format: TensorFormat) -> Result<Arc<Kernels>> {
        if let Some(kernels) = self.linear_kernels.borrow().get(&format) {
            return Ok(Arc::clone(kernels));
        }
        let kernels = Arc::new(self.load_kernels(Variant::of_weight(format))?);
        self.linear_kernels
            .borrow_mut()
            .insert(format, Arc::clone(&kernels));
        Ok(kernels)
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
