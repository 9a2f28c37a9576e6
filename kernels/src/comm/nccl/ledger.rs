//! Which collectives this rank has started, and how far the others are.
//!
//! All ranks start the same collectives in the same order, so a number names the same one everywhere, and this rank's
//! own list tells what it is that a peer has not come to.

use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

use phalanx_shm::{AbortReason, Progress};

/// A peer that is further behind than this is named without the collective's own name. A step has fewer.
const REMEMBERED: usize = 1024;

/// A live rank's watchdog beats many times in this.
const SILENCE: Duration = Duration::from_millis(500);

/// Which collectives make a step, as all ranks start them: for telling where in the model one belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLayout {
    /// Before the first layer, for the embedding.
    pub before_layers: usize,
    pub per_layer: usize,
    pub layers: usize,
}

impl StepLayout {
    /// The layer, from 0, of a step's collective, from 0; none if it belongs to no layer.
    fn layer(self, index: usize) -> Option<usize> {
        let layer = index
            .checked_sub(self.before_layers)?
            .checked_div(self.per_layer)?;
        (layer < self.layers).then_some(layer)
    }
}

/// A collective by name and size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) name: &'static str,
    pub(super) bytes: usize,
}

/// A collective of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    operation: Operation,
    layer: Option<usize>,
}

pub(super) struct Ledger {
    progress: Progress,
    rank: u32,
    layout: StepLayout,
    /// Collectives of the current step so far.
    in_step: usize,
    /// How many this rank has started; the first is number 1.
    started: u64,
    /// The last of them, oldest first.
    recent: VecDeque<Entry>,
    /// Every rank's last known beat, and since when it has not changed.
    beats: Vec<(u64, Instant)>,
}

/// Why nothing moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stall {
    /// Who is waited for, if that can be seen.
    pub(super) culprit: Option<Culprit>,
    pub(super) number: u64,
    entry: Option<Entry>,
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
    pub(super) fn new(progress: Progress, rank: u32, layout: StepLayout) -> Self {
        Self {
            progress,
            rank,
            layout,
            in_step: 0,
            started: 0,
            recent: VecDeque::with_capacity(REMEMBERED),
            beats: Vec::new(),
        }
    }

    pub(super) fn rank(&self) -> u32 {
        self.rank
    }

    /// The next collective is the first of a step.
    pub(super) fn begin_step(&mut self) {
        self.in_step = 0;
    }

    /// Tells everybody that this rank starts `operation`.
    pub(super) fn start(&mut self, operation: Operation) {
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back(Entry {
            operation,
            layer: self.layout.layer(self.in_step),
        });
        self.in_step += 1;
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
            entry: place.and_then(|place| self.recent.get(place).copied()),
        }
    }

    /// Leaves a word about the rank `about` for everybody who sees the group aborted.
    pub(super) fn testify(&self, about: u32, text: &str) {
        self.progress.testify(self.rank, about, text);
    }

    /// What some rank has said about the rank that a group was aborted because of.
    pub(super) fn testimony(&self, reason: AbortReason) -> Option<String> {
        let rank = reason.rank()?;
        Some(format!("it {}", self.progress.testimony(rank)?))
    }
}

impl Stall {
    /// As what is known about one rank, which is its subject: the culprit, or the rank that noticed.
    pub(super) fn predicate(&self) -> String {
        match self.culprit {
            Some(Culprit::Behind(_)) => format!("never reached {}", self.collective()),
            Some(Culprit::Silent(_)) => format!("does not move and never finished {}", self.collective()),
            None => format!(
                "noticed that all ranks started, and none finished, {}",
                self.collective()
            ),
        }
    }

    /// `all_reduce #8231 (layer 17, 33554432 bytes)`.
    fn collective(&self) -> String {
        let Some(Entry { operation, layer }) = self.entry else {
            return format!("collective #{}", self.number);
        };
        let Operation { name, bytes } = operation;
        let layer = layer.map(|layer| format!("layer {layer}, ")).unwrap_or_default();
        format!("{name} #{} ({layer}{bytes} bytes)", self.number)
    }
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.culprit {
            Some(culprit) => write!(f, "rank {} {}", culprit.rank(), self.predicate()),
            None => write!(f, "all ranks started, and none finished, {}", self.collective()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steps_collectives_belong_to_layers() {
        let layout = StepLayout {
            before_layers: 1,
            per_layer: 2,
            layers: 2,
        };
        let layers: Vec<_> = (0..6).map(|index| layout.layer(index)).collect();
        assert_eq!(layers, [None, Some(0), Some(0), Some(1), Some(1), None]);
    }

    #[test]
    fn a_stall_names_rank_collective_and_layer() {
        let entry = |layer| {
            Some(Entry {
                operation: Operation {
                    name: "all_reduce",
                    bytes: 64,
                },
                layer,
            })
        };
        let stall = |culprit, entry| Stall {
            culprit,
            number: 8231,
            entry,
        };
        assert_eq!(
            stall(Some(Culprit::Behind(3)), entry(Some(17))).to_string(),
            "rank 3 never reached all_reduce #8231 (layer 17, 64 bytes)"
        );
        assert_eq!(
            stall(Some(Culprit::Silent(1)), entry(None)).to_string(),
            "rank 1 does not move and never finished all_reduce #8231 (64 bytes)"
        );
        assert_eq!(
            stall(None, None).to_string(),
            "all ranks started, and none finished, collective #8231"
        );
    }
}
