//! Frequencies of the rotary position embedding.

use std::f64::consts::TAU;

use super::ConfigError;

/// Rotary position embedding (Su et al., 2021) and its context-extension variants.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    pub theta: f32,
    /// Leading dimensions of a head that rotate; even, at most `head_dim`.
    pub rotary_dim: usize,
    pub layout: RopeLayout,
    pub scaling: RopeScaling,
}

/// How the dimensions of a head pair up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// `(i, i + rotary_dim / 2)`: Hugging Face checkpoints.
    Half,
    /// `(2 i, 2 i + 1)`: GGUF files of the llama architecture, whose q and k rows are permuted for it.
    Interleaved,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions divided by `factor`.
    Linear {
        factor: f32,
    },
    /// Llama 3.1: low frequencies scaled, high ones kept, a ramp between.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_max_position_embeddings: usize,
    },
    /// YaRN (Peng et al., 2023).
    Yarn {
        factor: f32,
        original_max_position_embeddings: usize,
        beta_fast: f32,
        beta_slow: f32,
        /// Multiplies cos and sin.
        attention_factor: f32,
    },
    /// Each frequency divided by its own factor: `rope_freqs.weight` of GGUF files, which is how they hold Llama 3.1's
    /// scaling.
    FrequencyFactors {
        /// `rotary_dim / 2` of them.
        factors: Vec<f32>,
    },
}

impl RopeConfig {
    /// `rotary_dim / 2` inverse frequencies, scaling applied, and what multiplies cos and sin. Computed in f64.
    pub fn inverse_frequencies(&self) -> (Vec<f32>, f32) {
        let (theta, dim) = (f64::from(self.theta), self.rotary_dim as f64);
        let scale = |i: usize| {
            let base = theta.powf(-2.0 * i as f64 / dim);
            match &self.scaling {
                RopeScaling::None => base,
                RopeScaling::Linear { factor } => base / f64::from(*factor),
                RopeScaling::Llama3 { .. } => self.llama3(base),
                RopeScaling::Yarn { .. } => self.yarn(base, i),
                RopeScaling::FrequencyFactors { factors } => {
                    base / f64::from(factors.get(i).copied().unwrap_or(1.0))
                }
            }
        };
        let attention_factor = match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        };
        (
            (0..self.rotary_dim / 2).map(|i| scale(i) as f32).collect(),
            attention_factor,
        )
    }

    /// The rule published with Llama 3.1 (`apply_scaling` in meta-llama/llama-models).
    fn llama3(&self, base: f64) -> f64 {
        let RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } = self.scaling
        else {
            return base;
        };
        let (factor, low, high) = (
            f64::from(factor),
            f64::from(low_freq_factor),
            f64::from(high_freq_factor),
        );
        let original = original_max_position_embeddings as f64;
        let wavelength = TAU / base;
        if wavelength < original / high {
            base
        } else if wavelength > original / low {
            base / factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            (1.0 - smooth) * base / factor + smooth * base
        }
    }

    /// Section 3.2 of the YaRN paper, with the bounds of the ramp rounded outward as the authors' code does.
    fn yarn(&self, base: f64, i: usize) -> f64 {
        let RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            ..
        } = self.scaling
        else {
            return base;
        };
        let (dim, original) = (self.rotary_dim as f64, original_max_position_embeddings as f64);
        // The dimension whose frequency turns so many times over the original context.
        let dimension = |rotations: f32| {
            dim * (original / (f64::from(rotations) * TAU)).ln() / (2.0 * f64::from(self.theta).ln())
        };
        let low = dimension(beta_fast).floor().max(0.0);
        let high = dimension(beta_slow).ceil().min(dim - 1.0);
        let width = if high == low { 0.001 } else { high - low };
        let interpolated = ((i as f64 - low) / width).clamp(0.0, 1.0);
        base / f64::from(factor) * interpolated + base * (1.0 - interpolated)
    }

    pub(super) fn validate(&self, head_dim: usize) -> Result<(), ConfigError> {
        if !(self.theta > 1.0 && self.theta <= 1e15) {
            return Err(ConfigError::out_of_range(
                "rope_theta",
                self.theta,
                "more than 1 and at most 1e15",
            ));
        }
        if self.rotary_dim == 0 || self.rotary_dim > head_dim || !self.rotary_dim.is_multiple_of(2) {
            let limit = format!("even, 2 to {head_dim}");
            return Err(ConfigError::out_of_range("rotary_dim", self.rotary_dim, limit));
        }
        self.scaling.validate(self.rotary_dim)
    }
}

/// Range of every number in a scaling rule.
const SCALING_RANGE: std::ops::RangeInclusive<f32> = 1e-6..=1e6;

fn check_number(field: &str, value: f32) -> Result<(), ConfigError> {
    if SCALING_RANGE.contains(&value) {
        return Ok(());
    }
    let limit = format!("{:e} to {:e}", SCALING_RANGE.start(), SCALING_RANGE.end());
    Err(ConfigError::out_of_range(
        format!("rope_scaling.{field}"),
        value,
        limit,
    ))
}

fn check_original_length(value: usize) -> Result<(), ConfigError> {
    let limit = super::limits::CONTEXT;
    if (1..=limit).contains(&value) {
        return Ok(());
    }
    let field = "rope_scaling.original_max_position_embeddings";
    Err(ConfigError::out_of_range(field, value, format!("1 to {limit}")))
}

