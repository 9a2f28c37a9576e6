//! Scalar definitions of the weight formats: what a block of bytes means. The packed kernels are tested against them.
//!
//! Every quantized format is a sequence of 32-element blocks of small unsigned codes, so one type, [`Block`], holds a
//! block of any of them and one formula decodes it:
//! `w[k] = scale[k / 16] * (code[k] - offset) + min`.
//! With f16 super-scales and 6-bit (Q6_K: 8-bit) block scales the products `scale` and `scale * code` are exact in f32
//! (Q6_K: the latter is rounded once), so the formula gives the bits of the reference implementation.
//! Block layouts: GGUF specification, ggml `ggml-common.h` and `ggml-quants.c`.

mod dense;
mod k_quants;
mod legacy;
mod quantize;

pub use quantize::quantize_row;

pub(crate) use dense::dequantize as dequantize_dense;
pub(crate) use k_quants::scale_and_min;
pub(crate) use legacy::min_of_zero_point;

use phalanx_model::TensorFormat;

use crate::{KernelError, Result};

/// Elements of a [`Block`], whatever the format's own block length.
pub(crate) const BLOCK: usize = 32;

/// 32 consecutive weights of one row, taken apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    /// Unsigned codes in rising K.
    pub(crate) codes: [u8; BLOCK],
    /// What is subtracted from a code.
    pub(crate) offset: i32,
    /// Scale of the first and of the second 16 weights.
    pub(crate) scale: [f32; 2],
    pub(crate) min: Option<f32>,
}

impl Block {
    /// Block `index` (of 32) of a row in the file's layout. `row` holds whole blocks of the format.
    pub(crate) fn of_row(format: TensorFormat, row: &[u8], index: usize) -> Self {
        let per = format.block_len() / BLOCK;
        let bytes = &row[index / per * format.block_bytes()..][..format.block_bytes()];
        match format {
            TensorFormat::Q4_0 => legacy::q4_0(bytes),
            TensorFormat::Q4_1 => legacy::q4_1(bytes),
            TensorFormat::Int4 => legacy::int4(bytes),
            TensorFormat::Q5_0 => legacy::q5_0(bytes),
            TensorFormat::Q5_1 => legacy::q5_1(bytes),
            TensorFormat::Q8_0 => legacy::q8_0(bytes),
            TensorFormat::Q4_K => k_quants::q4_k(bytes, index % per),
            TensorFormat::Q5_K => k_quants::q5_k(bytes, index % per),
            TensorFormat::Q6_K => k_quants::q6_k(bytes, index % per),
            TensorFormat::F32 | TensorFormat::F16 | TensorFormat::BF16 | TensorFormat::F8_E4M3 => {
                unreachable!("dense formats have no blocks")
            }
        }
    }

    pub(crate) fn dequantize(&self, out: &mut [f32]) {
        for (k, (out, &code)) in out.iter_mut().zip(&self.codes).enumerate() {
            let weight = self.scale[k / 16] * (i32::from(code) - self.offset) as f32;
            *out = self.min.map_or(weight, |min| weight + min);
        }
    }
}

/// Whether the format stores one number per weight.
pub(crate) const fn is_dense(format: TensorFormat) -> bool {
    format.is_dense()
}

/// Decodes one row. `bytes` is the row as it lies in a model file, `out` its `cols` weights; of F8_E4M3 the codes, for
/// the row's scale lies elsewhere.
///
/// # Errors
/// [`KernelError::Shape`] if `out` is not a whole number of blocks or `bytes` is not exactly as long as such a row.
pub fn dequantize_row(format: TensorFormat, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    if format.row_bytes(out.len()) != Some(bytes.len()) {
        let message = format!(
            "{} bytes for a row of {} {format:?} weights",
            bytes.len(),
            out.len()
        );
        return Err(KernelError::Shape {
            op: "dequantize_row",
            message,
        });
    }
    if is_dense(format) {
        dequantize_dense(format, bytes, out);
    } else {
        for (index, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            Block::of_row(format, bytes, index).dequantize(out);
        }
    }
    Ok(())
}

/// The f16 at `at`, widened.
pub(crate) fn half(bytes: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}
