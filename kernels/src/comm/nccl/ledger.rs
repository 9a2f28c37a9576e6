//! Which collectives this rank has started, and how far the others are.
//!
//! All ranks start the same collectives in the same order, so a number names the same one everywhere, and this rank's
//! own list tells what it is that a peer has not come to.

use std::collections::VecDeque;
use std::fmt;

use phalanx_shm::Progress;

/// A peer that is further behind than this is named without the collective's own name. A step has fewer.
const REMEMBERED: usize = 1024;

/// A collective by name and size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) name: &'static str,
    pub(super) bytes: usize,
}

pub(super) struct Ledger {
    progress: Progress,
    rank: u32,
    /// How many this rank has started; the first is number 1.
    started: u64,
    /// The last of them, oldest first.
    recent: VecDeque<Operation>,
}

/// Why nothing moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stall {
    /// Who is behind; none if all have started the same.
    pub(super) rank: Option<u32>,
    pub(super) number: u64,
    pub(super) operation: Option<Operation>,
}

impl Ledger {
    pub(super) fn new(progress: Progress, rank: u32) -> Self {
        Self {
            progress,
            rank,
            started: 0,
            recent: VecDeque::with_capacity(REMEMBERED),
        }
    }

    /// Tells everybody that this rank starts `operation`.
    pub(super) fn start(&mut self, operation: Operation) {
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back(operation);
        self.started += 1;
        self.progress.set(self.rank, self.started);
    }

    /// Who is waited for, and at what, as far as this rank can see.
    pub(super) fn stall(&self) -> Stall {
        let behind = (0..)
            .zip(self.progress.counts())
            .filter(|&(_, count)| count < self.started)
            .min_by_key(|&(_, count)| count);
        let (rank, number) = match behind {
            Some((rank, count)) => (Some(rank), count + 1),
            None => (None, self.started),
        };
        let back = usize::try_from(self.started - number).ok();
        let place = back.and_then(|back| self.recent.len().checked_sub(back + 1));
        Stall {
            rank,
            number,
            operation: place.and_then(|place| self.recent.get(place).copied()),
        }
    }
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rank {
            Some(rank) => write!(f, "rank {rank} never reached ")?,
            None => f.write_str("all ranks started, and none finished, ")?,
        }
        match self.operation {
            Some(Operation { name, bytes }) => write!(f, "{name} #{} ({bytes} bytes)", self.number),
            None => write!(f, "collective #{}", self.number),
        }
    }
}
