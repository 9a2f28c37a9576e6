//! Eight f32 lanes. A kernel is written once, over [`Simd`], and runs on AVX2 + FMA + F16C where the machine has them
//! and portably where not.
//!
//! A `Simd` value is the proof that its instructions exist: [`Avx2`] can only be had from [`Isa::detect`]. That is
//! what makes its methods safe. The two instruction sets do not give the same bits (the portable [`Simd::fma`] rounds
//! twice); each of them gives the same bits for a row however the batch is cut.

use half::{bf16, f16};

use crate::E4m3;

/// Lanes of a vector.
pub(crate) const LANES: usize = 8;

/// Work to be done with vectors.
pub(crate) trait Kernel {
    type Output;
    /// Implementations are `#[inline(always)]`, as is everything they call: only so are the instructions inlined.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

pub(crate) trait Simd: Copy {
    type F32: Copy;
    /// Two vectors, in one register where there are such.
    type Pair: Copy;
    /// Pairs of sums that registers hold beside their operands.
    const PAIRS: usize;

    /// Runs `kernel` compiled for this instruction set.
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output;

    fn splat(self, x: f32) -> Self::F32;
    fn load(self, from: &[f32; LANES]) -> Self::F32;
    fn load_f16(self, from: &[f16; LANES]) -> Self::F32;
    fn load_bf16(self, from: &[bf16; LANES]) -> Self::F32;
    fn load_e4m3(self, from: &[E4m3; LANES]) -> Self::F32;
    fn load_i8(self, from: &[i8; LANES]) -> Self::F32;
    fn store(self, to: &mut [f32; LANES], x: Self::F32);

    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`.
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// `b` where either is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `b` where either is NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// To the nearest integer, ties to even; for |x| < 2²².
    fn round(self, x: Self::F32) -> Self::F32;
    /// `x · 2ⁿ` for an integral `n`, where that is a normal number.
    fn ldexp(self, x: Self::F32, n: Self::F32) -> Self::F32;
    /// 0 where `x < limit`, else `y`.
    fn zero_below(self, y: Self::F32, x: Self::F32, limit: Self::F32) -> Self::F32;

    fn join(self, first: Self::F32, second: Self::F32) -> Self::Pair;
    fn split(self, pair: Self::Pair) -> [Self::F32; 2];
    fn splat_pair(self, x: f32) -> Self::Pair;
    /// `a * b + c`.
    fn fma_pair(self, a: Self::Pair, b: Self::Pair, c: Self::Pair) -> Self::Pair;
    #[inline(always)]
    fn load_f16_pair(self, first: &[f16; LANES], second: &[f16; LANES]) -> Self::Pair {
        self.join(self.load_f16(first), self.load_f16(second))
    }

    /// Asks for `data`'s cache lines, to be there when they are read soon.
    fn prefetch<T>(self, data: &[T]);

    /// Up to eight values, followed by zeros.
    #[inline(always)]
    fn load_partial(self, from: &[f32]) -> Self::F32 {
        let mut lanes = [0.0; LANES];
        lanes[..from.len()].copy_from_slice(from);
        self.load(&lanes)
    }

    #[inline(always)]
    fn to_array(self, x: Self::F32) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, x);
        lanes
    }

    /// The sum of the lanes, in the order of this default.
    #[inline(always)]
    fn sum(self, x: Self::F32) -> f32 {
        let l = self.to_array(x);
        ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
    }

    /// The largest lane; any of them if one is NaN.
    #[inline(always)]
    fn max_lane(self, x: Self::F32) -> f32 {
        self.to_array(x).into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// The instruction set in use.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Isa {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Isa {
    /// The best one of this machine.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            let avx2 = Avx2(());
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                return Self::Avx512(Avx512(avx2));
            }
            return Self::Avx2(avx2);
        }
        Self::Portable
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512",
        }
    }

    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Portable => Portable.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => simd.vectorize(kernel),
        }
    }
}

/// Arrays, which compilers turn into whatever vectors the target has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

#[inline(always)]
fn map(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

impl Simd for Portable {
    type F32 = [f32; LANES];
    type Pair = [Self::F32; 2];
    const PAIRS: usize = 3;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F32 {
        *from
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> Self::F32 {
        map(|i| from[i].to_f32())
    }
    #[inline(always)]
    fn load_bf16(self, from: &[bf16; LANES]) -> Self::F32 {
        map(|i| from[i].to_f32())
    }
    #[inline(always)]
    fn load_e4m3(self, from: &[E4m3; LANES]) -> Self::F32 {
        map(|i| from[i].to_f32())
    }
    #[inline(always)]
    fn load_i8(self, from: &[i8; LANES]) -> Self::F32 {
        map(|i| from[i].into())
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], x: Self::F32) {
        *to = x;
    }
    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // Not `mul_add`, which is a slow library call on a machine without the instruction.
        map(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn round(self, x: Self::F32) -> Self::F32 {
        // Adding 1.5 · 2²³ leaves no bits for a fraction.
        const SHIFT: f32 = 12_582_912.0;
        map(|i| (x[i] + SHIFT) - SHIFT)
    }
    #[inline(always)]
    fn ldexp(self, x: Self::F32, n: Self::F32) -> Self::F32 {
        map(|i| f32::from_bits(x[i].to_bits().wrapping_add((n[i] as i32 as u32) << 23)))
    }
    #[inline(always)]
    fn zero_below(self, y: Self::F32, x: Self::F32, limit: Self::F32) -> Self::F32 {
        map(|i| if x[i] < limit[i] { 0.0 } else { y[i] })
    }
    #[inline(always)]
    fn join(self, first: Self::F32, second: Self::F32) -> Self::Pair {
        [first, second]
    }
    #[inline(always)]
    fn split(self, pair: Self::Pair) -> [Self::F32; 2] {
        pair
    }
    #[inline(always)]
    fn splat_pair(self, x: f32) -> Self::Pair {
        [[x; LANES]; 2]
    }
    #[inline(always)]
    fn fma_pair(self, a: Self::Pair, b: Self::Pair, c: Self::Pair) -> Self::Pair {
        [self.fma(a[0], b[0], c[0]), self.fma(a[1], b[1], c[1])]
    }
    #[inline(always)]
    fn prefetch<T>(self, _data: &[T]) {
        // There is no portable way to ask.
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::{E4m3, Kernel, LANES, Simd};

    /// Proof of AVX2, FMA and F16C.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Avx2(pub(super) ());

    impl Simd for Avx2 {
        type F32 = __m256;
        type Pair = [__m256; 2];
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
        fn splat(self, x: f32) -> __m256 {
            // SAFETY: `self` exists, so the machine has AVX.
            unsafe { _mm256_set1_ps(x) }
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
        fn join(self, first: __m256, second: __m256) -> [__m256; 2] {
            [first, second]
        }
        #[inline(always)]
        fn split(self, pair: [__m256; 2]) -> [__m256; 2] {
            pair
        }
        #[inline(always)]
        fn splat_pair(self, x: f32) -> [__m256; 2] {
            [self.splat(x); 2]
        }
        #[inline(always)]
        fn fma_pair(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
            [self.fma(a[0], b[0], c[0]), self.fma(a[1], b[1], c[1])]
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
}

/// AVX2's vectors, and pairs of them in one register. Every lane sees the operations that it sees on AVX2, so the bits
/// are the same.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::{Avx2, E4m3, Kernel, LANES, Simd};

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

    impl Simd for Avx512 {
        type F32 = __m256;
        type Pair = __m512;
        // Of 32 registers.
        const PAIRS: usize = 12;

        #[inline(always)]
        fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
            fn compiled<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
                kernel.run(simd)
            }
            // SAFETY: `self` exists, so the machine has the features.
            unsafe { compiled(self, kernel) }
        }

        as_avx2! {
            splat(x: f32) -> __m256;
            load(from: &[f32; LANES]) -> __m256;
            load_f16(from: &[f16; LANES]) -> __m256;
            load_bf16(from: &[bf16; LANES]) -> __m256;
            load_e4m3(from: &[E4m3; LANES]) -> __m256;
            load_i8(from: &[i8; LANES]) -> __m256;
            store(to: &mut [f32; LANES], x: __m256) -> ();
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
        fn splat_pair(self, x: f32) -> __m512 {
            // SAFETY: `self` exists, so the machine has AVX-512 F.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        fn fma_pair(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: `self` exists, so the machine has AVX-512 F.
            unsafe { _mm512_fmadd_ps(a, b, c) }
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
        fn prefetch<T>(self, data: &[T]) {
            self.0.prefetch(data);
        }
    }
}
