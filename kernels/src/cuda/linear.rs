//! The linear layer: the input is rounded to bf16 once; the product is cublasLt's with weights in bf16, and that of
//! `kernels/cuda/linear.cu` with weights that stay quantized.
//!
//! Which of its two kernels runs makes no difference to the bits, and both sum a row the same whatever other rows there
//! are. From [`UNPACK_FROM`] rows on, quantized weights are decoded to bf16 first and multiplied by cublasLt.

use phalanx_model::TensorFormat;

use super::backend::CudaBackend;
use super::blas::{Operands, Product};
use super::buffer::CudaBuffer;
use super::launch::{
    Arg::{self, Pointer, U32},
    Grid, Kernels,
};
use super::shape::u32_of;
use super::weight::{BF16_BYTES, CudaWeight, Segment, Storage, padded};
use crate::error::check;
use crate::{Columns, Linear, Result};

const OP: &str = "linear";

/// More rows than a step has by default, so that with default settings every row is always summed the same.
///
/// An estimate for an H100, not measured: decoding costs about 4.6 bytes of traffic per weight, 1.4 ps at 3.35 TB/s, once
/// per step. Then a row and weight take 2.9 fs at 70 % of the tensor cores' rate; without `wgmma` our kernel may take
/// 8 fs. Both are as fast near 270 rows, and at 512 rows our kernel takes about 1.4 times as long.
const UNPACK_FROM: usize = 513;
/// Up to here the kernel with four times as many warps per weight is better: weights are what has to be read.
const FEW_ROWS: usize = 32;
/// Outputs that are decoded together are a multiple of this, which keeps the products' addresses aligned.
const UNPACKED_OUTPUTS: usize = 64;
const THREADS: u32 = 128;

/// `struct Linear` of the kernels' file.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinearInput {
    x: u64,
    codes: u64,
    scales: u64,
    /// 0: none.
    bias: u64,
    x_stride: u32,
    rows: u32,
    inputs: u32,
    outputs: u32,
}

/// Rows of the input in the scratch memory, and where their outputs go.
struct Rows {
    count: usize,
    cols: usize,
    /// The first output of the first row, f32, and elements from row to row.
    out: u64,
    out_ld: usize,
    /// Of the first output; 0: none.
    bias: u64,
}

pub(crate) fn linear(
    backend: &CudaBackend,
    out: Columns<'_, CudaBackend>,
    x: &CudaBuffer,
    layer: &Linear<'_, CudaBackend>,
    rows: usize,
) -> Result<()> {
    let Linear { weight, bias } = *layer;
    x.check(OP, rows, weight.cols())?;
    out.buffer
        .check(OP, rows, out.start.saturating_add(weight.rows()))?;
    check(OP, bias.is_none_or(|bias| bias.len == weight.rows()), || {
        format!("a bias of another length than {}", weight.rows())
    })?;
    if weight.rows() == 0 {
        return Ok(());
    }
    if let Some(weight) = weight.fp8() {
        return weight.product(backend, out, (x, rows), bias);
    }
    let per_part = rows_per_part(backend, weight)?;
    for start in (0..rows).step_by(per_part) {
        let count = per_part.min(rows - start);
        let args = [
            Pointer(backend.scratch.ptr()),
            U32(u32_of(OP, padded(weight.cols()))?),
            Pointer(x.ptr() + (start * x.width() * size_of::<f32>()) as u64),
            U32(u32_of(OP, x.width())?),
            U32(u32_of(OP, weight.cols())?),
        ];
        // SAFETY: the parameters of `convert_f32_to_bf16`; `x` has the rows, and the scratch memory space for `count`.
        unsafe { backend.launch("convert_f32_to_bf16", Grid::rows(count, 256), &args)? };
        let mut part = Rows {
            count,
            cols: weight.cols(),
            out: out.buffer.column(out.start) + (start * out.buffer.width() * size_of::<f32>()) as u64,
            out_ld: out.buffer.width(),
            bias: bias.map_or(0, |bias| bias.region.ptr()),
        };
        for segment in weight.segments() {
            // SAFETY: the columns of all segments lie within the rows of `out`, and the bias is as long.
            unsafe { multiply(backend, segment, &part)? };
            part = part.after(segment.rows());
        }
    }
    Ok(())
}

/// The scratch memory is all there is: more rows than its half holds are done in parts. The other half is for weights.
fn rows_per_part(backend: &CudaBackend, weight: &CudaWeight) -> Result<usize> {
    let row_bytes = padded(weight.cols()) * BF16_BYTES;
    let most = backend.scratch.bytes() / 2;
    check(OP, most / row_bytes.max(1) >= UNPACKED_OUTPUTS, || {
        format!(
            "rows of {} values; {} bytes of workspace",
            weight.cols(),
            backend.scratch.bytes()
        )
    })?;
    Ok(most / row_bytes.max(1))
}

