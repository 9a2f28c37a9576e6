//! Names of cached KV blocks: a hash of everything the block's KV depends on.

use sha2::{Digest, Sha256};

/// How blocks are named. Both are SHA-256 rather than a faster hash: tokens are chosen by clients, and a collision would
/// serve one client attention over another's prompt.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PrefixHashAlgo {
    /// Over the tokens as they lie in memory, keyed with a secret of this process: names tell nothing to anybody else.
    #[default]
    Builtin,
    /// vLLM's `sha256_cbor`: over canonical CBOR (RFC 8949, section 4.2) of parent, tokens and extra keys, so that an
    /// indexer that has the tokens can compute the names.
    Sha256Cbor,
}

impl PrefixHashAlgo {
    /// What vLLM starts every chain with, unless `PYTHONHASHSEED` says otherwise.
    pub const DEFAULT_SEED: &'static str = "vllm-none-hash";

    /// The start of all chains (vLLM's `NONE_HASH`) from a seed that several processes share.
    pub fn none_hash(seed: &str) -> [u8; 32] {
        let mut cbor = Vec::new();
        put_text(&mut cbor, seed);
        Sha256::digest(&cbor).into()
    }
}

/// Name of a full block: of its tokens and of every token before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockHash(pub [u8; 32]);

impl BlockHash {
    /// The low 64 bits, which is what vLLM's events call a block.
    pub fn low(&self) -> u64 {
        self.0[24..]
            .iter()
            .fold(0, |bits, &byte| bits << 8 | u64::from(byte))
    }
}

/// Names of one sequence's full blocks, computed as they are needed.
#[derive(Debug)]
pub(super) struct BlockNames {
    algo: PrefixHashAlgo,
    root: BlockHash,
    salt: Option<Box<str>>,
    hashes: Vec<BlockHash>,
}

impl BlockNames {
    /// None yet. `seed` is the process's secret, or the start of vLLM's chains. A missing salt is not the empty one.
    pub(super) fn new(algo: PrefixHashAlgo, seed: &[u8; 32], salt: Option<&str>) -> Self {
        let root = match algo {
            PrefixHashAlgo::Builtin => builtin_root(seed, salt),
            PrefixHashAlgo::Sha256Cbor => BlockHash(*seed),
        };
        Self {
            algo,
            root,
            salt: salt.map(Into::into),
            hashes: Vec::new(),
        }
    }

    /// Computes the names of the first `num_blocks` blocks of `tokens`.
    pub(super) fn extend(&mut self, tokens: &[u32], num_blocks: usize, block_size: usize) -> &[BlockHash] {
        for index in self.hashes.len()..num_blocks {
            let block = &tokens[index * block_size..(index + 1) * block_size];
            let parent = self.parent(index);
            let hash = match self.algo {
                PrefixHashAlgo::Builtin => builtin_child(&parent.unwrap_or(self.root), block),
                // Only the first block is salted: every other one inherits it.
                PrefixHashAlgo::Sha256Cbor => match parent {
                    Some(parent) => cbor_child(&parent, block, None),
                    None => cbor_child(&self.root, block, self.salt.as_deref()),
                },
            };
            self.hashes.push(hash);
        }
        &self.hashes[..num_blocks]
    }

    /// Of a block whose name has been computed.
    pub(super) fn get(&self, index: usize) -> BlockHash {
        self.hashes[index]
    }

    /// Of the block before it; none before the first.
    pub(super) fn parent(&self, index: usize) -> Option<BlockHash> {
        index.checked_sub(1).map(|before| self.get(before))
    }

    pub(super) fn salt(&self) -> Option<&str> {
        self.salt.as_deref()
    }
}

fn builtin_root(seed: &[u8; 32], salt: Option<&str>) -> BlockHash {
    let mut hash = Sha256::new();
    hash.update(b"phalanx prefix cache root");
    hash.update(seed);
    hash.update([u8::from(salt.is_some())]);
    hash.update(salt.unwrap_or_default());
    BlockHash(hash.finalize().into())
}

fn builtin_child(parent: &BlockHash, tokens: &[u32]) -> BlockHash {
    let mut hash = Sha256::new();
    hash.update(parent.0);
    for token in tokens {
        hash.update(token.to_le_bytes());
    }
    BlockHash(hash.finalize().into())
}

/// SHA-256 of `[parent, [token, ...], null or [salt]]`.
fn cbor_child(parent: &BlockHash, tokens: &[u32], salt: Option<&str>) -> BlockHash {
    const NULL: u8 = 0xF6;
    let mut cbor = Vec::with_capacity(48 + 5 * tokens.len());
    put_head(&mut cbor, ARRAY, 3);
    put_head(&mut cbor, BYTES, parent.0.len() as u64);
    cbor.extend(parent.0);
    put_head(&mut cbor, ARRAY, tokens.len() as u64);
    for &token in tokens {
        put_head(&mut cbor, UNSIGNED, token.into());
    }
    match salt {
        None => cbor.push(NULL),
        Some(salt) => {
            put_head(&mut cbor, ARRAY, 1);
            put_text(&mut cbor, salt);
        }
    }
    BlockHash(Sha256::digest(&cbor).into())
}

