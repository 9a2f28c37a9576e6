//! Little-endian, length-prefixed, versioned encoding of plans and outputs for the shared-memory rings.
//!
//! The decoder trusts nothing: every count is checked against [`StepLimits`] and against the bytes that are left before
//! anything is allocated, every index against its bound, and a message must be used up to the last byte.

use super::{
    BlockId, Penalties, PromptLogprobs, RowSampling, SampledToken, ScoredPrompt, ScoredToken, SequenceId,
    StepLimits, StepMasks, StepOutput, StepPlan, StepRow, TokenMask, TokenSet,
};
use crate::limits::MAX_LOGPROB_TOKEN_IDS;

/// Changes with every change of the layout.
const VERSION: u16 = 3;
const PLAN: u16 = u16::from_le_bytes(*b"PL");
const OUTPUT: u16 = u16::from_le_bytes(*b"OU");
const MASKS: u16 = u16::from_le_bytes(*b"MA");

/// Why bytes are not a plan or an output, or why one cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("message ends within {field}")]
    Truncated { field: &'static str },
    #[error("{field} is {value}, limit {limit}")]
    OverLimit {
        field: &'static str,
        value: u64,
        limit: u64,
    },
    #[error("{field} is {value}, which is not valid")]
    Invalid { field: &'static str, value: u64 },
    #[error("{0} bytes after the end of the message")]
    Trailing(usize),
    #[error("message needs more than the {0} bytes of its slot")]
    NoRoom(usize),
}

type Result<T> = std::result::Result<T, CodecError>;

/// Writes `plan` to the front of `slot`; returns the bytes used.
pub fn encode_plan(plan: &StepPlan, slot: &mut [u8]) -> Result<usize> {
    let mut w = Writer { slot, at: 0 };
    w.header(PLAN)?;
    w.u32(plan.epoch)?;
    w.u64(plan.step)?;
    w.u8(plan.masks_follow.into())?;
    w.count(plan.rows.len())?;
    for row in &plan.rows {
        w.u64(row.sequence.0)?;
        w.u32(row.num_computed_tokens)?;
        w.u32s(row.token_ids.iter().copied())?;
        w.u32s(row.block_table.iter().map(|block| block.0))?;
        w.u8(u8::from(row.sampling.is_some()) | u8::from(row.prompt_logprobs.is_some()) << 1)?;
        if let Some(sampling) = &row.sampling {
            w.sampling(sampling)?;
        }
        if let Some(wanted) = &row.prompt_logprobs {
            w.u32(wanted.top)?;
            w.u32(wanted.first)?;
            w.u32s(wanted.targets.iter().copied())?;
        }
    }
    Ok(w.at)
}

/// Reads one plan; `bytes` must hold nothing else.
pub fn decode_plan(bytes: &[u8], limits: &StepLimits) -> Result<StepPlan> {
    let mut r = Reader { bytes };
    r.header(PLAN)?;
    let (epoch, step) = (r.u32("epoch")?, r.u64("step")?);
    let masks_follow = r.bool("masks_follow")?;
    let count = r.count("rows", limits.max_rows, MIN_ROW)?;
    let mut rows = Vec::with_capacity(count);
    let mut left = Left {
        tokens: limits.max_tokens,
        history: limits.max_history(),
    };
    for _ in 0..count {
        rows.push(r.row(limits, &mut left)?);
    }
    r.finish()?;
    Ok(StepPlan {
        epoch,
        step,
        rows,
        masks_follow,
    })
}

/// Writes `masks` to the front of `slot`; returns the bytes used.
pub fn encode_masks(masks: &StepMasks, slot: &mut [u8]) -> Result<usize> {
    let mut w = Writer { slot, at: 0 };
    w.header(MASKS)?;
    w.u32(masks.epoch)?;
    w.u64(masks.step)?;
    w.count(masks.masks.len())?;
    for mask in &masks.masks {
        w.u64(mask.sequence.0)?;
        mask.allowed.words().iter().try_for_each(|&word| w.u32(word))?;
    }
    Ok(w.at)
}

/// Reads the masks of one step; `bytes` must hold nothing else.
pub fn decode_masks(bytes: &[u8], limits: &StepLimits) -> Result<StepMasks> {
    let mut r = Reader { bytes };
    r.header(MASKS)?;
    let (epoch, step) = (r.u32("epoch")?, r.u64("step")?);
    let num_words = TokenSet::num_words(limits.vocab_size);
    let count = r.count("masks", limits.max_rows, 8 + 4 * num_words)?;
    let mut masks = Vec::with_capacity(count);
    for _ in 0..count {
        let sequence = SequenceId(r.u64("sequence")?);
        let words: Vec<u32> = (0..num_words).map(|_| r.u32("allowed")).collect::<Result<_>>()?;
        let last = words.last().copied().unwrap_or(0);
        let allowed = TokenSet::from_words(limits.vocab_size, words).ok_or(CodecError::Invalid {
            field: "allowed",
            value: last.into(),
        })?;
        masks.push(TokenMask { sequence, allowed });
    }
    r.finish()?;
    Ok(StepMasks { epoch, step, masks })
}

/// Writes `output` to the front of `slot`; returns the bytes used.
pub fn encode_output(output: &StepOutput, slot: &mut [u8]) -> Result<usize> {
    let mut w = Writer { slot, at: 0 };
    w.header(OUTPUT)?;
    w.u32(output.epoch)?;
    w.u64(output.step)?;
    w.u32(output.forward_us)?;
    w.count(output.sampled.len())?;
    for sampled in &output.sampled {
        w.u64(sampled.sequence.0)?;
        w.u32(sampled.token)?;
        let scored = sampled.logprob.zip(sampled.rank);
        w.u8(u8::from(sampled.finite) | u8::from(scored.is_some()) << 1)?;
        if let Some((logprob, rank)) = scored {
            w.f32(logprob)?;
            w.u32(rank)?;
        }
        w.top_logprobs(&sampled.top_logprobs)?;
    }
    w.count(output.prompt_logprobs.len())?;
    for prompt in &output.prompt_logprobs {
        w.u64(prompt.sequence.0)?;
        w.count(prompt.tokens.len())?;
        for scored in &prompt.tokens {
            w.u32(scored.token)?;
            w.f32(scored.logprob)?;
            w.u32(scored.rank)?;
            w.top_logprobs(&scored.top_logprobs)?;
        }
    }
    Ok(w.at)
}

/// Reads one output; `bytes` must hold nothing else.
pub fn decode_output(bytes: &[u8], limits: &StepLimits) -> Result<StepOutput> {
    let mut r = Reader { bytes };
    r.header(OUTPUT)?;
    let (epoch, step, forward_us) = (r.u32("epoch")?, r.u64("step")?, r.u32("forward_us")?);
    let count = r.count("sampled", limits.max_rows, MIN_SAMPLED)?;
    let sampled = (0..count).map(|_| r.sampled(limits)).collect::<Result<_>>()?;
    let count = r.count("prompt_logprobs", limits.max_rows, MIN_PROMPT)?;
    let mut tokens_left = limits.max_tokens;
    let mut prompt_logprobs = Vec::with_capacity(count);
    for _ in 0..count {
        let sequence = SequenceId(r.u64("sequence")?);
        let count = r.count("prompt_logprobs.tokens", tokens_left, MIN_SCORED)?;
        tokens_left -= count as u32;
        let tokens = (0..count).map(|_| r.scored(limits)).collect::<Result<_>>()?;
        prompt_logprobs.push(ScoredPrompt { sequence, tokens });
    }
    r.finish()?;
    Ok(StepOutput {
        epoch,
        step,
        sampled,
        prompt_logprobs,
        forward_us,
    })
}

impl StepLimits {
    /// Bytes a slot needs to hold any plan within these limits.
    pub fn plan_bytes(&self) -> usize {
        let row = MIN_ROW
            + SAMPLING_BYTES
            + PROMPT_LOGPROBS_BYTES
            + 4 * self.max_blocks_per_row as usize
            + 8 * self.max_edits_per_row as usize
            + 4 * MAX_LOGPROB_TOKEN_IDS;
        // A token, and the target that follows it.
        let tokens = 8 * self.max_tokens as usize;
        HEADER + self.max_rows as usize * row + tokens + 8 * self.max_history() as usize
    }
    /// Bytes a slot needs to hold the masks of any plan within these limits.
    pub fn masks_bytes(&self) -> usize {
        HEADER + self.max_rows as usize * (8 + 4 * TokenSet::num_words(self.vocab_size))
    }
    /// Bytes of a slot that plans and masks share.
    pub fn plan_slot_bytes(&self) -> usize {
        self.plan_bytes().max(self.masks_bytes())
    }
    /// Bytes a slot needs to hold any output within these limits.
    pub fn output_bytes(&self) -> usize {
        let [sampled, scored] = [self.max_top_logprobs(), self.max_logprobs].map(|top| 8 * top as usize);
        let row = MIN_SAMPLED + 8 + sampled + MIN_PROMPT;
        HEADER + self.max_rows as usize * row + self.max_tokens as usize * (MIN_SCORED + scored)
    }
}

/// Magic, version, epoch, step, and the count or flag fields beside them.
const HEADER: usize = 2 + 2 + 4 + 8 + 4 + 4 + 4;
/// Sequence, position, two counts, one token, one block and the flags.
const MIN_ROW: usize = 8 + 4 + 4 + 4 + 4 + 4 + 1;
/// A row's wish for log-probabilities of the prompt, without its targets.
const PROMPT_LOGPROBS_BYTES: usize = 4 + 4 + 4;
/// Sequence, token, flags and the count.
const MIN_SAMPLED: usize = 8 + 4 + 1 + 4;
/// Sequence and count.
const MIN_PROMPT: usize = 8 + 4;
/// Token, log-probability, rank and the count.
const MIN_SCORED: usize = 4 + 4 + 4 + 4;
/// A row's sampling without its lists' entries.
const SAMPLING_BYTES: usize = 4 * 4 + 8 + 1 + 4 + 4 + 12 + 4 + 4;

struct Writer<'a> {
    slot: &'a mut [u8],
    at: usize,
}

