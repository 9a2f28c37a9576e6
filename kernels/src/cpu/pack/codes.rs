//! Where a block's codes lie: nibbles, with a plane of fifth bits or of bit pairs behind them; or bytes.

use phalanx_model::TensorFormat;

use super::bits;
use crate::cpu::quant::BLOCK;

/// Byte within 32 x 4 of K `k` of row `lane`, for nibbles: both halves of a block share bytes.
const fn nibble_at(k: usize, lane: usize) -> usize {
    k % 16 / 4 * 32 + lane * 4 + k % 4
}

/// Where the bits above a nibble are: byte behind the nibbles and shift. Fifth bits: one vector, bit `step` for the
/// first and `4 + step` for the second half. Bit pairs: one vector per half, bits `2 * step` and above.
const fn high_at(bits: usize, k: usize, lane: usize) -> (usize, usize) {
    let (half, step, byte) = (k / 16, k % 16 / 4, lane * 4 + k % 4);
    if bits == 5 {
        (128 + byte, half * 4 + step)
    } else {
        (128 + half * 32 + byte, step * 2)
    }
}

/// Q8_0: byte of K `k` of row `lane`.
const fn byte_at(k: usize, lane: usize) -> usize {
    k / 4 * 32 + lane * 4 + k % 4
}

/// Q8_0 bytes of odd K are signed, those of even K in offset binary (see the kernel): the code xor this.
const fn byte_flip(k: usize) -> u8 {
    if k.is_multiple_of(2) { 0 } else { 0x80 }
}

/// Writes the codes of row `lane`; `vectors` holds zeros there.
pub(super) fn put(format: TensorFormat, vectors: &mut [u8], lane: usize, codes: &[u8; BLOCK]) {
    let bits = bits(format);
    for (k, &code) in codes.iter().enumerate() {
        if bits == 8 {
            vectors[byte_at(k, lane)] = code ^ byte_flip(k);
            continue;
        }
        vectors[nibble_at(k, lane)] |= (code & 15) << (k / 16 * 4);
        if bits > 4 {
            let (byte, shift) = high_at(bits, k, lane);
            vectors[byte] |= (code >> 4) << shift;
        }
    }
}

/// The codes of row `lane`.
pub(super) fn get(format: TensorFormat, vectors: &[u8], lane: usize) -> [u8; BLOCK] {
    let bits = bits(format);
    std::array::from_fn(|k| {
        if bits == 8 {
            return vectors[byte_at(k, lane)] ^ byte_flip(k);
        }
        let low = vectors[nibble_at(k, lane)] >> (k / 16 * 4) & 15;
        if bits == 4 {
            return low;
        }
        let (byte, shift) = high_at(bits, k, lane);
        low | (vectors[byte] >> shift & if bits == 5 { 1 } else { 3 }) << 4
    })
}