// Major types of CBOR.
const UNSIGNED: u8 = 0;
const BYTES: u8 = 2;
const TEXT: u8 = 3;
const ARRAY: u8 = 4;

fn put_text(cbor: &mut Vec<u8>, text: &str) {
    put_head(cbor, TEXT, text.len() as u64);
    cbor.extend(text.as_bytes());
}

/// A major type and its argument, in the fewest bytes.
fn put_head(cbor: &mut Vec<u8>, major: u8, argument: u64) {
    let major = major << 5;
    let bytes = argument.to_be_bytes();
    match argument {
        0..24 => cbor.push(major | argument as u8),
        24..0x100 => cbor.extend([major | 24, bytes[7]]),
        0x100..0x1_0000 => {
            cbor.push(major | 25);
            cbor.extend(&bytes[6..]);
        }
        0x1_0000..0x1_0000_0000 => {
            cbor.push(major | 26);
            cbor.extend(&bytes[4..]);
        }
        _ => {
            cbor.push(major | 27);
            cbor.extend(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(algo: PrefixHashAlgo, (seed, salt): (u8, Option<&str>), tokens: &[u32]) -> Vec<BlockHash> {
        let mut names = BlockNames::new(algo, &[seed; 32], salt);
        names.extend(tokens, tokens.len() / 2, 2).to_vec()
    }

    #[test]
    fn seed_salt_place_and_tokens_all_count() {
        for algo in [PrefixHashAlgo::Builtin, PrefixHashAlgo::Sha256Cbor] {
            let first = |root, tokens: [u32; 2]| names(algo, root, &tokens)[0];
            let all = [
                first((1, None), [1, 2]),
                first((1, None), [2, 1]),
                names(algo, (1, None), &[1, 2, 1, 2])[1],
                first((2, None), [1, 2]),
                first((1, Some("")), [1, 2]),
                first((1, Some("a")), [1, 2]),
                names(algo, (1, Some("a")), &[1, 2, 1, 2])[1],
            ];
            for (i, a) in all.iter().enumerate() {
                assert!(all[i + 1..].iter().all(|b| a != b), "{algo:?}");
            }
            assert_eq!(first((1, None), [1, 2]), names(algo, (1, None), &[1, 2, 9, 9])[0]);
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    // Computed with Python's cbor2 and hashlib: sha256(cbor2.dumps((parent, tokens, extra_keys), canonical=True)).
    #[test]
    fn names_are_those_that_an_indexer_in_python_computes() {
        assert_eq!(
            hex(&PrefixHashAlgo::none_hash("vllm-none-hash")),
            "9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0"
        );
        let seed = PrefixHashAlgo::none_hash("0");
        assert_eq!(
            hex(&seed),
            "4e1195df020de59e0d65a33a4279f1183e7ae4e5d980e309f8b55adff2e61c3e"
        );
        // Arguments of every length that a token can have.
        let tokens = [0, 23, 24, 255, 256, 65_535, 65_536, 4_294_967_294];
        let name = |salt, index: usize| {
            let mut names = BlockNames::new(PrefixHashAlgo::Sha256Cbor, &seed, salt);
            names.extend(&tokens, 2, 4)[index]
        };
        assert_eq!(
            hex(&name(None, 0).0),
            "ca90027d467f8ae0c02e71aa4eff29f116d1b74ca16446a60ab640f53e976f43"
        );
        assert_eq!(
            hex(&name(None, 1).0),
            "13dd88d6a48f1c9dc54e5aeb64fd9b470b20789fe975ff432dd22128c188fea4"
        );
        assert_eq!(
            hex(&name(Some("tenant é"), 0).0),
            "accff41a09a161c74852ccd144c6d3ef42589a3bef83ee19d7c1819c062d500d"
        );
        assert_eq!(
            hex(&name(Some("tenant é"), 1).0),
            "802303906b16d0050f1798882240514a1c9582266030b0b853187d8d4d5a49e2"
        );
        let mut long = BlockNames::new(PrefixHashAlgo::Sha256Cbor, &seed, None);
        let many: Vec<u32> = (1000..1300).collect();
        assert_eq!(
            hex(&long.extend(&many, 1, 300)[0].0),
            "cc78d08c62ae18a825f896c9f757563479e58dd3576609d6b9d6a416adfcfff9"
        );
        assert_eq!(name(None, 0).low(), 0xab640f53e976f43);
    }
}
