//! Dense panels: for every K the numbers of 8 rows.

use phalanx_model::TensorFormat;

use super::GROUP;
use crate::cpu::quant::dequantize_dense;

/// Scatters a file's row into its lane of the group.
pub(super) fn pack_row(format: TensorFormat, row: &[u8], lane: usize, out: &mut [u8]) {
    let width = format.block_bytes();
    for (out, number) in out.chunks_exact_mut(width * GROUP).zip(row.chunks_exact(width)) {
        out[lane * width..][..width].copy_from_slice(number);
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
