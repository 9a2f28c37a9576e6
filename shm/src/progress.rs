//! How far each rank is, and whether it lives, where all can see it.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::arena::Arena;

/// A rank's counters have the cache lines of a pair to themselves.
const STRIDE: usize = 128;

/// Two counters per rank at the front of the [`Arena`], written by its rank and read by everybody, at any time and
/// without a barrier: for telling who is behind in a group that does not meet in the segment.
#[derive(Clone, Debug)]
pub struct Progress {
    arena: Arena,
    world_size: u32,
}

/// One rank's.
#[repr(C)]
struct Counters {
    count: AtomicU64,
    beats: AtomicU64,
}

impl Progress {
    /// Bytes of the arena it takes.
    pub fn bytes(world_size: u32) -> u64 {
        u64::from(world_size) * STRIDE as u64
    }

    /// None if the arena is too small. Nothing else may use these bytes.
    pub fn new(arena: Arena, world_size: u32) -> Option<Self> {
        let fits = Self::bytes(world_size) <= arena.len() as u64;
        fits.then_some(Self { arena, world_size })
    }

    /// Tells that `rank` is at `count`; a rank beyond the group is ignored.
    pub fn set(&self, rank: u32, count: u64) {
        if let Some(counters) = self.counters(rank) {
            counters.count.store(count, Ordering::Release);
        }
    }

    /// Where every rank is, in rank order.
    pub fn counts(&self) -> Vec<u64> {
        self.read(|counters| &counters.count)
    }

    /// Tells that `rank` is alive; a rank beyond the group is ignored.
    pub fn beat(&self, rank: u32) {
        if let Some(counters) = self.counters(rank) {
            counters.beats.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How often every rank has said so, in rank order.
    pub fn beats(&self) -> Vec<u64> {
        self.read(|counters| &counters.beats)
    }

    fn read(&self, counter: impl Fn(&Counters) -> &AtomicU64) -> Vec<u64> {
        let ranks = (0..self.world_size).filter_map(|rank| self.counters(rank));
        ranks
            .map(|counters| counter(counters).load(Ordering::Acquire))
            .collect()
    }

    fn counters(&self, rank: u32) -> Option<&Counters> {
        if rank >= self.world_size {
            return None;
        }
        // SAFETY: within the arena, which was checked to be long enough and starts on a page, so the counters are
        // aligned; any bytes are values, every process accesses them as atomics, and the mapping lives as long as `self`.
        Some(unsafe { &*self.arena.as_ptr().as_ptr().add(rank as usize * STRIDE).cast() })
    }
}
