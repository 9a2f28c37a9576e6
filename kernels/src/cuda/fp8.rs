//! Weights in E4M3 with one scale per output, and products with them: `kernels/cuda/fp8.cu`. The activations are brought
//! to E4M3 row by row, each with the scale of its largest magnitude. cublasLt multiplies the codes; their scales are
//! applied to its sums.

use std::ops::Range;

use phalanx_model::format::E4M3_ALIGN;

use super::backend::CudaBackend;
use super::blas::{Operands, Product};
use super::buffer::CudaBuffer;
use super::launch::{
    Arg::{Pointer, U32},
    Grid,
};
use super::linear::Rows;
use super::shape::u32_of;
use super::weight::{Segment, padded};
use crate::error::check;
use crate::{Result, WeightSource};

const F32_BYTES: usize = size_of::<f32>();
const THREADS: u32 = 256;

fn aligned(len: usize) -> usize {
    len.next_multiple_of(E4M3_ALIGN)
}

/// Writes the rows of `part` from row `first` of an E4M3 segment on, a bounded number of bytes at a time, and zeros into
/// what pads them.
pub(super) fn upload(
    backend: &CudaBackend,
    segment: &Segment,
    part: &WeightSource<'_>,
    first: usize,
) -> Result<()> {
    let (device, staging, region) = (&backend.device, &backend.staging, segment.region());
    let ld = aligned(part.cols);
    if first == 0 {
        region.zero(device)?;
    }
    let offset = |address: u64| (address - region.ptr()) as usize;
    each_chunk(backend, part, ld.max(F32_BYTES), |rows| {
        let start = first + rows.start;
        let codes = (offset(segment.row(start)), rows.len() * ld);
        staging.upload_with(device, (region, codes), |slot| {
            fill_codes(part, rows.clone(), ld, slot);
        })?;
        let scales = (offset(segment.scales(start)), rows.len() * F32_BYTES);
        staging.upload_with(device, (region, scales), |slot| {
            fill_scales(part, rows.clone(), slot)
        })
    })
}

/// Writes the rows of `part` from row `first` of a bf16 segment on: for devices that do not multiply E4M3.
pub(super) fn dequantize(
    backend: &CudaBackend,
    segment: &Segment,
    part: &WeightSource<'_>,
    first: usize,
) -> Result<()> {
    const OP: &str = "weight";
    let (device, staging, scratch) = (&backend.device, &backend.staging, &backend.scratch);
    each_chunk(backend, part, part.cols + F32_BYTES, |rows| {
        let (codes, scales) = (rows.len() * part.cols, rows.len() * F32_BYTES);
        staging.upload_with(device, (scratch, (0, scales)), |slot| {
            fill_scales(part, rows.clone(), slot);
        })?;
        staging.upload_with(device, (scratch, (scales, codes)), |slot| {
            fill_codes(part, rows.clone(), part.cols, slot);
        })?;
        let args = [
            Pointer(segment.row(first + rows.start)),
            U32(u32_of(OP, padded(part.cols))?),
            Pointer(scratch.ptr() + scales as u64),
            Pointer(scratch.ptr()),
            U32(u32_of(OP, part.cols)?),
        ];
        // SAFETY: the parameters of `dequantize_rows_e4m3`; the scratch memory holds the scales and codes of these rows,
        // and the segment has as many from the first address on.
        unsafe { backend.launch("dequantize_rows_e4m3", Grid::rows(rows.len(), THREADS), &args) }
    })
}

/// `out = x · segmentᵀ (+ bias)` for all rows.
///
/// # Safety
/// `x` has the rows, and the addresses in `rows` are of as many columns and values as the segment has outputs.
pub(super) unsafe fn multiply(
    backend: &CudaBackend,
    segment: &Segment,
    x: &CudaBuffer,
    rows: &Rows,
) -> Result<()> {
    const OP: &str = "linear";
    // Codes, scale and sums of a row; more rows than the scratch memory holds are done in parts.
    let per_row = aligned(rows.cols) + F32_BYTES + aligned(segment.rows()) * F32_BYTES;
    let per_part = backend.scratch.bytes() / per_row / E4M3_ALIGN * E4M3_ALIGN;
    check(OP, per_part > 0, || {
        format!(
            "{E4M3_ALIGN} rows of {per_row} bytes; {} bytes of workspace",
            backend.scratch.bytes()
        )
    })?;
    for start in (0..rows.count).step_by(per_part) {
        let input = x.ptr() + (start * x.width() * F32_BYTES) as u64;
        let part = Rows {
            count: per_part.min(rows.count - start),
            out: rows.out + (start * rows.out_ld * F32_BYTES) as u64,
            ..*rows
        };
        // SAFETY: the caller's promise; the scratch memory has space for the rows of a part.
        unsafe { multiply_part(backend, segment, (input, x.width()), &part)? };
    }
    Ok(())
}

/// # Safety
/// As [`multiply`], of rows that the scratch memory has space for; `x` is their first address and their stride.
unsafe fn multiply_part(
    backend: &CudaBackend,
    segment: &Segment,
    (x, x_stride): (u64, usize),
    rows: &Rows,
) -> Result<()> {
    const OP: &str = "linear";
    let (m, n, ld) = (aligned(rows.count), aligned(segment.rows()), aligned(rows.cols));
    let codes = backend.scratch.ptr();
    let sums = codes + (m * ld) as u64;
    let scales = sums + (m * n * F32_BYTES) as u64;
    let quantize = [
        Pointer(codes),
        U32(u32_of(OP, ld)?),
        Pointer(scales),
        Pointer(x),
        U32(u32_of(OP, x_stride)?),
        U32(u32_of(OP, rows.cols)?),
        U32(u32_of(OP, rows.count)?),
    ];
    let product = Product {
        operands: Operands::E4m3,
        m,
        n,
        k: ld,
        x: codes,
        weight: segment.row(0),
        ld,
        out: sums,
        out_ld: n,
        bias: None,
    };
    let scale = [
        Pointer(rows.out),
        U32(u32_of(OP, rows.out_ld)?),
        Pointer(sums),
        U32(u32_of(OP, n)?),
        Pointer(scales),
        Pointer(segment.scales(0)),
        Pointer(rows.bias),
        U32(u32_of(OP, segment.rows())?),
    ];
    let columns = segment.rows().div_ceil(THREADS as usize);
    // SAFETY: the parameters of the two kernels and of the product. The scratch memory has space for the codes, sums and
    // scales of `m` rows, the segment as many codes and scales as it is padded to; the rest is the caller's promise.
    unsafe {
        backend.launch("quantize_rows_e4m3", Grid::rows(m, THREADS), &quantize)?;
        backend.blas.product(&backend.device, &product)?;
        backend.launch(
            "scale_product",
            Grid::new([rows.count, columns, 1], THREADS),
            &scale,
        )
    }
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
