//! The scales of a chunk, lane by lane.

use phalanx_model::TensorFormat;

use super::{has_min, is_super};
use crate::cpu::quant::{half, min_of_zero_point, scale_and_min};

/// Where the mins of a Q4_1 or Q5_1 chunk start, and the zero points of an Int4 chunk.
pub(crate) const MINS: usize = 32;
/// Where the f16 `-dmin` of a Q4_K or Q5_K chunk start.
pub(crate) const SUPER_MINS: usize = 16;
/// Where the integer scales of a Q4_K or Q5_K chunk start: per block 8 scales, then 8 mins.
pub(crate) const BLOCK_SCALES: usize = 32;
/// Where the integer scales of a Q6_K chunk start: per block 8 pairs.
pub(crate) const Q6_K_SCALES: usize = 16;

/// Writes what block `index` of a file's `row` has of scales into its lane and chunk.
pub(super) fn put(format: TensorFormat, row: &[u8], index: usize, (lane, chunk): (usize, &mut [u8])) {
    let per = format.block_len() / 32;
    let source = &row[index / per * format.block_bytes()..][..format.block_bytes()];
    if !is_super(format) {
        let at = index % 2 * 16 + lane * 2;
        chunk[at..at + 2].copy_from_slice(&source[..2]);
        if has_min(format) {
            chunk[MINS + at..MINS + at + 2].copy_from_slice(&source[2..4]);
        }
        return;
    }
    let j = index % per;
    if format == TensorFormat::Q6_K {
        chunk[lane * 2..lane * 2 + 2].copy_from_slice(&source[208..]);
        chunk[Q6_K_SCALES + j * 16 + lane * 2..][..2].copy_from_slice(&source[192 + 2 * j..][..2]);
        return;
    }
    let (scale, min) = scale_and_min(&source[4..16], j);
    chunk[lane * 2..lane * 2 + 2].copy_from_slice(&source[..2]);
    // The min is subtracted in the file and added here, as in every other format.
    chunk[SUPER_MINS + lane * 2] = source[2];
    chunk[SUPER_MINS + lane * 2 + 1] = source[3] ^ 0x80;
    chunk[BLOCK_SCALES + j * 16 + lane] = scale;
    chunk[BLOCK_SCALES + j * 16 + 8 + lane] = min;
}

/// Scales of the two halves, and the min, of block `at` of row `lane`.
pub(super) fn get(format: TensorFormat, chunk: &[u8], lane: usize, at: usize) -> ([f32; 2], Option<f32>) {
    if !is_super(format) {
        let offset = at * 16 + lane * 2;
        let scale = half(chunk, offset);
        let min = has_min(format).then(|| match (format, half(chunk, MINS + offset)) {
            (TensorFormat::Int4, zero_point) => min_of_zero_point(scale, zero_point),
            (_, min) => min,
        });
        return ([scale; 2], min);
    }
    let d = half(chunk, lane * 2);
    if format == TensorFormat::Q6_K {
        let scale = |i| d * f32::from(chunk[Q6_K_SCALES + at * 16 + lane * 2 + i] as i8);
        return ([scale(0), scale(1)], None);
    }
    let scale = d * f32::from(chunk[BLOCK_SCALES + at * 16 + lane]);
    let min = half(chunk, SUPER_MINS + lane * 2) * f32::from(chunk[BLOCK_SCALES + at * 16 + 8 + lane]);
    ([scale; 2], Some(min))
}
