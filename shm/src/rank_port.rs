//! A rank's end of a group: plans in, barriers with its peers, and outputs out on rank 0.

use std::sync::Arc;
use std::time::Duration;

use crate::arena::Arena;
use crate::deadline::{Deadline, SLICE};
use crate::direct::Peers;
use crate::error::{AbortReason, Awaited, Corruption, Party, ShmError};
use crate::gate::{COUNT_MASK, Stop};
use crate::protocol::{Barrier, RingReader, RingWriter};
use crate::segment::Segment;
use crate::slot::{OUTPUT, PLAN, Stamp};
use crate::wait::{Patience, Wait};

/// Held by a rank, on one thread at a time. All ranks make the same calls in the same order; after any error of a wait
/// the group is finished.
#[derive(Debug)]
pub struct RankPort {
    pub(crate) segment: Arc<Segment>,
    pub(crate) rank: u32,
    pub(crate) world_size: u32,
    limit: Duration,
    spins: u32,
    patience: Patience,
    barrier: Barrier,
    plans: RingReader,
    outputs: RingWriter,
    num_plans: u64,
    num_outputs: u64,
    /// A barrier has failed. Who goes on after that may write what a peer still reads, or be counted at a barrier that
    /// it has no right to be at.
    finished: bool,
    /// Message rounds so far; see `collective`.
    pub(crate) num_messages: u64,
    pub(crate) peers: Peers,
}

impl RankPort {
    /// `limit` bounds each wait for a peer or for the engine to free a slot. It should exceed the longest time that
    /// ranks may be apart, such as one computing while the others wait.
    ///
    /// # Errors
    /// [`ShmError::NoSuchRank`]; [`ShmError::RankTaken`] if this rank has joined before; [`ShmError::Aborted`].
    pub fn join(segment: Arc<Segment>, rank: u32, wait: Wait, limit: Duration) -> Result<Self, ShmError> {
        segment.join(Party::Rank(rank))?;
        let shape = *segment.shape();
        Ok(Self {
            segment,
            rank,
            world_size: shape.world_size,
            limit,
            spins: wait.short(),
            patience: Patience::new(wait),
            barrier: Barrier::new(rank as usize),
            plans: RingReader::new(shape.plan_slots),
            outputs: RingWriter::new(shape.output_slots),
            num_plans: 0,
            num_outputs: 0,
            finished: false,
            num_messages: 0,
            peers: Peers::NotAsked,
        })
    }

    pub fn rank(&self) -> u32 {
        self.rank
    }

    pub fn world_size(&self) -> u32 {
        self.world_size
    }

    pub fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    pub fn arena(&self) -> Arena {
        Arena::new(Arc::clone(&self.segment))
    }

    /// Barriers this rank has arrived at, modulo 2^30. Collectives count: each slice of one is a barrier.
    pub fn barrier_count(&self) -> u32 {
        self.barrier.round() & COUNT_MASK
    }

    /// Waits for the next plan and reads it in place. There is no limit, since an idle group sleeps; an abort ends it,
    /// and so does the end of the process that created the segment, within half a second.
    ///
    /// # Errors
    /// [`ShmError::Aborted`]; [`ShmError::Corrupt`], which aborts the group.
    pub fn next_plan<R>(&mut self, read: impl FnOnce(&[u8]) -> R) -> Result<R, ShmError> {
        let segment = &self.segment;
        let slot = loop {
            match self
                .plans
                .peek(segment.plan_head(), self.spins, &mut Deadline::after(SLICE))
            {
                Ok(slot) => break slot,
                Err(Stop::TimedOut) if segment.creator_gone() => segment.abort(AbortReason::CreatorGone),
                Err(Stop::TimedOut) => {}
                Err(Stop::Aborted) => return Err(segment.aborted()),
            }
        };
        let stamp = Stamp {
            kind: PLAN,
            number: self.num_plans + 1,
            total: 0,
        };
        // SAFETY: the head has been waited for, and the result is gone before `done` gives the slot back.
        let result = match unsafe { segment.read_slot(&segment.layout().plans, slot, stamp) } {
            Ok(bytes) => read(bytes),
            Err(problem) => return Err(self.out_of_step(Party::Engine, problem)),
        };
        self.num_plans += 1;
        self.plans
            .done(&segment.plan_cursors()[self.rank as usize])
            .map_err(|_| segment.aborted())?;
        Ok(result)
    }

