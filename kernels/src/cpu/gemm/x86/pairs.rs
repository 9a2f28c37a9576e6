//! VNNI on 512-bit vectors: two groups, 16 outputs, at a time.
//!
//! A vector is put together from one 256-bit load of each group. Of few rows, the sums of the two halves of a block are
//! kept apart until its end, so that twice as many chains of `vpdpbusd` are under way.
//!
//! Helpers that are `inline(always)` hold no closures: a closure has none of the caller's target features, and every
//! intrinsic in it becomes a call.

use std::arch::x86_64::*;
use std::mem::offset_of;

use super::codes::{Coded, min, scale};
use super::vnni::start_shift;
use super::{Sums, Tile};
use crate::cpu::gemm::activations::NarrowBlock;
use crate::cpu::pack::{bits, offset};

/// With fewer chains of `vpdpbusd`, each waits for itself.
const FEW_CHAINS: usize = 8;

/// The same 32 bytes of two groups.
///
/// # Safety
/// AVX-512 F; 32 bytes are readable at `p` and `group_bytes` further on.
#[inline(always)]
unsafe fn load(p: *const u8, group_bytes: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let first = _mm256_loadu_si256(p.cast());
        let second = _mm256_loadu_si256(p.add(group_bytes).cast());
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), second)
    }
}

/// # Safety
/// AVX-512 F.
#[inline(always)]
unsafe fn join(first: __m256, second: __m256) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let (first, second) = (_mm256_castps_pd(first), _mm256_castps_pd(second));
        _mm512_castpd_ps(_mm512_insertf64x4::<1>(_mm512_castpd256_pd512(first), second))
    }
}

/// # Safety
/// AVX-512 F.
#[inline(always)]
unsafe fn split(both: __m512) -> [__m256; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let both = _mm512_castps_pd(both);
        let (first, second) = (_mm512_castpd512_pd256(both), _mm512_extractf64x4_pd::<1>(both));
        [_mm256_castpd_ps(first), _mm256_castpd_ps(second)]
    }
}

/// Four bytes from anywhere, in all 16 lanes.
///
/// # Safety
/// AVX-512 F; 4 bytes at `p` are readable.
#[inline(always)]
unsafe fn broadcast(p: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
}

/// As in the AVX2 kernels: the fifth bits of step `STEP`, in place, of both halves of a block.
///
/// # Safety
/// AVX-512 F and BW.
#[inline(always)]
unsafe fn fifth_bits<const STEP: usize>(plane: __m512i) -> (__m512i, __m512i) {
    // SAFETY: the caller's promise. Shifts cross bytes, but the mask keeps one bit of each byte's own.
    unsafe {
        let mask = _mm512_set1_epi8(16);
        let first = _mm512_sll_epi16(plane, _mm_cvtsi32_si128(4 - STEP as i32));
        let second = _mm512_srl_epi16(plane, _mm_cvtsi32_si128(STEP as i32));
        (_mm512_and_si512(first, mask), _mm512_and_si512(second, mask))
    }
}

/// The codes of step `STEP` of both halves of a block; of 8 bits: of steps `2 * STEP` and `2 * STEP + 1`.
///
/// # Safety
/// AVX-512 F and BW; `vectors` points to the block's codes in the first of two groups.
#[inline(always)]
unsafe fn codes<F: Coded, const STEP: usize>(vectors: *const u8, group_bytes: usize) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        if bits(F::FORMAT) == 8 {
            // Bytes of odd K are signed; make them offset binary like the others.
            let flip = _mm512_set1_epi16(i16::MIN);
            let v = vectors.add(STEP * 64);
            return [
                _mm512_xor_si512(load(v, group_bytes), flip),
                _mm512_xor_si512(load(v.add(32), group_bytes), flip),
            ];
        }
        let mask = _mm512_set1_epi8(15);
        let v = load(vectors.add(STEP * 32), group_bytes);
        let mut lo = _mm512_and_si512(v, mask);
        let mut hi = _mm512_and_si512(_mm512_srli_epi16::<4>(v), mask);
        if F::FIVE_BITS {
            let plane = load(vectors.add(128), group_bytes);
            let (first, second) = fifth_bits::<STEP>(plane);
            lo = _mm512_or_si512(lo, first);
            hi = _mm512_or_si512(hi, second);
        }
        [lo, hi]
    }
}

