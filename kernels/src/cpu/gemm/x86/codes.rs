//! Formats of 4 and 5 bits: unsigned codes times int8 activations in 16-bit sums.

use std::arch::x86_64::*;
use std::mem::offset_of;

use phalanx_model::TensorFormat;

use super::{Kernel, Sums, Tile, broadcast, broadcast_f32, half8, keep_order, unroll};
use crate::cpu::gemm::activations::NarrowBlock;
use crate::cpu::pack::headers::{BLOCK_SCALES, MINS, SUPER_MINS};
use crate::cpu::pack::{Layout, bits, has_min, is_super, offset};

/// What a format's tile needs to know at compile time.
pub(super) trait Coded {
    const FORMAT: TensorFormat;
    const LAYOUT: Layout = Layout::of(Self::FORMAT);
    const FIVE_BITS: bool = bits(Self::FORMAT) == 5;
    const MIN: bool = has_min(Self::FORMAT);
    const SUPER: bool = is_super(Self::FORMAT);
    /// Mins are minus scale times zero point.
    const ZERO_POINT: bool = matches!(Self::FORMAT, TensorFormat::Int4);
    /// Whether the 16-bit sums are of codes less the middle of their range.
    const CENTERED: bool = Self::FIVE_BITS || offset(Self::FORMAT) != 0;
}

macro_rules! formats {
    ($($name:ident = $format:ident),*) => { $(
        #[allow(non_camel_case_types)]
        pub(super) struct $name;
        impl Coded for $name {
            const FORMAT: TensorFormat = TensorFormat::$format;
        }
        impl Kernel for $name {
            /// Never: pairs win on large matrices in cache, but lose 10 to 25 % on small ones.
            const PAIRS_FROM: usize = usize::MAX;

            #[inline(always)]
            unsafe fn tile<const R: usize, const G: usize, const PF: bool>(t: Tile) -> Sums<R, G> {
                // SAFETY: the caller's promise.
                unsafe { tile::<Self, R, G, PF>(t) }
            }
        }
    )* };
}
formats!(
    Q4_0 = Q4_0,
    Q4_1 = Q4_1,
    Int4 = Int4,
    Q5_0 = Q5_0,
    Q5_1 = Q5_1,
    Q4K = Q4_K,
    Q5K = Q5_K
);

/// Eight bytes as f32.
///
/// # Safety
/// AVX2; 8 bytes at `p` are readable.
#[inline(always)]
unsafe fn integers(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()))) }
}

/// Scales of block `block` of a chunk, for 8 rows. The product of a super-scale and an integer is exact.
///
/// # Safety
/// AVX2 and F16C; `chunk` is a chunk of the format.
#[inline(always)]
pub(super) unsafe fn scale<F: Coded>(chunk: *const u8, block: usize) -> __m256 {
    // SAFETY: header offsets of the format.
    unsafe {
        if F::SUPER {
            _mm256_mul_ps(half8(chunk), integers(chunk.add(BLOCK_SCALES + block * 16)))
        } else {
            half8(chunk.add(block * 16))
        }
    }
}

/// Mins of block `block` of a chunk of a format that has them; else as [`scale`].
///
/// # Safety
/// As [`scale`].
#[inline(always)]
pub(super) unsafe fn min<F: Coded>(chunk: *const u8, block: usize) -> __m256 {
    // SAFETY: header offsets of the format.
    unsafe {
        if F::SUPER {
            _mm256_mul_ps(
                half8(chunk.add(SUPER_MINS)),
                integers(chunk.add(BLOCK_SCALES + block * 16 + 8)),
            )
        } else if F::ZERO_POINT {
            let product = _mm256_mul_ps(scale::<F>(chunk, block), half8(chunk.add(MINS + block * 16)));
            _mm256_xor_ps(product, _mm256_set1_ps(-0.0))
        } else {
            half8(chunk.add(MINS + block * 16))
        }
    }
}

/// Fifth bits of the codes of step `STEP`, in place: of the first and of the second half of the block.
///
/// # Safety
/// AVX2.
#[inline(always)]
pub(super) unsafe fn fifth_bits<const STEP: usize>(plane: __m256i) -> (__m256i, __m256i) {
    // SAFETY: the caller's promise. Shifts cross bytes, but the mask keeps one bit of each byte's own.
    unsafe {
        let mask = _mm256_set1_epi8(16);
        let first = match STEP {
            0 => _mm256_slli_epi16::<4>(plane),
            1 => _mm256_slli_epi16::<3>(plane),
            2 => _mm256_slli_epi16::<2>(plane),
            _ => _mm256_slli_epi16::<1>(plane),
        };
        let second = match STEP {
            0 => plane,
            1 => _mm256_srli_epi16::<1>(plane),
            2 => _mm256_srli_epi16::<2>(plane),
            _ => _mm256_srli_epi16::<3>(plane),
        };
        (_mm256_and_si256(first, mask), _mm256_and_si256(second, mask))
    }
}

