//! Collectives on host memory, over message slots that alternate between two turns.
//!
//! A collective is one or more rounds. In a round every rank writes its own message slot of the current turn, passes
//! one barrier, and reads the others'. Turns alternate, so the next round's writes cannot meet this round's reads; see
//! [`Barrier`](crate::protocol::Barrier). What does not fit a slot goes in slices, a round each: beyond a slot's worth
//! slicing is also faster, since slots then stay in the cache. What is much larger is gathered past the slots; see
//! `direct`.
//!
//! The hot path of a model does not come here: it writes its activations straight into the [`Arena`](crate::Arena) and
//! needs a barrier only.

use crate::error::{Party, ShmError};
use crate::rank_port::RankPort;
use crate::shape::MAX_WORLD_SIZE;
use crate::slot::Stamp;

/// Kinds of messages, apart from those of the rings.
const EXCHANGE: u32 = 16;
const ALL_GATHER: u32 = 17;
const ALL_REDUCE: u32 = 18;
const BROADCAST: u32 = 19;
const GATHER: u32 = 20;

/// The root of a collective is part of its kind, so that ranks that disagree on it notice.
fn rooted(kind: u32, root: u32) -> u32 {
    kind | root << 8
}

/// Numbers without padding for which any bytes are a value.
pub trait Element: Copy + Default + sealed::Plain {}
impl Element for u8 {}
impl Element for u32 {}
impl Element for f32 {}

mod sealed {
    /// # Safety
    /// The type has no padding, and any bytes are a value of it.
    pub unsafe trait Plain {}
    // SAFETY: an integer.
    unsafe impl Plain for u8 {}
    // SAFETY: an integer.
    unsafe impl Plain for u32 {}
    // SAFETY: IEEE 754, every bit pattern is a number or a NaN.
    unsafe impl Plain for f32 {}
}

