//! What an engine is built with, checked once before anything is allocated.

use std::time::Duration;

use phalanx_proto::step::StepLimits;

/// Which waiting sequence runs next, and which running one gives way when blocks are short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum SchedulingPolicy {
    /// By arrival.
    #[default]
    Fcfs,
    /// By the request's priority (smaller first), then by arrival.
    Priority,
}

/// Immutable for the engine's life. Every rank must have been given [`EngineConfig::step_limits`] of the same value.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// Tokens per KV block.
    pub block_size: u32,
    /// KV blocks every rank has allocated.
    pub num_blocks: u32,
    /// Most sequences in one step, and most that hold blocks at a time.
    pub max_num_seqs: u32,
    /// Most tokens in one step; at least `max_num_seqs`, so that decodes can never starve the oldest prompt.
    pub max_num_batched_tokens: u32,
    /// Most tokens of prompt and completion together.
    pub max_model_len: u32,
    pub vocab_size: u32,
    /// Most log-probabilities a request may ask for, per token.
    pub max_logprobs: u32,
    /// Most bias entries of a row, see [`StepLimits`].
    pub max_edits_per_row: u32,
    /// Keep the KV of finished and preempted sequences for others that begin with the same tokens.
    pub enable_prefix_caching: bool,
    pub policy: SchedulingPolicy,
    /// Longest prompt chunk of a single sequence in one step, tokens; 0: only the step's budget limits it.
    pub long_prefill_token_threshold: u32,
    /// Share of the blocks that admission leaves free, so that running sequences can grow before one is preempted.
    pub watermark: f32,
    /// The group is taken for lost when a step takes longer.
    pub step_timeout: Duration,
    /// A sequence that was part of so many failed steps in a row is given up.
    pub max_step_failures: u32,
    /// Epoch of the group that the executor holds at start.
    pub epoch: u32,
    /// Key of the prefix cache's block hashes. `spawn_engine` draws it anew, so that what is cached can neither be guessed
    /// nor collided with from outside.
    pub prefix_cache_seed: [u8; 32],
}

/// Which setting is wrong.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ConfigError {
    #[error("{field} is {value}, allowed are {min} to {max}")]
    OutOfRange {
        field: &'static str,
        value: u64,
        min: u64,
        max: u64,
    },
    #[error("watermark is {0}, allowed are 0 to below 1")]
    Watermark(f32),
    #[error(
        "max_num_batched_tokens is {max_num_batched_tokens}, needs to be at least max_num_seqs, which is {max_num_seqs}"
    )]
    BudgetBelowSequences {
        max_num_batched_tokens: u32,
        max_num_seqs: u32,
    },
    #[error("step_timeout is zero")]
    NoTimeout,
}

impl EngineConfig {
    /// vLLM's defaults for everything that does not follow from model and memory.
    pub fn new(num_blocks: u32, max_model_len: u32, vocab_size: u32) -> Self {
        Self {
            block_size: 16,
            num_blocks,
            max_num_seqs: 256,
            max_num_batched_tokens: 2048,
            max_model_len,
            vocab_size,
            max_logprobs: 20,
            max_edits_per_row: 1024,
            enable_prefix_caching: true,
            policy: SchedulingPolicy::Fcfs,
            long_prefill_token_threshold: 0,
            watermark: 0.01,
            step_timeout: Duration::from_secs(60),
            max_step_failures: 3,
            epoch: 0,
            prefix_cache_seed: [0; 32],
        }
    }

    pub fn validate(&self) -> Result<(), ConfigError> {
        let max = u64::from(u32::MAX) - 1;
        for (field, value, min, max) in [
            ("block_size", self.block_size, 1, 1024),
            ("num_blocks", self.num_blocks, 1, max),
            ("max_num_seqs", self.max_num_seqs, 1, 1 << 16),
            ("max_num_batched_tokens", self.max_num_batched_tokens, 1, 1 << 24),
            // One token of prompt and one of completion; a position fits in an i32 on every device.
            ("max_model_len", self.max_model_len, 2, 1 << 30),
            ("vocab_size", self.vocab_size, 1, max),
            ("max_logprobs", self.max_logprobs, 0, 1 << 20),
            ("max_edits_per_row", self.max_edits_per_row, 1, 1 << 24),
            ("max_step_failures", self.max_step_failures, 1, max),
        ] {
            let value = u64::from(value);
            if value < min || value > max {
                return Err(ConfigError::OutOfRange {
                    field,
                    value,
                    min,
                    max,
                });
            }
        }
        if !(0.0..1.0).contains(&self.watermark) {
            return Err(ConfigError::Watermark(self.watermark));
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            return Err(ConfigError::BudgetBelowSequences {
                max_num_batched_tokens: self.max_num_batched_tokens,
                max_num_seqs: self.max_num_seqs,
            });
        }
        if self.step_timeout.is_zero() {
            return Err(ConfigError::NoTimeout);
        }
        Ok(())
    }

    /// What the engine's plans stay within.
    pub fn step_limits(&self) -> StepLimits {
        StepLimits {
            max_rows: self.max_num_seqs,
            max_tokens: self.max_num_batched_tokens,
            max_blocks_per_row: self.max_model_len.div_ceil(self.block_size),
            num_blocks: self.num_blocks,
            vocab_size: self.vocab_size,
            max_edits_per_row: self.max_edits_per_row,
            max_logprobs: self.max_logprobs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_wrong_setting_is_named() {
        let good = EngineConfig::new(64, 256, 100);
        assert_eq!(good.validate(), Ok(()));
        let zero_blocks = EngineConfig {
            num_blocks: 0,
            ..good.clone()
        };
        assert!(matches!(
            zero_blocks.validate(),
            Err(ConfigError::OutOfRange {
                field: "num_blocks",
                value: 0,
                ..
            })
        ));
        let starving = EngineConfig {
            max_num_batched_tokens: 255,
            ..good.clone()
        };
        assert!(matches!(
            starving.validate(),
            Err(ConfigError::BudgetBelowSequences { .. })
        ));
        for watermark in [1.0, -0.1, f32::NAN] {
            let config = EngineConfig {
                watermark,
                ..good.clone()
            };
            assert!(matches!(config.validate(), Err(ConfigError::Watermark(_))));
        }
        let hasty = EngineConfig {
            step_timeout: Duration::ZERO,
            ..good
        };
        assert_eq!(hasty.validate(), Err(ConfigError::NoTimeout));
    }
}
