//! Every KV block there is: who holds it, what it is known as, and in which order free ones are given out.

use std::collections::HashMap;

use phalanx_proto::step::BlockId;

use super::{
    BlockHash, KvEvent,
    kv_events::{KvEventLog, Stored},
};

/// No neighbour in the free list.
const NONE: u32 = u32::MAX;

struct Block {
    /// Sequences that have it in their table; 0: it is in the free list.
    ref_count: u32,
    /// Set while the block can be found by its content.
    hash: Option<BlockHash>,
    prev: u32,
    next: u32,
}

/// Free blocks form a doubly linked list through the blocks themselves, least recently used first, so that a prefix hit
/// takes a block out of its middle in constant time. A free block stays findable until it is given out again.
pub(super) struct BlockPool {
    blocks: Vec<Block>,
    /// Only ever looked up, never iterated: its order is random.
    cached: HashMap<BlockHash, BlockId>,
    head: u32,
    tail: u32,
    num_free: usize,
    log: KvEventLog,
}

impl BlockPool {
    pub(super) fn new(num_blocks: u32, log: KvEventLog) -> Self {
        let mut pool = Self {
            blocks: Vec::with_capacity(num_blocks as usize),
            cached: HashMap::new(),
            head: NONE,
            tail: NONE,
            num_free: 0,
            log,
        };
        for index in 0..num_blocks {
            pool.blocks.push(Block {
                ref_count: 0,
                hash: None,
                prev: NONE,
                next: NONE,
            });
            pool.link_back(index);
        }
        pool
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn num_free(&self) -> usize {
        self.num_free
    }

    /// The block that was free for longest; what it held is forgotten.
    pub(super) fn allocate(&mut self) -> Option<BlockId> {
        let index = self.head;
        if index == NONE {
            return None;
        }
        self.unlink(index);
        self.uncache(BlockId(index));
        self.block_mut(BlockId(index)).ref_count = 1;
        Some(BlockId(index))
    }

    pub(super) fn find(&self, hash: &BlockHash) -> Option<BlockId> {
        self.cached.get(hash).copied()
    }

    pub(super) fn is_free(&self, id: BlockId) -> bool {
        self.block(id).ref_count == 0
    }

    /// One more holder of a block that [`BlockPool::find`] returned.
    pub(super) fn share(&mut self, id: BlockId) {
        if self.is_free(id) {
            self.unlink(id.0);
        }
        self.block_mut(id).ref_count += 1;
    }

    /// One holder less. The last one puts it at the end of the free list, or at its front if nobody could find it.
    pub(super) fn release(&mut self, id: BlockId) {
        let block = self.block_mut(id);
        assert!(block.ref_count > 0, "{id:?} released more often than held");
        block.ref_count -= 1;
        if block.ref_count == 0 {
            if block.hash.is_some() {
                self.link_back(id.0);
            } else {
                self.link_front(id.0);
            }
        }
    }

    /// Makes a held, completely computed block findable. The first block of a content keeps the name.
    pub(super) fn cache(&mut self, id: BlockId, block: &Stored<'_>) {
        if self.block(id).hash.is_none() && !self.cached.contains_key(&block.hash) {
            self.cached.insert(block.hash, id);
            self.block_mut(id).hash = Some(block.hash);
            self.log.stored(block);
        }
    }

    /// All content is lost. No block may be held.
    pub(super) fn clear(&mut self) {
        let mut log = std::mem::take(&mut self.log);
        log.cleared();
        *self = Self::new(self.blocks.len() as u32, log);
    }

    /// What has changed in the names since the last call.
    pub(super) fn take_events(&mut self) -> Vec<KvEvent> {
        self.log.take()
    }

    /// Names that can be found, for the simulator.
    #[cfg(test)]
    pub(super) fn names(&self) -> std::collections::BTreeSet<BlockHash> {
        self.cached.keys().copied().collect()
    }

    /// Nobody will find the block any more; who holds it keeps it.
    pub(super) fn uncache(&mut self, id: BlockId) {
        if let Some(hash) = self.block_mut(id).hash.take() {
            self.cached.remove(&hash);
            self.log.removed(hash);
        }
    }

    /// The same for all blocks.
    pub(super) fn uncache_all(&mut self) {
        self.cached.clear();
        for block in &mut self.blocks {
            block.hash = None;
        }
        self.log.cleared();
    }

    /// Panics unless `held` names every block exactly as often as it is counted, and list and map agree with the blocks.
    pub(super) fn check(&self, held: impl Iterator<Item = BlockId>) {
        let mut ref_counts = vec![0; self.blocks.len()];
        held.for_each(|id| ref_counts[id.0 as usize] += 1);
        let mut num_cached = 0;
        for (index, block) in self.blocks.iter().enumerate() {
            let id = BlockId(index as u32);
            assert_eq!(block.ref_count, ref_counts[index], "reference count of {id:?}");
            if let Some(hash) = block.hash {
                assert_eq!(self.find(&hash), Some(id), "name of {id:?}");
                num_cached += 1;
            }
        }
        assert_eq!(num_cached, self.cached.len(), "cached blocks");
        let (mut at, mut prev, mut num_free) = (self.head, NONE, 0);
        while at != NONE {
            let block = self.block(BlockId(at));
            assert!(
                block.ref_count == 0 && block.prev == prev,
                "free list at block {at}"
            );
            num_free += 1;
            (prev, at) = (at, block.next);
        }
        let unheld = self.blocks.iter().filter(|block| block.ref_count == 0).count();
        assert_eq!(
            (num_free, unheld, prev),
            (self.num_free, self.num_free, self.tail),
            "free blocks"
        );
    }

    // Ids come out of this pool and never from outside, so indexing cannot fail.
    fn block(&self, id: BlockId) -> &Block {
        &self.blocks[id.0 as usize]
    }
    fn block_mut(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id.0 as usize]
    }

