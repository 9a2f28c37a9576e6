//! The data-plane contract: what every rank must do in one forward pass, and what came of it.
//!
//! A [`StepPlan`] is self-contained. A worker keeps weights and KV and nothing else, so a rank that was replaced, a
//! sequence that was preempted and one that is decoded for the first time all look the same to it.

mod codec;
mod mask;

pub use codec::{
    CodecError, decode_masks, decode_output, decode_plan, encode_masks, encode_output, encode_plan,
};
pub use mask::{StepMasks, TokenMask, TokenSet};

use crate::limits::MAX_LOGPROB_TOKEN_IDS;

/// Index of a KV block in the pool that every rank lays out alike.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockId(pub u32);

/// One sequence for the time of the engine's life; never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SequenceId(pub u64);

/// One forward pass.
#[derive(Clone, PartialEq, Debug)]
pub struct StepPlan {
    /// The group's incarnation: a plan of another epoch is refused.
    pub epoch: u32,
    /// Counts up by one within an epoch.
    pub step: u64,
    /// A sequence may have several rows, one behind the other: in every layer the KV of all rows is written before any
    /// row attends, so each sees the tokens of those before it.
    pub rows: Vec<StepRow>,
    /// [`StepMasks`] of this step come in a message of their own, after this one and before sampling: they are computed
    /// while the ranks run the layers.
    pub masks_follow: bool,
}

impl StepPlan {
    /// Tokens computed in this step.
    pub fn num_tokens(&self) -> usize {
        self.rows.iter().map(|row| row.token_ids.len()).sum()
    }
}

/// The tokens of one sequence that this step computes: a prompt chunk, one decode token, or anything in between.
#[derive(Clone, PartialEq, Debug)]
pub struct StepRow {
    pub sequence: SequenceId,
    /// Never empty.
    pub token_ids: Vec<u32>,
    /// Position of the first of them; everything before has its KV in the blocks.
    pub num_computed_tokens: u32,
    /// All blocks of the sequence, enough for every token up to the last of this step.
    pub block_table: Vec<BlockId>,
    /// How to draw the next token from the last row; none for a chunk that ends before the last known token.
    pub sampling: Option<RowSampling>,
    /// Which prompt tokens' log-probabilities are wanted after this row's tokens.
    pub prompt_logprobs: Option<PromptLogprobs>,
}

/// Known tokens to be scored by a row's logits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PromptLogprobs {
    /// How many of the best tokens to report at each position.
    pub top: u32,
    /// Index in `token_ids` of the token that `targets[0]` follows; the other targets follow the tokens after it.
    pub first: u32,
    /// Never empty, and no longer than the row from `first` on.
    pub targets: Vec<u32>,
}

/// Sampling state of one row. The drawn token depends on this, on the logits and on the position, and on nothing else.
#[derive(Clone, PartialEq, Debug)]
pub struct RowSampling {
    /// 0: greedy.
    pub temperature: f32,
    /// 1: off.
    pub top_p: f32,
    /// 0: off.
    pub top_k: u32,
    /// 0: off.
    pub min_p: f32,
    pub seed: u64,
    /// Report the chosen token's log-probability and this many of the best.
    pub logprobs: Option<u32>,
    /// If there are any, they are reported in place of the best; only with `logprobs`. At most [`MAX_LOGPROB_TOKEN_IDS`].
    pub logprob_token_ids: Vec<u32>,
    pub penalties: Option<Penalties>,
    /// Added to single logits; negative infinity bans a token.
    pub bias: Vec<(u32, f32)>,
}

impl RowSampling {
    /// The most likely token, no extras.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        seed: 0,
        logprobs: None,
        logprob_token_ids: Vec::new(),
        penalties: None,
        bias: Vec::new(),
    };
}

/// Penalties and the tokens they look at.
#[derive(Clone, PartialEq, Debug)]
pub struct Penalties {
    /// Divides positive and multiplies negative logits of every token seen in prompt or output; 1: off.
    pub repetition: f32,
    /// Subtracted once for every token seen in the output.
    pub presence: f32,
    /// Subtracted as often as the token was seen in the output.
    pub frequency: f32,
    /// Each token of the sequence once, with how often the output holds it (0: the prompt only, which is left out where
    /// only the output counts), by rising id. All rows of a plan together have at most [`StepLimits::max_history`].
    pub history: Vec<(u32, u32)>,
}

/// What one step sampled, in the order of the plan's rows that asked for it.
#[derive(Clone, PartialEq, Debug)]
pub struct StepOutput {
    pub epoch: u32,
    pub step: u64,
    pub sampled: Vec<SampledToken>,
    /// In the order of the plan's rows that asked for it.
    pub prompt_logprobs: Vec<ScoredPrompt>,
    /// Time from the plan's arrival to this output on rank 0.
    pub forward_us: u32,
}

/// The answer to a row's [`PromptLogprobs`].
#[derive(Clone, PartialEq, Debug)]
pub struct ScoredPrompt {
    pub sequence: SequenceId,
    /// One for each target, in their order.
    pub tokens: Vec<ScoredToken>,
}

/// A known token's log-probability, and the best tokens at its position.
#[derive(Clone, PartialEq, Debug)]
pub struct ScoredToken {
    pub token: u32,
    /// Log-softmax of the raw logits over the whole vocabulary; NaN if they held a NaN or an infinity.
    pub logprob: f32,
    /// How many tokens are at least as likely, the token among them.
    pub rank: u32,
    /// The best tokens by raw log-probability, best first.
    pub top_logprobs: Vec<(u32, f32)>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct SampledToken {
    pub sequence: SequenceId,
    pub token: u32,
    /// False: the logits held a NaN or an infinity, `token` means nothing and the request must fail.
    pub finite: bool,
    /// Log-softmax of the raw logits, when asked for.
    pub logprob: Option<f32>,
    /// How many tokens are at least as likely, the token among them; there if `logprob` is.
    pub rank: Option<u32>,
    /// The row's [`RowSampling::logprob_token_ids`] in their order; without any, the best tokens by raw log-probability, best
    /// first.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// What a plan or an output may hold at most. Both sides are given the same limits at start and both check.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StepLimits {
    pub max_rows: u32,
    pub max_tokens: u32,
    pub max_blocks_per_row: u32,
    pub num_blocks: u32,
    pub vocab_size: u32,
    /// Most `bias` entries of a row.
    pub max_edits_per_row: u32,
    pub max_logprobs: u32,
}

/// Distinct tokens that the rows of a full step may have on average, where each has penalties.
const HISTORY_PER_ROW: u32 = 2048;

impl StepLimits {
    /// Most `top_logprobs` of a sampled token.
    pub fn max_top_logprobs(&self) -> u32 {
        self.max_logprobs.max(MAX_LOGPROB_TOKEN_IDS as u32)
    }

    /// Most `history` entries of all rows of a plan together: enough for the whole vocabulary in one row.
    pub fn max_history(&self) -> u32 {
        self.max_rows.saturating_mul(HISTORY_PER_ROW).max(self.vocab_size)
    }
}
