//! E4M3, the 8-bit float of KV caches and weights: OCP 8-bit Floating Point Specification (2023), section 5.1. A sign, 4
//! bits of exponent with bias 7, 3 bits of mantissa. There is no infinity; the largest magnitude is 448.

/// One number. The device's conversions (kernels/cuda/phx.cuh) give the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct E4m3(u8);

const SMALLEST_NORMAL: f32 = 1.0 / 64.0;
/// Added to a magnitude below [`SMALLEST_NORMAL`], it leaves no bits below 2⁻⁹, the step of subnormal numbers.
const SUBNORMAL_SHIFT: f32 = 16_384.0;
/// Bits of a float's mantissa that E4M3 has not.
const DROPPED: u32 = 20;
/// The difference of the exponents' biases.
const BIAS: u32 = 127 - 7;

impl E4m3 {
    /// The largest magnitude.
    pub const MAX: f32 = 448.0;
    pub const NAN: Self = Self(0x7f);
    pub const ZERO: Self = Self(0);

    pub const fn from_bits(bits: u8) -> Self {
        Self(bits)
    }

    pub const fn to_bits(self) -> u8 {
        self.0
    }

    /// Rounds to nearest, ties to even. What lies beyond ±448, infinities too, becomes ±448; NaN stays NaN, without its
    /// sign. PTX calls this `cvt.rn.satfinite.e4m3x2.f32`.
    #[inline]
    pub fn from_f32(value: f32) -> Self {
        if value.is_nan() {
            return Self::NAN;
        }
        let sign = (value.to_bits() >> 24) as u8 & 0x80;
        let magnitude = value.abs().min(Self::MAX);
        let code = if magnitude < SMALLEST_NORMAL {
            (magnitude + SUBNORMAL_SHIFT).to_bits() - SUBNORMAL_SHIFT.to_bits()
        } else {
            let bits = magnitude.to_bits();
            let rounded = bits + (1 << (DROPPED - 1)) - 1 + (bits >> DROPPED & 1);
            (rounded >> DROPPED) - (BIAS << 3)
        };
        Self(sign | code as u8)
    }

    /// Exact.
    #[inline]
    pub const fn to_f32(self) -> f32 {
        VALUES[self.0 as usize]
    }
}

/// The value of each code.
static VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (sign, magnitude) = ((code as u32 & 0x80) << 24, code as u32 & 0x7f);
        // The code's exponent and mantissa in a float's places: too small by the difference of the biases, also where
        // both are subnormal.
        values[code] = if magnitude == 0x7f {
            f32::from_bits(sign | 0x7fc0_0000)
        } else {
            f32::from_bits(sign | magnitude << DROPPED) * f32::from_bits((127 + BIAS) << 23)
        };
        code += 1;
    }
    values
};
