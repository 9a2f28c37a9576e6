//! Candidates as bytes. A peer's message is checked against what was asked for before anything is allocated.

use std::ops::Range;

use phalanx_kernels::{Candidate, CandidateRequest, Candidates, ChunkStatistics, VOCAB_CHUNK};

/// Why a peer's message is not an answer to the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("ends within {0}")]
    Truncated(&'static str),
    #[error("{field} is {value}, limit {limit}")]
    OverLimit {
        field: &'static str,
        value: usize,
        limit: usize,
    },
    #[error("token {id} lies outside the rank's {start}..{end}")]
    ForeignToken { id: u32, start: usize, end: usize },
    #[error("{0} bytes after the end")]
    Trailing(usize),
}

type Result<T> = std::result::Result<T, WireError>;

const FINITE: u8 = 1;
const PERTURBED: u8 = 2;
const CANDIDATE_BYTES: usize = 12;
const CHUNK_BYTES: usize = 8;
/// Flags, a perturbed candidate and four counts.
const ROW_BYTES: usize = 1 + 4 + CANDIDATE_BYTES + 4 * 4;

/// Most bytes that the answers to `requests` take on a rank that holds `vocab`.
pub(super) fn message_bound(requests: &[CandidateRequest<'_>], vocab: &Range<usize>) -> usize {
    let row = |request: &CandidateRequest<'_>| {
        let limits = RowLimits::new(request, vocab);
        ROW_BYTES
            + CANDIDATE_BYTES * (limits.top + limits.raw_top)
            + CHUNK_BYTES * (limits.scaled_chunks + limits.raw_chunks)
    };
    requests.iter().map(row).sum()
}

pub(super) fn encode(rows: &[Candidates]) -> Vec<u8> {
    let mut out = Vec::new();
    for row in rows {
        let finite = if row.finite { FINITE } else { 0 };
        let perturbed = if row.perturbed.is_some() { PERTURBED } else { 0 };
        out.push(finite | perturbed);
        if let Some((value, candidate)) = &row.perturbed {
            out.extend(value.to_le_bytes());
            put_candidate(&mut out, candidate);
        }
        for list in [&row.best, &row.raw_best] {
            out.extend((list.len() as u32).to_le_bytes());
            list.iter()
                .for_each(|candidate| put_candidate(&mut out, candidate));
        }
        for list in [&row.scaled_statistics, &row.raw_statistics] {
            out.extend((list.len() as u32).to_le_bytes());
            for chunk in list {
                out.extend(chunk.max.to_le_bytes());
                out.extend(chunk.sum.to_le_bytes());
            }
        }
    }
    out
}

fn put_candidate(out: &mut Vec<u8>, candidate: &Candidate) {
    out.extend(candidate.id.to_le_bytes());
    out.extend(candidate.raw.to_le_bytes());
    out.extend(candidate.scaled.to_le_bytes());
}

