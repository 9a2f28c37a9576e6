//! Which blocks hold the KV of which sequence: prefix match, growth, and giving back.

use phalanx_proto::step::BlockId;

use super::{
    EngineConfig, KvEvent, PrefixHashAlgo,
    block_hash::BlockNames,
    block_pool::BlockPool,
    kv_events::{KvEventLog, Stored},
};

/// The KV of one sequence.
#[derive(Debug)]
pub(super) struct SequenceKv {
    /// Blocks in the order of the tokens they hold; the last may be partly filled.
    pub(super) table: Vec<BlockId>,
    /// Kept across preemption: tokens never change.
    names: BlockNames,
    /// Leading blocks of the table that have been offered to the prefix cache or came from it.
    num_offered: usize,
    /// The blocks are older than the last reset of the cache: nothing that is computed from them is offered.
    withheld: bool,
}

impl SequenceKv {
    /// Keeps what is computed so far, and what follows from it, out of the prefix cache.
    pub(super) fn withhold(&mut self) {
        self.withheld = !self.table.is_empty();
    }
}

/// What must be free for a sequence to be admitted.
#[derive(Clone, Copy)]
pub(super) struct Room {
    /// Leading tokens whose KV may come from the prefix cache: never all of them, the last one's logits are wanted.
    pub(super) num_cacheable: usize,
    /// Blocks for so many of its tokens beyond the cached ones, if it has them.
    pub(super) new_tokens: usize,
    /// And so many blocks beside.
    pub(super) kept_blocks: usize,
}

/// Blocks of all sequences over one pool.
pub(super) struct KvCacheManager {
    pool: BlockPool,
    block_size: usize,
    enable_prefix_caching: bool,
    hash_algo: PrefixHashAlgo,
    seed: [u8; 32],
    watermark_blocks: usize,
}

impl KvCacheManager {
    pub(super) fn new(config: &EngineConfig) -> Self {
        Self {
            pool: BlockPool::new(config.num_blocks, KvEventLog::new(config.kv_events)),
            block_size: config.block_size as usize,
            enable_prefix_caching: config.enable_prefix_caching,
            hash_algo: config.prefix_hash_algo,
            seed: config.prefix_cache_seed,
            watermark_blocks: (f64::from(config.watermark) * f64::from(config.num_blocks)) as usize,
        }
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.pool.num_blocks()
    }
    pub(super) fn num_free_blocks(&self) -> usize {
        self.pool.num_free()
    }
    /// Blocks that admission leaves free while anything runs.
    pub(super) fn watermark_blocks(&self) -> usize {
        self.watermark_blocks
    }
    /// Blocks that a sequence is still to get for the tokens it has.
    pub(super) fn num_missing_blocks(&self, kv: &SequenceKv, tokens: &[u32]) -> usize {
        tokens
            .len()
            .div_ceil(self.block_size)
            .saturating_sub(kv.table.len())
    }

    /// The state of a sequence that holds nothing yet.
    pub(super) fn sequence(&self, cache_salt: Option<&str>) -> SequenceKv {
        SequenceKv {
            table: Vec::new(),
            names: BlockNames::new(self.hash_algo, &self.seed, cache_salt),
            num_offered: 0,
            withheld: false,
        }
    }

    /// Takes what the prefix cache knows of `tokens`, if what else has to fit would. Returns how many tokens need no
    /// computation. None, and nothing taken, if the free blocks do not suffice.
    pub(super) fn admit(&mut self, kv: &mut SequenceKv, tokens: &[u32], room: Room) -> Option<usize> {
        let cached = self.find_prefix(kv, &tokens[..room.num_cacheable]);
        let num_cached_tokens = cached.len() * self.block_size;
        let first = num_cached_tokens
            .saturating_add(room.new_tokens)
            .min(tokens.len());
        let new_blocks = first.div_ceil(self.block_size) - cached.len();
        let revived = cached.iter().filter(|id| self.pool.is_free(**id)).count();
        if new_blocks + revived + room.kept_blocks > self.pool.num_free() {
            return None;
        }
        cached.iter().for_each(|&id| self.pool.share(id));
        kv.num_offered = cached.len();
        kv.table = cached;
        Some(num_cached_tokens)
    }

