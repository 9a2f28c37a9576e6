//! F32, F16, BF16 and F8_E4M3: one little-endian number per weight.

use half::{bf16, f16};
use phalanx_model::TensorFormat;

use crate::E4m3;

/// `bytes` holds exactly `out.len()` numbers of the format.
pub(crate) fn dequantize(format: TensorFormat, bytes: &[u8], out: &mut [f32]) {
    match format {
        TensorFormat::F32 => {
            for (out, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        TensorFormat::F16 => {
            for (out, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *out = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        TensorFormat::BF16 => {
            for (out, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *out = bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        TensorFormat::F8_E4M3 => {
            for (out, &code) in out.iter_mut().zip(bytes) {
                *out = E4m3::from_bits(code).to_f32();
            }
        }
        _ => unreachable!("{format:?} is not dense"),
    }
}
