//! F32, F16 and BF16 panels: one FMA per weight, in rising K.

use std::arch::x86_64::*;

use super::{Kernel, Sums, Tile, broadcast_f32, half8};
use crate::cpu::pack::GROUP;

/// Reads the 8 numbers of one K.
trait Numbers {
    /// Bytes of a number.
    const BYTES: usize;

    /// # Safety
    /// AVX2 and F16C; 8 numbers at `p` are readable.
    unsafe fn load(p: *const u8) -> __m256;
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;

impl Numbers for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(p.cast()) }
    }
}

impl Numbers for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { half8(p) }
    }
}

impl Numbers for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m256 {
        // SAFETY: the caller's promise. A bf16 is the upper half of an f32.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
}

impl<N: Numbers> Kernel for N {
    /// Always: a sum is one chain of FMAs, and more sums at a time hide their latency.
    const PAIRS_FROM: usize = 1;

    #[inline(always)]
    unsafe fn tile<const R: usize, const G: usize, const PF: bool>(t: Tile) -> Sums<R, G> {
        // SAFETY: the caller's promise.
        unsafe { tile::<N, R, G, PF>(t) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<N: Numbers, const R: usize, const G: usize, const PF: bool>(t: Tile) -> Sums<R, G> {
    // SAFETY: all addresses lie within the chunks of G groups and the R rows that `t` describes.
    unsafe {
        let mut acc = [[_mm256_setzero_ps(); G]; R];
        let mut w = t.weights;
        for k in 0..t.chunks {
            let weights: [__m256; G] = std::array::from_fn(|g| N::load(w.add(g * t.group_bytes)));
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = broadcast_f32(t.activations.add(r * t.row_bytes + k * 4));
                for (acc, &weights) in acc.iter_mut().zip(&weights) {
                    *acc = _mm256_fmadd_ps(weights, x, *acc);
                }
            }
            if PF && (k * N::BYTES * GROUP).is_multiple_of(64) {
                t.prefetch::<G>(w, 64);
            }
            w = w.add(N::BYTES * GROUP);
        }
        acc
    }
}
