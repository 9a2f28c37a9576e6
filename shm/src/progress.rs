//! How far each rank is, where all can see it.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::arena::Arena;

/// A rank's counter has the cache lines of a pair to itself.
const STRIDE: usize = 128;

/// A counter per rank at the front of the [`Arena`], written by its rank and read by everybody, at any time and without
/// a barrier: for telling who is behind in a group that does not meet in the segment.
#[derive(Clone, Debug)]
pub struct Progress {
    arena: Arena,
    world_size: u32,
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
        if let Some(counter) = self.counter(rank) {
            counter.store(count, Ordering::Release);
        }
    }

    /// Where every rank is, in rank order.
    pub fn counts(&self) -> Vec<u64> {
        let counters = (0..self.world_size).filter_map(|rank| self.counter(rank));
        counters.map(|counter| counter.load(Ordering::Acquire)).collect()
    }

    fn counter(&self, rank: u32) -> Option<&AtomicU64> {
        if rank >= self.world_size {
            return None;
        }
        // SAFETY: within the arena, which was checked to be long enough and starts on a page, so the counter is aligned;
        // any bytes are a value, every process accesses them as atomics, and the mapping lives as long as `self`.
        Some(unsafe { &*self.arena.as_ptr().as_ptr().add(rank as usize * STRIDE).cast() })
    }
}
