//! The data-plane contract: what every rank must do in one forward pass, and what came of it.
//!
//! A [`StepPlan`] is self-contained. A worker keeps weights and KV and nothing else, so a rank that was replaced, a
//! sequence that was preempted and one that is decoded for the first time all look the same to it.

mod codec;

pub use codec::{CodecError, decode_output, decode_plan, encode_output, encode_plan};

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
    /// Token masks for this step come in a message of their own, before sampling.
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
    /// Each token of the sequence once, with how often the output holds it (0: the prompt only), by rising id.
    pub history: Vec<(u32, u32)>,
}

/// What one step sampled, in the order of the plan's rows that asked for it.
#[derive(Clone, PartialEq, Debug)]
pub struct StepOutput {
    pub epoch: u32,
    pub step: u64,
    pub sampled: Vec<SampledToken>,
    /// Time from the plan's arrival to this output on rank 0.
    pub forward_us: u32,
}

#[derive(Clone, PartialEq, Debug)]
pub struct SampledToken {
    pub sequence: SequenceId,
    pub token: u32,
    /// False: the logits held a NaN or an infinity, `token` means nothing and the request must fail.
    pub finite: bool,
    /// Log-softmax of the raw logits, when asked for.
    pub logprob: Option<f32>,
    /// The best tokens by raw log-probability, best first.
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
    /// Most `history` entries and `bias` entries of a row.
    pub max_edits_per_row: u32,
    pub max_logprobs: u32,
}
