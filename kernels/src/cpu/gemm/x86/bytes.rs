//! Q8_0: int8 weights without any sign handling.

use std::arch::x86_64::*;
use std::mem::offset_of;

use phalanx_model::TensorFormat;

use super::codes::Coded;
use super::{Kernel, Sums, TILE_ROWS, Tile, broadcast, broadcast_f32, half8, keep_order};
use crate::cpu::gemm::activations::WideBlock;
use crate::cpu::pack::Layout;

#[allow(non_camel_case_types)]
pub(super) struct Q8_0;

impl Coded for Q8_0 {
    const FORMAT: TensorFormat = TensorFormat::Q8_0;
}

impl Kernel for Q8_0 {
    /// With fewer rows the second group's loads cost more than its broadcasts save.
    const PAIRS_FROM: usize = 2 * TILE_ROWS;

    #[inline(always)]
    unsafe fn tile<const R: usize, const G: usize, const PF: bool>(t: Tile) -> Sums<R, G> {
        // SAFETY: the caller's promise.
        unsafe { tile::<R, G, PF>(t) }
    }
}

/// Read a vector of weight bytes as i16 `v = 256 * odd + (even + 128)`; then
/// `sum(v * even_x) + sum(odd * (odd_x - 256 * even_x)) - 128 * sum(even_x) = sum(even * even_x) + sum(odd * odd_x)`:
/// two `vpmaddwd` per 32 products and a single shift to unpack, exact for every int8 weight including -128.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<const R: usize, const G: usize, const PF: bool>(t: Tile) -> Sums<R, G> {
    const LAYOUT: Layout = Layout::of(TensorFormat::Q8_0);
    // SAFETY: all addresses lie within the chunks of G groups and the blocks of R rows that `t` describes.
    unsafe {
        let mut acc = [[_mm256_setzero_ps(); G]; R];
        let (mut w, mut a) = (t.weights, t.activations);
        for _ in 0..t.chunks {
            for block in 0..LAYOUT.blocks {
                let vectors = w.add(LAYOUT.header + block * LAYOUT.block_bytes);
                let mut sum = [[_mm256_setzero_si256(); G]; R];
                for (r, sum) in sum.iter_mut().enumerate() {
                    *sum = [broadcast(a.add(r * t.row_bytes + offset_of!(WideBlock, start))); G];
                }
                for step in 0..8 {
                    let mut v = [_mm256_setzero_si256(); G];
                    let mut odd = v;
                    for g in 0..G {
                        v[g] = _mm256_loadu_si256(vectors.add(g * t.group_bytes + step * 32).cast());
                        odd[g] = _mm256_srai_epi16::<8>(v[g]);
                    }
                    for r in 0..R {
                        let row = a.add(r * t.row_bytes + step * 4);
                        let x = broadcast(row.add(offset_of!(WideBlock, even)));
                        let z = broadcast(row.add(offset_of!(WideBlock, odd)));
                        for g in 0..G {
                            sum[r][g] = _mm256_add_epi32(sum[r][g], _mm256_madd_epi16(v[g], x));
                            sum[r][g] = _mm256_add_epi32(sum[r][g], _mm256_madd_epi16(odd[g], z));
                        }
                    }
                    sum = keep_order(sum);
                }
                for g in 0..G {
                    let scale = half8(w.add(g * t.group_bytes + block * 16));
                    for r in 0..R {
                        let x = broadcast_f32(a.add(r * t.row_bytes + offset_of!(WideBlock, scale)));
                        let scale = _mm256_mul_ps(scale, x);
                        acc[r][g] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][g]), scale, acc[r][g]);
                    }
                }
                a = a.add(size_of::<WideBlock>());
            }
            if PF {
                t.prefetch::<G>(w, LAYOUT.bytes);
            }
            w = w.add(LAYOUT.bytes);
        }
        acc
    }
}