impl Writer<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let end = self.at + bytes.len();
        let room = self.slot.len();
        self.slot
            .get_mut(self.at..end)
            .ok_or(CodecError::NoRoom(room))?
            .copy_from_slice(bytes);
        self.at = end;
        Ok(())
    }
    fn u8(&mut self, v: u8) -> Result<()> {
        self.bytes(&[v])
    }
    fn u32(&mut self, v: u32) -> Result<()> {
        self.bytes(&v.to_le_bytes())
    }
    fn u64(&mut self, v: u64) -> Result<()> {
        self.bytes(&v.to_le_bytes())
    }
    fn f32(&mut self, v: f32) -> Result<()> {
        self.u32(v.to_bits())
    }
    fn header(&mut self, kind: u16) -> Result<()> {
        self.bytes(&kind.to_le_bytes())?;
        self.bytes(&VERSION.to_le_bytes())
    }
    fn count(&mut self, n: usize) -> Result<()> {
        let limit = u64::from(u32::MAX);
        self.u32(u32::try_from(n).map_err(|_| CodecError::OverLimit {
            field: "count",
            value: n as u64,
            limit,
        })?)
    }
    fn u32s(&mut self, values: impl ExactSizeIterator<Item = u32>) -> Result<()> {
        self.count(values.len())?;
        values.into_iter().try_for_each(|v| self.u32(v))
    }
    fn pairs(&mut self, values: impl ExactSizeIterator<Item = (u32, u32)>) -> Result<()> {
        self.count(values.len())?;
        values
            .into_iter()
            .try_for_each(|(a, b)| self.u32(a).and_then(|()| self.u32(b)))
    }
    fn top_logprobs(&mut self, top: &[(u32, f32)]) -> Result<()> {
        self.pairs(top.iter().map(|&(id, logprob)| (id, logprob.to_bits())))
    }
    fn sampling(&mut self, s: &RowSampling) -> Result<()> {
        for v in [s.temperature, s.top_p, s.min_p] {
            self.f32(v)?;
        }
        self.u32(s.top_k)?;
        self.u64(s.seed)?;
        self.u8(u8::from(s.logprobs.is_some()) | u8::from(s.penalties.is_some()) << 1)?;
        if let Some(n) = s.logprobs {
            self.u32(n)?;
            self.u32s(s.logprob_token_ids.iter().copied())?;
        }
        if let Some(p) = &s.penalties {
            for v in [p.repetition, p.presence, p.frequency] {
                self.f32(v)?;
            }
            self.pairs(p.history.iter().copied())?;
        }
        self.pairs(s.bias.iter().map(|&(id, v)| (id, v.to_bits())))
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
}

