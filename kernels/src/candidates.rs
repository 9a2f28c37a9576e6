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
///
/// Token `id` gets `-ln(-ln((w + 1/2) / 2^32))`, rounded to f32, of word `w = id / 8 % 4` of
/// [`philox4x32`](crate::philox::philox4x32) with the seed as key and the counter
/// `[id / 32 * 8 + id % 8, 0, position, position >> 32]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noise {
    pub seed: u64,
    pub position: u64,
}

/// Words of [`CandidateRequest::allowed`] for so many tokens.
pub(crate) fn mask_words(tokens: usize) -> usize {
    tokens.div_ceil(u32::BITS as usize)
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
    /// Tokens that may be drawn: bit `i % 32` of word `i / 32` is that of `vocab.start + i`, and there is a bit for every id
    /// of `vocab`. The others count as banned. None: all may.
    pub allowed: Option<&'a [u32]>,
    /// Scales edited logits; 1 for greedy.
    pub inverse_temperature: f32,
    /// With noise, `Candidates::perturbed` is the argmax of scaled logit + Gumbel noise: a draw from the softmax.
    pub noise: Option<Noise>,
    /// How many of the best scaled logits to report; banned tokens (negative infinity) are never among them.
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

/// Of one row and one part of the vocabulary. Order: larger value first, then smaller id.
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

impl Candidates {
    /// Joins the candidates of the next part of the vocabulary, for the same request.
    pub fn append(&mut self, next: Self, request: &CandidateRequest<'_>) {
        merge(&mut self.best, next.best, request.top, |c| c.scaled);
        merge(&mut self.raw_best, next.raw_best, request.raw_top, |c| c.raw);
        self.perturbed = match (self.perturbed, next.perturbed) {
            (Some(a), Some(b)) if rank(b.0, b.1.id).cmp(&rank(a.0, a.1.id)).is_lt() => Some(b),
            (a, b) => a.or(b),
        };
        self.scaled_statistics.extend(next.scaled_statistics);
        self.raw_statistics.extend(next.raw_statistics);
        self.finite &= next.finite;
    }
}

/// Merges two ordered lists and keeps the first `top`.
fn merge(list: &mut Vec<Candidate>, next: Vec<Candidate>, top: usize, value: impl Fn(&Candidate) -> f32) {
    list.extend(next);
    list.sort_by_key(|c| rank(value(c), c.id));
    list.truncate(top);
}

/// Sorts by falling value, then by rising id; the two zeros are one value, and NaN comes first or last.
pub(crate) fn rank(value: f32, id: u32) -> (i32, u32) {
    let bits = (value + 0.0).to_bits() as i32;
    // As `f32::total_cmp`: the integers of negative floats run the wrong way.
    let rising = bits ^ (((bits >> 31) as u32) >> 1) as i32;
    (!rising, id)
}
