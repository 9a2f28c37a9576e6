//! Q6_K: 6-bit codes with an integer scale per 16.

use std::arch::x86_64::*;
use std::mem::offset_of;

use phalanx_model::TensorFormat;

use super::{Kernel, Sums, Tile, broadcast, broadcast_f32, half8, keep_order, unroll};
use crate::cpu::gemm::activations::NarrowBlock;
use crate::cpu::pack::Layout;
use crate::cpu::pack::headers::Q6_K_SCALES;

pub(super) struct Q6K;

impl Kernel for Q6K {
    const PAIRS_FROM: usize = usize::MAX;

    #[inline(always)]
    unsafe fn tile<const R: usize, const G: usize, const PF: bool>(t: Tile) -> Sums<R, G> {
        // SAFETY: the caller's promise.
        unsafe { tile::<R, G, PF>(t) }
    }
}

/// The codes of half `HALF`, step `STEP`: nibbles `v` with the bit pairs of `plane` above them.
///
/// # Safety
/// AVX2.
#[inline(always)]
pub(super) unsafe fn codes<const HALF: usize, const STEP: usize>(v: __m256i, plane: __m256i) -> __m256i {
    // SAFETY: the caller's promise. Shifts cross bytes, but the masks keep each byte's own bits.
    unsafe {
        let low = if HALF == 0 { v } else { _mm256_srli_epi16::<4>(v) };
        let high = match STEP {
            0 => _mm256_slli_epi16::<4>(plane),
            1 => _mm256_slli_epi16::<2>(plane),
            2 => plane,
            _ => _mm256_srli_epi16::<2>(plane),
        };
        _mm256_or_si256(
            _mm256_and_si256(low, _mm256_set1_epi8(15)),
            _mm256_and_si256(high, _mm256_set1_epi8(48)),
        )
    }
}

/// Start of a row's 16-bit sums of half `HALF`: -32 times the lane's activations.
///
/// # Safety
/// AVX2; `block` is a [`NarrowBlock`].
#[inline(always)]
unsafe fn start<const HALF: usize>(block: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let first = broadcast(block.add(offset_of!(NarrowBlock, start_32_first)));
        if HALF == 0 {
            return first;
        }
        // Four times -8 x sum may wrap, but the difference is the second half's, which fits.
        let both = _mm256_slli_epi16::<2>(broadcast(block.add(offset_of!(NarrowBlock, start_8))));
        _mm256_sub_epi16(both, first)
    }
}

/// Sums of one half of a block for `R` rows: 8 codes less 32 per lane, at most 8 x 32 x 127 = 32512 in 16 bits; what wraps
/// on the way comes back. (One `vpmaddubsw` alone, at most 2 x 63 x 127, does not saturate.)
///
/// # Safety
/// AVX2; `vectors` points to the block's codes in the first of `G` groups, `a` to the block of the first row.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn half_sums<const HALF: usize, const R: usize, const G: usize>(
    t: &Tile,
    vectors: *const u8,
    a: *const u8,
) -> [[__m256i; G]; R] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sum = [[_mm256_setzero_si256(); G]; R];
        for (r, sum) in sum.iter_mut().enumerate() {
            *sum = [start::<HALF>(a.add(r * t.row_bytes)); G];
        }
        unroll!(STEP in [0, 1, 2, 3] {
            let mut code = [_mm256_setzero_si256(); G];
            for (g, code) in code.iter_mut().enumerate() {
                let group = vectors.add(g * t.group_bytes);
                let v = _mm256_loadu_si256(group.add(STEP * 32).cast());
                let plane = _mm256_loadu_si256(group.add(128 + HALF * 32).cast());
                *code = codes::<HALF, STEP>(v, plane);
            }
            for r in 0..R {
                let x = broadcast(a.add(r * t.row_bytes + HALF * 16 + STEP * 4));
                for g in 0..G {
                    sum[r][g] = _mm256_add_epi16(sum[r][g], _mm256_maddubs_epi16(code[g], x));
                }
            }
            sum = keep_order(sum);
            // No load of the next step may move up here: it would spill.
            std::arch::asm!("", options(nostack, preserves_flags));
        });
        sum
    }
}

/// The integer scales of a block for 8 rows, twice per row as i16: of the first and of the second half.
///
/// # Safety
/// AVX2; `chunk` is a Q6_K chunk.
#[inline(always)]
unsafe fn integer_scales(chunk: *const u8, block: usize) -> [__m256i; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let pairs = _mm256_cvtepi8_epi16(_mm_loadu_si128(chunk.add(Q6_K_SCALES + block * 16).cast()));
        let first = _mm256_slli_epi32::<16>(pairs);
        let second = _mm256_srli_epi32::<16>(pairs);
        [
            _mm256_or_si256(first, _mm256_srli_epi32::<16>(first)),
            _mm256_or_si256(second, _mm256_slli_epi32::<16>(second)),
        ]
    }
}

/// The scales of the halves are applied to integers: `|dot|` is at most 2 x 16 x 32 x 127 x 128 < 2^24, exact in f32.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<const R: usize, const G: usize, const PF: bool>(t: Tile) -> Sums<R, G> {
    const LAYOUT: Layout = Layout::of(TensorFormat::Q6_K);
    // SAFETY: all addresses lie within the chunks of G groups and the blocks of R rows that `t` describes.
    unsafe {
        let mut acc = [[_mm256_setzero_ps(); G]; R];
        let (mut w, mut a) = (t.weights, t.activations);
        for _ in 0..t.chunks {
            for block in 0..LAYOUT.blocks {
                let vectors = w.add(LAYOUT.header + block * LAYOUT.block_bytes);
                let scales: [[__m256i; 2]; G] =
                    std::array::from_fn(|g| integer_scales(w.add(g * t.group_bytes), block));
                let sum = half_sums::<0, R, G>(&t, vectors, a);
                let mut dot = [[_mm256_setzero_si256(); G]; R];
                for r in 0..R {
                    for g in 0..G {
                        dot[r][g] = _mm256_madd_epi16(sum[r][g], scales[g][0]);
                    }
                }
                let sum = half_sums::<1, R, G>(&t, vectors, a);
                for g in 0..G {
                    let scale = half8(w.add(g * t.group_bytes));
                    for r in 0..R {
                        let second = _mm256_madd_epi16(sum[r][g], scales[g][1]);
                        let dot = _mm256_cvtepi32_ps(_mm256_add_epi32(dot[r][g], second));
                        let x = broadcast_f32(a.add(r * t.row_bytes + offset_of!(NarrowBlock, scale)));
                        acc[r][g] = _mm256_fmadd_ps(dot, _mm256_mul_ps(scale, x), acc[r][g]);
                    }
                }
                a = a.add(size_of::<NarrowBlock>());
            }
            if PF {
                t.prefetch::<G>(w, LAYOUT.bytes);
            }
            w = w.add(LAYOUT.bytes);
        }
        acc
    }
}