/// The answers of the rank that holds `vocab` to `requests`.
pub(super) fn decode(
    bytes: &[u8],
    requests: &[CandidateRequest<'_>],
    vocab: &Range<usize>,
) -> Result<Vec<Candidates>> {
    let mut reader = Reader { bytes, vocab };
    let rows = requests
        .iter()
        .map(|request| reader.row(&RowLimits::new(request, vocab)))
        .collect::<Result<_>>()?;
    match reader.bytes.len() {
        0 => Ok(rows),
        left => Err(WireError::Trailing(left)),
    }
}

/// Bytes of so many counts.
pub(super) fn counts_bytes(counts: usize) -> usize {
    size_of::<u32>() * counts
}

pub(super) fn encode_counts(counts: &[u32]) -> Vec<u8> {
    counts.iter().flat_map(|count| count.to_le_bytes()).collect()
}

/// The counts of the rank that holds `vocab`: exactly `len`, and none above its number of tokens.
pub(super) fn decode_counts(bytes: &[u8], len: usize, vocab: &Range<usize>) -> Result<Vec<u32>> {
    let (counts, rest) = bytes.as_chunks();
    if counts.len() < len {
        return Err(WireError::Truncated("counts"));
    }
    if counts.len() > len || !rest.is_empty() {
        return Err(WireError::Trailing(bytes.len() - counts_bytes(len)));
    }
    let count = |bytes: &[u8; 4]| {
        let count = u32::from_le_bytes(*bytes);
        let (value, limit) = (count as usize, vocab.len());
        if value > limit {
            let field = "counts";
            return Err(WireError::OverLimit { field, value, limit });
        }
        Ok(count)
    };
    counts.iter().map(count).collect()
}

/// What a rank may answer to one request.
struct RowLimits {
    top: usize,
    raw_top: usize,
    scaled_chunks: usize,
    raw_chunks: usize,
}

impl RowLimits {
    fn new(request: &CandidateRequest<'_>, vocab: &Range<usize>) -> Self {
        let chunks = |wanted: bool| {
            if wanted {
                vocab.len().div_ceil(VOCAB_CHUNK)
            } else {
                0
            }
        };
        Self {
            top: request.top.min(vocab.len()),
            raw_top: request.raw_top.min(vocab.len()),
            scaled_chunks: chunks(request.scaled_statistics),
            raw_chunks: chunks(request.raw_statistics),
        }
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    vocab: &'a Range<usize>,
}

impl Reader<'_> {
    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N]> {
        let (head, rest) = self
            .bytes
            .split_first_chunk::<N>()
            .ok_or(WireError::Truncated(field))?;
        self.bytes = rest;
        Ok(*head)
    }
    fn f32(&mut self, field: &'static str) -> Result<f32> {
        Ok(f32::from_le_bytes(self.array(field)?))
    }
    fn candidate(&mut self, field: &'static str) -> Result<Candidate> {
        let id = u32::from_le_bytes(self.array(field)?);
        if !self.vocab.contains(&(id as usize)) {
            let Range { start, end } = *self.vocab;
            return Err(WireError::ForeignToken { id, start, end });
        }
        Ok(Candidate {
            id,
            raw: self.f32(field)?,
            scaled: self.f32(field)?,
        })
    }
    fn count(&mut self, field: &'static str, limit: usize) -> Result<usize> {
        let value = u32::from_le_bytes(self.array(field)?) as usize;
        if value <= limit {
            Ok(value)
        } else {
            Err(WireError::OverLimit { field, value, limit })
        }
    }
    fn candidates(&mut self, field: &'static str, limit: usize) -> Result<Vec<Candidate>> {
        let count = self.count(field, limit)?;
        (0..count).map(|_| self.candidate(field)).collect()
    }
    fn statistics(&mut self, field: &'static str, limit: usize) -> Result<Vec<ChunkStatistics>> {
        let count = self.count(field, limit)?;
        (0..count)
            .map(|_| {
                Ok(ChunkStatistics {
                    max: self.f32(field)?,
                    sum: self.f32(field)?,
                })
            })
            .collect()
    }
    fn row(&mut self, limits: &RowLimits) -> Result<Candidates> {
        let [flags] = self.array("flags")?;
        let perturbed = if flags & PERTURBED != 0 {
            Some((self.f32("perturbed")?, self.candidate("perturbed")?))
        } else {
            None
        };
        Ok(Candidates {
            finite: flags & FINITE != 0,
            perturbed,
            best: self.candidates("best", limits.top)?,
            raw_best: self.candidates("raw_best", limits.raw_top)?,
            scaled_statistics: self.statistics("scaled_statistics", limits.scaled_chunks)?,
            raw_statistics: self.statistics("raw_statistics", limits.raw_chunks)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VOCAB: Range<usize> = 512..1300;

    fn request() -> CandidateRequest<'static> {
        CandidateRequest {
            row: 0,
            vocab: 0..512,
            edits: &[],
            allowed: None,
            inverse_temperature: 1.0,
            noise: None,
            top: 3,
            raw_top: 2,
            scaled_statistics: true,
            raw_statistics: false,
        }
    }

    fn candidate(id: u32) -> Candidate {
        Candidate {
            id,
            raw: 0.5,
            scaled: -1.5,
        }
    }

    fn answer() -> Candidates {
        Candidates {
            best: vec![candidate(512), candidate(1299), candidate(700)],
            raw_best: vec![candidate(600)],
            perturbed: Some((2.5, candidate(513))),
            scaled_statistics: vec![ChunkStatistics { max: 1.0, sum: 2.0 }; 2],
            raw_statistics: Vec::new(),
            finite: true,
        }
    }

    #[test]
    fn answers_arrive_whole_within_their_bound() {
        let (requests, rows) = ([request(), request()], [answer(), Candidates::default()]);
        let bytes = encode(&rows);
        assert!(bytes.len() <= message_bound(&requests, &VOCAB));
        assert_eq!(decode(&bytes, &requests, &VOCAB).unwrap(), rows);
        for end in 0..bytes.len() {
            assert!(decode(&bytes[..end], &requests, &VOCAB).is_err());
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(decode(&longer, &requests, &VOCAB), Err(WireError::Trailing(1)));
    }

    #[test]
    fn a_peer_answers_what_it_was_asked_about_its_own_tokens() {
        let mut foreign = answer();
        foreign.best[1].id = 1300;
        let error = decode(&encode(&[foreign]), &[request()], &VOCAB).unwrap_err();
        assert_eq!(error.to_string(), "token 1300 lies outside the rank's 512..1300");
        let mut wordy = answer();
        wordy.raw_statistics.push(ChunkStatistics { max: 0.0, sum: 1.0 });
        let error = decode(&encode(&[wordy]), &[request()], &VOCAB).unwrap_err();
        assert_eq!(error.to_string(), "raw_statistics is 1, limit 0");
    }

    #[test]
    fn counts_are_of_the_ranks_own_tokens() {
        let bytes = encode_counts(&[0, 788, 5]);
        assert_eq!(bytes.len(), counts_bytes(3));
        assert_eq!(decode_counts(&bytes, 3, &VOCAB), Ok(vec![0, 788, 5]));
        assert_eq!(
            decode_counts(&bytes, 4, &VOCAB),
            Err(WireError::Truncated("counts"))
        );
        assert_eq!(decode_counts(&bytes, 2, &VOCAB), Err(WireError::Trailing(4)));
        assert_eq!(
            decode_counts(&bytes[..11], 2, &VOCAB),
            Err(WireError::Trailing(3))
        );
        let error = decode_counts(&encode_counts(&[789]), 1, &VOCAB).unwrap_err();
        assert_eq!(error.to_string(), "counts is 789, limit 788");
    }

    proptest! {
        #[test]
        fn no_bytes_whatever_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes, &[request()], &VOCAB);
        }
    }
}
