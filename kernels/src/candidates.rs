//! What sampling needs of a row of logits: a few candidates and chunked statistics instead of the whole row.

use std::ops::Range;

/// Vocabulary ids per [`ChunkStatistics`]. Ranks hold whole chunks, so the statistics do not depend on the split.
pub const VOCAB_CHUNK: usize = phalanx_model::shard::VOCAB_ALIGN;

/// Change of one logit before anything else: repetition penalty (divide if positive, multiply if not), then add.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitEdit {
    pub id: u32,
    /// 1: none.
    pub repetition: f32,
    /// Negative infinity bans the token.
    pub add: f32,
}

/// Counter-based Gumbel noise: a token's noise depends on seed, position and token id alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noise {
    pub seed: u64,
    pub position: u64,
}

/// One sampled row.
#[derive(Clone, Debug)]
pub struct CandidateRequest<'a> {
    /// Row of the logits buffer.
    pub row: usize,
    /// Vocabulary ids of the buffer's columns.
    pub vocab: Range<usize>,
    /// By rising id; entries outside `vocab` are skipped.
    pub edits: &'a [LogitEdit],
    /// Scales edited logits; 1 for greedy.
    pub inverse_temperature: f32,
    /// With noise, `Candidates::perturbed` is the argmax of scaled logit + Gumbel noise: a draw from the softmax.
    pub noise: Option<Noise>,
    /// How many of the best scaled logits to report.
    pub top: usize,
    /// How many of the best raw logits to report.
    pub raw_top: usize,
    /// Whether chunk statistics of the scaled, and of the raw logits, are wanted.
    pub scaled_statistics: bool,
    pub raw_statistics: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub id: u32,
    /// The logit as the model computed it.
    pub raw: f32,
    /// After edits and temperature.
    pub scaled: f32,
}

/// `sum(exp(x - max))` over one chunk of the vocabulary, in rising id.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChunkStatistics {
    pub max: f32,
    pub sum: f32,
}

/// Of one row and one rank's part of the vocabulary. Order: larger value first, then smaller id.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Candidates {
    pub best: Vec<Candidate>,
    pub raw_best: Vec<Candidate>,
    /// Perturbed value and its token.
    pub perturbed: Option<(f32, Candidate)>,
    pub scaled_statistics: Vec<ChunkStatistics>,
    pub raw_statistics: Vec<ChunkStatistics>,
    /// False if any raw logit was NaN or infinite.
    pub finite: bool,
}
