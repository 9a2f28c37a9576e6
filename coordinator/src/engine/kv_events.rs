//! What changes in the prefix cache, for those who index it from outside.

use super::BlockHash;

/// A change of what the prefix cache can find, in the order of the changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvEvent {
    /// Blocks that follow each other can be found.
    Stored {
        hashes: Vec<BlockHash>,
        /// Of the block before them; none if they begin a sequence.
        parent: Option<BlockHash>,
        /// Of all of them.
        token_ids: Vec<u32>,
        /// What the first block's name holds beside its tokens; only blocks that begin a sequence have any.
        salt: Option<String>,
    },
    /// Blocks that were given to others, or whose content is not to be trusted.
    Removed { hashes: Vec<BlockHash> },
    /// No block can be found any more.
    Cleared,
}

/// A full block that has been named.
pub(super) struct Stored<'a> {
    pub(super) hash: BlockHash,
    pub(super) parent: Option<BlockHash>,
    pub(super) token_ids: &'a [u32],
    pub(super) salt: Option<&'a str>,
}

/// Collects events until they are taken, if anybody wants them at all.
#[derive(Debug, Default)]
pub(super) struct KvEventLog {
    enabled: bool,
    events: Vec<KvEvent>,
}

impl KvEventLog {
    pub(super) fn new(enabled: bool) -> Self {
        Self {
            enabled,
            events: Vec::new(),
        }
    }

    /// Blocks of one sequence that are stored one after another become one event.
    pub(super) fn stored(&mut self, block: &Stored<'_>) {
        if !self.enabled {
            return;
        }
        if let Some(KvEvent::Stored {
            hashes, token_ids, ..
        }) = self.events.last_mut()
            && block.parent.is_some()
            && hashes.last() == block.parent.as_ref()
        {
            hashes.push(block.hash);
            token_ids.extend(block.token_ids);
            return;
        }
        self.events.push(KvEvent::Stored {
            hashes: vec![block.hash],
            parent: block.parent,
            token_ids: block.token_ids.to_vec(),
            salt: block.salt.filter(|_| block.parent.is_none()).map(str::to_owned),
        });
    }

    pub(super) fn removed(&mut self, hash: BlockHash) {
        if !self.enabled {
            return;
        }
        match self.events.last_mut() {
            Some(KvEvent::Removed { hashes }) => hashes.push(hash),
            _ => self.events.push(KvEvent::Removed { hashes: vec![hash] }),
        }
    }

    pub(super) fn cleared(&mut self) {
        if self.enabled {
            self.events.push(KvEvent::Cleared);
        }
    }

    pub(super) fn take(&mut self) -> Vec<KvEvent> {
        std::mem::take(&mut self.events)
    }
}
