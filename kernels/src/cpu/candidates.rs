//! Sampling candidates of rows of logits, in one pass.
//!
//! A row is cut into segments if there are more threads than rows; they are independent tasks. The best of the best of the segments are the best of the
//! row, in one order, and statistics are per chunk: the result does not depend on the cut.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::OnceLock;

use super::buffer::CpuBuffer;
use super::exec::{Exec, check};
use super::math::{exp, ln};
use super::simd::{Kernel, LANES, Simd};
use crate::candidates::{mask_words, rank};
use crate::philox::philox4x32_lanes;
use crate::{Candidate, CandidateRequest, Candidates, ChunkStatistics, Noise, Result, VOCAB_CHUNK};

/// Tokens of a word of a mask.
const MASK_BITS: usize = u32::BITS as usize;
/// Tokens whose noise comes from one call of the generator: four words of each lane.
const NOISE_GROUP: usize = 4 * LANES;
/// No Gumbel noise of a 32-bit uniform is larger: -ln(-ln(1 - 2⁻³³)) = 22.87.
const MAX_NOISE: f32 = 23.0;

pub(crate) fn candidates(
    exec: Exec<'_>,
    logits: &CpuBuffer,
    requests: &[CandidateRequest<'_>],
) -> Result<Vec<Candidates>> {
    let segments = exec.pool.threads().div_ceil(requests.len().max(1));
    let segment = |request: &CandidateRequest<'_>| {
        request
            .vocab
            .len()
            .div_ceil(segments)
            .next_multiple_of(VOCAB_CHUNK)
            .max(VOCAB_CHUNK)
    };
    let mut tasks = Vec::new();
    for request in requests {
        check_request(logits, request)?;
        let segment = segment(request);
        let starts = request.vocab.clone().step_by(segment);
        tasks.extend(starts.map(|start| Segment {
            request,
            raw: &logits.row(request.row)[start - request.vocab.start..],
            ids: start..request.vocab.end.min(start + segment),
        }));
    }
    let parts: Vec<OnceLock<Candidates>> = tasks.iter().map(|_| OnceLock::new()).collect();
    exec.pool.run(tasks.len(), |i| {
        parts[i].get_or_init(|| exec.isa.run(tasks[i].clone()));
    });
    let mut parts = parts.into_iter().filter_map(OnceLock::into_inner);
    Ok(requests
        .iter()
        .map(|request| {
            let mut all = Candidates {
                finite: true,
                ..Candidates::default()
            };
            for part in parts
                .by_ref()
                .take(request.vocab.len().div_ceil(segment(request)))
            {
                all.append(part, request);
            }
            all
        })
        .collect())
}

fn check_request(logits: &CpuBuffer, request: &CandidateRequest<'_>) -> Result<()> {
    const OP: &str = "candidates";
    let Range { start, end } = request.vocab;
    check(
        OP,
        start <= end && end <= u32::MAX as usize && start.is_multiple_of(VOCAB_CHUNK),
        || format!("vocabulary {start}..{end} does not start at a multiple of {VOCAB_CHUNK}"),
    )?;
    logits.check(OP, request.row.saturating_add(1), end - start)?;
    let masked = request.allowed.map_or(usize::MAX, <[u32]>::len);
    check(OP, masked >= mask_words(end - start), || {
        format!("{masked} words of a mask over {start}..{end}")
    })?;
    let temperature = request.inverse_temperature;
    check(OP, temperature.is_finite() && temperature > 0.0, || {
        format!("inverse temperature {temperature}")
    })
}

#[derive(Clone)]
struct Segment<'a> {
    request: &'a CandidateRequest<'a>,
    /// Raw logits from the segment's first id on; may be longer.
    raw: &'a [f32],
    ids: Range<usize>,
}

