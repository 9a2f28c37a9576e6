//! Which blocks hold the KV of which sequence: prefix match, growth, and giving back.

use phalanx_proto::step::BlockId;

use super::{EngineConfig, block_hash::BlockHash, block_pool::BlockPool};

/// The KV of one sequence.
#[derive(Debug)]
pub(super) struct SequenceKv {
    /// Blocks in the order of the tokens they hold; the last may be partly filled.
    pub(super) table: Vec<BlockId>,
    /// Names of the sequence's full blocks, computed as they are needed and kept across preemption: tokens never change.
    hashes: Vec<BlockHash>,
    /// Name before the first block.
    root: BlockHash,
    /// Leading blocks of the table that have been offered to the prefix cache or came from it.
    num_offered: usize,
}

impl SequenceKv {
    fn extend_hashes(&mut self, tokens: &[u32], num_blocks: usize, block_size: usize) {
        for index in self.hashes.len()..num_blocks {
            let parent = self.hashes.last().unwrap_or(&self.root);
            self.hashes
                .push(parent.child(&tokens[index * block_size..(index + 1) * block_size]));
        }
    }
}

/// Blocks of all sequences over one pool.
pub(super) struct KvCacheManager {
    pool: BlockPool,
    block_size: usize,
    enable_prefix_caching: bool,
    seed: [u8; 32],
    /// Blocks that admission leaves free while anything runs.
    watermark_blocks: usize,
}

impl KvCacheManager {
    pub(super) fn new(config: &EngineConfig) -> Self {
        Self {
            pool: BlockPool::new(config.num_blocks),
            block_size: config.block_size as usize,
            enable_prefix_caching: config.enable_prefix_caching,
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

    /// The state of a sequence that holds nothing yet.
    pub(super) fn sequence(&self, cache_salt: Option<&str>) -> SequenceKv {
        SequenceKv {
            table: Vec::new(),
            hashes: Vec::new(),
            root: BlockHash::root(&self.seed, cache_salt),
            num_offered: 0,
        }
    }

    /// Takes what the prefix cache knows of the first `num_cacheable` tokens, which leave at least the last one, if the
    /// rest would fit as well. Returns how many tokens need no computation. None, and nothing taken, if the free blocks
    /// do not suffice; with `alone` the watermark does not count.
    ///
    /// The whole sequence has to fit although only its first chunk is allocated now, because a prompt that is admitted
    /// and then preempted halfway was computed for nothing.
    pub(super) fn admit(
        &mut self,
        kv: &mut SequenceKv,
        tokens: &[u32],
        num_cacheable: usize,
        alone: bool,
    ) -> Option<usize> {
        let cached = self.find_prefix(kv, &tokens[..num_cacheable]);
        let new_blocks = tokens.len().div_ceil(self.block_size) - cached.len();
        let revived = cached.iter().filter(|id| self.pool.is_free(**id)).count();
        let reserve = if alone { 0 } else { self.watermark_blocks };
        if new_blocks + revived + reserve > self.pool.num_free() {
            return None;
        }
        cached.iter().for_each(|&id| self.pool.share(id));
        kv.num_offered = cached.len();
        let num_cached_tokens = cached.len() * self.block_size;
        kv.table = cached;
        Some(num_cached_tokens)
    }

    fn find_prefix(&self, kv: &mut SequenceKv, tokens: &[u32]) -> Vec<BlockId> {
        if !self.enable_prefix_caching {
            return Vec::new();
        }
        let num_blocks = tokens.len() / self.block_size;
        kv.extend_hashes(tokens, num_blocks, self.block_size);
        let hashes = kv.hashes.iter().take(num_blocks);
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
        if !self.enable_prefix_caching {
            return;
        }
        let num_full = num_computed / self.block_size;
        kv.extend_hashes(tokens, num_full, self.block_size);
        for index in kv.num_offered..num_full {
            self.pool.cache(kv.table[index], kv.hashes[index]);
        }
        kv.num_offered = num_full;
    }

    /// Gives all blocks back, the last first: the end of a prefix is of use to fewer than its beginning.
    pub(super) fn free(&mut self, kv: &mut SequenceKv) {
        kv.num_offered = 0;
        while let Some(id) = kv.table.pop() {
            self.pool.release(id);
        }
    }

    /// As [`KvCacheManager::free`], but nobody will find what the blocks hold: it produced logits that are no numbers.
    pub(super) fn discard(&mut self, kv: &mut SequenceKv) {
        kv.table.iter().for_each(|&id| self.pool.uncache(id));
        self.free(kv);
    }

    /// The ranks have lost all KV. Every [`SequenceKv`] must have been freed.
    pub(super) fn reset(&mut self) {
        self.pool = BlockPool::new(self.pool.num_blocks() as u32);
    }

    /// Panics unless every block is held exactly as often as the tables of `all` say.
    pub(super) fn check<'a>(&self, all: impl Iterator<Item = &'a SequenceKv>) {
        self.pool.check(all.flat_map(|kv| kv.table.iter().copied()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager() -> KvCacheManager {
        let mut config = EngineConfig::new(8, 64, 100);
        config.block_size = 4;
        config.watermark = 0.25;
        KvCacheManager::new(&config)
    }

    /// Computes `tokens` to the end and gives the blocks back.
    fn run(manager: &mut KvCacheManager, tokens: &[u32], salt: Option<&str>) -> Option<usize> {
        let mut kv = manager.sequence(salt);
        let cached = manager.admit(&mut kv, tokens, tokens.len() - 1, true);
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
            assert_eq!(
                manager.admit(&mut kv, &tokens, num_cacheable, true),
                Some(expected)
            );
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
    fn admission_leaves_the_watermark_free_unless_nothing_runs() {
        let mut manager = manager();
        let tokens = vec![1; 28]; // 7 of 8 blocks, the watermark is 2
        let mut kv = manager.sequence(None);
        assert_eq!(manager.admit(&mut kv, &tokens, 27, false), None);
        assert_eq!(manager.admit(&mut kv, &tokens, 27, true), Some(0));
    }

    #[test]
    fn a_free_cached_block_is_not_counted_twice() {
        let mut manager = manager();
        let tokens: Vec<u32> = (0..29).collect(); // all 8 blocks
        run(&mut manager, &tokens, None);
        let mut kv = manager.sequence(None);
        assert_eq!(manager.admit(&mut kv, &tokens, 28, true), Some(28));
        assert_eq!(manager.num_free_blocks(), 1);
        assert!(manager.grow(&mut kv, 29) && !manager.grow(&mut kv, 33));
        manager.check([&kv].into_iter());
    }

    #[test]
    fn discarded_content_is_not_found() {
        let mut manager = manager();
        let tokens: Vec<u32> = (0..12).collect();
        let mut kv = manager.sequence(None);
        manager.admit(&mut kv, &tokens, 11, true);
        manager.grow(&mut kv, 12);
        manager.offer(&mut kv, &tokens, 12);
        manager.discard(&mut kv);
        assert_eq!(run(&mut manager, &tokens, None), Some(0));
    }
}
