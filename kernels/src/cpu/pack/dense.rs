//! Dense panels: for every K the numbers of 8 rows.

use half::bf16;
use phalanx_model::TensorFormat;

use super::GROUP;
use crate::E4m3;
use crate::cpu::quant::dequantize_dense;

/// Scatters a file's row into its lane of the group.
pub(super) fn pack_row(format: TensorFormat, row: &[u8], lane: usize, out: &mut [u8]) {
    let width = format.block_bytes();
    for (out, number) in out.chunks_exact_mut(width * GROUP).zip(row.chunks_exact(width)) {
        out[lane * width..][..width].copy_from_slice(number);
    }
}

/// Scatters a row of E4M3, times its scale and rounded to bf16, into its lane of the group.
pub(super) fn pack_scaled_row(row: &[u8], scale: f32, lane: usize, out: &mut [u8]) {
    let groups = out.as_chunks_mut::<2>().0.chunks_exact_mut(GROUP);
    for (numbers, &code) in groups.zip(row) {
        numbers[lane] = bf16::from_f32(E4m3::from_bits(code).to_f32() * scale).to_le_bytes();
    }
}

/// Gathers and widens lane `lane` of a group.
pub(super) fn unpack_row(format: TensorFormat, group: &[u8], lane: usize, out: &mut [f32]) {
    let width = format.block_bytes();
    for (out, numbers) in out.iter_mut().zip(group.chunks_exact(width * GROUP)) {
        dequantize_dense(
            format,
            &numbers[lane * width..][..width],
            std::slice::from_mut(out),
        );
    }
}