impl RopeScaling {
    fn validate(&self, rotary_dim: usize) -> Result<(), ConfigError> {
        match *self {
            Self::None => Ok(()),
            Self::Linear { factor } => check_number("factor", factor),
            Self::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings,
            } => {
                check_number("factor", factor)?;
                check_number("low_freq_factor", low)?;
                check_number("high_freq_factor", high)?;
                if high <= low {
                    let limit = format!("more than low_freq_factor, {low}");
                    return Err(ConfigError::out_of_range(
                        "rope_scaling.high_freq_factor",
                        high,
                        limit,
                    ));
                }
                check_original_length(original_max_position_embeddings)
            }
            Self::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                attention_factor,
            } => {
                check_number("factor", factor)?;
                check_number("beta_fast", beta_fast)?;
                check_number("beta_slow", beta_slow)?;
                check_number("attention_factor", attention_factor)?;
                if beta_fast < beta_slow {
                    let limit = format!("at least beta_slow, {beta_slow}");
                    return Err(ConfigError::out_of_range(
                        "rope_scaling.beta_fast",
                        beta_fast,
                        limit,
                    ));
                }
                check_original_length(original_max_position_embeddings)
            }
            Self::FrequencyFactors { ref factors } if factors.len() == rotary_dim / 2 => factors
                .iter()
                .try_for_each(|&factor| check_number("factors", factor)),
            Self::FrequencyFactors { ref factors } => {
                let limit = format!("rotary_dim / 2, {}", rotary_dim / 2);
                Err(ConfigError::out_of_range(
                    "number of rope_scaling.factors",
                    factors.len(),
                    limit,
                ))
            }
        }
    }
}

/// `0.1 * mscale * ln(factor) + 1`: the attention temperature of equation 22 of the YaRN paper, in the form that
/// multiplies cos and sin.
pub fn yarn_attention_factor(factor: f32, mscale: f32) -> f32 {
    if factor <= 1.0 {
        1.0
    } else {
        (0.1 * f64::from(mscale) * f64::from(factor).ln() + 1.0) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(theta: f32, rotary_dim: usize, scaling: RopeScaling) -> RopeConfig {
        RopeConfig {
            theta,
            rotary_dim,
            layout: RopeLayout::Half,
            scaling,
        }
    }

    /// Relative to f32's precision.
    fn assert_close(got: f32, want: f64) {
        assert!(
            (f64::from(got) - want).abs() <= 2e-7 * want.abs(),
            "{got} is not {want}"
        );
    }

    #[test]
    fn plain_and_linear_frequencies_are_powers_of_theta() {
        let (plain, factor) = rope(10_000.0, 4, RopeScaling::None).inverse_frequencies();
        assert_eq!((plain.as_slice(), factor), ([1.0, 0.01].as_slice(), 1.0));
        let (linear, _) = rope(10_000.0, 4, RopeScaling::Linear { factor: 4.0 }).inverse_frequencies();
        assert_eq!(linear, [0.25, 0.0025]);
    }

    #[test]
    fn llama3_keeps_high_frequencies_scales_low_ones_and_ramps_between() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let (plain, _) = rope(500_000.0, 128, RopeScaling::None).inverse_frequencies();
        let (scaled, _) = rope(500_000.0, 128, scaling).inverse_frequencies();
        assert_eq!(scaled[..29], plain[..29]);
        for i in 36..64 {
            assert_close(scaled[i], f64::from(plain[i]) / 8.0);
        }
        // Wavelength 2π / base(30) is between 8192 / 4 and 8192 / 1.
        let base = 500_000_f64.powf(-60.0 / 128.0);
        let smooth = (8192.0 * base / TAU - 1.0) / 3.0;
        assert!((0.0..1.0).contains(&smooth));
        assert_close(scaled[30], (1.0 - smooth) * base / 8.0 + smooth * base);
    }

    #[test]
    fn yarn_interpolates_beyond_the_ramp_and_keeps_what_lies_before_it() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            original_max_position_embeddings: 32_768,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: yarn_attention_factor(4.0, 1.0),
        };
        let (plain, _) = rope(1e6, 128, RopeScaling::None).inverse_frequencies();
        let (scaled, factor) = rope(1e6, 128, scaling).inverse_frequencies();
        assert_close(factor, 0.1 * 4_f64.ln() + 1.0);
        // 128 ln(32768 / (32 · 2π)) / (2 ln 1e6) = 23.6 and 128 ln(32768 / 2π) / (2 ln 1e6) = 39.6.
        assert_eq!(scaled[..24], plain[..24]);
        for i in 40..64 {
            assert_close(scaled[i], f64::from(plain[i]) / 4.0);
        }
        let (ramp, base) = ((30.0 - 23.0) / (40.0 - 23.0), 1e6_f64.powf(-60.0 / 128.0));
        assert_close(scaled[30], base / 4.0 * ramp + base * (1.0 - ramp));
    }

    #[test]
    fn explicit_factors_divide_and_must_be_as_many_as_frequencies() {
        let factors = |factors: &[f32]| RopeScaling::FrequencyFactors {
            factors: factors.to_vec(),
        };
        let (scaled, _) = rope(10_000.0, 4, factors(&[1.0, 8.0])).inverse_frequencies();
        assert_eq!(scaled, [1.0, 0.00125]);
        assert!(rope(10_000.0, 4, factors(&[1.0])).validate(4).is_err());
        assert!(rope(10_000.0, 4, factors(&[1.0, f32::NAN])).validate(4).is_err());
        assert!(rope(10_000.0, 4, factors(&[1.0, 0.0])).validate(4).is_err());
    }
}