impl Kernel for Segment<'_> {
    type Output = Candidates;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Candidates {
        let Segment { request, raw, ids } = self;
        let len = ids.len();
        let mut found = Candidates {
            finite: true,
            ..Candidates::default()
        };
        let mut best = Best::new(request.top.min(len));
        let mut raw_best = Best::new(request.raw_top.min(len));
        let mut perturbed = None;
        for (raw, first) in raw[..len].chunks(VOCAB_CHUNK).zip(ids.step_by(VOCAB_CHUNK)) {
            found.finite &= all_finite(raw);
            let chunk = Chunk::new(request, raw, first);
            let scaled_max = max(simd, &chunk.scaled);
            best.offer(&chunk, &chunk.scaled, scaled_max);
            if let Some(noise) = request.noise {
                chunk.perturb(simd, noise, scaled_max, &mut perturbed);
            }
            if request.scaled_statistics {
                found
                    .scaled_statistics
                    .push(statistics(simd, &chunk.scaled, scaled_max));
            }
            if request.raw_top > 0 || request.raw_statistics {
                let raw_max = max(simd, &chunk.raw);
                raw_best.offer(&chunk, &chunk.raw, raw_max);
                if request.raw_statistics {
                    found.raw_statistics.push(statistics(simd, &chunk.raw, raw_max));
                }
            }
        }
        found.best = best.into_candidates();
        found.raw_best = raw_best.into_candidates();
        found.perturbed = perturbed;
        found
    }
}

/// Bans the tokens whose bits are not set; those beyond the words are banned already.
fn ban(scaled: &mut [f32; VOCAB_CHUNK], words: &[u32]) {
    for (logits, &word) in scaled.as_chunks_mut::<MASK_BITS>().0.iter_mut().zip(words) {
        for (bit, logit) in logits.iter_mut().enumerate() {
            *logit = if word >> bit & 1 == 1 {
                *logit
            } else {
                f32::NEG_INFINITY
            };
        }
    }
}

fn all_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    // Without an early exit, so that the loop is vectors.
    !values
        .iter()
        .fold(false, |bad, x| bad | (x.to_bits() & EXPONENT == EXPONENT))
}

/// Logits of one chunk of the vocabulary, padded with negative infinity.
struct Chunk {
    first: u32,
    raw: [f32; VOCAB_CHUNK],
    /// After edits and temperature.
    scaled: [f32; VOCAB_CHUNK],
}

impl Chunk {
    #[inline(always)]
    fn new(request: &CandidateRequest<'_>, values: &[f32], first: usize) -> Self {
        let mut raw = [f32::NEG_INFINITY; VOCAB_CHUNK];
        raw[..values.len()].copy_from_slice(values);
        let mut scaled = raw;
        let edits = request.edits;
        let from = edits.partition_point(|e| (e.id as usize) < first);
        for edit in edits[from..]
            .iter()
            .take_while(|e| (e.id as usize) < first + values.len())
        {
            let logit = &mut scaled[edit.id as usize - first];
            let penalized = if *logit > 0.0 {
                *logit / edit.repetition
            } else {
                *logit * edit.repetition
            };
            *logit = penalized + edit.add;
        }
        for logit in &mut scaled {
            *logit *= request.inverse_temperature;
        }
        if let Some(allowed) = request.allowed {
            let offset = first - request.vocab.start;
            let words = &allowed[offset / MASK_BITS..mask_words(offset + values.len())];
            ban(&mut scaled, words);
        }
        Self {
            first: first as u32,
            raw,
            scaled,
        }
    }

    fn candidate(&self, index: usize) -> Candidate {
        Candidate {
            id: self.first + index as u32,
            raw: self.raw[index],
            scaled: self.scaled[index],
        }
    }

    /// Keeps the best of scaled logit + noise. Noise is evaluated only where it could win.
    ///
    /// Scaled logit s with uniform u beats the best value b if -ln(u) < exp(s - b); and 1 - u < -ln(u). So a token with
    /// 1 - u >= exp(s - b) has lost, which costs neither logarithm. On average as many tokens pass as the softmax's
    /// weights are larger than that of the best value: a few.
    #[inline(always)]
    fn perturb<S: Simd>(&self, simd: S, noise: Noise, max: f32, best: &mut Option<(f32, Candidate)>) {
        for (group, scaled) in self.scaled.as_chunks::<NOISE_GROUP>().0.iter().enumerate() {
            let limit = best.map_or(f32::NEG_INFINITY, |b| lower(b.0));
            if max + MAX_NOISE < limit {
                return;
            }
            let words = random_words(noise, self.first + (group * NOISE_GROUP) as u32);
            let vectors = scaled.as_chunks::<LANES>().0;
            for (vector, (scaled, words)) in vectors.iter().zip(&words).enumerate() {
                let limit = best.map_or(f32::NEG_INFINITY, |b| lower(b.0));
                let odds = simd.to_array(exp(simd, simd.sub(simd.load(scaled), simd.splat(limit))));
                for (lane, (&odds, &word)) in odds.iter().zip(words).enumerate() {
                    // `!word` is 2³² (1 - u), less a half. A banned token's odds are 0, or NaN before there is a best.
                    if (!word as f32) * 2f32.powi(-32) < odds {
                        let value = scaled[lane] + gumbel(word);
                        if best.is_none_or(|b| value > b.0) {
                            *best =
                                Some((value, self.candidate(group * NOISE_GROUP + vector * LANES + lane)));
                        }
                    }
                }
            }
        }
    }
}

