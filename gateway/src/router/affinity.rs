//! What ties a request to a replica: its session, and the beginning of its prompt.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use http::{HeaderName, HeaderValue};

/// Names a session; without it the body's `user` does.
pub(crate) const X_SESSION_ID: HeaderName = HeaderName::from_static("x-session-id");

/// Bytes of a prompt that are one step of affinity: some 30 tokens, two blocks of the KV cache.
const BLOCK_BYTES: usize = 128;
/// Blocks that are looked at: what is alike for so long is alike enough.
const MAX_BLOCKS: usize = 256;
/// Blocks that are remembered of each generation.
const MAX_REMEMBERED: usize = 1 << 16;

/// What ties one request.
#[derive(Debug, Default)]
pub(super) struct Affinity {
    pub(super) session: Option<u64>,
    /// A hash of each beginning of the prompt that is a multiple of a block, the shortest first.
    pub(super) blocks: Vec<u64>,
}

/// The session of a request with this [`X_SESSION_ID`] and this `user`.
pub(crate) fn session(header: Option<&HeaderValue>, user: Option<&str>) -> Option<u64> {
    let name = header.map(HeaderValue::as_bytes).or(user.map(str::as_bytes));
    let name = name.filter(|name| !name.is_empty())?;
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    Some(hasher.finish())
}

/// The weight of `candidate` for `key` (rendezvous hashing, Thaler and Ravishankar 1998): who has the greatest gets it,
/// so that a candidate's coming or going moves no key but its own.
pub(super) fn weight(key: u64, candidate: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    (key, candidate).hash(&mut hasher);
    hasher.finish()
}

/// Hashes a prompt block by block; each hash stands for all bytes up to its end.
#[derive(Default)]
pub(super) struct Blocks {
    hasher: DefaultHasher,
    /// Bytes of the last, unfinished block.
    filled: usize,
    hashes: Vec<u64>,
}

impl Blocks {
    pub(super) fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.hashes.len() < MAX_BLOCKS {
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK_BYTES - self.filled));
            self.hasher.write(now);
            self.filled += now.len();
            if self.filled == BLOCK_BYTES {
                self.filled = 0;
                self.hashes.push(self.hasher.finish());
            }
            bytes = later;
        }
    }

    pub(super) fn finish(self) -> Vec<u64> {
        self.hashes
    }
}

/// Which replica has last seen a block. Two generations, so that what is used stays and memory is bounded: when the
/// newer one is full it becomes the older one, and what was in that is forgotten.
#[derive(Default)]
pub(super) struct Memory {
    newer: HashMap<u64, u64>,
    older: HashMap<u64, u64>,
}

impl Memory {
    pub(super) fn replica_of(&self, block: u64) -> Option<u64> {
        self.newer.get(&block).or_else(|| self.older.get(&block)).copied()
    }

    pub(super) fn learn(&mut self, blocks: &[u64], replica: u64) {
        if self.newer.len() + blocks.len() > MAX_REMEMBERED {
            self.older = std::mem::take(&mut self.newer);
        }
        self.newer.extend(blocks.iter().map(|&block| (block, replica)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(parts: &[&str]) -> Vec<u64> {
        let mut blocks = Blocks::default();
        for part in parts {
            blocks.feed(part.as_bytes());
        }
        blocks.finish()
    }

    #[test]
    fn prompts_that_begin_alike_share_their_first_blocks() {
        let common = "x".repeat(3 * BLOCK_BYTES + 5);
        let one = blocks(&[&common, &"y".repeat(BLOCK_BYTES)]);
        let other = blocks(&[&common, &"z".repeat(2 * BLOCK_BYTES)]);
        assert_eq!((one.len(), other.len()), (4, 5));
        assert_eq!(one[..3], other[..3]);
        assert_ne!(one[3], other[3]);
        assert!(blocks(&["short"]).is_empty());
        assert_eq!(blocks(&[&"x".repeat(1 << 20)]).len(), MAX_BLOCKS);
    }

    #[test]
    fn a_header_wins_over_the_user() {
        assert_eq!(session(None, None), None);
        assert_eq!(session(None, Some("")), None);
        let user = session(None, Some("ann")).expect("a session");
        let header = HeaderValue::from_static("s-1");
        let named = session(Some(&header), Some("ann")).expect("a session");
        assert_ne!(user, named);
        assert_eq!(session(Some(&header), None), Some(named));
    }

    #[test]
    fn memory_keeps_what_is_used_and_is_bounded() {
        let mut memory = Memory::default();
        memory.learn(&[7], 1);
        for round in 0..8_u64 {
            let many: Vec<u64> = (0..MAX_REMEMBERED as u64 / 2)
                .map(|at| (round << 32) | (at << 8))
                .collect();
            memory.learn(&many, 2);
            if round < 4 {
                memory.learn(&[7], 1);
            }
        }
        assert!(memory.newer.len() + memory.older.len() <= 2 * MAX_REMEMBERED);
        assert_eq!(memory.replica_of(7), None, "not seen for two generations");
        assert_eq!(memory.replica_of(7 << 32), Some(2));
    }
}
