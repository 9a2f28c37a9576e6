//! Eight f32 lanes. A kernel is written once, over [`Simd`], and runs on AVX2 + FMA + F16C where the machine has them
//! and portably where not.
//!
//! A `Simd` value is the proof that its instructions exist: [`Avx2`] can only be had from [`Isa::detect`]. That is
//! what makes its methods safe. The two instruction sets do not give the same bits (the portable [`Simd::fma`] rounds
//! twice); each of them gives the same bits for a row however the batch is cut.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use self::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use self::avx512::Avx512;
use self::portable::Portable;
use crate::E4m3;

/// Lanes of a vector.
pub(crate) const LANES: usize = 8;

/// Work to be done with vectors.
pub(crate) trait Kernel {
    type Output;
    /// Implementations are `#[inline(always)]`, as is everything they call: only so are the instructions inlined.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// What is done to every lane by itself, on vectors of one length: a function over it gives a lane the same bits
/// whatever the length.
pub(crate) trait Arithmetic: Copy {
    /// A vector.
    type F32: Copy;

    fn splat(self, x: f32) -> Self::F32;
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
}

/// Two vectors, in one register where there are such.
pub(crate) type Pair<S> = <<S as Simd>::Wide as Arithmetic>::F32;

/// Vectors of eight lanes.
pub(crate) trait Simd: Arithmetic {
    /// Arithmetic on pairs.
    type Wide: Arithmetic;
    /// Pairs of sums that registers hold beside their operands.
    const PAIRS: usize;

    /// Runs `kernel` compiled for this instruction set.
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output;
    fn wide(self) -> Self::Wide;

    fn load(self, from: &[f32; LANES]) -> Self::F32;
    fn load_f16(self, from: &[f16; LANES]) -> Self::F32;
    fn load_bf16(self, from: &[bf16; LANES]) -> Self::F32;
    fn load_e4m3(self, from: &[E4m3; LANES]) -> Self::F32;
    fn load_i8(self, from: &[i8; LANES]) -> Self::F32;
    fn store(self, to: &mut [f32; LANES], x: Self::F32);

    fn join(self, first: Self::F32, second: Self::F32) -> Pair<Self>;
    fn split(self, pair: Pair<Self>) -> [Self::F32; 2];
    #[inline(always)]
    fn load_pair(self, from: &[[f32; LANES]; 2]) -> Pair<Self> {
        self.join(self.load(&from[0]), self.load(&from[1]))
    }
    #[inline(always)]
    fn load_f16_pair(self, first: &[f16; LANES], second: &[f16; LANES]) -> Pair<Self> {
        self.join(self.load_f16(first), self.load_f16(second))
    }
    #[inline(always)]
    fn store_pair(self, to: &mut [[f32; LANES]; 2], pair: Pair<Self>) {
        let [first, second] = self.split(pair);
        self.store(&mut to[0], first);
        self.store(&mut to[1], second);
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

/// Pairs of vectors where no register holds both.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Both<S>(S);

/// Calls an operation for the first and for the second vector.
macro_rules! for_both {
    ($($name:ident($($argument:ident),*);)*) => { $(
        #[inline(always)]
        fn $name(self, $($argument: Self::F32),*) -> Self::F32 {
            [self.0.$name($($argument[0]),*), self.0.$name($($argument[1]),*)]
        }
    )* };
}

impl<S: Arithmetic> Arithmetic for Both<S> {
    type F32 = [S::F32; 2];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        [self.0.splat(x); 2]
    }

    for_both! {
        add(a, b);
        sub(a, b);
        mul(a, b);
        div(a, b);
        fma(a, b, c);
        max(a, b);
        min(a, b);
        round(x);
        ldexp(x, n);
        zero_below(y, x, limit);
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
