//! Every rank tells every other one its candidates, and all merge them alike.

use std::cmp::Ordering;

use phalanx_kernels::{Backend, Candidate, Candidates, Communicator};

use super::{
    Vocabulary,
    decision::{Merged, log_sum_exp},
    row::Ask,
    wire::{self, WireError},
};
use crate::error::RunError;

/// Bytes of one exchanged message: what every communicator carries at least.
const MESSAGE_BYTES: usize = 16 << 10;
/// In front of each fragment: the bytes that are still to come after it.
const FRAGMENT_HEADER: usize = 4;
const FRAGMENT_BYTES: usize = MESSAGE_BYTES - FRAGMENT_HEADER;

/// What all ranks together answer to `asks`; `local` is this rank's part. Without asks it is only a meeting of all
/// ranks.
pub(super) fn merge_all<B: Backend, C: Communicator<B>>(
    comm: &mut C,
    vocab: Vocabulary<'_>,
    asks: &[Ask],
    local: &[Candidates],
) -> Result<Vec<Merged>, RunError> {
    let bounds: Vec<usize> = vocab.ranks.iter().map(|range| wire::message_bound(asks, range)).collect();
    let messages = exchange_long(comm, &wire::encode(local), &bounds)?;
    let mut ranks = Vec::with_capacity(messages.len());
    for (rank, (message, range)) in messages.iter().zip(vocab.ranks).enumerate() {
        let rows = wire::decode(message, asks, range);
        ranks.push(rows.map_err(|error| RunError::Peer { rank, error })?);
    }
    Ok(asks.iter().enumerate().map(|(i, ask)| merge(ask, &ranks, i)).collect())
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
            let announced = whole[rank].len().saturating_add(fragment.len()).saturating_add(left);
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

/// One row of every rank as one.
fn merge(ask: &Ask, ranks: &[Vec<Candidates>], row: usize) -> Merged {
    let parts = || ranks.iter().map(|rows| &rows[row]);
    let best = |list: fn(&Candidates) -> &Vec<Candidate>, value: fn(&Candidate) -> f32, limit| {
        let mut all: Vec<Candidate> = parts().flat_map(|part| list(part).iter().copied()).collect();
        all.sort_by(|x, y| by_value(value(x), x.id, value(y), y.id));
        all.truncate(limit);
        all
    };
    Merged {
        best: best(|part| &part.best, |candidate| candidate.scaled, ask.top),
        raw_best: best(|part| &part.raw_best, |candidate| candidate.raw, ask.raw_top),
        perturbed: parts()
            .filter_map(|part| part.perturbed)
            .min_by(|(a, x), (b, y)| by_value(*a, x.id, *b, y.id)),
        scaled_log_sum_exp: ask
            .scaled_statistics
            .then(|| log_sum_exp(parts().flat_map(|part| &part.scaled_statistics))),
        raw_log_sum_exp: ask
            .raw_statistics
            .then(|| log_sum_exp(parts().flat_map(|part| &part.raw_statistics))),
        finite: parts().all(|part| part.finite),
    }
}

/// Larger value first, then smaller id. Total, whatever a peer sent.
fn by_value(a: f32, a_id: u32, b: f32, b_id: u32) -> Ordering {
    b.total_cmp(&a).then(a_id.cmp(&b_id))
}
