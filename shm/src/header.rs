//! The first bytes of a segment: written once before anybody else knows the file, checked and copied out by everyone
//! who opens it, and not looked at again.

use crate::error::HeaderProblem;
use crate::shape::GroupShape;

pub(crate) const HEADER_BYTES: usize = 128;
const MAGIC: u64 = u64::from_le_bytes(*b"phalanx\0");
const VERSION: u32 = 1;
const CHECKSUM_AT: usize = HEADER_BYTES - 8;

pub(crate) fn encode(shape: &GroupShape) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    let words = [
        VERSION,
        shape.world_size,
        shape.epoch,
        shape.plan_slots,
        shape.output_slots,
        0,
    ];
    let longs = [
        shape.plan_slot_bytes,
        shape.output_slot_bytes,
        shape.message_bytes,
        shape.arena_bytes,
    ];
    bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
    for (place, word) in bytes[8..32].chunks_exact_mut(4).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    for (place, long) in bytes[32..64].chunks_exact_mut(8).zip(longs) {
        place.copy_from_slice(&long.to_le_bytes());
    }
    let checksum = fnv1a(&bytes[..CHECKSUM_AT]);
    bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// `file_bytes` is the length of the file the header came from.
pub(crate) fn decode(bytes: &[u8; HEADER_BYTES], file_bytes: u64) -> Result<GroupShape, HeaderProblem> {
    if u64_at(bytes, 0) != MAGIC {
        return Err(HeaderProblem::Magic);
    }
    let found = u32_at(bytes, 8);
    if found != VERSION {
        return Err(HeaderProblem::Version {
            found,
            supported: VERSION,
        });
    }
    if u64_at(bytes, CHECKSUM_AT) != fnv1a(&bytes[..CHECKSUM_AT]) {
        return Err(HeaderProblem::Checksum);
    }
    let shape = GroupShape {
        world_size: u32_at(bytes, 12),
        epoch: u32_at(bytes, 16),
        plan_slots: u32_at(bytes, 20),
        output_slots: u32_at(bytes, 24),
        plan_slot_bytes: u64_at(bytes, 32),
        output_slot_bytes: u64_at(bytes, 40),
        message_bytes: u64_at(bytes, 48),
        arena_bytes: u64_at(bytes, 56),
    };
    shape.validate()?;
    let expected = shape.total_bytes();
    if expected != file_bytes {
        return Err(HeaderProblem::Size {
            expected,
            found: file_bytes,
        });
    }
    Ok(shape)
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

/// FNV-1a (Fowler, Noll, Vo), 64 bits: every change of a single byte changes it.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::shape::tests::SMALL;

    /// Puts a valid checksum on a damaged header, as a peer with a bug or ill will might.
    fn reseal(bytes: &mut [u8; HEADER_BYTES]) {
        let checksum = fnv1a(&bytes[..CHECKSUM_AT]);
        bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
    }

    #[test]
    fn what_was_written_is_read() {
        let shape = GroupShape {
            epoch: 77,
            message_bytes: 1 << 16,
            arena_bytes: 1 << 20,
            ..SMALL
        };
        assert_eq!(decode(&encode(&shape), shape.total_bytes()), Ok(shape));
    }

    #[test]
    fn each_check_has_its_error() {
        let (size, good) = (SMALL.total_bytes(), encode(&SMALL));
        let with = |at: usize, value: u8, seal: bool| {
            let mut bytes = good;
            bytes[at] = value;
            if seal {
                reseal(&mut bytes);
            }
            decode(&bytes, size).unwrap_err()
        };
        assert_eq!(with(0, b'P', true), HeaderProblem::Magic);
        assert_eq!(
            with(8, 9, true),
            HeaderProblem::Version {
                found: 9,
                supported: VERSION
            }
        );
        assert_eq!(with(16, 9, false), HeaderProblem::Checksum);
        let field = |problem| match problem {
            HeaderProblem::Shape(problem) => problem.field,
            other => panic!("{other}"),
        };
        assert_eq!(field(with(12, 200, true)), "world_size");
        assert_eq!(field(with(63, 255, true)), "arena_bytes");
        assert!(matches!(with(58, 1, true), HeaderProblem::Size { .. }));
        let short = decode(&good, size - 1);
        assert_eq!(
            short,
            Err(HeaderProblem::Size {
                expected: size,
                found: size - 1
            })
        );
    }

    proptest! {
        #[test]
        fn one_damaged_byte_is_noticed(at in 0..HEADER_BYTES, flip in 1u8..) {
            let mut bytes = encode(&SMALL);
            bytes[at] ^= flip;
            prop_assert!(decode(&bytes, SMALL.total_bytes()).is_err());
        }

        /// Whatever passes describes exactly the file it came with.
        #[test]
        fn forged_headers_are_refused_or_consistent(tail in any::<[u8; 56]>(), size in any::<u64>()) {
            let mut bytes = encode(&SMALL);
            bytes[12..68].copy_from_slice(&tail);
            reseal(&mut bytes);
            if let Ok(shape) = decode(&bytes, size) {
                prop_assert_eq!(shape.total_bytes(), size);
                prop_assert!(shape.validate().is_ok());
            }
        }
    }
}
