//! Q4_K, Q5_K, Q6_K: super-blocks of 256 weights. Small integer scales per 32 (Q6_K: 16) weights are themselves scaled
//! by one f16 (Q4_K and Q5_K: and their mins by another).

use super::{BLOCK, Block, half};

/// The 6-bit scale and min of block `j` of a Q4_K or Q5_K super-block from its 12 bytes of packed scales
/// (`get_scale_min_k4` of ggml): four blocks lie in whole bytes, whose top two bits hold parts of the other four.
pub(crate) fn scale_and_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4,
            (packed[j + 4] >> 4) | (packed[j] >> 6) << 4,
        )
    }
}

/// 64 weights share 32 bytes: the first 32 are the low nibbles.
fn nibble(quants: &[u8], j: usize, k: usize) -> u8 {
    quants[j / 2 * BLOCK + k] >> (j % 2 * 4) & 15
}

fn with_min(b: &[u8], j: usize, codes: [u8; BLOCK]) -> Block {
    let (scale, min) = scale_and_min(&b[4..16], j);
    Block {
        codes,
        offset: 0,
        scale: [half(b, 0) * f32::from(scale); 2],
        min: Some(-(half(b, 2) * f32::from(min))),
    }
}

/// f16 d, f16 dmin, 12 bytes of scales, 128 bytes of nibbles.
pub(super) fn q4_k(b: &[u8], j: usize) -> Block {
    with_min(b, j, std::array::from_fn(|k| nibble(&b[16..], j, k)))
}

/// f16 d, f16 dmin, 12 bytes of scales, 32 bytes of fifth bits (bit `j` of byte `k`), 128 bytes of nibbles.
pub(super) fn q5_k(b: &[u8], j: usize) -> Block {
    with_min(
        b,
        j,
        std::array::from_fn(|k| nibble(&b[48..], j, k) | (b[16 + k] >> j & 1) << 4),
    )
}

/// 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 i8 scales, f16 d.
/// Each half of 128 weights is four blocks: nibbles low, low, high, high; bit pairs 0..4 of the same 32 bytes.
pub(super) fn q6_k(b: &[u8], j: usize) -> Block {
    let (part, t) = (j / 4, j % 4);
    let low = &b[part * 64 + t % 2 * 32..][..32];
    let high = &b[128 + part * 32..][..32];
    let scale = |i: usize| half(b, 208) * f32::from(b[192 + 2 * j + i] as i8);
    Block {
        codes: std::array::from_fn(|k| (low[k] >> (t / 2 * 4) & 15) | (high[k] >> (2 * t) & 3) << 4),
        offset: 32,
        scale: [scale(0), scale(1)],
        min: None,
    }
}
