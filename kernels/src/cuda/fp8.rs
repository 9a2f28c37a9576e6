//! Weights in E4M3 with one scale per output, and products with them: `kernels/cuda/fp8.cu`. The activations are brought
//! to E4M3 row by row, each with the scale of its largest magnitude. cublasLt multiplies the codes; their scales are
//! applied to its sums.

use std::ops::Range;

use super::backend::CudaBackend;
use super::blas::{Operands, Product};
use super::buffer::{CudaBuffer, CudaVector};
use super::device::Device;
use super::launch::{
    Arg::{Pointer, U32},
    Grid,
};
use super::memory::Region;
use super::shape::u32_of;
use crate::error::check;
use crate::{Columns, KernelError, Result, WeightSource};

/// Rows and columns that cublasLt multiplies are multiples of so many codes (cuBLAS documentation, "FP8 data types").
const ALIGNMENT: usize = 16;
/// The first compute capability whose tensor cores multiply E4M3.
const CAPABILITY: (i32, i32) = (8, 9);
const F32_BYTES: usize = size_of::<f32>();

/// Whether the device multiplies E4M3 itself.
pub(crate) fn is_native(device: &Device) -> bool {
    device.capability >= CAPABILITY
}

fn padded(len: usize) -> usize {
    len.next_multiple_of(ALIGNMENT)
}

/// Bytes of a `[rows, cols]` matrix of E4M3 and its scales in device memory.
fn bytes(rows: usize, cols: usize) -> Option<[usize; 2]> {
    let rows = rows.checked_next_multiple_of(ALIGNMENT)?;
    let codes = rows.checked_mul(cols.checked_next_multiple_of(ALIGNMENT)?)?;
    Some([codes, rows.checked_mul(F32_BYTES)?])
}

/// A matrix `[rows = outputs, cols = inputs]` of codes in device memory; rows and columns are padded with zeros.
pub(crate) struct Fp8Weight {
    codes: Region,
    /// One f32 per row.
    scales: Region,
    rows: usize,
    cols: usize,
}

