//! A communicator and what its ranks do together: collectives in slots between barriers, point to point through rings.

use std::sync::{
    Mutex,
    atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering},
};

use super::{
    IN_PROGRESS, INVALID_ARGUMENT, INVALID_USAGE, NcclStatus, SUCCESS,
    reduce::{DataType, Reduction, reduce},
    segment::{RING, SLOT, Segment},
};
use crate::{handles::lock, settings::log};

pub(super) struct Comm {
    pub(super) segment: Segment,
    pub(super) rank: usize,
    pub(super) world: usize,
    /// The ordinal of its device.
    pub(super) device: usize,
    pub(super) blocking: bool,
    pub(super) aborted: AtomicBool,
    /// What `ncclCommGetAsyncError` reports: in progress while it is made, then success or the first failure.
    pub(super) state: AtomicI32,
    /// Times that a caller will still be told "in progress" about a call that is over.
    pub(super) pretended: AtomicU32,
    /// Held by the operation that runs.
    running: Mutex<()>,
    barriers: AtomicU64,
    calls: AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Collective {
    AllReduce(Reduction),
    AllGather,
    ReduceScatter(Reduction),
    Broadcast { root: usize },
    Reduce { reduction: Reduction, root: usize },
}

/// The buffers of a collective: addresses, and the elements that NCCL's own call counts.
#[derive(Clone, Copy)]
pub(super) struct Buffers {
    pub(super) send: usize,
    pub(super) receive: usize,
    pub(super) count: usize,
    pub(super) data_type: DataType,
}

/// A message to or from a peer.
#[derive(Clone, Copy)]
pub(super) struct Message {
    pub(super) sends: bool,
    pub(super) peer: usize,
    pub(super) address: usize,
    pub(super) bytes: usize,
}

impl Collective {
    /// Elements of the send and of the receive buffer; `None` if it is not used on this rank.
    pub(super) fn counts(self, comm: &Comm, count: usize) -> Option<(Option<usize>, Option<usize>)> {
        let all = count.checked_mul(comm.world)?;
        Some(match self {
            Self::AllReduce(_) => (Some(count), Some(count)),
            Self::AllGather => (Some(count), Some(all)),
            Self::ReduceScatter(_) => (Some(all), Some(count)),
            Self::Broadcast { root } => ((root == comm.rank).then_some(count), Some(count)),
            Self::Reduce { root, .. } => (Some(count), (root == comm.rank).then_some(count)),
        })
    }

    /// Distinguishes calls that must not meet.
    fn signature(self, buffers: &Buffers) -> u64 {
        let kind = match self {
            Self::AllReduce(reduction) => 0x100 + reduction as u64,
            Self::AllGather => 0x200,
            Self::ReduceScatter(reduction) => 0x300 + reduction as u64,
            Self::Broadcast { root } => 0x400 + root as u64,
            Self::Reduce { reduction, root } => 0x500 + 0x10 * reduction as u64 + root as u64,
        };
        kind << 52 ^ (buffers.data_type as u64) << 48 ^ buffers.count as u64
    }
}

/// # Safety
/// Both ranges lie in memory that nobody else uses meanwhile.
unsafe fn copy(to: usize, from: usize, bytes: usize) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
}

impl Comm {
    pub(super) fn new(
        segment: Segment,
        (rank, world): (usize, usize),
        device: usize,
        blocking: bool,
    ) -> Self {
        Self {
            segment,
            rank,
            world,
            device,
            blocking,
            aborted: AtomicBool::new(false),
            state: AtomicI32::new(IN_PROGRESS),
            pretended: AtomicU32::new(0),
            running: Mutex::new(()),
            barriers: AtomicU64::new(0),
            calls: AtomicU64::new(0),
        }
    }