/// Start of a row's 16-bit sums: minus offset times the lane's activations.
///
/// # Safety
/// AVX2; `block` is a [`NarrowBlock`].
#[inline(always)]
unsafe fn start<F: Coded>(block: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let eight = broadcast(block.add(offset_of!(NarrowBlock, start_8)));
        if F::FIVE_BITS {
            _mm256_add_epi16(eight, eight)
        } else {
            eight
        }
    }
}

/// The codes of step `STEP` of a block of 8 rows: those of the low nibbles, those of the high ones.
///
/// # Safety
/// `vectors` points at a block's quants.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack<F: Coded, const STEP: usize>(vectors: *const u8) -> (__m256i, __m256i) {
    let mask = _mm256_set1_epi8(15);
    // SAFETY: within the block, which is 128 bytes of nibbles and, with five bits, 32 of high bits.
    unsafe {
        let v = _mm256_loadu_si256(vectors.add(STEP * 32).cast());
        let (lo, hi) = (
            _mm256_and_si256(v, mask),
            _mm256_and_si256(_mm256_srli_epi16::<4>(v), mask),
        );
        if !F::FIVE_BITS {
            return (lo, hi);
        }
        let (first, second) = fifth_bits::<STEP>(_mm256_loadu_si256(vectors.add(128).cast()));
        (_mm256_or_si256(lo, first), _mm256_or_si256(hi, second))
    }
}

/// A 16-bit lane sums eight `vpmaddubsw` of a block: at most 16 x 15 x 127 = 30480 for 4-bit codes. 5-bit codes are
/// summed less 16, whose sums are at most 16 x 16 x 127 = 32512: what wraps on the way comes back. (One `vpmaddubsw`
/// alone, at most 2 x 31 x 127, does not saturate.) Only after the block sums are widened and scaled. Formats with a min
/// get the 16 back as an exact integer.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<F: Coded, const R: usize, const G: usize, const PF: bool>(t: Tile) -> Sums<R, G> {
    // SAFETY: all addresses lie within the chunks of G groups and the blocks of R rows that `t` describes.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        let layout = F::LAYOUT;
        let mut acc = [[_mm256_setzero_ps(); G]; R];
        let (mut w, mut a) = (t.weights, t.activations);
        for _ in 0..t.chunks {
            for block in 0..layout.blocks {
                let vectors = w.add(layout.header + block * layout.block_bytes);
                let mut sum = [[_mm256_setzero_si256(); G]; R];
                if F::CENTERED {
                    for (r, sum) in sum.iter_mut().enumerate() {
                        *sum = [start::<F>(a.add(r * t.row_bytes)); G];
                    }
                }
                unroll!(STEP in [0, 1, 2, 3] {
                    let mut lo = [_mm256_setzero_si256(); G];
                    let mut hi = lo;
                    for g in 0..G {
                        (lo[g], hi[g]) = unpack::<F, STEP>(vectors.add(g * t.group_bytes));
                    }
                    for r in 0..R {
                        let x = broadcast(a.add(r * t.row_bytes + STEP * 4));
                        let z = broadcast(a.add(r * t.row_bytes + 16 + STEP * 4));
                        for g in 0..G {
                            sum[r][g] = _mm256_add_epi16(sum[r][g], _mm256_maddubs_epi16(lo[g], x));
                            sum[r][g] = _mm256_add_epi16(sum[r][g], _mm256_maddubs_epi16(hi[g], z));
                        }
                    }
                    sum = keep_order(sum);
                    // No load of the next step may move up here: it would spill.
                    std::arch::asm!("", options(nostack, preserves_flags));
                });
                for g in 0..G {
                    let chunk = w.add(g * t.group_bytes);
                    let w_scale = scale::<F>(chunk, block);
                    for r in 0..R {
                        let row = a.add(r * t.row_bytes);
                        let mut dot = _mm256_madd_epi16(sum[r][g], ones);
                        if F::MIN && F::CENTERED {
                            dot = _mm256_sub_epi32(dot, _mm256_madd_epi16(start::<F>(row), ones));
                        }
                        let x_scale = broadcast_f32(row.add(offset_of!(NarrowBlock, scale)));
                        let scale = _mm256_mul_ps(w_scale, x_scale);
                        acc[r][g] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, acc[r][g]);
                    }
                    if F::MIN {
                        // A loop of its own: together with the dots it spills (30 % slower).
                        let w_min = min::<F>(chunk, block);
                        for r in 0..R {
                            let x_sum =
                                broadcast_f32(a.add(r * t.row_bytes + offset_of!(NarrowBlock, scaled_sum)));
                            acc[r][g] = _mm256_fmadd_ps(w_min, x_sum, acc[r][g]);
                        }
                    }
                }
                a = a.add(size_of::<NarrowBlock>());
            }
            if PF {
                t.prefetch::<G>(w, layout.bytes);
            }
            w = w.add(layout.bytes);
        }
        acc
    }
}
