//! Elementary functions that give the same bits on every machine with the same instruction set, whatever its C library.

use super::simd::Arithmetic;

/// Smallest argument whose [`exp`] is a normal number.
const EXP_MIN: f32 = -87.336_54;
/// Largest argument whose [`exp`] is finite.
const EXP_MAX: f32 = 88.722_83;

/// `eˣ` of every lane: within 1.2 units in the last place (the tests say so), exactly 1 at 0, 0 below -87.34
/// (results that are not normal numbers), constant above 88.72; NaN of NaN.
///
/// Cody and Waite's reduction to |r| <= ln 2 / 2 and the polynomial of Moshier's Cephes `expf`.
#[inline(always)]
pub(crate) fn exp<A: Arithmetic>(simd: A, x: A::F32) -> A::F32 {
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const COEFFICIENTS: [f32; 6] = [
        1.987_569_1e-4,
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ];
    let clamped = simd.min(simd.splat(EXP_MAX), simd.max(simd.splat(EXP_MIN), x));
    let n = simd.round(simd.mul(clamped, simd.splat(std::f32::consts::LOG2_E)));
    let r = simd.fma(n, simd.splat(-LN_2_HIGH), clamped);
    let r = simd.fma(n, simd.splat(-LN_2_LOW), r);
    let mut p = simd.splat(COEFFICIENTS[0]);
    for c in &COEFFICIENTS[1..] {
        p = simd.fma(p, r, simd.splat(*c));
    }
    let y = simd.add(simd.fma(p, simd.mul(r, r), r), simd.splat(1.0));
    simd.zero_below(simd.ldexp(y, n), x, simd.splat(EXP_MIN))
}

/// Natural logarithm of a positive normal number, within 1 unit in the last place: fdlibm's `e_log.c`.
pub(crate) fn ln(x: f64) -> f64 {
    const LN_2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
    const LN_2_LOW: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);
    const COEFFICIENTS: [f64; 7] = [
        1.479_819_860_511_658_6e-1,
        1.531_383_769_920_937_3e-1,
        1.818_357_216_161_805e-1,
        2.222_219_843_214_978_4e-1,
        2.857_142_874_366_239e-1,
        3.999_999_999_940_942e-1,
        6.666_666_666_666_735e-1,
    ];
    // x = 2^k (1 + f), with 1 + f in [sqrt(1/2), sqrt(2)).
    const SQRT_HALF: u64 = 0x3fe6_a09e_667f_3bcd;
    let k = (x.to_bits().wrapping_sub(SQRT_HALF) as i64) >> 52;
    let f = f64::from_bits(x.to_bits().wrapping_sub((k as u64) << 52)) - 1.0;
    let k = k as f64;
    let s = f / (2.0 + f);
    let z = s * s;
    let mut r = 0.0;
    for c in COEFFICIENTS {
        r = (r + c) * z;
    }
    let half_square = 0.5 * f * f;
    k * LN_2_HIGH - ((half_square - (s * (half_square + r) + k * LN_2_LOW)) - f)
}

