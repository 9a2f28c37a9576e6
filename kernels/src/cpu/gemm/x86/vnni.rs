//! VNNI: `vpdpbusd` adds four products of unsigned codes and int8 activations to a 32-bit sum.
//!
//! Nothing can saturate and every sum is exact, so the results are those of the AVX2 kernels. A sum is one chain of
//! instructions per block; blocks are independent but for the last FMA, and overlap.

use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::mem::offset_of;

use phalanx_model::TensorFormat;

use super::codes::{Coded, fifth_bits, min, scale};
use super::sixes::{self, Q6K};
use super::{Kernel, Sums, TILE_ROWS, Tile, broadcast, broadcast_f32, half8, pairs, unroll};
use crate::cpu::gemm::activations::NarrowBlock;
use crate::cpu::pack::headers::Q6_K_SCALES;
use crate::cpu::pack::{Layout, bits, offset};

/// The VNNI kernel of a format.
pub(super) struct Vnni<F>(PhantomData<F>);

impl<F: Coded> Kernel for Vnni<F> {
    /// Unpacking a vector of codes takes about as long as multiplying it with two rows.
    const ROWS: usize = 8;
    /// Always: a pair is one 512-bit vector.
    const PAIRS_FROM: usize = 1;

    #[inline(always)]
    unsafe fn tile<const R: usize, const G: usize, const PF: bool>(t: Tile) -> Sums<R, G> {
        // SAFETY: the caller's promise, and AVX-512 where `run` chose this kernel.
        unsafe {
            if G == 2 {
                let sums = pairs::tile::<F, R, PF>(t);
                return std::array::from_fn(|r| std::array::from_fn(|g| sums[r][g]));
            }
            tile::<F, R, G, PF>(t)
        }
    }
}

impl Kernel for Vnni<Q6K> {
    const PAIRS_FROM: usize = 2 * TILE_ROWS;

    #[inline(always)]
    unsafe fn tile<const R: usize, const G: usize, const PF: bool>(t: Tile) -> Sums<R, G> {
        // SAFETY: the caller's promise, and VNNI where `run` chose this kernel.
        unsafe { tile_sixes::<R, G, PF>(t) }
    }
}

/// How far the sum for the offset 8 is shifted to be that of the format's, a power of two.
pub(super) const fn start_shift(format: TensorFormat) -> i32 {
    (offset(format) / 8).trailing_zeros() as i32
}

/// Start of a row's sums: minus the format's offset times all activations of the block.
///
/// # Safety
/// AVX2; `block` is a [`NarrowBlock`].
#[inline(always)]
unsafe fn start(block: *const u8, format: TensorFormat) -> __m256i {
    // SAFETY: the caller's promise. The shift is a constant where this is inlined.
    unsafe {
        let eight = broadcast(block.add(offset_of!(NarrowBlock, start)));
        _mm256_sll_epi32(eight, _mm_cvtsi32_si128(start_shift(format)))
    }
}