    fn find_prefix(&self, kv: &mut SequenceKv, tokens: &[u32]) -> Vec<BlockId> {
        if !self.enable_prefix_caching {
            return Vec::new();
        }
        let num_blocks = tokens.len() / self.block_size;
        let hashes = kv.names.extend(tokens, num_blocks, self.block_size).iter();
        hashes.map_while(|hash| self.pool.find(hash)).collect()
    }

    /// Makes room for the first `num_tokens` tokens; false, and nothing changed, if free blocks do not suffice.
    pub(super) fn grow(&mut self, kv: &mut SequenceKv, num_tokens: usize) -> bool {
        let missing = num_tokens
            .div_ceil(self.block_size)
            .saturating_sub(kv.table.len());
        if missing > self.pool.num_free() {
            return false;
        }
        kv.table.extend((0..missing).map_while(|_| self.pool.allocate()));
        true
    }

    /// Offers the blocks that `num_computed` tokens fill to other sequences. Not before the step that computes them has
    /// succeeded: a block is only ever findable while its content is there.
    pub(super) fn offer(&mut self, kv: &mut SequenceKv, tokens: &[u32], num_computed: usize) {
        if !self.enable_prefix_caching || kv.withheld {
            return;
        }
        let num_full = num_computed / self.block_size;
        kv.names.extend(tokens, num_full, self.block_size);
        for index in kv.num_offered..num_full {
            let block = Stored {
                hash: kv.names.get(index),
                parent: kv.names.parent(index),
                token_ids: &tokens[index * self.block_size..(index + 1) * self.block_size],
                salt: kv.names.salt(),
            };
            self.pool.cache(kv.table[index], &block);
        }
        kv.num_offered = num_full;
    }

    /// Gives all blocks back, the last first: the end of a prefix is of use to fewer than its beginning.
    pub(super) fn free(&mut self, kv: &mut SequenceKv) {
        kv.num_offered = 0;
        kv.withheld = false;
        while let Some(id) = kv.table.pop() {
            self.pool.release(id);
        }
    }

    /// As [`KvCacheManager::free`], but nobody will find what the blocks hold: it produced logits that are no numbers.
    pub(super) fn discard(&mut self, kv: &mut SequenceKv) {
        kv.table.iter().for_each(|&id| self.pool.uncache(id));
        self.free(kv);
    }

    /// No block will be found by its content any more. Every [`SequenceKv`] that holds blocks must be withheld.
    pub(super) fn forget(&mut self) {
        self.pool.uncache_all();
    }

    /// The ranks have lost all KV. Every [`SequenceKv`] must have been freed.
    pub(super) fn reset(&mut self) {
        self.pool.clear();
    }

    /// What has changed in the prefix cache since the last call.
    pub(super) fn take_events(&mut self) -> Vec<KvEvent> {
        self.pool.take_events()
    }

    #[cfg(test)]
    pub(super) fn cached_blocks(&self) -> std::collections::BTreeSet<super::BlockHash> {
        self.pool.names()
    }