pub(crate) fn bytes_of<T: Element>(values: &[T]) -> &[u8] {
    // SAFETY: per `Plain` there is no padding; the length in bytes is that of the same memory.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

pub(crate) fn bytes_of_mut<T: Element>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and per `Plain` any bytes written are values.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

impl RankPort {
    /// All-gather of host messages of any lengths up to [`message_bytes`](crate::GroupShape::message_bytes); the result
    /// is in rank order.
    ///
    /// # Errors
    /// [`ShmError::TooLong`], before anything is sent; [`ShmError::Corrupt`] if a peer is in another call, which aborts
    /// the group; those of [`barrier`](Self::barrier).
    pub fn exchange(&mut self, message: &[u8]) -> Result<Vec<Vec<u8>>, ShmError> {
        let stamp = self.round(EXCHANGE, 0, message)?;
        (0..self.world_size)
            .map(|rank| self.message(rank, stamp).map(<[u8]>::to_vec))
            .collect()
    }

    /// Every rank gives the same number of values; `out` becomes everyone's, in rank order.
    ///
    /// # Errors
    /// [`ShmError::WrongLength`] unless `out` has room for exactly `world_size` times as many; [`ShmError::Corrupt`] if
    /// a peer is in another call or gives another number of values, which aborts the group; those of
    /// [`barrier`](Self::barrier).
    pub fn all_gather<T: Element>(&mut self, mine: &[T], out: &mut [T]) -> Result<(), ShmError> {
        self.gather_slices(ALL_GATHER, mine, Some(out))
    }

    /// As [`all_gather`](Self::all_gather), but only rank `root` gets the values; elsewhere `out` is empty.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather), and [`ShmError::NoSuchRank`].
    pub fn gather<T: Element>(&mut self, root: u32, mine: &[T], out: &mut [T]) -> Result<(), ShmError> {
        self.check_rank(root)?;
        if self.rank == root {
            return self.gather_slices(rooted(GATHER, root), mine, Some(out));
        }
        check_length(out.len(), 0)?;
        self.gather_slices(rooted(GATHER, root), mine, None)
    }

    fn gather_slices<T: Element>(
        &mut self,
        kind: u32,
        mine: &[T],
        mut out: Option<&mut [T]>,
    ) -> Result<(), ShmError> {
        let each = mine.len();
        if let Some(out) = &out {
            check_length(out.len(), each.saturating_mul(self.world_size as usize))?;
        }
        if self.gathers_directly(size_of_val(mine))? {
            return self.gather_directly(kind, mine, out);
        }
        for slice in self.slices::<T>(each) {
            let stamp = self.round(kind, size_of_val(mine), bytes_of(&mine[slice.clone()]))?;
            let Some(out) = &mut out else { continue };
            for rank in 0..self.world_size {
                let at = rank as usize * each;
                let place = &mut out[at + slice.start..at + slice.end];
                if rank == self.rank {
                    place.copy_from_slice(&mine[slice.clone()]);
                } else {
                    self.copy(rank, stamp, bytes_of_mut(place))?;
                }
            }
        }
        Ok(())
    }

    /// Rank `root`'s values replace those of all others.
    ///
    /// # Errors
    /// [`ShmError::NoSuchRank`]; [`ShmError::Corrupt`] if a peer is in another call or has another number of values,
    /// which aborts the group; those of [`barrier`](Self::barrier).
    pub fn broadcast<T: Element>(&mut self, root: u32, values: &mut [T]) -> Result<(), ShmError> {
        self.check_rank(root)?;
        let total = size_of_val(values);
        for slice in self.slices::<T>(values.len()) {
            let mine = if self.rank == root {
                bytes_of(&values[slice.clone()])
            } else {
                &[]
            };
            let stamp = self.round(rooted(BROADCAST, root), total, mine)?;
            if self.rank == root {
                // Nobody sends values here, but a peer in another call is noticed on this side as well.
                self.check_peers(stamp)?;
            } else {
                self.copy(root, stamp, bytes_of_mut(&mut values[slice]))?;
            }
        }
        Ok(())
    }

    /// Every rank's `values` become the sum over ranks. Terms are added in rank order, by every rank for itself, so all
    /// hold the same bits.
    ///
    /// # Errors
    /// [`ShmError::Corrupt`] if a peer is in another call or has another number of values, which aborts the group;
    /// those of [`barrier`](Self::barrier).
    pub fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), ShmError> {
        let total = size_of_val(values);
        for slice in self.slices::<f32>(values.len()) {
            let values = &mut values[slice];
            let stamp = self.round(ALL_REDUCE, total, bytes_of(values))?;
            let mut terms: [&[[u8; 4]]; MAX_WORLD_SIZE as usize] = [&[]; _];
            let terms = &mut terms[..self.world_size as usize];
            for (rank, term) in (0..).zip(terms.iter_mut()) {
                // This rank's own term is still in `values`.
                if rank != self.rank {
                    *term = self
                        .message_of_length(rank, stamp, size_of_val(values))?
                        .as_chunks()
                        .0;
                }
            }
            let (before, after) = terms.split_at(self.rank as usize);
            add_in_order(before, values, &after[1..]);
        }
        Ok(())
    }

    /// Which values go into which round; at least one round, so that every call meets its peers'.
    fn slices<T: Element>(&self, len: usize) -> impl Iterator<Item = std::ops::Range<usize>> + use<T> {
        let most = self.segment.layout().messages.capacity / size_of::<T>();
        (0..len.div_ceil(most).max(1)).map(move |i| i * most..len.min((i + 1) * most))
    }

    /// Writes this rank's message and waits for everyone's. They can be read under the stamp returned until this rank
    /// enters another round.
    pub(crate) fn round(&mut self, kind: u32, total: usize, message: &[u8]) -> Result<Stamp, ShmError> {
        self.check_unfinished()?;
        let slots = self.segment.layout().messages;
        if message.len() > slots.capacity {
            return Err(ShmError::TooLong {
                len: message.len() as u64,
                limit: slots.capacity as u64,
            });
        }
        self.num_messages += 1;
        let stamp = Stamp {
            kind,
            number: self.num_messages,
            total: total as u64,
        };
        let fill = |payload: &mut [u8]| {
            payload[..message.len()].copy_from_slice(message);
            Ok::<_, ShmError>(message.len())
        };
        // SAFETY: the port is unique per rank, and a rank writes its own slots only. Who still reads this one, from
        // two rounds ago, has not arrived at the barrier of the last round, which this rank has passed.
        unsafe {
            self.segment
                .write_slot(&slots, self.message_slot(stamp, self.rank), stamp, fill)
        }?;
        self.barrier()?;
        Ok(stamp)
    }

    fn message_slot(&self, stamp: Stamp, rank: u32) -> usize {
        let turn = (stamp.number & 1) as usize;
        turn * self.world_size as usize + rank as usize
    }

    /// A rank's message of this round. It borrows the port, so it is gone before the next round.
    pub(crate) fn message(&self, rank: u32, stamp: Stamp) -> Result<&[u8], ShmError> {
        let slots = &self.segment.layout().messages;
        // SAFETY: `rank` has written it before its arrival at the barrier that `round` has passed, and writes it again
        // only after this rank's arrival at the next one, which takes `&mut self`.
        unsafe {
            self.segment
                .read_slot(slots, self.message_slot(stamp, rank), stamp)
        }
        .map_err(|problem| self.out_of_step(Party::Rank(rank), problem))
    }

    pub(crate) fn message_of_length(&self, rank: u32, stamp: Stamp, len: usize) -> Result<&[u8], ShmError> {
        let message = self.message(rank, stamp)?;
        if message.len() != len {
            let (found, expected) = (message.len() as u64, len as u64);
            let problem = crate::Corruption::Field {
                field: "length",
                found,
                expected,
            };
            return Err(self.out_of_step(Party::Rank(rank), problem));
        }
        Ok(message)
    }

    fn copy(&self, rank: u32, stamp: Stamp, out: &mut [u8]) -> Result<(), ShmError> {
        out.copy_from_slice(self.message_of_length(rank, stamp, out.len())?);
        Ok(())
    }

    fn check_peers(&self, stamp: Stamp) -> Result<(), ShmError> {
        (0..self.world_size).try_for_each(|rank| self.message(rank, stamp).map(drop))
    }

    fn check_rank(&self, rank: u32) -> Result<(), ShmError> {
        let world_size = self.world_size;
        if rank < world_size {
            Ok(())
        } else {
            Err(ShmError::NoSuchRank { rank, world_size })
        }
    }
}

