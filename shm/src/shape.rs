//! How large the parts of a segment are, and where they lie.

use crate::error::OutOfRange;

/// Ranks of one segment, which is one host.
pub const MAX_WORLD_SIZE: u32 = 30;

/// Header, cold words and gates start on this boundary, and so do the parts with payload.
pub(crate) const PAGE: usize = 4096;
/// The adjacent-line prefetcher moves cache lines in pairs: what different parties write is kept this far apart.
pub(crate) const LINE: usize = 128;
/// Where the gates start; the page before them holds the header and the cold words.
pub(crate) const GATES_OFFSET: usize = PAGE;

const MAX_SLOTS: u32 = 1 << 10;
const MAX_SLOT_BYTES: u64 = 1 << 30;
const MAX_ARENA_BYTES: u64 = 1 << 40;

// Offsets are computed in u64 and used as usize.
const _: () = assert!(usize::BITS == 64);

/// What a group shares. It decides the size of the segment and nothing else does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GroupShape {
    /// 1 to [`MAX_WORLD_SIZE`].
    pub world_size: u32,
    /// The incarnation of the group. It is part of the segment's name and of every slot.
    pub epoch: u32,
    /// Plans in flight: a power of two, at most 1024.
    pub plan_slots: u32,
    /// Bytes of the longest plan, at most 1 GiB.
    pub plan_slot_bytes: u64,
    /// Outputs in flight: a power of two, at most 1024.
    pub output_slots: u32,
    /// Bytes of the longest output, at most 1 GiB.
    pub output_slot_bytes: u64,
    /// Bytes of a rank's longest message in [`exchange`](crate::RankPort::exchange), and of a slice of the other
    /// collectives; at least 4, at most 1 GiB.
    pub message_bytes: u64,
    /// Bytes of the one area that all ranks share for activations; may be 0, at most 1 TiB.
    pub arena_bytes: u64,
}

/// Slots of one kind, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotArray {
    pub(crate) offset: usize,
    pub(crate) count: usize,
    pub(crate) stride: usize,
    /// Payload bytes of each.
    pub(crate) capacity: usize,
}

/// Byte offsets within the segment.
///
/// ```text
/// 0      header line, then the cold line (joined parties, abort reason)
/// 4096   gates, 128 bytes each
/// page   plan slots            head of 128 bytes + payload, each
/// page   output slots
/// page   message slots         [2 turns][world_size]
/// page   arena
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) num_gates: usize,
    pub(crate) plans: SlotArray,
    pub(crate) outputs: SlotArray,
    pub(crate) messages: SlotArray,
    pub(crate) arena_offset: usize,
    pub(crate) total: usize,
}

impl GroupShape {
    /// Bytes of the segment: what a volume must have free. A shape with fields beyond their limits, which
    /// [`Segment::create`](crate::Segment::create) refuses, gives a number that is at least as large.
    pub fn total_bytes(&self) -> u64 {
        self.layout().total as u64
    }

    pub(crate) fn validate(&self) -> Result<(), OutOfRange> {
        let slots_ok = |slots: u32| slots.is_power_of_two() && slots <= MAX_SLOTS;
        const SLOTS: &str = "a power of two up to 1024";
        const SLOT_BYTES: &str = "1 to 2^30";
        let checks = [
            (
                "world_size",
                u64::from(self.world_size),
                (1..=MAX_WORLD_SIZE).contains(&self.world_size),
                "1 to 30",
            ),
            (
                "plan_slots",
                self.plan_slots.into(),
                slots_ok(self.plan_slots),
                SLOTS,
            ),
            (
                "plan_slot_bytes",
                self.plan_slot_bytes,
                in_slot(self.plan_slot_bytes, 1),
                SLOT_BYTES,
            ),
            (
                "output_slots",
                self.output_slots.into(),
                slots_ok(self.output_slots),
                SLOTS,
            ),
            (
                "output_slot_bytes",
                self.output_slot_bytes,
                in_slot(self.output_slot_bytes, 1),
                SLOT_BYTES,
            ),
            (
                "message_bytes",
                self.message_bytes,
                in_slot(self.message_bytes, 4),
                "4 to 2^30",
            ),
            (
                "arena_bytes",
                self.arena_bytes,
                self.arena_bytes <= MAX_ARENA_BYTES,
                "0 to 2^40",
            ),
        ];
        match checks.into_iter().find(|(.., ok, _)| !ok) {
            Some((field, value, _, allowed)) => Err(OutOfRange {
                field,
                value,
                allowed,
            }),
            None => Ok(()),
        }
    }

