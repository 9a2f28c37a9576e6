//! Sampling candidates of rows of logits: `kernels/cuda/candidates.cu`. What is wanted of all rows comes back in one copy.

use std::ops::Range;

use super::backend::CudaBackend;
use super::buffer::CudaBuffer;
use super::launch::{
    Arg::{Pointer, U32},
    Grid,
};
use super::shape::u32_of;
use crate::candidates::{mask_words, rank};
use crate::error::check;
use crate::{Candidate, CandidateRequest, Candidates, ChunkStatistics, KernelError, Result, VOCAB_CHUNK};

const OP: &str = "candidates";
/// The driver's limit is 65,535 blocks in the second dimension of a grid.
const MAX_GROUP: usize = 4096;
const NO_TOKEN: u32 = u32::MAX;
/// In the place of a mask's start.
const NO_MASK: u32 = u32::MAX;

/// Words of 4 bytes of the kernels' structures.
const REQUEST: usize = 16;
const EDIT: usize = 3;
const STATISTICS: usize = 4;
const WINNER: usize = 5;
/// Of a reported token: id, raw and scaled logit.
const TOKEN: usize = 3;

pub(crate) fn candidates(
    backend: &CudaBackend,
    logits: &CudaBuffer,
    requests: &[CandidateRequest<'_>],
) -> Result<Vec<Candidates>> {
    for request in requests {
        check_request(logits, request)?;
    }
    let mut found = Vec::with_capacity(requests.len());
    let mut rest = requests;
    while !rest.is_empty() {
        let (group, later) = rest.split_at(group_len(rest, backend)?);
        found.extend(of_group(backend, logits, group)?);
        rest = later;
    }
    Ok(found)
}

fn check_request(logits: &CudaBuffer, request: &CandidateRequest<'_>) -> Result<()> {
    let Range { start, end } = request.vocab;
    check(
        OP,
        start <= end && end < NO_TOKEN as usize && start.is_multiple_of(VOCAB_CHUNK),
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

/// Where a group's results and temporary arrays lie in the scratch memory, in words.
#[derive(Clone, Copy, Debug, Default)]
struct Layout {
    requests: usize,
    max_chunks: usize,
    /// Tokens reported by scaled, and by raw logit.
    tops: [usize; 2],
}

impl Layout {
    fn with(mut self, request: &CandidateRequest<'_>) -> Self {
        self.requests += 1;
        // A request over nothing still has a place for its statistics.
        self.max_chunks = self.max_chunks.max(chunks(request)).max(1);
        for (sum, top) in self.tops.iter_mut().zip(tops(request)) {
            *sum += top;
        }
        self
    }

    /// Best token of every request.
    fn results(&self) -> usize {
        0
    }
    fn statistics(&self) -> usize {
        self.results() + self.requests * WINNER
    }
    /// How many tokens every request reports.
    fn counts(&self, raw: usize) -> usize {
        self.statistics() + self.requests * (self.max_chunks * STATISTICS + raw)
    }
    /// Ids, raw and scaled logits of the reported tokens.
    fn tokens(&self, raw: usize) -> usize {
        self.counts(2) + TOKEN * self.tops[..raw].iter().sum::<usize>()
    }
    /// Up to here it is copied back.
    fn winners(&self) -> usize {
        self.tokens(2)
    }
    fn scaled(&self) -> usize {
        self.winners() + self.requests * self.max_chunks * WINNER
    }
    fn words(&self) -> usize {
        self.scaled() + self.requests * self.max_chunks * VOCAB_CHUNK
    }
}

fn chunks(request: &CandidateRequest<'_>) -> usize {
    request.vocab.len().div_ceil(VOCAB_CHUNK)
}

fn tops(request: &CandidateRequest<'_>) -> [usize; 2] {
    [request.top, request.raw_top].map(|top| top.min(request.vocab.len()))
}

/// The words of a request's mask, those of its ids alone.
fn mask<'a>(request: &CandidateRequest<'a>) -> Option<&'a [u32]> {
    request
        .allowed
        .map(|words| &words[..mask_words(request.vocab.len())])
}

/// Words that a request takes in the upload.
fn packed_words(request: &CandidateRequest<'_>) -> usize {
    REQUEST + request.edits.len() * EDIT + mask(request).map_or(0, <[u32]>::len)
}

/// How many of the first requests fit the scratch memory, and half of what a step's input may take.
fn group_len(requests: &[CandidateRequest<'_>], backend: &CudaBackend) -> Result<usize> {
    let bytes = backend.scratch.bytes();
    let mut layout = Layout::default();
    let (mut len, mut packed) = (0, 0);
    for request in requests.iter().take(MAX_GROUP) {
        layout = layout.with(request);
        packed += packed_words(request) * size_of::<u32>();
        if len > 0 && packed > backend.step_bytes / 2 {
            break;
        }
        let needed = layout.words() * size_of::<u32>();
        if needed > bytes {
            if len == 0 {
                return Err(KernelError::OutOfMemory {
                    what: "the candidates of a row",
                    requested: needed,
                    free: bytes,
                });
            }
            break;
        }
        len += 1;
    }
    Ok(len)
}

fn of_group(
    backend: &CudaBackend,
    logits: &CudaBuffer,
    group: &[CandidateRequest<'_>],
) -> Result<Vec<Candidates>> {
    let layout = group.iter().fold(Layout::default(), |layout, r| layout.with(r));
    queue(backend, logits, group, layout)?;
    let words = backend.download(&backend.scratch, layout.winners())?;
    let mut starts = [0, 0];
    let mut found = Vec::with_capacity(group.len());
    for (index, request) in group.iter().enumerate() {
        found.push(
            Results {
                words: &words,
                layout,
            }
            .of(request, index, starts)?,
        );
        for (start, top) in starts.iter_mut().zip(tops(request)) {
            *start += top;
        }
    }
    Ok(found)
}

/// Queues the three kernels.
fn queue(
    backend: &CudaBackend,
    logits: &CudaBuffer,
    group: &[CandidateRequest<'_>],
    layout: Layout,
) -> Result<()> {
    let uploaded = backend.upload_step(&pack(group)?)?;
    let edits = uploaded.ptr() + (group.len() * REQUEST * size_of::<u32>()) as u64;
    let num_edits: usize = group.iter().map(|request| request.edits.len()).sum();
    let masks = Pointer(edits + (num_edits * EDIT * size_of::<u32>()) as u64);
    let at = |word: usize| Pointer(backend.scratch.ptr() + (word * size_of::<u32>()) as u64);
    let (requests, edits) = (Pointer(uploaded.ptr()), Pointer(edits));
    let (logits_at, stride) = (Pointer(logits.ptr()), U32(u32_of(OP, logits.width())?));
    let max_chunks = U32(u32_of(OP, layout.max_chunks)?);
    let launch = |name, grid, args: &[_]| {
        // SAFETY: the parameters of the three kernels. Every request names a row of `logits` and ids that the row has
        // (`check_request`); the scratch memory holds the layout (`group_len`); the structures are packed by `pack`.
        unsafe { backend.launch(name, grid, args) }
    };
    launch(
        "candidate_chunks",
        Grid::new([layout.max_chunks, group.len(), 1], 128),
        &[
            at(layout.scaled()),
            at(layout.statistics()),
            at(layout.winners()),
            logits_at,
            stride,
            requests,
            edits,
            masks,
        ],
    )?;
    launch(
        "candidate_winners",
        Grid::rows(group.len(), 32),
        &[at(layout.results()), at(layout.winners()), requests, max_chunks],
    )?;
    for raw in (0..2).filter(|&raw| layout.tops[raw] > 0) {
        let (ids, tokens) = (layout.tokens(raw), layout.tops[raw]);
        launch(
            "select_top",
            Grid::rows(group.len(), 512),
            &[
                at(ids),
                at(ids + tokens),
                at(ids + 2 * tokens),
                at(layout.counts(raw)),
                at(layout.scaled()),
                logits_at,
                stride,
                requests,
                max_chunks,
                U32(raw as u32),
            ],
        )?;
    }
    Ok(())
}

/// `struct Request` of every request, then `struct Edit` of every edit, then every mask.
fn pack(group: &[CandidateRequest<'_>]) -> Result<Vec<u32>> {
    let mut words = Vec::with_capacity(group.iter().map(packed_words).sum());
    let (mut edits_start, mut mask_start, mut starts) = (0, 0, [0, 0]);
    for request in group {
        let low_and_high = |n: u64| [n as u32, (n >> 32) as u32];
        let noise = request.noise.map_or([[0; 2]; 2], |noise| {
            [noise.seed, noise.position].map(low_and_high)
        });
        let [top, raw_top] = tops(request);
        words.push(u32_of(OP, request.row)?);
        words.push(u32_of(OP, request.vocab.start)?);
        words.push(u32_of(OP, request.vocab.len())?);
        words.push(u32_of(OP, edits_start)?);
        words.push(u32_of(OP, request.edits.len())?);
        words.push(request.inverse_temperature.to_bits());
        words.push(request.noise.is_some().into());
        words.extend(noise.as_flattened());
        for size in [top, starts[0], raw_top, starts[1]] {
            words.push(u32_of(OP, size)?);
        }
        match mask(request) {
            Some(mask) => {
                words.push(u32_of(OP, mask_start)?);
                mask_start += mask.len();
            }
            None => words.push(NO_MASK),
        }
        edits_start += request.edits.len();
        starts = [starts[0] + top, starts[1] + raw_top];
    }
    for edit in group.iter().flat_map(|request| request.edits) {
        words.extend([edit.id, edit.repetition.to_bits(), edit.add.to_bits()]);
    }
    words.extend(group.iter().filter_map(mask).flatten());
    Ok(words)
}

/// What has come back of a group.
struct Results<'a> {
    words: &'a [u32],
    layout: Layout,
}

impl Results<'_> {
    /// `starts`: where its tokens begin among those reported by scaled and by raw logit.
    fn of(&self, request: &CandidateRequest<'_>, index: usize, starts: [usize; 2]) -> Result<Candidates> {
        let float = |word: &u32| f32::from_bits(*word);
        let winner = &self.words[self.layout.results() + index * WINNER..][..WINNER];
        let candidate = Candidate {
            id: winner[1],
            raw: float(&winner[2]),
            scaled: float(&winner[3]),
        };
        let first = self.layout.statistics() + index * self.layout.max_chunks * STATISTICS;
        let statistics = &self.words[first..][..chunks(request) * STATISTICS];
        let statistics = |wanted: bool, at: usize| -> Vec<ChunkStatistics> {
            let of_chunks = statistics.chunks_exact(STATISTICS).filter(|_| wanted);
            of_chunks
                .map(|chunk| ChunkStatistics {
                    max: float(&chunk[at]),
                    sum: float(&chunk[at + 1]),
                })
                .collect()
        };
        Ok(Candidates {
            best: self.tokens(0, index, starts[0])?,
            raw_best: self.tokens(1, index, starts[1])?,
            perturbed: (candidate.id != NO_TOKEN).then_some((float(&winner[0]), candidate)),
            scaled_statistics: statistics(request.scaled_statistics, 0),
            raw_statistics: statistics(request.raw_statistics, 2),
            finite: winner[4] != 0,
        })
    }

    /// The tokens reported for a request, best first. The kernel leaves the order to the host.
    fn tokens(&self, raw: usize, index: usize, start: usize) -> Result<Vec<Candidate>> {
        let total = self.layout.tops[raw];
        if total == 0 {
            return Ok(Vec::new());
        }
        let count = self.words[self.layout.counts(raw) + index] as usize;
        check(OP, count <= total - start, || {
            format!("{count} tokens of {total}")
        })?;
        let array = |which: usize| &self.words[self.layout.tokens(raw) + which * total + start..][..count];
        let mut tokens: Vec<Candidate> = array(0)
            .iter()
            .zip(array(1).iter().zip(array(2)))
            .map(|(&id, (&raw, &scaled))| Candidate {
                id,
                raw: f32::from_bits(raw),
                scaled: f32::from_bits(scaled),
            })
            .collect();
        tokens.sort_unstable_by_key(|c| rank(if raw == 1 { c.raw } else { c.scaled }, c.id));
        Ok(tokens)
    }
}
