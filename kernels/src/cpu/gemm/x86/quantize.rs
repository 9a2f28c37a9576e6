//! Activation quantization, 32 values at a time.

use std::arch::x86_64::*;

use crate::cpu::gemm::activations::{NarrowBlock, WideBlock, scale_and_inverse};
use crate::cpu::quant::BLOCK;

/// Codes in rising K and the scale of a block.
///
/// # Safety
/// AVX2; 32 values at `x` are readable.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn codes(x: *const f32) -> (__m256i, f32) {
    let magnitude = _mm256_set1_epi32(0x7fff_ffff);
    // SAFETY: the caller's promise.
    let mut v: [__m256; 4] = std::array::from_fn(|i| unsafe { _mm256_loadu_ps(x.add(i * 8)) });
    let m = v.map(|v| _mm256_and_si256(_mm256_castps_si256(v), magnitude));
    // Magnitudes order like their bits; as integers a NaN is the largest instead of getting lost.
    let m = _mm256_max_epi32(_mm256_max_epi32(m[0], m[1]), _mm256_max_epi32(m[2], m[3]));
    let m = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256::<1>(m));
    let m = _mm_max_epi32(m, _mm_bsrli_si128::<8>(m));
    let m = _mm_max_epi32(m, _mm_bsrli_si128::<4>(m));
    let (scale, inverse) = scale_and_inverse(_mm_cvtsi128_si32(m) as u32);
    if scale.is_nan() {
        v = [_mm256_setzero_ps(); 4];
    }
    let inverse = _mm256_set1_ps(inverse);
    let q = v.map(|v| _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse)));
    let q = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    (
        _mm256_permutevar8x32_epi32(q, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)),
        scale,
    )
}

/// Two i16 as they lie in an i32.
fn lanes(pair: i32) -> [i16; 2] {
    [pair as i16, (pair >> 16) as i16]
}

/// Quantizes the whole blocks of `x`.
///
/// # Safety
/// AVX2.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::cpu::gemm) unsafe fn quantize_narrow(x: &[f32], out: &mut [NarrowBlock]) {
    for (x, out) in x.chunks_exact(BLOCK).zip(out) {
        // SAFETY: `x` is one block.
        let (q, scale) = unsafe { codes(x.as_ptr()) };
        let s = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);
        let halves = [_mm256_castsi256_si128(s), _mm256_extracti128_si256::<1>(s)].map(|s| {
            let s = _mm_add_epi16(s, _mm_bsrli_si128::<8>(s));
            _mm_add_epi16(s, _mm_bsrli_si128::<4>(s))
        });
        let first = lanes(_mm_cvtsi128_si32(halves[0]));
        let sums = lanes(_mm_cvtsi128_si32(_mm_add_epi16(halves[0], halves[1])));
        // SAFETY: `codes` holds 32 bytes.
        unsafe { _mm256_storeu_si256(out.codes.as_mut_ptr().cast(), q) };
        out.start_8 = sums.map(|s| -8 * s);
        out.scale = scale;
        out.scaled_sum = scale * f32::from(sums[0] + sums[1]);
        out.start_32_first = first.map(|s| -32 * s);
        out.start = -8 * i32::from(sums[0] + sums[1]);
    }
}

/// Quantizes the whole blocks of `x`.
///
/// # Safety
/// AVX2.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::cpu::gemm) unsafe fn quantize_wide(x: &[f32], out: &mut [WideBlock]) {
    for (x, out) in x.chunks_exact(BLOCK).zip(out) {
        // SAFETY: `x` is one block.
        let (q, scale) = unsafe { codes(x.as_ptr()) };
        let even_256 = _mm256_slli_epi16::<8>(q);
        let even = _mm256_srai_epi16::<8>(even_256);
        let odd = _mm256_sub_epi16(_mm256_srai_epi16::<8>(q), even_256);
        let s = _mm256_madd_epi16(even, _mm256_set1_epi16(-128));
        let s = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256::<1>(s));
        let s = _mm_add_epi32(s, _mm_bsrli_si128::<8>(s));
        // SAFETY: both arrays hold 32 bytes.
        unsafe {
            _mm256_storeu_si256(out.even.as_mut_ptr().cast(), even);
            _mm256_storeu_si256(out.odd.as_mut_ptr().cast(), odd);
        }
        out.start = _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_bsrli_si128::<4>(s)));
        out.scale = scale;
    }
}
