//! Barrier, ring and abort as control flow over gates. They own no memory, so loom can check them.

use crate::deadline::Deadline;
use crate::gate::{Gate, Stop};
use crate::sync::{AtomicU32, Ordering};

/// A wait that failed, and the gate it was on: its index in the slice that was waited on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Missing {
    pub(crate) gate: usize,
    pub(crate) stop: Stop,
}

/// Every party advances its own gate and waits for all others. No counter is shared, two parties exchange one cache
/// line each, and who is missing is known by name.
///
/// It also makes double buffering safe with one barrier per operation: who writes turn `t + 2`, the same memory as turn
/// `t`, has passed barrier `t + 1`, at which everybody arrives only after reading turn `t`.
#[derive(Debug)]
pub(crate) struct Barrier {
    me: usize,
    round: u32,
}

impl Barrier {
    pub(crate) fn new(me: usize) -> Self {
        Self { me, round: 0 }
    }

    /// Barriers this party has arrived at.
    pub(crate) fn round(&self) -> u32 {
        self.round
    }

    /// True if it slept. After an error the barrier is of no more use.
    pub(crate) fn wait(
        &mut self,
        gates: &[Gate],
        spins: u32,
        deadline: &mut Deadline,
    ) -> Result<bool, Missing> {
        self.arrive(gates)?;
        let mut slept = false;
        for (gate, party) in gates.iter().enumerate().filter(|(gate, _)| *gate != self.me) {
            slept |= party
                .wait(self.round, spins, deadline)
                .map_err(|stop| Missing { gate, stop })?;
        }
        Ok(slept)
    }

    fn arrive(&mut self, gates: &[Gate]) -> Result<(), Missing> {
        self.round = self.round.wrapping_add(1);
        gates[self.me]
            .advance()
            .map_err(|stop| Missing { gate: self.me, stop })
    }
}

/// The writer's end of a ring: slot `n % slots` may be filled once every reader is done with message `n - slots`.
#[derive(Debug)]
pub(crate) struct RingWriter {
    slots: u32,
    next: u32,
}

impl RingWriter {
    /// `slots` is a power of two, so that slot numbers go on evenly when the 32-bit message number wraps.
    pub(crate) fn new(slots: u32) -> Self {
        debug_assert!(slots.is_power_of_two());
        Self { slots, next: 0 }
    }

    /// Waits for room; returns the slot to fill. May be repeated.
    pub(crate) fn claim(
        &self,
        cursors: &[Gate],
        spins: u32,
        deadline: &mut Deadline,
    ) -> Result<usize, Missing> {
        // Before the first `slots` messages this is "negative", and any count is past it.
        let done = self.next.wrapping_add(1).wrapping_sub(self.slots);
        for (gate, cursor) in cursors.iter().enumerate() {
            cursor
                .wait(done, spins, deadline)
                .map_err(|stop| Missing { gate, stop })?;
        }
        Ok((self.next % self.slots) as usize)
    }

    /// Publishes the claimed slot.
    pub(crate) fn commit(&mut self, head: &Gate) -> Result<(), Stop> {
        self.next = self.next.wrapping_add(1);
        head.advance()
    }
}

/// A reader's end of a ring; it owns the cursor it is used with.
#[derive(Debug)]
pub(crate) struct RingReader {
    slots: u32,
    next: u32,
}

impl RingReader {
    pub(crate) fn new(slots: u32) -> Self {
        debug_assert!(slots.is_power_of_two());
        Self { slots, next: 0 }
    }

    /// Waits for the next message; returns its slot, which stays as it is until `done`. May be repeated.
    pub(crate) fn peek(&self, head: &Gate, spins: u32, deadline: &mut Deadline) -> Result<usize, Stop> {
        head.wait(self.next.wrapping_add(1), spins, deadline)?;
        Ok((self.next % self.slots) as usize)
    }

    /// Gives the slot back to the writer.
    pub(crate) fn done(&mut self, cursor: &Gate) -> Result<(), Stop> {
        self.next = self.next.wrapping_add(1);
        cursor.advance()
    }
}

/// Ends every wait at every gate, for good. The first code given stays; 0 is no code.
pub(crate) fn abort(reason: &AtomicU32, gates: &[Gate], code: u32) {
    // The code is written before any gate says ABORT. Release, for those who look at it without having seen a gate.
    // A failure means that there is a code already.
    let _ = reason.compare_exchange(0, code, Ordering::Release, Ordering::Relaxed);
    gates.iter().for_each(Gate::abort);
}