/// Dot products of a block, offset included, for `R` rows.
///
/// # Safety
/// AVX-512 F, BW, VL and VNNI; `vectors` points to the block's codes in the first of two groups, `a` to the first row's
/// block.
#[inline(always)]
unsafe fn dots<F: Coded, const R: usize>(t: &Tile, vectors: *const u8, a: *const u8) -> [__m512i; R] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sum = [[_mm512_setzero_si512(); 2]; R];
        if offset(F::FORMAT) != 0 {
            let shift = _mm_cvtsi32_si128(start_shift(F::FORMAT));
            for r in 0..R {
                let eight = broadcast(a.add(r * t.row_bytes + offset_of!(NarrowBlock, start)));
                sum[r][0] = _mm512_sll_epi32(eight, shift);
            }
        }
        let chains = if R < FEW_CHAINS { 2 } else { 1 };
        // Where the activations of a step's two vectors lie.
        let (stride, second) = if bits(F::FORMAT) == 8 { (8, 4) } else { (4, 16) };
        super::unroll!(STEP in [0, 1, 2, 3] {
            let code = codes::<F, STEP>(vectors, t.group_bytes);
            for r in 0..R {
                let row = a.add(r * t.row_bytes + STEP * stride);
                sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], code[0], broadcast(row));
                let chain = chains - 1;
                sum[r][chain] = _mm512_dpbusd_epi32(sum[r][chain], code[1], broadcast(row.add(second)));
            }
        });
        let mut dots = [_mm512_setzero_si512(); R];
        for r in 0..R {
            dots[r] = if chains == 2 {
                _mm512_add_epi32(sum[r][0], sum[r][1])
            } else {
                sum[r][0]
            };
        }
        dots
    }
}

/// A tile of `R` rows and two groups.
///
/// # Safety
/// AVX-512 F, BW, VL and VNNI; `t` describes `R` rows and two groups of the format.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn tile<F: Coded, const R: usize, const PF: bool>(t: Tile) -> Sums<R, 2> {
    // SAFETY: all addresses lie within the chunks of two groups and the blocks of R rows that `t` describes.
    unsafe {
        let layout = F::LAYOUT;
        let mut acc = [_mm512_setzero_ps(); R];
        let (mut w, mut a) = (t.weights, t.activations);
        for _ in 0..t.chunks {
            let other = w.add(t.group_bytes);
            for block in 0..layout.blocks {
                let vectors = w.add(layout.header + block * layout.block_bytes);
                let dot = dots::<F, R>(&t, vectors, a);
                let w_scale = join(scale::<F>(w, block), scale::<F>(other, block));
                let w_min = join(min::<F>(w, block), min::<F>(other, block));
                for r in 0..R {
                    let row = a.add(r * t.row_bytes);
                    let x_scale = row
                        .add(offset_of!(NarrowBlock, scale))
                        .cast::<f32>()
                        .read_unaligned();
                    let scale = _mm512_mul_ps(w_scale, _mm512_set1_ps(x_scale));
                    acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r]), scale, acc[r]);
                    if F::MIN {
                        let x_sum = row
                            .add(offset_of!(NarrowBlock, scaled_sum))
                            .cast::<f32>()
                            .read_unaligned();
                        acc[r] = _mm512_fmadd_ps(w_min, _mm512_set1_ps(x_sum), acc[r]);
                    }
                }
                a = a.add(size_of::<NarrowBlock>());
            }
            if PF {
                t.prefetch::<2>(w, layout.bytes);
            }
            w = w.add(layout.bytes);
        }
        acc.map(|sums| split(sums))
    }
}
