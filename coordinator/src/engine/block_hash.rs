//! Names of cached KV blocks: a hash of everything the block's KV depends on.

use sha2::{Digest, Sha256};

/// Hash of a full block's tokens and of every token before it, in the caller's salt and this process's seed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct BlockHash([u8; 32]);

impl BlockHash {
    /// Start of the chain of every sequence with this salt. A missing salt is not the empty one.
    pub(super) fn root(seed: &[u8; 32], salt: Option<&str>) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"phalanx prefix cache root");
        hash.update(seed);
        hash.update([u8::from(salt.is_some())]);
        hash.update(salt.unwrap_or_default());
        Self(hash.finalize().into())
    }

    /// The block after `self` that holds `tokens`.
    ///
    /// SHA-256 rather than a faster hash: tokens are chosen by clients, and a collision would serve one client
    /// attention over another's prompt.
    pub(super) fn child(&self, tokens: &[u32]) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.0);
        for token in tokens {
            hash.update(token.to_le_bytes());
        }
        Self(hash.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seed_salt_place_and_tokens_all_count() {
        let root = BlockHash::root(&[1; 32], None);
        let all = [
            root.child(&[1, 2]),
            root.child(&[2, 1]),
            root.child(&[1, 2]).child(&[1, 2]),
            BlockHash::root(&[2; 32], None).child(&[1, 2]),
            BlockHash::root(&[1; 32], Some("")).child(&[1, 2]),
            BlockHash::root(&[1; 32], Some("a")).child(&[1, 2]),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b));
        }
        assert_eq!(
            root.child(&[1, 2]),
            BlockHash::root(&[1; 32], None).child(&[1, 2])
        );
    }
}
