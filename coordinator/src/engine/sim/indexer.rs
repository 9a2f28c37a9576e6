//! An indexer outside: it knows events and nothing else, and must know at any time what the prefix cache can find.

use std::collections::{BTreeMap, BTreeSet};

use crate::engine::{BlockHash, EngineConfig, KvEvent, block_hash::BlockNames};

pub(super) struct Indexer {
    config: EngineConfig,
    blocks: BTreeSet<BlockHash>,
    /// Every chain that was ever told of, by the name of its last block: tokens up to it, and the salt.
    chains: BTreeMap<BlockHash, (Vec<u32>, Option<String>)>,
}

impl Indexer {
    pub(super) fn new(config: &EngineConfig) -> Self {
        Self {
            config: config.clone(),
            blocks: BTreeSet::new(),
            chains: BTreeMap::new(),
        }
    }

    pub(super) fn follow(&mut self, events: Vec<KvEvent>) {
        for event in events {
            match event {
                KvEvent::Stored {
                    hashes,
                    parent,
                    token_ids,
                    salt,
                } => self.store(&hashes, parent, (&token_ids, salt)),
                KvEvent::Removed { hashes } => {
                    for hash in hashes {
                        assert!(self.blocks.remove(&hash), "removed what was never stored");
                    }
                }
                KvEvent::Cleared => self.blocks.clear(),
            }
        }
    }

    fn store(
        &mut self,
        hashes: &[BlockHash],
        parent: Option<BlockHash>,
        (tokens, salt): (&[u32], Option<String>),
    ) {
        let block_size = self.config.block_size as usize;
        assert_eq!(tokens.len(), hashes.len() * block_size);
        let (mut chain, salt) = match parent {
            None => (Vec::new(), salt),
            Some(parent) => {
                assert_eq!(salt, None, "only a first block is salted");
                self.chains[&parent].clone()
            }
        };
        for (hash, block) in hashes.iter().zip(tokens.chunks(block_size)) {
            chain.extend(block);
            let (algo, seed) = (self.config.prefix_hash_algo, &self.config.prefix_cache_seed);
            let mut names = BlockNames::new(algo, seed, salt.as_deref());
            let names = names.extend(&chain, chain.len() / block_size, block_size);
            assert_eq!(names.last(), Some(hash), "the name follows from what was told");
            assert!(self.blocks.insert(*hash), "stored twice");
            self.chains.insert(*hash, (chain.clone(), salt.clone()));
        }
    }

    pub(super) fn blocks(&self) -> BTreeSet<BlockHash> {
        self.blocks.clone()
    }
}
