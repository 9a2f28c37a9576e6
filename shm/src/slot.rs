//! Slots: a head that says what is in them, and payload.

use crate::error::{Corruption, ShmError};
use crate::segment::Segment;
use crate::shape::{LINE, SlotArray};

/// What a message is. The reader knows all of it beforehand, so a late, repeated or foreign message is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Stamp {
    pub(crate) kind: u32,
    pub(crate) number: u64,
    /// Length of the whole operation, in bytes, where all parties must agree on one; else 0.
    pub(crate) total: u64,
}

pub(crate) const PLAN: u32 = 1;
pub(crate) const OUTPUT: u32 = 2;

#[derive(Clone, Copy)]
#[repr(C)]
struct Head {
    epoch: u64,
    stamp: Stamp,
    len: u64,
}

const _: () = assert!(size_of::<Head>() <= LINE);

impl Segment {
    fn slot(&self, array: &SlotArray, index: usize) -> *mut u8 {
        assert!(index < array.count, "slot {index} of {}", array.count);
        // SAFETY: arrays come from this segment's layout and `index` is within; the offset lies inside the mapping.
        unsafe { self.base().add(array.offset + index * array.stride) }
    }

    /// Has `fill` write a slot's payload in place and return its length, and then seals it. On an error the slot holds
    /// nothing that a reader would accept.
    ///
    /// # Safety
    /// The caller is the slot's one writer, and no reader looks at it before the caller's next advance.
    pub(crate) unsafe fn write_slot<E: From<ShmError>>(
        &self,
        array: &SlotArray,
        index: usize,
        stamp: Stamp,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<(), E> {
        let at = self.slot(array, index);
        // SAFETY: a slot has room for its head and `capacity` bytes; per contract nobody else accesses them now.
        let payload = unsafe { std::slice::from_raw_parts_mut(at.add(LINE), array.capacity) };
        let len = fill(payload)?;
        if len > array.capacity {
            let error = ShmError::TooLong {
                len: len as u64,
                limit: array.capacity as u64,
            };
            return Err(error.into());
        }
        let head = Head {
            epoch: self.shape().epoch.into(),
            stamp,
            len: len as u64,
        };
        // SAFETY: slots are aligned to `LINE`; exclusive access as above.
        unsafe { at.cast::<Head>().write(head) };
        Ok(())
    }

    /// The payload of a slot whose head is as expected.
    ///
    /// # Safety
    /// The caller has waited for the writer's advance, and drops the result before its own advance that gives the slot
    /// back: until then the writer leaves it alone.
    pub(crate) unsafe fn read_slot(
        &self,
        array: &SlotArray,
        index: usize,
        expected: Stamp,
    ) -> Result<&[u8], Corruption> {
        let at = self.slot(array, index);
        // SAFETY: slots are aligned to `LINE`, any bytes are a `Head`, and per contract nobody writes them now.
        let head = unsafe { at.cast::<Head>().read() };
        let fields = [
            ("epoch", head.epoch, self.shape().epoch.into()),
            ("kind of operation", head.stamp.kind.into(), expected.kind.into()),
            ("message number", head.stamp.number, expected.number),
            ("length of the operation", head.stamp.total, expected.total),
        ];
        if let Some(&(field, found, expected)) = fields.iter().find(|(_, found, expected)| found != expected)
        {
            return Err(Corruption::Field {
                field,
                found,
                expected,
            });
        }
        if head.len > array.capacity as u64 {
            return Err(Corruption::Length {
                found: head.len,
                limit: array.capacity as u64,
            });
        }
        // SAFETY: the length has been checked against the slot's capacity; access as above.
        Ok(unsafe { std::slice::from_raw_parts(at.add(LINE), head.len as usize) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::SMALL;

    #[test]
    fn a_slot_is_read_only_under_its_own_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let segment = Segment::create(dir.path(), "slot", SMALL).unwrap();
        let plans = segment.layout().plans;
        let stamp = Stamp {
            kind: PLAN,
            number: 4,
            total: 0,
        };
        // SAFETY: this thread is the only user of the segment.
        let read = |stamp| unsafe { segment.read_slot(&plans, 1, stamp) };
        assert!(read(stamp).is_err(), "nothing has been written");
        let fill = |payload: &mut [u8]| {
            payload[..3].copy_from_slice(b"abc");
            Ok::<_, ShmError>(3)
        };
        // SAFETY: as above.
        unsafe { segment.write_slot(&plans, 1, stamp, fill) }.unwrap();
        assert_eq!(read(stamp).unwrap(), b"abc");
        for other in [
            Stamp {
                kind: OUTPUT,
                ..stamp
            },
            Stamp { number: 3, ..stamp },
            Stamp { total: 1, ..stamp },
        ] {
            assert!(matches!(read(other), Err(Corruption::Field { .. })), "{other:?}");
        }
    }

    #[test]
    fn a_length_beyond_the_slot_is_refused_on_both_sides() {
        let dir = tempfile::tempdir().unwrap();
        let segment = Segment::create(dir.path(), "length", SMALL).unwrap();
        let plans = segment.layout().plans;
        let stamp = Stamp {
            kind: PLAN,
            number: 1,
            total: 0,
        };
        // SAFETY: this thread is the only user of the segment.
        let error = unsafe { segment.write_slot(&plans, 0, stamp, |_| Ok::<_, ShmError>(65)) }.unwrap_err();
        assert!(matches!(error, ShmError::TooLong { len: 65, limit: 64 }));
        let head = Head {
            epoch: SMALL.epoch.into(),
            stamp,
            len: u64::MAX,
        };
        // SAFETY: as above; the head is what a broken writer could have left.
        unsafe { segment.slot(&plans, 0).cast::<Head>().write(head) };
        // SAFETY: as above.
        let problem = unsafe { segment.read_slot(&plans, 0, stamp) }.unwrap_err();
        assert_eq!(
            problem,
            Corruption::Length {
                found: u64::MAX,
                limit: 64
            }
        );
    }
}
