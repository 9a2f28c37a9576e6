//! Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Int4: 32 weights with one f16 scale, and a min or a zero point for some.

use super::{BLOCK, Block, half};

/// Low nibbles are weights 0..16, high nibbles 16..32.
fn nibbles(bytes: &[u8]) -> [u8; BLOCK] {
    std::array::from_fn(|k| if k < 16 { bytes[k] & 15 } else { bytes[k - 16] >> 4 })
}

/// Nibbles with a fifth bit each: bit `k` of the little-endian word `high`.
fn fives(high: &[u8], low: &[u8]) -> [u8; BLOCK] {
    let mut codes = nibbles(low);
    for (k, code) in codes.iter_mut().enumerate() {
        *code |= (high[k / 8] >> (k % 8) & 1) << 4;
    }
    codes
}

/// f16 d, 16 bytes of nibbles.
pub(super) fn q4_0(b: &[u8]) -> Block {
    Block {
        codes: nibbles(&b[2..]),
        offset: 8,
        scale: [half(b, 0); 2],
        min: None,
    }
}

/// f16 d, f16 m, 16 bytes of nibbles.
pub(super) fn q4_1(b: &[u8]) -> Block {
    Block {
        codes: nibbles(&b[4..]),
        offset: 0,
        scale: [half(b, 0); 2],
        min: Some(half(b, 2)),
    }
}

/// f16 d, f16 z, 16 bytes of nibbles.
pub(super) fn int4(b: &[u8]) -> Block {
    let scale = half(b, 0);
    Block {
        codes: nibbles(&b[4..]),
        offset: 0,
        scale: [scale; 2],
        min: Some(min_of_zero_point(scale, half(b, 2))),
    }
}

/// What a zero point adds to every weight of its block. Scale times code, this, and the sum of both have few enough bits
/// that f32 rounds none of them.
pub(crate) fn min_of_zero_point(scale: f32, zero_point: f32) -> f32 {
    -(scale * zero_point)
}

/// f16 d, u32 of fifth bits, 16 bytes of nibbles.
pub(super) fn q5_0(b: &[u8]) -> Block {
    Block {
        codes: fives(&b[2..6], &b[6..]),
        offset: 16,
        scale: [half(b, 0); 2],
        min: None,
    }
}

/// f16 d, f16 m, u32 of fifth bits, 16 bytes of nibbles.
pub(super) fn q5_1(b: &[u8]) -> Block {
    Block {
        codes: fives(&b[4..8], &b[8..]),
        offset: 0,
        scale: [half(b, 0); 2],
        min: Some(half(b, 2)),
    }
}

/// f16 d, 32 i8; a code is the i8 in offset binary.
pub(super) fn q8_0(b: &[u8]) -> Block {
    Block {
        codes: std::array::from_fn(|k| b[2 + k] ^ 0x80),
        offset: 128,
        scale: [half(b, 0); 2],
        min: None,
    }
}