    fn link_back(&mut self, index: u32) {
        self.link(self.tail, index, NONE);
    }
    fn link_front(&mut self, index: u32) {
        self.link(NONE, index, self.head);
    }
    fn link(&mut self, prev: u32, index: u32, next: u32) {
        let block = self.block_mut(BlockId(index));
        (block.prev, block.next) = (prev, next);
        match prev {
            NONE => self.head = index,
            prev => self.block_mut(BlockId(prev)).next = index,
        }
        match next {
            NONE => self.tail = index,
            next => self.block_mut(BlockId(next)).prev = index,
        }
        self.num_free += 1;
    }
    fn unlink(&mut self, index: u32) {
        let Block { prev, next, .. } = *self.block(BlockId(index));
        match prev {
            NONE => self.head = next,
            prev => self.block_mut(BlockId(prev)).next = next,
        }
        match next {
            NONE => self.tail = prev,
            next => self.block_mut(BlockId(next)).prev = prev,
        }
        self.num_free -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new_pool(num_blocks: u32) -> BlockPool {
        BlockPool::new(num_blocks, KvEventLog::new(true))
    }

    fn hash(token: u8) -> BlockHash {
        BlockHash([token; 32])
    }

    fn named(token: u8) -> Stored<'static> {
        Stored {
            hash: hash(token),
            parent: None,
            token_ids: &[],
            salt: None,
        }
    }

    #[test]
    fn the_longest_unused_block_is_evicted_first_and_unnamed_ones_before_it() {
        let mut pool = new_pool(3);
        let ids: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        assert_eq!(pool.allocate(), None);
        pool.cache(ids[0], &named(0));
        pool.cache(ids[1], &named(1));
        for &id in &[ids[1], ids[0], ids[2]] {
            pool.release(id);
        }
        pool.check([].into_iter());
        assert_eq!(pool.allocate(), Some(ids[2]), "nothing is lost with it");
        assert_eq!(pool.allocate(), Some(ids[1]), "released before 0");
        assert_eq!((pool.find(&hash(1)), pool.find(&hash(0))), (None, Some(ids[0])));
        pool.check([ids[2], ids[1]].into_iter());
    }

    #[test]
    fn a_shared_block_is_free_after_its_last_holder() {
        let mut pool = new_pool(4);
        let id = pool.allocate().unwrap();
        pool.cache(id, &named(7));
        pool.share(id);
        pool.release(id);
        assert_eq!(pool.num_free(), 3);
        pool.check([id].into_iter());
        pool.release(id);
        assert_eq!(pool.num_free(), 4);
        pool.share(pool.find(&hash(7)).unwrap());
        assert_eq!(pool.num_free(), 3);
        pool.check([id].into_iter());
    }

    #[test]
    #[should_panic(expected = "released more often than held")]
    fn releasing_a_free_block_is_a_bug() {
        let mut pool = new_pool(1);
        let id = pool.allocate().unwrap();
        pool.release(id);
        pool.release(id);
    }

    #[test]
    #[should_panic(expected = "reference count")]
    fn a_lost_holder_is_noticed() {
        let mut pool = new_pool(2);
        let _leaked = pool.allocate();
        pool.check([].into_iter());
    }
}
