//! Batches as vLLM's subscribers expect them: MessagePack of `[timestamp, events, data_parallel_rank]`, each event a map
//! with its `type`. Blocks are called by the low 64 bits of their names.

use super::KvEventBatch;
use crate::engine::{BlockHash, KvEvent};

const NIL: u8 = 0xC0;

pub(super) fn encode(batch: &KvEventBatch) -> Vec<u8> {
    let mut out = Vec::new();
    put_array(&mut out, 3);
    out.push(0xCB);
    out.extend(batch.timestamp.to_be_bytes());
    put_array(&mut out, batch.events.len());
    for event in &batch.events {
        put_event(&mut out, event, batch.block_size);
    }
    put_uint(&mut out, 0);
    out
}

fn put_event(out: &mut Vec<u8>, event: &KvEvent, block_size: u32) {
    match event {
        KvEvent::Stored {
            hashes,
            parent,
            token_ids,
            salt,
        } => {
            put_map(out, 11);
            put_pair(out, "type", "BlockStored");
            put_hashes(out, hashes);
            put_str(out, "parent_block_hash");
            match parent {
                Some(parent) => put_uint(out, parent.low()),
                None => out.push(NIL),
            }
            put_str(out, "token_ids");
            put_array(out, token_ids.len());
            token_ids.iter().for_each(|&token| put_uint(out, token.into()));
            put_str(out, "block_size");
            put_uint(out, block_size.into());
            put_str(out, "lora_id");
            out.push(NIL);
            put_pair(out, "medium", "GPU");
            put_str(out, "lora_name");
            out.push(NIL);
            put_extra_keys(out, hashes.len(), salt.as_deref());
            put_group(out);
            put_pair(out, "kv_cache_spec_kind", "full_attention");
        }
        KvEvent::Removed { hashes } => {
            put_map(out, 4);
            put_pair(out, "type", "BlockRemoved");
            put_hashes(out, hashes);
            put_pair(out, "medium", "GPU");
            put_group(out);
        }
        KvEvent::Cleared => {
            put_map(out, 1);
            put_pair(out, "type", "AllBlocksCleared");
        }
    }
}

/// One entry for each block: what its name holds beside parent and tokens.
fn put_extra_keys(out: &mut Vec<u8>, num_blocks: usize, salt: Option<&str>) {
    put_str(out, "extra_keys");
    put_array(out, num_blocks);
    for index in 0..num_blocks {
        match salt.filter(|_| index == 0) {
            Some(salt) => {
                put_array(out, 1);
                put_str(out, salt);
            }
            None => out.push(NIL),
        }
    }
}

/// All layers share one group of blocks.
fn put_group(out: &mut Vec<u8>) {
    put_str(out, "group_idx");
    put_uint(out, 0);
}

fn put_hashes(out: &mut Vec<u8>, hashes: &[BlockHash]) {
    put_str(out, "block_hashes");
    put_array(out, hashes.len());
    hashes.iter().for_each(|hash| put_uint(out, hash.low()));
}

fn put_pair(out: &mut Vec<u8>, key: &str, value: &str) {
    put_str(out, key);
    put_str(out, value);
}

fn put_uint(out: &mut Vec<u8>, value: u64) {
    let bytes = value.to_be_bytes();
    match value {
        0..0x80 => out.push(bytes[7]),
        0x80..0x100 => out.extend([0xCC, bytes[7]]),
        0x100..0x1_0000 => put_tagged(out, 0xCD, &bytes[6..]),
        0x1_0000..0x1_0000_0000 => put_tagged(out, 0xCE, &bytes[4..]),
        _ => put_tagged(out, 0xCF, &bytes),
    }
}

fn put_str(out: &mut Vec<u8>, text: &str) {
    let bytes = (text.len() as u32).to_be_bytes();
    match text.len() {
        0..32 => out.push(0xA0 | bytes[3]),
        32..0x100 => out.extend([0xD9, bytes[3]]),
        0x100..0x1_0000 => put_tagged(out, 0xDA, &bytes[2..]),
        _ => put_tagged(out, 0xDB, &bytes),
    }
    out.extend(text.as_bytes());
}

fn put_array(out: &mut Vec<u8>, len: usize) {
    let bytes = (len as u32).to_be_bytes();
    match len {
        0..16 => out.push(0x90 | bytes[3]),
        16..0x1_0000 => put_tagged(out, 0xDC, &bytes[2..]),
        _ => put_tagged(out, 0xDD, &bytes),
    }
}

/// Of at most 15 pairs.
fn put_map(out: &mut Vec<u8>, len: u8) {
    out.push(0x80 | len);
}

fn put_tagged(out: &mut Vec<u8>, tag: u8, bytes: &[u8]) {
    out.push(tag);
    out.extend(bytes);
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use super::*;

    fn encoded(events: Vec<KvEvent>) -> String {
        let batch = KvEventBatch {
            sequence: 0,
            timestamp: 1.5,
            block_size: 16,
            events,
            msgpack: OnceLock::new(),
        };
        batch.msgpack().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn name(low: u64) -> BlockHash {
        let mut bytes = [0xEE; 32];
        bytes[24..].copy_from_slice(&low.to_be_bytes());
        BlockHash(bytes)
    }

    // Computed with Python's msgpack: packb([1.5, [...], 0]).
    #[test]
    fn batches_are_what_pythons_msgpack_makes_of_them() {
        let stored = KvEvent::Stored {
            hashes: vec![name(1), name(u64::MAX)],
            parent: None,
            token_ids: vec![0, 127, 128, 255, 256, 65_535, 65_536, 9, 9, 9, 9, 9, 9, 9, 9, 9],
            salt: Some("s".repeat(40)),
        };
        assert_eq!(
            encoded(vec![stored]),
            "93cb3ff8000000000000918ba474797065ab426c6f636b53746f726564ac626c6f636b5f6861736865739201cfffffffffffffffffb1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f696473dc0010007fcc80ccffcd0100cdffffce00010000090909090909090909aa626c6f636b5f73697a6510a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c0aa65787472615f6b6579739291d92873737373737373737373737373737373737373737373737373737373737373737373737373737373c0a967726f75705f69647800b26b765f63616368655f737065635f6b696e64ae66756c6c5f617474656e74696f6e00"
        );
        let removed = KvEvent::Removed {
            hashes: vec![name(300), name(70_000)],
        };
        assert_eq!(
            encoded(vec![removed, KvEvent::Cleared]),
            "93cb3ff80000000000009284a474797065ac426c6f636b52656d6f766564ac626c6f636b5f68617368657392cd012cce00011170a66d656469756da3475055a967726f75705f6964780081a474797065b0416c6c426c6f636b73436c656172656400"
        );
    }
}