    /// Panics unless every block is held exactly as often as the tables of `all` say.
    pub(super) fn check<'a>(&self, all: impl Iterator<Item = &'a SequenceKv>) {
        self.pool.check(all.flat_map(|kv| kv.table.iter().copied()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All of the sequence, and nothing else.
    fn alone(tokens: &[u32]) -> Room {
        Room {
            num_cacheable: tokens.len() - 1,
            new_tokens: usize::MAX,
            kept_blocks: 0,
        }
    }

    fn manager() -> KvCacheManager {
        let mut config = EngineConfig::new(8, 64, 100);
        config.block_size = 4;
        config.watermark = 0.25;
        KvCacheManager::new(&config)
    }

    /// Computes `tokens` to the end and gives the blocks back.
    fn run(manager: &mut KvCacheManager, tokens: &[u32], salt: Option<&str>) -> Option<usize> {
        let mut kv = manager.sequence(salt);
        let cached = manager.admit(&mut kv, tokens, alone(tokens));
        assert!(manager.grow(&mut kv, tokens.len()));
        manager.offer(&mut kv, tokens, tokens.len());
        manager.check([&kv].into_iter());
        manager.free(&mut kv);
        cached
    }

    #[test]
    fn full_blocks_are_found_again_but_never_the_last_token() {
        let mut manager = manager();
        let tokens: Vec<u32> = (0..12).collect();
        assert_eq!(run(&mut manager, &tokens, None), Some(0));
        assert_eq!(
            run(&mut manager, &tokens, None),
            Some(8),
            "the third block holds the last token"
        );
        assert_eq!(run(&mut manager, &[&tokens[..], &[99]].concat(), None), Some(12));
        assert_eq!(run(&mut manager, &tokens[..7], None), Some(4));
        assert_eq!(run(&mut manager, &tokens[1..], None), Some(0));
    }

    #[test]
    fn tokens_whose_logits_are_wanted_are_not_taken_from_the_cache() {
        let mut manager = manager();
        let tokens: Vec<u32> = (0..12).collect();
        run(&mut manager, &tokens, None);
        for (num_cacheable, expected) in [(0, 0), (3, 0), (4, 4), (11, 8)] {
            let mut kv = manager.sequence(None);
            let room = Room {
                num_cacheable,
                ..alone(&tokens)
            };
            assert_eq!(manager.admit(&mut kv, &tokens, room), Some(expected));
            manager.free(&mut kv);
        }
    }

    #[test]
    fn another_salt_sees_nothing() {
        let mut manager = manager();
        let tokens: Vec<u32> = (0..9).collect();
        assert_eq!(run(&mut manager, &tokens, Some("a")), Some(0));
        assert_eq!(run(&mut manager, &tokens, Some("b")), Some(0));
        assert_eq!(run(&mut manager, &tokens, None), Some(0));
        assert_eq!(run(&mut manager, &tokens, Some("a")), Some(8));
    }

    #[test]
    fn admission_keeps_free_what_it_is_told_to() {
        let mut manager = manager();
        assert_eq!(manager.watermark_blocks(), 2);
        let tokens = vec![1; 28]; // 7 of 8 blocks
        let mut kv = manager.sequence(None);
        let room = |new_tokens, kept_blocks| Room {
            num_cacheable: 27,
            new_tokens,
            kept_blocks,
        };
        assert_eq!(manager.admit(&mut kv, &tokens, room(usize::MAX, 2)), None);
        assert_eq!(manager.admit(&mut kv, &tokens, room(25, 2)), None);
        assert_eq!(
            manager.admit(&mut kv, &tokens, room(24, 2)),
            Some(0),
            "the first chunk"
        );
        assert_eq!(manager.num_missing_blocks(&kv, &tokens), 7);
        assert_eq!(manager.admit(&mut kv, &tokens, alone(&tokens)), Some(0));
    }

    #[test]
    fn a_free_cached_block_is_not_counted_twice() {
        let mut manager = manager();
        let tokens: Vec<u32> = (0..29).collect(); // all 8 blocks
        run(&mut manager, &tokens, None);
        let mut kv = manager.sequence(None);
        assert_eq!(manager.admit(&mut kv, &tokens, alone(&tokens)), Some(28));
        assert_eq!(manager.num_free_blocks(), 1);
        assert!(manager.grow(&mut kv, 29) && !manager.grow(&mut kv, 33));
        manager.check([&kv].into_iter());
    }

    #[test]
    fn forgotten_content_is_not_found_nor_what_follows_from_it() {
        let mut manager = manager();
        let tokens: Vec<u32> = (0..12).collect();
        let mut kv = manager.sequence(None);
        manager.admit(&mut kv, &tokens, alone(&tokens));
        manager.grow(&mut kv, 8);
        manager.offer(&mut kv, &tokens, 8);
        manager.forget();
        kv.withhold();
        manager.grow(&mut kv, 12);
        manager.offer(&mut kv, &tokens, 12);
        manager.check([&kv].into_iter());
        manager.free(&mut kv);
        assert_eq!(run(&mut manager, &tokens, None), Some(0));
        assert_eq!(
            run(&mut manager, &tokens, None),
            Some(8),
            "later content is found"
        );
    }

    #[test]
    fn discarded_content_is_not_found() {
        let mut manager = manager();
        let tokens: Vec<u32> = (0..12).collect();
        let mut kv = manager.sequence(None);
        manager.admit(&mut kv, &tokens, alone(&tokens));
        manager.grow(&mut kv, 12);
        manager.offer(&mut kv, &tokens, 12);
        manager.discard(&mut kv);
        assert_eq!(run(&mut manager, &tokens, None), Some(0));
    }
}