impl Rows {
    /// The same rows, `outputs` columns further.
    fn after(&self, outputs: usize) -> Self {
        let bytes = (outputs * size_of::<f32>()) as u64;
        Self {
            out: self.out + bytes,
            bias: if self.bias == 0 { 0 } else { self.bias + bytes },
            ..*self
        }
    }

    /// With `n` outputs of bf16 `weight`.
    fn product(&self, x: u64, weight: u64, n: usize) -> Product {
        Product {
            operands: Operands::Bf16,
            m: self.count,
            n,
            k: self.cols,
            x,
            weight,
            ld: padded(self.cols),
            out: self.out,
            out_ld: self.out_ld,
            bias: (self.bias != 0).then_some(self.bias),
        }
    }
}

/// # Safety
/// The addresses in `rows` are of as many columns and values as the segment has outputs.
unsafe fn multiply(backend: &CudaBackend, segment: &Segment, rows: &Rows) -> Result<()> {
    match segment.storage() {
        Storage::Bf16(_) => {
            let product = rows.product(backend.scratch.ptr(), segment.row(0), segment.rows());
            // SAFETY: both operands are as large as `product` says; the rest is the caller's promise.
            unsafe { backend.blas.product(&backend.device, &product) }
        }
        // SAFETY: the caller's promise.
        Storage::Packed { kernels, .. } if rows.count < UNPACK_FROM => unsafe {
            multiply_packed(backend, (segment, kernels), rows)
        },
        // SAFETY: the caller's promise.
        Storage::Packed { format, .. } => unsafe { multiply_unpacked(backend, (segment, *format), rows) },
        Storage::Fp8(_) => check(OP, false, || "E4M3 beside other formats".to_owned()),
    }
}

/// # Safety
/// As [`multiply`].
unsafe fn multiply_packed(
    backend: &CudaBackend,
    (segment, kernels): (&Segment, &Kernels),
    rows: &Rows,
) -> Result<()> {
    let input = LinearInput {
        x: backend.scratch.ptr(),
        codes: segment.row(0),
        scales: segment.scales(0),
        bias: rows.bias,
        x_stride: u32_of(OP, padded(rows.cols))?,
        rows: u32_of(OP, rows.count)?,
        inputs: u32_of(OP, rows.cols)?,
        outputs: u32_of(OP, segment.rows())?,
    };
    let (name, [tile_rows, tile_outputs]) = match rows.count {
        0..=FEW_ROWS => ("linear_few_rows", [16, 32]),
        _ => ("linear_many_rows", [64, 64]),
    };
    let blocks = [
        segment.rows().div_ceil(tile_outputs),
        rows.count.div_ceil(tile_rows),
        1,
    ];
    let args = [
        Pointer(rows.out),
        U32(u32_of(OP, rows.out_ld)?),
        Arg::Linear(&input),
    ];
    // SAFETY: the parameters of either kernel; the scratch memory holds the rows of the input, the segment its codes and
    // scales; the rest is the caller's promise.
    unsafe { kernels.launch(&backend.device, name, Grid::new(blocks, THREADS), &args) }
}

/// As many outputs at a time as the second half of the scratch memory holds decoded.
///
/// # Safety
/// As [`multiply`].
unsafe fn multiply_unpacked(
    backend: &CudaBackend,
    (segment, format): (&Segment, TensorFormat),
    rows: &Rows,
) -> Result<()> {
    let half = backend.scratch.bytes() / 2;
    let weights = backend.scratch.ptr() + half.next_multiple_of(256) as u64;
    let most = (backend.scratch.bytes() - half.next_multiple_of(256)) / (rows.cols * BF16_BYTES);
    let per_part = (most / UNPACKED_OUTPUTS * UNPACKED_OUTPUTS).max(1);
    for first in (0..segment.rows()).step_by(per_part) {
        let count = per_part.min(segment.rows() - first);
        let args = [
            Pointer(weights),
            Pointer(segment.row(first)),
            Pointer(segment.scales(first)),
            U32(format.gguf_type()),
            U32(u32_of(OP, rows.cols)?),
        ];
        // SAFETY: the parameters of `unpack_rows`; the second half of the scratch memory has space for `count` rows.
        unsafe { backend.launch("unpack_rows", Grid::rows(count, 256), &args)? };
        let product = rows.after(first).product(backend.scratch.ptr(), weights, count);
        // SAFETY: the first half of the scratch memory holds the input; the rest is the caller's promise.
        unsafe { backend.blas.product(&backend.device, &product)? };
    }
    Ok(())
}