/// What the rows that are still to come may hold, all together.
struct Left {
    tokens: u32,
    history: u32,
}

impl Reader<'_> {
    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N]> {
        let (head, rest) = self
            .bytes
            .split_first_chunk::<N>()
            .ok_or(CodecError::Truncated { field })?;
        self.bytes = rest;
        Ok(*head)
    }
    fn u32(&mut self, field: &'static str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }
    fn u64(&mut self, field: &'static str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }
    fn f32(&mut self, field: &'static str) -> Result<f32> {
        Ok(f32::from_bits(self.u32(field)?))
    }
    /// A finite number, at least `min`.
    fn number(&mut self, field: &'static str, min: f32) -> Result<f32> {
        let v = self.f32(field)?;
        let fits = v.is_finite() && v >= min;
        if fits {
            Ok(v)
        } else {
            Err(CodecError::Invalid {
                field,
                value: v.to_bits().into(),
            })
        }
    }
    fn flags(&mut self, field: &'static str, known: u8) -> Result<u8> {
        let [v] = self.array(field)?;
        if v & !known == 0 {
            Ok(v)
        } else {
            Err(CodecError::Invalid {
                field,
                value: v.into(),
            })
        }
    }
    fn bool(&mut self, field: &'static str) -> Result<bool> {
        Ok(self.flags(field, 1)? == 1)
    }
    fn index(&mut self, field: &'static str, bound: u32) -> Result<u32> {
        let v = self.u32(field)?;
        let limit = u64::from(bound.saturating_sub(1));
        if v < bound {
            Ok(v)
        } else {
            Err(CodecError::OverLimit {
                field,
                value: v.into(),
                limit,
            })
        }
    }
    fn header(&mut self, kind: u16) -> Result<()> {
        for (field, want) in [("magic", kind), ("version", VERSION)] {
            let got = u16::from_le_bytes(self.array(field)?);
            if got != want {
                return Err(CodecError::Invalid {
                    field,
                    value: got.into(),
                });
            }
        }
        Ok(())
    }
    /// A count of entries of at least `entry` bytes each: within its limit and within what is left of the message.
    fn count(&mut self, field: &'static str, limit: u32, entry: usize) -> Result<usize> {
        let n = self.u32(field)?;
        if n > limit {
            return Err(CodecError::OverLimit {
                field,
                value: n.into(),
                limit: limit.into(),
            });
        }
        if self.bytes.len() / entry < n as usize {
            return Err(CodecError::Truncated { field });
        }
        Ok(n as usize)
    }
    fn indices(&mut self, field: &'static str, limit: u32, bound: u32) -> Result<Vec<u32>> {
        let n = self.count(field, limit, 4)?;
        (0..n).map(|_| self.index(field, bound)).collect()
    }
    fn row(&mut self, limits: &StepLimits, left: &mut Left) -> Result<StepRow> {
        let sequence = SequenceId(self.u64("sequence")?);
        let num_computed_tokens = self.u32("num_computed_tokens")?;
        let token_ids = self.indices("token_ids", left.tokens, limits.vocab_size)?;
        left.tokens -= token_ids.len() as u32;
        let block_table = self.indices("block_table", limits.max_blocks_per_row, limits.num_blocks)?;
        // A row has tokens to compute and somewhere to put them.
        for (field, list) in [("token_ids", &token_ids), ("block_table", &block_table)] {
            if list.is_empty() {
                return Err(CodecError::Invalid { field, value: 0 });
            }
        }
        let block_table = block_table.into_iter().map(BlockId).collect();
        let flags = self.flags("row.flags", 3)?;
        let sampling = if flags & 1 != 0 {
            Some(self.sampling(limits, left)?)
        } else {
            None
        };
        let prompt_logprobs = if flags & 2 != 0 {
            Some(self.prompt_logprobs(limits, token_ids.len() as u32)?)
        } else {
            None
        };
        Ok(StepRow {
            sequence,
            token_ids,
            num_computed_tokens,
            block_table,
            sampling,
            prompt_logprobs,
        })
    }
    fn prompt_logprobs(&mut self, limits: &StepLimits, row_len: u32) -> Result<PromptLogprobs> {
        let top = self.index("prompt_logprobs.top", limits.max_logprobs + 1)?;
        let first = self.index("prompt_logprobs.first", row_len)?;
        let targets = self.indices("prompt_logprobs.targets", row_len - first, limits.vocab_size)?;
        if targets.is_empty() {
            let field = "prompt_logprobs.targets";
            return Err(CodecError::Invalid { field, value: 0 });
        }
        Ok(PromptLogprobs { top, first, targets })
    }
    fn sampled(&mut self, limits: &StepLimits) -> Result<SampledToken> {
        let sequence = SequenceId(self.u64("sequence")?);
        let token = self.index("token", limits.vocab_size)?;
        let flags = self.flags("sampled.flags", 3)?;
        let scored = if flags & 2 != 0 {
            Some((self.f32("logprob")?, self.u32("rank")?))
        } else {
            None
        };
        Ok(SampledToken {
            sequence,
            token,
            finite: flags & 1 != 0,
            logprob: scored.map(|(logprob, _)| logprob),
            rank: scored.map(|(_, rank)| rank),
            top_logprobs: self.top_logprobs(limits, limits.max_top_logprobs())?,
        })
    }
    fn scored(&mut self, limits: &StepLimits) -> Result<ScoredToken> {
        Ok(ScoredToken {
            token: self.index("token", limits.vocab_size)?,
            logprob: self.f32("logprob")?,
            rank: self.u32("rank")?,
            top_logprobs: self.top_logprobs(limits, limits.max_logprobs)?,
        })
    }
    fn top_logprobs(&mut self, limits: &StepLimits, most: u32) -> Result<Vec<(u32, f32)>> {
        const FIELD: &str = "top_logprobs";
        let n = self.count(FIELD, most, 8)?;
        let top = (0..n).map(|_| Ok((self.index(FIELD, limits.vocab_size)?, self.f32(FIELD)?)));
        top.collect()
    }
    fn sampling(&mut self, limits: &StepLimits, left: &mut Left) -> Result<RowSampling> {
        let temperature = self.number("temperature", 0.0)?;
        let top_p = self.number("top_p", 0.0)?;
        let min_p = self.number("min_p", 0.0)?;
        let (top_k, seed) = (self.u32("top_k")?, self.u64("seed")?);
        let flags = self.flags("sampling.flags", 3)?;
        let (mut logprobs, mut logprob_token_ids) = (None, Vec::new());
        if flags & 1 != 0 {
            logprobs = Some(self.index("logprobs", limits.max_logprobs + 1)?);
            let most = MAX_LOGPROB_TOKEN_IDS as u32;
            logprob_token_ids = self.indices("logprob_token_ids", most, limits.vocab_size)?;
        }
        let penalties = if flags & 2 != 0 {
            Some(self.penalties(limits, left)?)
        } else {
            None
        };
        let n = self.count("bias", limits.max_edits_per_row, 8)?;
        let bias = (0..n).map(|_| Ok((self.index("bias", limits.vocab_size)?, self.f32("bias")?)));
        let bias = bias.collect::<Result<_>>()?;
        Ok(RowSampling {
            temperature,
            top_p,
            top_k,
            min_p,
            seed,
            logprobs,
            logprob_token_ids,
            penalties,
            bias,
        })
    }
    fn penalties(&mut self, limits: &StepLimits, left: &mut Left) -> Result<Penalties> {
        let repetition = self.number("repetition", f32::MIN_POSITIVE)?;
        let presence = self.number("presence", f32::MIN)?;
        let frequency = self.number("frequency", f32::MIN)?;
        let n = self.count("history", left.history, 8)?;
        left.history -= n as u32;
        let history = (0..n).map(|_| Ok((self.index("history", limits.vocab_size)?, self.u32("history")?)));
        let history = history.collect::<Result<_>>()?;
        Ok(Penalties {
            repetition,
            presence,
            frequency,
            history,
        })
    }
    fn finish(&self) -> Result<()> {
        if self.bytes.is_empty() {
            Ok(())
        } else {
            Err(CodecError::Trailing(self.bytes.len()))
        }
    }
}