    /// Rank 0: has `fill` write an output into a free slot of
    /// [`output_slot_bytes`](crate::GroupShape::output_slot_bytes) and return its length, and gives it to the engine. If
    /// `fill` fails nothing is published.
    ///
    /// # Errors
    /// [`ShmError::NotRankZero`]; [`ShmError::TimedOut`] if the engine frees no slot, which aborts the group;
    /// [`ShmError::Aborted`]; [`ShmError::TooLong`] if `fill` returns more than the slot has; whatever `fill` returns.
    pub fn publish_output<E: From<ShmError>>(
        &mut self,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<(), E> {
        if self.rank != 0 {
            return Err(ShmError::NotRankZero { rank: self.rank }.into());
        }
        let segment = &self.segment;
        let mut deadline = Deadline::after(self.limit);
        let slot = self
            .outputs
            .claim(segment.output_cursor(), self.spins, &mut deadline)
            .map_err(|missing| self.stopped(missing.stop, Party::Engine, Awaited::OutputRead))?;
        let stamp = Stamp {
            kind: OUTPUT,
            number: self.num_outputs + 1,
            total: 0,
        };
        // SAFETY: rank 0's port is unique per segment, so this is the ring's one writer; the slot has been claimed,
        // so the engine is done with it and does not look again before the commit.
        unsafe { segment.write_slot(&segment.layout().outputs, slot, stamp, fill) }?;
        self.num_outputs += 1;
        self.outputs
            .commit(segment.output_head())
            .map_err(|_| segment.aborted())?;
        Ok(())
    }

    /// Waits until every rank has come here as often as this one. What any rank wrote before, all see afterwards.
    ///
    /// # Errors
    /// [`ShmError::TimedOut`] with the rank that is missing, which aborts the group; [`ShmError::Aborted`].
    pub fn barrier(&mut self) -> Result<(), ShmError> {
        self.check_unfinished()?;
        let spins = self.patience.next_budget();
        let mut deadline = Deadline::after(self.limit);
        match self
            .barrier
            .wait(self.segment.barrier_gates(), spins, &mut deadline)
        {
            Ok(slept) => {
                self.patience.learn(slept);
                Ok(())
            }
            Err(missing) => {
                self.finished = true;
                let party = Party::Rank(missing.gate as u32);
                Err(self.stopped(missing.stop, party, Awaited::Barrier(self.barrier_count())))
            }
        }
    }

    /// # Errors
    /// [`ShmError::Aborted`] once a barrier has failed.
    pub(crate) fn check_unfinished(&self) -> Result<(), ShmError> {
        if self.finished {
            Err(self.segment.aborted())
        } else {
            Ok(())
        }
    }

    /// The error for a wait that ended early. A timeout becomes an abort for everyone else.
    fn stopped(&self, stop: Stop, party: Party, awaited: Awaited) -> ShmError {
        match stop {
            Stop::Aborted => self.segment.aborted(),
            Stop::TimedOut => {
                self.segment.abort(AbortReason::TimedOut(party));
                ShmError::TimedOut {
                    party,
                    awaited,
                    limit: self.limit,
                }
            }
        }
    }

    pub(crate) fn out_of_step(&self, party: Party, problem: Corruption) -> ShmError {
        self.segment.abort(AbortReason::OutOfStep(party));
        ShmError::Corrupt { party, problem }
    }
}
