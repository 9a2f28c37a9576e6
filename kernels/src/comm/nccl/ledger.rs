//! Which collectives this rank has started, and how far the others are.
//!
//! All ranks start the same collectives in the same order, so a number names the same one everywhere, and this rank's
//! own list tells what it is that a peer has not come to.

use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

use phalanx_shm::Progress;

/// A peer that is further behind than this is named without the collective's own name. A step has fewer.
const REMEMBERED: usize = 1024;

/// A live rank's watchdog beats many times in this.
const SILENCE: Duration = Duration::from_millis(500);

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
    /// Every rank's last known beat, and since when it has not changed.
    beats: Vec<(u64, Instant)>,
}

/// Why nothing moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stall {
    /// Who is waited for, if that can be seen.
    pub(super) culprit: Option<Culprit>,
    pub(super) number: u64,
    pub(super) operation: Option<Operation>,
}

/// A rank that keeps the others waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Culprit {
    /// It has not started the collective.
    Behind(u32),
    /// It has, but its process no longer moves.
    Silent(u32),
}

impl Culprit {
    pub(super) fn rank(self) -> u32 {
        match self {
            Self::Behind(rank) | Self::Silent(rank) => rank,
        }
    }
}

impl Ledger {
    pub(super) fn new(progress: Progress, rank: u32) -> Self {
        Self {
            progress,
            rank,
            started: 0,
            recent: VecDeque::with_capacity(REMEMBERED),
            beats: Vec::new(),
        }
    }

    pub(super) fn rank(&self) -> u32 {
        self.rank
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

    /// Tells the others that this rank's process lives, and looks who else does. To be called all the time in a step.
    pub(super) fn beat(&mut self) {
        self.progress.beat(self.rank);
        let beats = self.progress.beats();
        self.beats.resize(beats.len(), (0, Instant::now()));
        for (known, beat) in self.beats.iter_mut().zip(beats) {
            if known.0 != beat {
                *known = (beat, Instant::now());
            }
        }
    }

    /// Who is waited for, and at what, as far as this rank can see.
    pub(super) fn stall(&self) -> Stall {
        let behind = (0..)
            .zip(self.progress.counts())
            .filter(|&(_, count)| count < self.started)
            .min_by_key(|&(_, count)| count);
        let silent = (0..)
            .zip(&self.beats)
            .find(|(_, (_, since))| since.elapsed() > SILENCE)
            .map(|(rank, _)| Culprit::Silent(rank));
        let (culprit, number) = match behind {
            Some((rank, count)) => (Some(Culprit::Behind(rank)), count + 1),
            None => (silent, self.started),
        };
        let back = usize::try_from(self.started - number).ok();
        let place = back.and_then(|back| self.recent.len().checked_sub(back + 1));
        Stall {
            culprit,
            number,
            operation: place.and_then(|place| self.recent.get(place).copied()),
        }
    }
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.culprit {
            Some(Culprit::Behind(rank)) => write!(f, "rank {rank} never reached ")?,
            Some(Culprit::Silent(rank)) => write!(f, "rank {rank} does not move and never finished ")?,
            None => f.write_str("all ranks started, and none finished, ")?,
        }
        match self.operation {
            Some(Operation { name, bytes }) => write!(f, "{name} #{} ({bytes} bytes)", self.number),
            None => write!(f, "collective #{}", self.number),
        }
    }
}
