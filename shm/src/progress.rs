//! How far each rank is, whether it lives, and why it gave up, where all can see it.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::arena::Arena;

/// A rank's counters have the cache lines of a pair to themselves, and its words follow them.
const STRIDE: usize = 512;
const WORDS: usize = 46;
/// Of a rank's testimony, at most.
const TEXT_BYTES: usize = WORDS * size_of::<u64>();
/// In the place of a rank: there is no testimony.
const NOBODY: u64 = 0;

/// Two counters and a sentence per rank at the front of the [`Arena`], written by its rank and read by everybody, at any
/// time and without a barrier: for telling who is behind in a group that does not meet in the segment.
#[derive(Clone, Debug)]
pub struct Progress {
    arena: Arena,
    world_size: u32,
}

/// One rank's.
#[repr(C, align(128))]
struct Counters {
    count: AtomicU64,
    beats: AtomicU64,
    _room: [u64; 14],
    /// [`NOBODY`], or one more than the rank that the text is about; written last.
    about: AtomicU64,
    /// Bytes of the text.
    len: AtomicU64,
    text: [AtomicU64; WORDS],
}

const _: () = assert!(size_of::<Counters>() == STRIDE);

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

    /// Says as `witness`, once, what is wrong with the rank `about`. To be called before the group is aborted because of
    /// it: whoever sees the abort then finds the reason. What is longer than a few hundred bytes is cut.
    pub fn testify(&self, witness: u32, about: u32, text: &str) {
        let Some(counters) = self.counters(witness) else {
            return;
        };
        if counters.about.load(Ordering::Relaxed) != NOBODY {
            return;
        }
        let text = &text.as_bytes()[..text.len().min(TEXT_BYTES)];
        for (word, bytes) in counters.text.iter().zip(text.chunks(size_of::<u64>())) {
            let mut padded = [0; size_of::<u64>()];
            padded[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(padded), Ordering::Relaxed);
        }
        counters.len.store(text.len() as u64, Ordering::Relaxed);
        counters.about.store(u64::from(about) + 1, Ordering::Release);
    }

    /// What some rank has said about the rank `about`.
    pub fn testimony(&self, about: u32) -> Option<String> {
        let mut witnesses = (0..self.world_size).filter_map(|rank| self.counters(rank));
        let said =
            witnesses.find(|counters| counters.about.load(Ordering::Acquire) == u64::from(about) + 1)?;
        let words = said
            .text
            .iter()
            .map(|word| word.load(Ordering::Relaxed).to_ne_bytes());
        let bytes: Vec<u8> = words.flatten().collect();
        // Another process wrote it: any length and any bytes.
        let len =
            usize::try_from(said.len.load(Ordering::Relaxed)).map_or(TEXT_BYTES, |len| len.min(TEXT_BYTES));
        Some(String::from_utf8_lossy(&bytes[..len]).into_owned())
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