    pub(crate) fn layout(&self) -> Layout {
        let num_gates = 3 + 2 * self.world_size as usize;
        let gates_end = GATES_OFFSET + num_gates * LINE;
        let plans = SlotArray::after(gates_end, self.plan_slots.into(), self.plan_slot_bytes);
        let outputs = SlotArray::after(plans.end(), self.output_slots.into(), self.output_slot_bytes);
        let messages = SlotArray::after(outputs.end(), 2 * u64::from(self.world_size), self.message_bytes);
        let arena_offset = round_up(messages.end(), PAGE);
        let total = round_up(arena_offset.saturating_add(self.arena_bytes as usize), PAGE);
        Layout {
            num_gates,
            plans,
            outputs,
            messages,
            arena_offset,
            total,
        }
    }
}

impl SlotArray {
    fn after(previous_end: usize, count: u64, capacity: u64) -> Self {
        let (count, capacity) = (count as usize, capacity as usize);
        Self {
            offset: round_up(previous_end, PAGE),
            count,
            stride: round_up(capacity.saturating_add(LINE), LINE),
            capacity,
        }
    }

    fn end(&self) -> usize {
        self.offset.saturating_add(self.count.saturating_mul(self.stride))
    }
}

fn in_slot(bytes: u64, least: u64) -> bool {
    (least..=MAX_SLOT_BYTES).contains(&bytes)
}

/// To the next multiple of a power of two; saturates at the last one.
fn round_up(value: usize, to: usize) -> usize {
    value.saturating_add(to - 1) & !(to - 1)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) const SMALL: GroupShape = GroupShape {
        world_size: 2,
        epoch: 1,
        plan_slots: 2,
        plan_slot_bytes: 64,
        output_slots: 2,
        output_slot_bytes: 64,
        message_bytes: 256,
        arena_bytes: 4096,
    };

    #[test]
    fn every_limit_is_named() {
        let with = |change: fn(&mut GroupShape)| {
            let mut shape = SMALL;
            change(&mut shape);
            shape
        };
        let cases = [
            ("world_size", with(|shape| shape.world_size = 0)),
            ("world_size", with(|shape| shape.world_size = 31)),
            ("plan_slots", with(|shape| shape.plan_slots = 3)),
            ("plan_slots", with(|shape| shape.plan_slots = 0)),
            ("output_slots", with(|shape| shape.output_slots = 2048)),
            ("plan_slot_bytes", with(|shape| shape.plan_slot_bytes = 0)),
            (
                "output_slot_bytes",
                with(|shape| shape.output_slot_bytes = u64::MAX),
            ),
            ("message_bytes", with(|shape| shape.message_bytes = 3)),
            ("arena_bytes", with(|shape| shape.arena_bytes = u64::MAX)),
        ];
        for (name, shape) in cases {
            let problem = shape.validate().unwrap_err();
            assert_eq!(problem.field, name);
        }
        SMALL.validate().unwrap();
    }

    #[test]
    fn total_of_a_usual_shape() {
        // 9 gates fit a page; 2 slots of 256 B each; 4 messages of 384 B; one arena page.
        let shape = GroupShape {
            world_size: 3,
            ..SMALL
        };
        assert_eq!(shape.total_bytes(), 4096 * (1 + 1 + 1 + 1 + 1 + 1));
    }

    proptest! {
        #[test]
        fn parts_do_not_overlap(
            world_size in 1..=MAX_WORLD_SIZE, slots in 0u32..=10, bytes in 4u64..100_000, arena_bytes in 0u64..1 << 30
        ) {
            let shape = GroupShape {
                world_size, epoch: 0, plan_slots: 1 << slots, plan_slot_bytes: bytes, output_slots: 1,
                output_slot_bytes: bytes / 2 + 1, message_bytes: bytes, arena_bytes,
            };
            prop_assert!(shape.validate().is_ok());
            let l = shape.layout();
            prop_assert!(GATES_OFFSET + l.num_gates * LINE <= l.plans.offset);
            prop_assert!(l.plans.end() <= l.outputs.offset && l.outputs.end() <= l.messages.offset);
            prop_assert!(l.messages.end() <= l.arena_offset);
            prop_assert!(l.arena_offset + arena_bytes as usize <= l.total && l.total.is_multiple_of(PAGE));
        }

        #[test]
        fn no_shape_overflows(numbers in any::<[u64; 4]>(), counts in any::<[u32; 4]>()) {
            let shape = GroupShape {
                world_size: counts[0], epoch: counts[1], plan_slots: counts[2], plan_slot_bytes: numbers[0],
                output_slots: counts[3], output_slot_bytes: numbers[1], message_bytes: numbers[2],
                arena_bytes: numbers[3],
            };
            prop_assert!(shape.total_bytes() >= numbers[3] & !0xfff || numbers[3] > u64::MAX - (1 << 40));
        }
    }
}