fn check_length(found: usize, expected: usize) -> Result<(), ShmError> {
    if found == expected {
        Ok(())
    } else {
        Err(ShmError::WrongLength { found, expected })
    }
}

/// `values[i] = before[0][i] + before[1][i] + ... + values[i] + after[0][i] + ...`, from left to right, in blocks that stay
/// in the first-level cache between terms.
fn add_in_order(before: &[&[[u8; 4]]], values: &mut [f32], after: &[&[[u8; 4]]]) {
    const BLOCK: usize = 2048;
    for (block, values) in values.chunks_mut(BLOCK).enumerate() {
        let range = block * BLOCK..block * BLOCK + values.len();
        if let Some((first, others)) = before.split_first() {
            if others.is_empty() {
                // One pass where there are two ranks.
                add(&first[range.clone()], values, |term, value| term + value);
            } else {
                let mut sum = [0.0; BLOCK];
                let sum = &mut sum[..values.len()];
                add(&first[range.clone()], sum, |term, _| term);
                for term in others {
                    add(&term[range.clone()], sum, |term, sum| sum + term);
                }
                for (value, sum) in values.iter_mut().zip(sum) {
                    *value += *sum;
                }
            }
        }
        for term in after {
            add(&term[range.clone()], values, |term, sum| sum + term);
        }
    }
}

fn add(term: &[[u8; 4]], values: &mut [f32], sum: impl Fn(f32, f32) -> f32) {
    for (value, term) in values.iter_mut().zip(term) {
        *value = sum(f32::from_ne_bytes(*term), *value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_in_rank_order() {
        let terms = [[1e8f32, 1.0], [-1e8, 1e-8], [1.0, 2.0]];
        let bytes = terms.map(|term| term.map(f32::to_ne_bytes));
        let bytes: Vec<&[[u8; 4]]> = bytes.iter().map(|term| &term[..]).collect();
        for (rank, own) in terms.iter().enumerate() {
            let mut values = *own;
            add_in_order(&bytes[..rank], &mut values, &bytes[rank + 1..]);
            assert_eq!(values, [(1e8 - 1e8) + 1.0, (1.0 + 1e-8) + 2.0], "on rank {rank}");
        }
    }
}
