//! The linear layer: the input is rounded to bf16 once, the product is cublasLt's.

use super::backend::CudaBackend;
use super::blas::{Operands, Product};
use super::buffer::CudaBuffer;
use super::launch::{
    Arg::{Pointer, U32},
    Grid,
};
use super::shape::u32_of;
use super::weight::BF16_BYTES;
use crate::error::check;
use crate::{Columns, Linear, Result};

const OP: &str = "linear";

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
    // The scratch memory is all there is: more rows than it holds are done in parts.
    let per_part = backend.scratch.bytes() / (weight.ld() * BF16_BYTES).max(1);
    check(OP, per_part > 0, || {
        format!(
            "rows of {} values; {} bytes of workspace",
            weight.cols(),
            backend.scratch.bytes()
        )
    })?;
    for start in (0..rows).step_by(per_part) {
        let count = per_part.min(rows - start);
        let args = [
            Pointer(backend.scratch.ptr()),
            U32(u32_of(OP, weight.ld())?),
            Pointer(x.ptr() + (start * x.width() * size_of::<f32>()) as u64),
            U32(u32_of(OP, x.width())?),
            U32(u32_of(OP, weight.cols())?),
        ];
        // SAFETY: the parameters of `convert_f32_to_bf16`; `x` has the rows, and the scratch memory space for `count`.
        unsafe { backend.launch("convert_f32_to_bf16", Grid::rows(count, 256), &args)? };
        let product = Product {
            operands: Operands::Bf16,
            m: count,
            n: weight.rows(),
            k: weight.cols(),
            x: backend.scratch.ptr(),
            weight: weight.bf16(OP)?,
            ld: weight.ld(),
            out: out.buffer.column(out.start) + (start * out.buffer.width() * size_of::<f32>()) as u64,
            out_ld: out.buffer.width(),
            bias: bias.map(|bias| bias.region.ptr()),
        };
        // SAFETY: both operands are as large as `product` says, and the columns lie within the rows of `out`.
        unsafe { backend.blas.product(&backend.device, &product)? };
    }
    Ok(())
}