/// Adds the products of one block to `sum`.
///
/// # Safety
/// AVX-512 VL and VNNI; `vectors` points to the block's codes in the first of `G` groups, `a` to the first row's block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512vnni")]
unsafe fn add_block<F: Coded, const R: usize, const G: usize>(
    t: &Tile,
    vectors: *const u8,
    a: *const u8,
    mut sum: [[__m256i; G]; R],
) -> [[__m256i; G]; R] {
    // SAFETY: the caller's promise.
    unsafe {
        if bits(F::FORMAT) == 8 {
            // Bytes of odd K are signed; make them offset binary like the others.
            let flip = _mm256_set1_epi16(i16::MIN);
            for step in 0..8 {
                for g in 0..G {
                    let v = _mm256_loadu_si256(vectors.add(g * t.group_bytes + step * 32).cast());
                    let code = _mm256_xor_si256(v, flip);
                    for r in 0..R {
                        let x = broadcast(a.add(r * t.row_bytes + step * 4));
                        sum[r][g] = _mm256_dpbusd_epi32(sum[r][g], code, x);
                    }
                }
            }
            return sum;
        }
        let mask = _mm256_set1_epi8(15);
        unroll!(STEP in [0, 1, 2, 3] {
            for g in 0..G {
                let v = _mm256_loadu_si256(vectors.add(g * t.group_bytes + STEP * 32).cast());
                let mut lo = _mm256_and_si256(v, mask);
                let mut hi = _mm256_and_si256(_mm256_srli_epi16::<4>(v), mask);
                if F::FIVE_BITS {
                    let plane = _mm256_loadu_si256(vectors.add(g * t.group_bytes + 128).cast());
                    let (first, second) = fifth_bits::<STEP>(plane);
                    lo = _mm256_or_si256(lo, first);
                    hi = _mm256_or_si256(hi, second);
                }
                for r in 0..R {
                    let row = a.add(r * t.row_bytes + STEP * 4);
                    sum[r][g] = _mm256_dpbusd_epi32(sum[r][g], lo, broadcast(row));
                    sum[r][g] = _mm256_dpbusd_epi32(sum[r][g], hi, broadcast(row.add(16)));
                }
            }
        });
        sum
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512vnni")]
unsafe fn tile<F: Coded, const R: usize, const G: usize, const PF: bool>(t: Tile) -> Sums<R, G> {
    // SAFETY: all addresses lie within the chunks of G groups and the blocks of R rows that `t` describes.
    unsafe {
        let layout = F::LAYOUT;
        let mut acc = [[_mm256_setzero_ps(); G]; R];
        let (mut w, mut a) = (t.weights, t.activations);
        for _ in 0..t.chunks {
            for block in 0..layout.blocks {
                let mut sum = [[_mm256_setzero_si256(); G]; R];
                if offset(F::FORMAT) != 0 {
                    for (r, sum) in sum.iter_mut().enumerate() {
                        *sum = [start(a.add(r * t.row_bytes), F::FORMAT); G];
                    }
                }
                let vectors = w.add(layout.header + block * layout.block_bytes);
                let sum = add_block::<F, R, G>(&t, vectors, a, sum);
                for g in 0..G {
                    let chunk = w.add(g * t.group_bytes);
                    let w_scale = scale::<F>(chunk, block);
                    let w_min = min::<F>(chunk, block);
                    for r in 0..R {
                        let row = a.add(r * t.row_bytes);
                        let x_scale = broadcast_f32(row.add(offset_of!(NarrowBlock, scale)));
                        let scale = _mm256_mul_ps(w_scale, x_scale);
                        acc[r][g] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][g]), scale, acc[r][g]);
                        if F::MIN {
                            let x_sum = broadcast_f32(row.add(offset_of!(NarrowBlock, scaled_sum)));
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

/// Dot products of half `HALF` of a Q6_K block, offset included.
///
/// # Safety
/// As [`add_block`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512vnni")]
unsafe fn half_sums<const HALF: usize, const R: usize, const G: usize>(
    t: &Tile,
    vectors: *const u8,
    a: *const u8,
) -> [[__m256i; G]; R] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sum = [[_mm256_setzero_si256(); G]; R];
        for (r, sum) in sum.iter_mut().enumerate() {
            let block = a.add(r * t.row_bytes);
            let first = broadcast(block.add(offset_of!(NarrowBlock, start_32_first)));
            let first = _mm256_madd_epi16(first, _mm256_set1_epi16(1));
            let start = if HALF == 0 {
                first
            } else {
                _mm256_sub_epi32(start(block, TensorFormat::Q6_K), first)
            };
            *sum = [start; G];
        }
        unroll!(STEP in [0, 1, 2, 3] {
            for g in 0..G {
                let group = vectors.add(g * t.group_bytes);
                let v = _mm256_loadu_si256(group.add(STEP * 32).cast());
                let plane = _mm256_loadu_si256(group.add(128 + HALF * 32).cast());
                let code = sixes::codes::<HALF, STEP>(v, plane);
                for r in 0..R {
                    let x = broadcast(a.add(r * t.row_bytes + HALF * 16 + STEP * 4));
                    sum[r][g] = _mm256_dpbusd_epi32(sum[r][g], code, x);
                }
            }
        });
        sum
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512vnni")]
unsafe fn tile_sixes<const R: usize, const G: usize, const PF: bool>(t: Tile) -> Sums<R, G> {
    const LAYOUT: Layout = Layout::of(TensorFormat::Q6_K);
    // SAFETY: all addresses lie within the chunks of G groups and the blocks of R rows that `t` describes.
    unsafe {
        let mut acc = [[_mm256_setzero_ps(); G]; R];
        let (mut w, mut a) = (t.weights, t.activations);
        for _ in 0..t.chunks {
            for block in 0..LAYOUT.blocks {
                let vectors = w.add(LAYOUT.header + block * LAYOUT.block_bytes);
                let first = half_sums::<0, R, G>(&t, vectors, a);
                let second = half_sums::<1, R, G>(&t, vectors, a);
                for g in 0..G {
                    let chunk = w.add(g * t.group_bytes);
                    let pairs = _mm_loadu_si128(chunk.add(Q6_K_SCALES + block * 16).cast());
                    let pairs = _mm256_cvtepi8_epi16(pairs);
                    let scales = [
                        _mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(pairs)),
                        _mm256_srai_epi32::<16>(pairs),
                    ];
                    let d = half8(chunk);
                    for r in 0..R {
                        let dot = _mm256_add_epi32(
                            _mm256_mullo_epi32(first[r][g], scales[0]),
                            _mm256_mullo_epi32(second[r][g], scales[1]),
                        );
                        let x = broadcast_f32(a.add(r * t.row_bytes + offset_of!(NarrowBlock, scale)));
                        let scale = _mm256_mul_ps(d, x);
                        acc[r][g] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, acc[r][g]);
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