impl Fp8Weight {
    /// Uploads the rows of `parts`, whose sizes were checked, a bounded number of bytes at a time.
    pub(crate) fn load(backend: &CudaBackend, parts: &[WeightSource<'_>]) -> Result<Self> {
        let cols = parts.first().map_or(0, |part| part.cols);
        let rows = parts.iter().map(|part| part.rows).sum();
        let [code_bytes, scale_bytes] = bytes(rows, cols).ok_or(KernelError::OutOfMemory {
            what: "weights",
            requested: usize::MAX,
            free: 0,
        })?;
        let device = &backend.device;
        let weight = Self {
            codes: backend.weights.alloc(device, code_bytes)?,
            scales: backend.weights.alloc(device, scale_bytes)?,
            rows,
            cols,
        };
        weight.codes.zero(device)?;
        weight.scales.zero(device)?;
        let mut first = 0;
        for part in parts {
            weight.upload(backend, part, first)?;
            first += part.rows;
        }
        Ok(weight)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.codes.bytes() + self.scales.bytes()
    }

    fn upload(&self, backend: &CudaBackend, part: &WeightSource<'_>, first: usize) -> Result<()> {
        let (device, ld) = (&backend.device, padded(self.cols));
        each_chunk(backend, part, ld.max(F32_BYTES), |rows| {
            let range = |row_bytes| ((first + rows.start) * row_bytes, rows.len() * row_bytes);
            let staging = &backend.staging;
            staging.upload_with(device, (&self.codes, range(ld)), |slot| {
                fill_codes(part, rows.clone(), ld, slot);
            })?;
            staging.upload_with(device, (&self.scales, range(F32_BYTES)), |slot| {
                fill_scales(part, rows.clone(), slot);
            })
        })
    }

    /// `out[:, columns] = x · selfᵀ (+ bias)`; the sizes were checked.
    pub(crate) fn product(
        &self,
        backend: &CudaBackend,
        out: Columns<'_, CudaBackend>,
        (x, rows): (&CudaBuffer, usize),
        bias: Option<&CudaVector>,
    ) -> Result<()> {
        const OP: &str = "linear";
        let (ld, n) = (padded(self.cols), padded(self.rows));
        // Codes, scales and sums of a row; more rows than the scratch memory holds are done in parts.
        let per_row = ld + F32_BYTES + n * F32_BYTES;
        let per_part = backend.scratch.bytes() / per_row / ALIGNMENT * ALIGNMENT;
        check(OP, per_part > 0, || {
            format!(
                "{ALIGNMENT} rows of {per_row} bytes; {} bytes of workspace",
                backend.scratch.bytes()
            )
        })?;
        for start in (0..rows).step_by(per_part) {
            let count = per_part.min(rows - start);
            let m = padded(count);
            let codes = backend.scratch.ptr();
            let sums = codes + (m * ld) as u64;
            let scales = sums + (m * n * F32_BYTES) as u64;
            let quantize = [
                Pointer(codes),
                U32(u32_of(OP, ld)?),
                Pointer(scales),
                Pointer(x.ptr() + (start * x.width() * F32_BYTES) as u64),
                U32(u32_of(OP, x.width())?),
                U32(u32_of(OP, self.cols)?),
                U32(u32_of(OP, count)?),
            ];
            let product = Product {
                operands: Operands::E4m3,
                m,
                n,
                k: ld,
                x: codes,
                weight: self.codes.ptr(),
                ld,
                out: sums,
                out_ld: n,
                bias: None,
            };
            let scale = [
                Pointer(out.buffer.column(out.start) + (start * out.buffer.width() * F32_BYTES) as u64),
                U32(u32_of(OP, out.buffer.width())?),
                Pointer(sums),
                U32(u32_of(OP, n)?),
                Pointer(scales),
                Pointer(self.scales.ptr()),
                Pointer(bias.map_or(0, |bias| bias.region.ptr())),
                U32(u32_of(OP, self.rows)?),
            ];
            // SAFETY: the parameters of the two kernels and of the product. The scratch memory has space for the codes,
            // the sums and the scales of `m` rows; `x` has the rows, `out` the rows and columns, which the caller has
            // checked.
            unsafe {
                backend.launch("quantize_rows_e4m3", Grid::rows(m, 256), &quantize)?;
                backend.blas.product(&backend.device, &product)?;
                let grid = Grid::new([count, self.rows.div_ceil(256), 1], 256);
                backend.launch("scale_product", grid, &scale)?;
            }
        }
        Ok(())
    }
}

/// Writes the rows of `part`, in bf16, from address `out` on, rows `ld` elements apart: for devices that do not multiply
/// E4M3.
pub(super) fn dequantize(backend: &CudaBackend, part: &WeightSource<'_>, out: u64, ld: usize) -> Result<()> {
    const OP: &str = "weight";
    const BF16_BYTES: usize = 2;
    let per_row = part.cols + F32_BYTES;
    each_chunk(backend, part, per_row, |rows| {
        let (codes, scales) = (rows.len() * part.cols, rows.len() * F32_BYTES);
        let (device, target, staging) = (&backend.device, &backend.scratch, &backend.staging);
        staging.upload_with(device, (target, (0, scales)), |slot| {
            fill_scales(part, rows.clone(), slot);
        })?;
        staging.upload_with(device, (target, (scales, codes)), |slot| {
            fill_codes(part, rows.clone(), part.cols, slot);
        })?;
        let args = [
            Pointer(out + (rows.start * ld * BF16_BYTES) as u64),
            U32(u32_of(OP, ld)?),
            Pointer(target.ptr() + scales as u64),
            Pointer(target.ptr()),
            U32(u32_of(OP, part.cols)?),
        ];
        // SAFETY: the parameters of `dequantize_rows_e4m3`; the scratch memory holds the scales and codes of these rows,
        // and the caller has as many rows from `out` on.
        unsafe { backend.launch("dequantize_rows_e4m3", Grid::rows(rows.len(), 256), &args) }
    })
}

/// Calls `done` for the rows of `part`, as many at a time as the staging buffers and the scratch memory hold.
fn each_chunk(
    backend: &CudaBackend,
    part: &WeightSource<'_>,
    row_bytes: usize,
    mut done: impl FnMut(Range<usize>) -> Result<()>,
) -> Result<()> {
    let most = backend.staging.slot_bytes().min(backend.scratch.bytes());
    let per_chunk = most / row_bytes.max(1);
    check("weight", per_chunk > 0, || {
        format!("rows of {row_bytes} bytes; at most {most} can be loaded")
    })?;
    (0..part.rows)
        .step_by(per_chunk)
        .try_for_each(|start| done(start..part.rows.min(start + per_chunk)))
}

/// Writes codes `[rows, row_bytes]`, padded with zeros.
fn fill_codes(part: &WeightSource<'_>, rows: Range<usize>, row_bytes: usize, slot: &mut [u8]) {
    for (row, to) in rows.zip(slot.chunks_exact_mut(row_bytes.max(1))) {
        let (codes, padding) = to.split_at_mut(part.cols);
        codes.copy_from_slice(&part.data[row * part.row_stride..][..part.cols]);
        padding.fill(0);
    }
}

fn fill_scales(part: &WeightSource<'_>, rows: Range<usize>, slot: &mut [u8]) {
    let scales = part.row_scales.unwrap_or_default();
    for (to, scale) in slot.as_chunks_mut().0.iter_mut().zip(&scales[rows]) {
        *to = scale.to_ne_bytes();
    }
}
