//! AVX2's vectors, and pairs of them in one register. Every lane sees the operations that it sees on AVX2, so the bits
//! are the same.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Arithmetic, Avx2, Kernel, LANES, Simd};
use crate::E4m3;

/// Proof of AVX-512 F, BW, DQ and VL, and of what [`Avx2`] proves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(pub(super) Avx2);

/// What 256 bits are enough for.
macro_rules! as_avx2 {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => { $(
        #[inline(always)]
        fn $name(self, $($argument: $type),*) -> $result {
            self.0.$name($($argument),*)
        }
    )* };
}

impl Arithmetic for Avx512 {
    type F32 = __m256;

    as_avx2! {
        splat(x: f32) -> __m256;
        add(a: __m256, b: __m256) -> __m256;
        sub(a: __m256, b: __m256) -> __m256;
        mul(a: __m256, b: __m256) -> __m256;
        div(a: __m256, b: __m256) -> __m256;
        fma(a: __m256, b: __m256, c: __m256) -> __m256;
        max(a: __m256, b: __m256) -> __m256;
        min(a: __m256, b: __m256) -> __m256;
        round(x: __m256) -> __m256;
        ldexp(x: __m256, n: __m256) -> __m256;
        zero_below(y: __m256, x: __m256, limit: __m256) -> __m256;
    }
}

impl Simd for Avx512 {
    type Wide = Zmm;
    // Of 32 registers.
    const PAIRS: usize = 24;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        fn compiled<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists, so the machine has the features.
        unsafe { compiled(self, kernel) }
    }
    #[inline(always)]
    fn wide(self) -> Zmm {
        Zmm(self)
    }

    as_avx2! {
        load(from: &[f32; LANES]) -> __m256;
        load_f16(from: &[f16; LANES]) -> __m256;
        load_bf16(from: &[bf16; LANES]) -> __m256;
        load_e4m3(from: &[E4m3; LANES]) -> __m256;
        load_i8(from: &[i8; LANES]) -> __m256;
        store(to: &mut [f32; LANES], x: __m256) -> ();
        sum(x: __m256) -> f32;
        max_lane(x: __m256) -> f32;
    }

    #[inline(always)]
    fn join(self, first: __m256, second: __m256) -> __m512 {
        // SAFETY: `self` exists, so the machine has AVX-512 DQ.
        unsafe { _mm512_insertf32x8::<1>(_mm512_castps256_ps512(first), second) }
    }
    #[inline(always)]
    fn split(self, pair: __m512) -> [__m256; 2] {
        // SAFETY: `self` exists, so the machine has AVX-512 DQ.
        unsafe { [_mm512_castps512_ps256(pair), _mm512_extractf32x8_ps::<1>(pair)] }
    }
    #[inline(always)]
    fn load_pair(self, from: &[[f32; LANES]; 2]) -> __m512 {
        // SAFETY: `self` exists, so the machine has AVX-512 F; sixteen floats are readable, at any alignment.
        unsafe { _mm512_loadu_ps(from.as_ptr().cast()) }
    }
    #[inline(always)]
    fn load_f16_pair(self, first: &[f16; LANES], second: &[f16; LANES]) -> __m512 {
        // SAFETY: `self` exists, so the machine has AVX-512 F; 16 bytes are readable at each, at any alignment.
        unsafe {
            let first = _mm_loadu_si128(first.as_ptr().cast());
            let second = _mm_loadu_si128(second.as_ptr().cast());
            _mm512_cvtph_ps(_mm256_set_m128i(second, first))
        }
    }
    #[inline(always)]
    fn store_pair(self, to: &mut [[f32; LANES]; 2], pair: __m512) {
        // SAFETY: `self` exists, so the machine has AVX-512 F; sixteen floats are writable, at any alignment.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr().cast(), pair) }
    }
    #[inline(always)]
    fn prefetch<T>(self, data: &[T]) {
        self.0.prefetch(data);
    }
}

/// Arithmetic on 512 bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Zmm(Avx512);

impl Arithmetic for Zmm {
    type F32 = __m512;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` exists, so the machine has AVX-512 F.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so the machine has AVX-512 F.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so the machine has AVX-512 F.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so the machine has AVX-512 F.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so the machine has AVX-512 F.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` exists, so the machine has AVX-512 F.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so the machine has AVX-512 F.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so the machine has AVX-512 F.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn round(self, x: __m512) -> __m512 {
        // SAFETY: `self` exists, so the machine has AVX-512 F.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }
    #[inline(always)]
    fn ldexp(self, x: __m512, n: __m512) -> __m512 {
        // SAFETY: `self` exists, so the machine has AVX-512 F.
        unsafe {
            let exponent = _mm512_slli_epi32::<23>(_mm512_cvtps_epi32(n));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), exponent))
        }
    }
    #[inline(always)]
    fn zero_below(self, y: __m512, x: __m512, limit: __m512) -> __m512 {
        // SAFETY: `self` exists, so the machine has AVX-512 F.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, limit), y) }
    }
}
