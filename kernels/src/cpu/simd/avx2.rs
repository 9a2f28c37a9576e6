//! Eight lanes with AVX2, FMA and F16C.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Arithmetic, Both, Kernel, LANES, Simd};
use crate::E4m3;

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(pub(super) ());

impl Arithmetic for Avx2 {
    type F32 = __m256;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: `self` exists, so the machine has AVX.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so the machine has AVX.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so the machine has AVX.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so the machine has AVX.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so the machine has AVX.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: `self` exists, so the machine has FMA.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so the machine has AVX.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so the machine has AVX.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn round(self, x: __m256) -> __m256 {
        // SAFETY: `self` exists, so the machine has AVX.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }
    #[inline(always)]
    fn ldexp(self, x: __m256, n: __m256) -> __m256 {
        // SAFETY: `self` exists, so the machine has AVX2.
        unsafe {
            let exponent = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent))
        }
    }
    #[inline(always)]
    fn zero_below(self, y: __m256, x: __m256, limit: __m256) -> __m256 {
        // SAFETY: `self` exists, so the machine has AVX.
        unsafe { _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, limit), y) }
    }
}

impl Simd for Avx2 {
    type Wide = Both<Self>;
    // Of 16 registers, 4 are left for operands.
    const PAIRS: usize = 6;
    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists, so the machine has the features.
        unsafe { compiled(self, kernel) }
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> __m256 {
        // SAFETY: `self` exists, so the machine has AVX; eight floats are readable, at any alignment.
        unsafe { _mm256_loadu_ps(from.as_ptr()) }
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> __m256 {
        // SAFETY: `self` exists, so the machine has F16C; 16 bytes are readable, at any alignment.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast())) }
    }
    #[inline(always)]
    fn load_bf16(self, from: &[bf16; LANES]) -> __m256 {
        // SAFETY: `self` exists, so the machine has AVX2; 16 bytes are readable, at any alignment.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    /// Exponent and mantissa in an f16's places are too small by 2⁸, the difference of the biases.
    #[inline(always)]
    fn load_e4m3(self, from: &[E4m3; LANES]) -> __m256 {
        // SAFETY: `self` exists, so the machine has AVX2 and F16C; 8 bytes are readable, at any alignment.
        unsafe {
            let codes = _mm_cvtepu8_epi16(_mm_loadl_epi64(from.as_ptr().cast()));
            let magnitudes = _mm_and_si128(codes, _mm_set1_epi16(0x7f));
            let signs = _mm_slli_epi16::<8>(_mm_sub_epi16(codes, magnitudes));
            // All ones are a NaN of f16.
            let nan = _mm_cmpeq_epi16(magnitudes, _mm_set1_epi16(0x7f));
            let halves = _mm_or_si128(_mm_slli_epi16::<7>(magnitudes), _mm_or_si128(signs, nan));
            _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(256.0))
        }
    }
    #[inline(always)]
    fn load_i8(self, from: &[i8; LANES]) -> __m256 {
        // SAFETY: `self` exists, so the machine has AVX2; 8 bytes are readable, at any alignment.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], x: __m256) {
        // SAFETY: `self` exists, so the machine has AVX; eight floats are writable, at any alignment.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn sum(self, x: __m256) -> f32 {
        // SAFETY: `self` exists, so the machine has AVX.
        unsafe {
            let quarters = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let halves = _mm_add_ps(quarters, _mm_movehl_ps(quarters, quarters));
            _mm_cvtss_f32(_mm_add_ss(halves, _mm_movehdup_ps(halves)))
        }
    }
    #[inline(always)]
    fn max_lane(self, x: __m256) -> f32 {
        // SAFETY: `self` exists, so the machine has AVX.
        unsafe {
            let quarters = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let halves = _mm_max_ps(quarters, _mm_movehl_ps(quarters, quarters));
            _mm_cvtss_f32(_mm_max_ss(halves, _mm_movehdup_ps(halves)))
        }
    }
    #[inline(always)]
    fn wide(self) -> Both<Self> {
        Both(self)
    }
    #[inline(always)]
    fn join(self, first: __m256, second: __m256) -> [__m256; 2] {
        [first, second]
    }
    #[inline(always)]
    fn split(self, pair: [__m256; 2]) -> [__m256; 2] {
        pair
    }
    #[inline(always)]
    fn prefetch<T>(self, data: &[T]) {
        let start = data.as_ptr().cast::<i8>();
        for line in (0..size_of_val(data)).step_by(64) {
            // SAFETY: a prefetch of any address is a hint.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(line)) };
        }
    }
}
