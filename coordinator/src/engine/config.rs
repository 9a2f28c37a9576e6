//! What an engine is built with, checked once before anything is allocated.

use std::time::Duration;

use phalanx_proto::step::StepLimits;

use super::{NgramSpeculation, PrefixHashAlgo};

/// Which waiting sequence runs next, and which running one gives way when blocks are short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum SchedulingPolicy {
    /// By arrival.
    #[default]
    Fcfs,
    /// By the request's priority (smaller first), then by arrival.
    Priority,
    /// Tenants in turn, by how much they have been served; a tenant's own requests by arrival.
    Fair,
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
    /// Admit a sequence only if all of its prompt fits beside what running prompts still need, not only its first chunk:
    /// one that is preempted halfway was computed for nothing.
    pub reserve_full_isl: bool,
    /// Guess tokens and verify several in one step. Output stays the same.
    pub speculative: Option<NgramSpeculation>,
    /// The group is taken for lost when a step takes longer.
    pub step_timeout: Duration,
    /// A sequence that was part of so many failed steps in a row is given up.
    pub max_step_failures: u32,
    /// Epoch of the group that the executor holds at start.
    pub epoch: u32,
    /// How the prefix cache names blocks.
    pub prefix_hash_algo: PrefixHashAlgo,
    /// Tell what changes in the prefix cache.
    pub kv_events: bool,
    /// Key of the builtin block hashes, or the start of vLLM's chains.
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
    #[error("prompt_lookup_min is {min}, more than prompt_lookup_max, which is {max}")]
    LookupRange { min: u32, max: u32 },
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
            reserve_full_isl: true,
            speculative: None,
            step_timeout: Duration::from_secs(60),
            max_step_failures: 3,
            epoch: 0,
            prefix_hash_algo: PrefixHashAlgo::Builtin,
            kv_events: false,
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
            within(field, value, min, max)?;
        }
        if let Some(speculative) = &self.speculative {
            speculative.validate()?;
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

    /// Rows of a step: sequences, and guesses as long as the batch is small. A large one keeps the ranks busy without
    /// them.
    fn max_rows(&self) -> u32 {
        const MOST_WITH_DRAFTS: u32 = 256;
        let drafts = self
            .speculative
            .map_or(0, |speculative| speculative.num_speculative_tokens);
        let wanted = self.max_num_seqs.saturating_mul(drafts.saturating_add(1));
        let most = MOST_WITH_DRAFTS.min(self.max_num_batched_tokens);
        wanted.min(most).max(self.max_num_seqs)
    }

    /// What the engine's plans stay within.
    pub fn step_limits(&self) -> StepLimits {
        StepLimits {
            max_rows: self.max_rows(),
            max_tokens: self.max_num_batched_tokens,
            max_blocks_per_row: self.max_model_len.div_ceil(self.block_size),
            num_blocks: self.num_blocks,
            vocab_size: self.vocab_size,
            max_edits_per_row: self.max_edits_per_row,
            max_logprobs: self.max_logprobs,
        }
    }
}

impl NgramSpeculation {
    /// # Errors
    /// The first number that is out of its range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let longest = u64::from(Self::LONGEST_NGRAM);
        for (field, value, max) in [
            (
                "num_speculative_tokens",
                self.num_speculative_tokens,
                Self::MOST_TOKENS.into(),
            ),
            ("prompt_lookup_min", self.prompt_lookup_min, longest),
            ("prompt_lookup_max", self.prompt_lookup_max, longest),
        ] {
            within(field, value, 1, max)?;
        }
        let (min, max) = (self.prompt_lookup_min, self.prompt_lookup_max);
        if min > max {
            return Err(ConfigError::LookupRange { min, max });
        }
        Ok(())
    }
}

fn within(field: &'static str, value: u32, min: u64, max: u64) -> Result<(), ConfigError> {
    let value = u64::from(value);
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(ConfigError::OutOfRange {
        field,
        value,
        min,
        max,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_take_the_rows_that_a_small_batch_leaves() {
        let rows = |max_num_seqs, num_speculative_tokens| {
            let speculative = Some(NgramSpeculation {
                num_speculative_tokens,
                prompt_lookup_min: 1,
                prompt_lookup_max: 4,
            });
            let config = EngineConfig {
                max_num_seqs,
                speculative,
                ..EngineConfig::new(64, 256, 100)
            };
            assert_eq!(config.validate(), Ok(()));
            config.step_limits().max_rows
        };
        assert_eq!(
            [rows(1, 4), rows(8, 4), rows(100, 4), rows(300, 4)],
            [5, 40, 256, 300]
        );
    }

    #[test]
    fn what_is_guessed_from_has_bounds() {
        let validate = |num_speculative_tokens, prompt_lookup_min, prompt_lookup_max| {
            let speculation = NgramSpeculation {
                num_speculative_tokens,
                prompt_lookup_min,
                prompt_lookup_max,
            };
            speculation.validate().map_err(|error| error.to_string())
        };
        assert_eq!(validate(4, 2, 4), Ok(()));
        let refused = |(tokens, min, max)| validate(tokens, min, max).expect_err("out of range");
        assert_eq!(
            refused((17, 2, 4)),
            "num_speculative_tokens is 17, allowed are 1 to 16"
        );
        assert_eq!(refused((4, 0, 4)), "prompt_lookup_min is 0, allowed are 1 to 32");
        assert_eq!(
            refused((4, 5, 4)),
            "prompt_lookup_min is 5, more than prompt_lookup_max, which is 4"
        );
    }

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
