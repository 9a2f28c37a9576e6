//! Every rank tells every other one its candidates, and all merge them alike.

use phalanx_kernels::{Backend, CandidateRequest, Candidates, Communicator, Threshold};

use super::{
    Vocabulary,
    wire::{self, WireError},
};
use crate::error::RunError;

/// Bytes of one exchanged message: what every communicator must carry.
pub const MESSAGE_BYTES: usize = 16 << 10;
/// In front of each fragment: the bytes that are still to come after it.
const FRAGMENT_HEADER: usize = 4;
const FRAGMENT_BYTES: usize = MESSAGE_BYTES - FRAGMENT_HEADER;

/// What all ranks together answer to `requests`, row by row; `local` is this rank's part. Without requests it is only a
/// meeting of all ranks.
pub(super) fn merge_all<B: Backend, C: Communicator<B>>(
    comm: &mut C,
    vocab: Vocabulary<'_>,
    requests: &[CandidateRequest<'_>],
    local: &[Candidates],
) -> Result<Vec<Candidates>, RunError> {
    let bounds: Vec<usize> = vocab
        .ranks
        .iter()
        .map(|range| wire::message_bound(requests, range))
        .collect();
    let messages = exchange_long(comm, &wire::encode(local), &bounds)?;
    let whole = Candidates {
        finite: true,
        ..Candidates::default()
    };
    let mut merged = vec![whole; requests.len()];
    // In rank order, which is that of the vocabulary.
    for (rank, (message, range)) in messages.iter().zip(vocab.ranks).enumerate() {
        let rows = wire::decode(message, requests, range).map_err(|error| RunError::Peer { rank, error })?;
        for ((merged, row), request) in merged.iter_mut().zip(rows).zip(requests) {
            merged.append(row, request);
        }
    }
    Ok(merged)
}

/// How many tokens of the whole vocabulary reach each threshold.
pub(super) fn count_all<B: Backend, C: Communicator<B>>(
    backend: &B,
    comm: &mut C,
    (logits, vocab): (&B::Buffer, Vocabulary<'_>),
    thresholds: &[Threshold],
) -> Result<Vec<u32>, RunError> {
    let local = backend.count_at_least(logits, vocab.own().len(), thresholds)?;
    let bounds = vec![wire::counts_bytes(thresholds.len()); vocab.ranks.len()];
    let messages = exchange_long(comm, &wire::encode_counts(&local), &bounds)?;
    let mut sums = vec![0; thresholds.len()];
    for (rank, (message, range)) in messages.iter().zip(vocab.ranks).enumerate() {
        let counts = wire::decode_counts(message, thresholds.len(), range);
        let counts = counts.map_err(|error| RunError::Peer { rank, error })?;
        // Each is at most the rank's part of a vocabulary whose ids fit u32.
        sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
    Ok(sums)
}

/// Exchanges messages longer than one slot: fragments, until no rank has anything left. `bounds[r]` is the most that
/// rank `r` may send.
fn exchange_long<B: Backend, C: Communicator<B>>(
    comm: &mut C,
    message: &[u8],
    bounds: &[usize],
) -> Result<Vec<Vec<u8>>, RunError> {
    let mut whole: Vec<Vec<u8>> = vec![Vec::new(); bounds.len()];
    let mut rest = message;
    loop {
        let (fragment, after) = rest.split_at(rest.len().min(FRAGMENT_BYTES));
        rest = after;
        let mut sent = (rest.len() as u32).to_le_bytes().to_vec();
        sent.extend_from_slice(fragment);
        let received = comm.exchange(&sent)?;
        if received.len() != bounds.len() {
            return Err(RunError::WorldSize {
                expected: bounds.len(),
                found: received.len(),
            });
        }
        let mut more = false;
        for (rank, bytes) in received.iter().enumerate() {
            let peer = |error| RunError::Peer { rank, error };
            let (left, fragment) = bytes
                .split_first_chunk::<FRAGMENT_HEADER>()
                .ok_or_else(|| peer(WireError::Truncated("fragment")))?;
            let left = u32::from_le_bytes(*left) as usize;
            let announced = whole[rank]
                .len()
                .saturating_add(fragment.len())
                .saturating_add(left);
            if announced > bounds[rank] {
                return Err(peer(WireError::OverLimit {
                    field: "message",
                    value: announced,
                    limit: bounds[rank],
                }));
            }
            if fragment.is_empty() && left > 0 {
                return Err(peer(WireError::Truncated("fragment")));
            }
            whole[rank].extend_from_slice(fragment);
            more |= left > 0;
        }
        if !more {
            return Ok(whole);
        }
    }
}
