//! Eight lanes on any machine.

use half::{bf16, f16};

use super::{Arithmetic, Both, Kernel, LANES, Pair, Simd};
use crate::E4m3;

/// Arrays, which compilers turn into whatever vectors the target has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

#[inline(always)]
fn map(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

impl Arithmetic for Portable {
    type F32 = [f32; LANES];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        [x; LANES]
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
}

impl Simd for Portable {
    type Wide = Both<Self>;
    const PAIRS: usize = 3;
    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
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
    fn wide(self) -> Both<Self> {
        Both(self)
    }
    #[inline(always)]
    fn join(self, first: Self::F32, second: Self::F32) -> Pair<Self> {
        [first, second]
    }
    #[inline(always)]
    fn split(self, pair: Pair<Self>) -> [Self::F32; 2] {
        pair
    }
    #[inline(always)]
    fn prefetch<T>(self, _data: &[T]) {
        // There is no portable way to ask.
    }
}
