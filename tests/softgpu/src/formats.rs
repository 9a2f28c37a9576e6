//! Number formats of matrices and messages.

use half::{bf16, f16};
use libc::c_int;

/// Element types of a matrix, `cudaDataType_t`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Format {
    F32,
    F16,
    Bf16,
    /// FP8 with 4 exponent and 3 mantissa bits (OCP 8-bit floating point, E4M3): no infinity, 448 the largest.
    E4m3,
}

impl Format {
    pub(crate) fn of(data_type: c_int) -> Option<Self> {
        match data_type {
            0 => Some(Self::F32),
            2 => Some(Self::F16),
            14 => Some(Self::Bf16),
            28 => Some(Self::E4m3),
            _ => None,
        }
    }

    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::E4m3 => 1,
        }
    }

    /// Reads element `index` of the array at `address`.
    ///
    /// # Safety
    /// The element lies in memory that nobody writes meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn read(self, address: usize, index: usize) -> f32 {
        // SAFETY: the caller's promise; unaligned reads, because nobody promised alignment.
        unsafe {
            match self {
                Self::F32 => (address as *const f32).add(index).read_unaligned(),
                Self::F16 => f16::from_bits((address as *const u16).add(index).read_unaligned()).to_f32(),
                Self::Bf16 => bf16::from_bits((address as *const u16).add(index).read_unaligned()).to_f32(),
                Self::E4m3 => e4m3_to_f32(*(address as *const u8).add(index)),
            }
        }
    }

    /// Writes element `index`, rounded to nearest even.
    ///
    /// # Safety
    /// The element lies in memory that nobody else uses meanwhile.
    pub(crate) unsafe fn write(self, address: usize, index: usize, value: f32) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F32 => (address as *mut f32).add(index).write_unaligned(value),
                Self::F16 => (address as *mut u16)
                    .add(index)
                    .write_unaligned(f16::from_f32(value).to_bits()),
                Self::Bf16 => (address as *mut u16)
                    .add(index)
                    .write_unaligned(bf16::from_f32(value).to_bits()),
                Self::E4m3 => *(address as *mut u8).add(index) = f32_to_e4m3(value),
            }
        }
    }
}

pub(crate) fn e4m3_to_f32(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Rounds to nearest even; what is larger than 448 becomes 448.
fn f32_to_e4m3(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) as u8 & 0x80;
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return sign | 0x7f;
    }
    if magnitude >= 448.0 {
        return sign | 0x7e;
    }
    if magnitude < 2f32.powi(-6) {
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    let bits = magnitude.to_bits();
    let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
    sign | ((((rounded >> 23) - 120) << 3) | (rounded >> 20 & 7)) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fp8_number_survives_a_round_trip() {
        for bits in 0..=u8::MAX {
            let value = e4m3_to_f32(bits);
            if value.is_nan() {
                assert_eq!(bits & 0x7f, 0x7f);
            } else {
                assert_eq!(f32_to_e4m3(value), bits, "{value}");
            }
        }
    }

    #[test]
    fn fp8_rounds_to_the_nearest_and_ties_to_even() {
        let rounded = |value| e4m3_to_f32(f32_to_e4m3(value));
        assert_eq!(rounded(1.0625), 1.0); // between 1 and 1.125, even mantissa 0
        assert_eq!(rounded(1.1875), 1.25); // between 1.125 and 1.25, even mantissa 2
        assert_eq!(rounded(1.07), 1.125);
        assert_eq!(rounded(1000.0), 448.0);
        assert_eq!(rounded(-0.0018), -1.0 / 512.0); // subnormal
    }
}