/// A bound below which no sum with noise, as rounded, can beat `value`.
fn lower(value: f32) -> f32 {
    value - (value.abs() * 2f32.powi(-20) + 2f32.powi(-10))
}

/// The words of 32 tokens in rising id. `first` is a multiple of 32.
#[inline(always)]
fn random_words(noise: Noise, first: u32) -> [[u32; LANES]; 4] {
    let group = first / NOISE_GROUP as u32 * LANES as u32;
    let lanes = std::array::from_fn(|lane| group + lane as u32);
    let position = [noise.position as u32, (noise.position >> 32) as u32];
    let counters = [lanes, [0; LANES], [position[0]; LANES], [position[1]; LANES]];
    philox4x32_lanes(counters, [noise.seed as u32, (noise.seed >> 32) as u32])
}

/// Standard Gumbel noise of a uniform word.
pub(crate) fn gumbel(word: u32) -> f32 {
    let uniform = (f64::from(word) + 0.5) * 2f64.powi(-32);
    -ln(-ln(uniform)) as f32
}

#[inline(always)]
fn max<S: Simd>(simd: S, values: &[f32; VOCAB_CHUNK]) -> f32 {
    let mut max = simd.splat(f32::NEG_INFINITY);
    for x in values.as_chunks::<LANES>().0 {
        max = simd.max(max, simd.load(x));
    }
    simd.max_lane(max)
}

#[inline(always)]
fn statistics<S: Simd>(simd: S, values: &[f32; VOCAB_CHUNK], max: f32) -> ChunkStatistics {
    if max == f32::NEG_INFINITY {
        return ChunkStatistics { max, sum: 0.0 };
    }
    let mut sum = simd.splat(0.0);
    for x in values.as_chunks::<LANES>().0 {
        sum = simd.add(sum, exp(simd, simd.sub(simd.load(x), simd.splat(max))));
    }
    ChunkStatistics {
        max,
        sum: simd.sum(sum),
    }
}

/// The best few of what is offered in rising id.
struct Best {
    keep: usize,
    /// The worst on top.
    heap: BinaryHeap<Ranked>,
}

struct Ranked {
    value: f32,
    candidate: Candidate,
}

impl Ranked {
    fn key(&self) -> (i32, u32) {
        rank(self.value, self.candidate.id)
    }
}
impl PartialEq for Ranked {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}
impl Eq for Ranked {}
impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl Best {
    fn new(keep: usize) -> Self {
        Self {
            keep,
            heap: BinaryHeap::with_capacity(keep),
        }
    }

    /// A value must exceed this: of equal values the first one stays.
    fn threshold(&self) -> f32 {
        let full = self.heap.len() == self.keep;
        self.heap
            .peek()
            .filter(|_| full)
            .map_or(f32::NEG_INFINITY, |worst| worst.value)
    }

    /// Offers a chunk, whose largest value is `max`.
    fn offer(&mut self, chunk: &Chunk, values: &[f32; VOCAB_CHUNK], max: f32) {
        let mut threshold = self.threshold();
        if self.keep == 0 || max <= threshold {
            return;
        }
        for (index, &value) in values.iter().enumerate() {
            if value > threshold {
                if self.heap.len() == self.keep {
                    self.heap.pop();
                }
                self.heap.push(Ranked {
                    value,
                    candidate: chunk.candidate(index),
                });
                threshold = self.threshold();
            }
        }
    }

    fn into_candidates(self) -> Vec<Candidate> {
        self.heap
            .into_sorted_vec()
            .into_iter()
            .map(|r| r.candidate)
            .collect()
    }
}