/// `(sin x, cos x)`, absolute error below 2⁻⁵⁰ for 0 <= x < 2²⁰, growing with x beyond: fdlibm's `k_sin.c` and
/// `k_cos.c` after a reduction by multiples of π/2 in two parts, of which the first has 33 bits.
pub(crate) fn sin_cos(x: f64) -> (f64, f64) {
    const HALF_PI_HIGH: f64 = f64::from_bits(0x3ff9_21fb_5440_0000);
    const HALF_PI_LOW: f64 = f64::from_bits(0x3dd0_b461_1a62_6331);
    const SIN: [f64; 6] = [
        1.589_690_995_211_55e-10,
        -2.505_076_025_340_686_3e-8,
        2.755_731_370_707_006_8e-6,
        -1.984_126_982_985_795e-4,
        8.333_333_333_322_49e-3,
        -1.666_666_666_666_663_2e-1,
    ];
    const COS: [f64; 6] = [
        -1.135_964_755_778_819_5e-11,
        2.087_572_321_298_175e-9,
        -2.755_731_435_139_066_3e-7,
        2.480_158_728_947_673e-5,
        -1.388_888_888_887_411e-3,
        4.166_666_666_666_66e-2,
    ];
    let n = (x * std::f64::consts::FRAC_2_PI).round_ties_even();
    let r = (x - n * HALF_PI_HIGH) - n * HALF_PI_LOW;
    let z = r * r;
    let polynomial = |coefficients: [f64; 6]| coefficients.into_iter().fold(0.0, |p, c| p * z + c);
    let sin = r + r * z * polynomial(SIN);
    let cos = 1.0 - (0.5 * z - z * z * polynomial(COS));
    match n as i64 & 3 {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Isa, Kernel, LANES, Simd};
    use super::*;

    struct Exp([f32; LANES]);
    impl Kernel for Exp {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> [f32; LANES] {
            simd.to_array(exp(simd, simd.load(&self.0)))
        }
    }

    fn exp_of(isa: Isa, x: f32) -> f32 {
        isa.run(Exp([x; LANES]))[3]
    }

    #[test]
    fn exp_is_within_its_error_over_all_its_range() {
        for isa in [Isa::detect(), Isa::Portable] {
            let mut worst = 0.0f64;
            let limits = [
                0.0f32.to_bits()..EXP_MAX.to_bits(),
                0x8000_0000..EXP_MIN.to_bits(),
            ];
            for bits in limits.into_iter().flat_map(|r| r.step_by(1009)) {
                let x = f32::from_bits(bits);
                let want = f64::from(x).exp();
                let ulp = f64::from(f32::from_bits((want as f32).to_bits() + 1)) - f64::from(want as f32);
                worst = worst.max((f64::from(exp_of(isa, x)) - want).abs() / ulp);
            }
            assert!(worst < 1.2, "{}: {worst} units in the last place", isa.name());
        }
    }

    struct ExpOfPair([[f32; LANES]; 2]);
    impl Kernel for ExpOfPair {
        type Output = [[f32; LANES]; 2];
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> [[f32; LANES]; 2] {
            let mut lanes = [[0.0; LANES]; 2];
            simd.store_pair(&mut lanes, exp(simd.wide(), simd.load_pair(&self.0)));
            lanes
        }
    }

    /// One NaN is as good as another.
    fn bits_of(x: f32) -> u32 {
        if x.is_nan() { f32::NAN } else { x }.to_bits()
    }

    #[test]
    fn exp_of_a_pair_has_the_bits_of_its_vectors() {
        for isa in [Isa::detect(), Isa::Portable] {
            for bits in (0..=u32::MAX).step_by(10_007) {
                // Each vector with other values in its lanes, so that lanes that change places are found.
                let pair: [[f32; LANES]; 2] = std::array::from_fn(|half| {
                    std::array::from_fn(|lane| f32::from_bits(bits ^ (half * LANES + lane) as u32))
                });
                let want = pair.map(|x| isa.run(Exp(x)).map(bits_of));
                let got = isa.run(ExpOfPair(pair)).map(|x| x.map(bits_of));
                assert_eq!(got, want, "{}: {pair:?}", isa.name());
            }
        }
    }

    #[test]
    fn exp_at_the_edges() {
        for isa in [Isa::detect(), Isa::Portable] {
            assert_eq!(exp_of(isa, 0.0), 1.0);
            assert_eq!(exp_of(isa, -0.0), 1.0);
            assert_eq!(exp_of(isa, f32::NEG_INFINITY), 0.0);
            assert_eq!(exp_of(isa, -87.5), 0.0);
            assert!(exp_of(isa, f32::INFINITY) > 3.4e38);
            assert!(exp_of(isa, f32::NAN).is_nan());
        }
    }

    #[test]
    fn ln_is_within_its_error() {
        let mut x = 1e-12f64;
        while x < 1e12 {
            let want = x.ln();
            assert!(
                (ln(x) - want).abs() <= want.abs() * 2.3e-16,
                "ln({x}) = {} not {want}",
                ln(x)
            );
            x *= 1.000_37;
        }
        assert_eq!(ln(1.0), 0.0);
    }

    #[test]
    fn sin_cos_are_within_their_error() {
        for i in 0..200_000u32 {
            let x = f64::from(i) * 5.237_1;
            let (sin, cos) = sin_cos(x);
            assert!((sin - x.sin()).abs() < 9e-16, "sin({x}) = {sin}");
            assert!((cos - x.cos()).abs() < 9e-16, "cos({x}) = {cos}");
        }
        assert_eq!(sin_cos(0.0), (0.0, 1.0));
    }
}
