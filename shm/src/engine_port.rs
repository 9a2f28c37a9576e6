//! The engine's end of a group: plans out, outputs in.

use std::sync::Arc;
use std::time::Duration;

use crate::arena::Arena;
use crate::deadline::Deadline;
use crate::error::{AbortReason, Awaited, Party, ShmError};
use crate::gate::Stop;
use crate::progress::Progress;
use crate::protocol::{RingReader, RingWriter};
use crate::segment::Segment;
use crate::slot::{OUTPUT, PLAN, Stamp};
use crate::wait::Wait;

/// Held by the process that decides what runs. Its timeouts do not abort the group, so a call may be repeated; whether
/// a late rank is a lost one is for the engine's supervisor to say, with [`Segment::abort`].
#[derive(Debug)]
pub struct EnginePort {
    segment: Arc<Segment>,
    spins: u32,
    plans: RingWriter,
    outputs: RingReader,
    num_published: u64,
    num_received: u64,
}

impl EnginePort {
    /// # Errors
    /// [`ShmError::RankTaken`] if the segment has its engine; [`ShmError::Aborted`].
    pub fn join(segment: Arc<Segment>, wait: Wait) -> Result<Self, ShmError> {
        segment.join(Party::Engine)?;
        let plans = RingWriter::new(segment.shape().plan_slots);
        let outputs = RingReader::new(segment.shape().output_slots);
        Ok(Self {
            segment,
            spins: wait.short(),
            plans,
            outputs,
            num_published: 0,
            num_received: 0,
        })
    }

    pub fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// Where ranks that do not meet in the segment say how far they are; none if the arena is too small for it.
    pub fn progress(&self) -> Option<Progress> {
        let arena = Arena::new(Arc::clone(&self.segment));
        Progress::new(arena, self.segment.shape().world_size)
    }

    /// Has `fill` write a plan into a free slot of [`plan_slot_bytes`](crate::GroupShape::plan_slot_bytes) and return
    /// its length, and gives it to every rank. If `fill` fails nothing is published.
    ///
    /// # Errors
    /// [`ShmError::TimedOut`] with the rank that has not freed the slot within `limit`; [`ShmError::Aborted`];
    /// [`ShmError::TooLong`] if `fill` returns more than the slot has; whatever `fill` returns.
    pub fn publish_plan<E: From<ShmError>>(
        &mut self,
        limit: Duration,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<(), E> {
        let segment = &self.segment;
        let slot = self
            .plans
            .claim(segment.plan_cursors(), self.spins, &mut Deadline::after(limit))
            .map_err(|missing| match missing.stop {
                Stop::Aborted => segment.aborted(),
                Stop::TimedOut => {
                    let party = Party::Rank(missing.gate as u32);
                    ShmError::TimedOut {
                        party,
                        awaited: Awaited::PlanRead,
                        limit,
                    }
                }
            })?;
        let stamp = Stamp {
            kind: PLAN,
            number: self.num_published + 1,
            total: 0,
        };
        // SAFETY: the port is unique per segment, so this is the ring's one writer; the slot has been claimed, so
        // every reader is done with it, and none looks again before the commit.
        unsafe { segment.write_slot(&segment.layout().plans, slot, stamp, fill) }?;
        self.num_published += 1;
        // It can only have been aborted.
        self.plans
            .commit(segment.plan_head())
            .map_err(|_| segment.aborted())?;
        Ok(())
    }

    /// Waits for the next output and reads it in place. A limit of zero asks whether there is one.
    ///
    /// # Errors
    /// [`ShmError::TimedOut`] with the rank that is furthest behind; [`ShmError::Aborted`]; [`ShmError::Corrupt`],
    /// which aborts the group.
    pub fn wait_output<R>(&mut self, limit: Duration, read: impl FnOnce(&[u8]) -> R) -> Result<R, ShmError> {
        let segment = &self.segment;
        let slot = self
            .outputs
            .peek(segment.output_head(), self.spins, &mut Deadline::after(limit))
            .map_err(|stop| match stop {
                Stop::Aborted => segment.aborted(),
                Stop::TimedOut => {
                    let party = Party::Rank(segment.slowest_rank());
                    ShmError::TimedOut {
                        party,
                        awaited: Awaited::Output,
                        limit,
                    }
                }
            })?;
        let stamp = Stamp {
            kind: OUTPUT,
            number: self.num_received + 1,
            total: 0,
        };
        // SAFETY: the head has been waited for, and the result is gone before `done` gives the slot back.
        let result = match unsafe { segment.read_slot(&segment.layout().outputs, slot, stamp) } {
            Ok(bytes) => read(bytes),
            Err(problem) => {
                let party = Party::Rank(0);
                segment.abort(AbortReason::OutOfStep(party));
                return Err(ShmError::Corrupt { party, problem });
            }
        };
        self.num_received += 1;
        self.outputs
            .done(&segment.output_cursor()[0])
            .map_err(|_| segment.aborted())?;
        Ok(result)
    }
}