    /// Ends every operation, now and later. Returns when none runs any more.
    pub(super) fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
        self.segment.notify();
        drop(lock(&self.running));
    }

    /// Waits for the operation that runs.
    pub(super) fn finish(&self) {
        drop(lock(&self.running));
    }

    /// Whether it can be used, as NCCL tells a caller that does not wait for it.
    pub(super) fn ready(&self) -> Result<(), NcclStatus> {
        let pretends = self.pretended.load(Ordering::Relaxed) > 0;
        match self.state.load(Ordering::Acquire) {
            SUCCESS if !pretends => Ok(()),
            SUCCESS | IN_PROGRESS => {
                log("nccl: a communicator is used before its last call has returned ncclSuccess");
                Err(INVALID_ARGUMENT)
            }
            failed => Err(failed),
        }
    }

    /// Runs one operation on the stream's thread. Its failure is the communicator's, the stream goes on.
    fn run(&self, operation: impl FnOnce() -> Result<(), NcclStatus>) {
        let _running = lock(&self.running);
        if self.aborted.load(Ordering::Acquire) {
            return;
        }
        if let Err(status) = operation()
            && !self.aborted.load(Ordering::Acquire)
        {
            self.state.store(status, Ordering::Release);
        }
    }

    fn barrier(&self) -> Result<(), NcclStatus> {
        let number = self.barriers.fetch_add(1, Ordering::Relaxed) + 1;
        let arrived = &self.segment.header().arrived;
        arrived[self.rank].0.store(number, Ordering::Release);
        self.segment.notify();
        let all = || {
            arrived[..self.world]
                .iter()
                .all(|word| word.0.load(Ordering::Acquire) >= number)
        };
        self.segment.wait(&self.aborted, None, all)
    }

    /// Every rank must call the same collective with the same count and type. NCCL does not say what happens otherwise.
    fn agree(&self, signature: u64) -> Result<(), NcclStatus> {
        let turn = self.calls.fetch_add(1, Ordering::Relaxed) as usize % 2;
        let signatures = &self.segment.header().signatures[turn];
        signatures[self.rank].store(signature, Ordering::Relaxed);
        self.barrier()?;
        let theirs = signatures[..self.world]
            .iter()
            .map(|signature| signature.load(Ordering::Relaxed));
        let differing: Vec<_> = (0..)
            .zip(theirs)
            .filter(|(_, other)| *other != signature)
            .collect();
        if differing.is_empty() {
            return Ok(());
        }
        let ranks: Vec<usize> = differing.into_iter().map(|(rank, _)| rank).collect();
        log(&format!(
            "nccl: mismatch: ranks {ranks:?} call another collective, count or type than rank {}",
            self.rank
        ));
        Err(INVALID_USAGE)
    }

    pub(super) fn run_collective(&self, collective: Collective, buffers: Buffers) {
        self.run(|| self.collective(collective, &buffers));
    }

    fn collective(&self, collective: Collective, buffers: &Buffers) -> Result<(), NcclStatus> {
        self.agree(collective.signature(buffers))?;
        let bytes = buffers.data_type.bytes();
        let scattered = matches!(collective, Collective::ReduceScatter(_));
        let total = if scattered {
            buffers.count * self.world
        } else {
            buffers.count
        };
        let has_input = !matches!(collective, Collective::Broadcast { root } if root != self.rank);
        let slots: Vec<usize> = (0..self.world).map(|rank| self.segment.slot(rank)).collect();
        let mut at = 0;
        while at < total {
            let count = (SLOT / bytes).min(total - at);
            if has_input {
                // SAFETY: the send buffer lies in device memory, checked at the call; the slot has SLOT bytes, and
                // nobody reads it before the barrier.
                unsafe { copy(slots[self.rank], buffers.send + at * bytes, count * bytes) };
            }
            self.barrier()?;
            // SAFETY: all slots are written and stay so until the next barrier; the receive buffer lies in device
            // memory, checked at the call.
            unsafe { self.take(collective, buffers, &slots, (at, count)) };
            self.barrier()?;
            at += count;
        }
        Ok(())
    }

    /// Takes this rank's part of the elements `[at, at + count)`, which lie in the slots.
    ///
    /// # Safety
    /// The slots are written, and the receive buffer is large enough.
    unsafe fn take(
        &self,
        collective: Collective,
        buffers: &Buffers,
        slots: &[usize],
        (at, count): (usize, usize),
    ) {
        let bytes = buffers.data_type.bytes();
        let receive = buffers.receive + at * bytes;
        let sum = |reduction| (buffers.data_type, reduction);
        // SAFETY: the caller's promise.
        unsafe {
            match collective {
                Collective::AllReduce(reduction) => reduce(sum(reduction), receive, slots, 0, count),
                Collective::Reduce { reduction, root } if root == self.rank => {
                    reduce(sum(reduction), receive, slots, 0, count);
                }
                Collective::Reduce { .. } => {}
                Collective::AllGather => {
                    for (rank, slot) in slots.iter().enumerate() {
                        copy(receive + rank * buffers.count * bytes, *slot, count * bytes);
                    }
                }
                Collective::Broadcast { root } => copy(receive, slots[root], count * bytes),
                Collective::ReduceScatter(reduction) => {
                    let own = self.rank * buffers.count..(self.rank + 1) * buffers.count;
                    let (first, last) = (own.start.max(at), own.end.min(at + count));
                    if first < last {
                        let target = buffers.receive + (first - own.start) * bytes;
                        reduce(sum(reduction), target, slots, first - at, last - first);
                    }
                }
            }
        }
    }

    pub(super) fn run_messages(&self, messages: &[Message]) {
        self.run(|| self.exchange(messages.to_vec()));
    }

    /// Moves all messages at once, so that two ranks that send to each other do not wait for each other.
    fn exchange(&self, mut messages: Vec<Message>) -> Result<(), NcclStatus> {
        loop {
            messages.retain(|message| message.bytes > 0);
            if messages.is_empty() {
                return Ok(());
            }
            self.segment.wait(&self.aborted, None, || {
                let mut moved = false;
                for i in 0..messages.len() {
                    let Message { sends, peer, .. } = messages[i];
                    // Messages between the same two ranks keep their order.
                    let earlier =
                        |other: &Message| other.bytes > 0 && (other.sends, other.peer) == (sends, peer);
                    if !messages[..i].iter().any(earlier) {
                        moved |= self.advance(&mut messages[i]);
                    }
                }
                moved
            })?;
            self.segment.notify();
        }
    }

    /// Moves as much of a message as the ring has room or bytes for.
    fn advance(&self, message: &mut Message) -> bool {
        let (from, to) = if message.sends {
            (self.rank, message.peer)
        } else {
            (message.peer, self.rank)
        };
        let header = self.segment.header();
        let (sent, received) = (&header.sent[from][to], &header.received[from][to]);
        let (written, read) = (sent.load(Ordering::Acquire), received.load(Ordering::Acquire));
        let used = (written - read) as usize;
        let (position, available) = if message.sends {
            (written, RING - used)
        } else {
            (read, used)
        };
        let place = position as usize % RING;
        let bytes = available.min(message.bytes).min(RING - place);
        if bytes == 0 {
            return false;
        }
        let ring = self.segment.ring(from, to) + place;
        // SAFETY: the message's buffer lies in device memory, checked at the call; the piece of the ring is the writer's
        // until `sent` says otherwise, and the reader's until `received` does.
        unsafe {
            if message.sends {
                copy(ring, message.address, bytes);
                sent.fetch_add(bytes as u64, Ordering::Release);
            } else {
                copy(message.address, ring, bytes);
                received.fetch_add(bytes as u64, Ordering::Release);
            }
        }
        message.address += bytes;
        message.bytes -= bytes;
        true
    }
}
