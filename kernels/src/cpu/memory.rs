//! Zeroed, aligned memory for weights, caches and activations.
//!
//! Matrices are carved from large mappings that ask for transparent huge pages, in the order they are packed: a forward
//! pass reads memory almost sequentially, and where one matrix ends within a huge page the next one begins. Pages never
//! written cost nothing.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use crate::{KernelError, Result};

/// Alignment of every region, in bytes: two cache lines, because the adjacent-line prefetcher fetches pairs.
pub const ALIGN: usize = 128;
/// Size of a transparent huge page, and the alignment of mappings.
const HUGE_PAGE: usize = 2 << 20;
/// Address space an [`Arena`] maps at a time.
const SEGMENT: usize = 64 << 20;

/// How finely memory becomes resident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// Two megabytes at a time: for what is read whole, like weights.
    Huge,
    /// A few kilobytes at a time: for what may never be used, like most KV blocks.
    Small,
}

/// One anonymous private mapping.
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping is plain memory; who may touch which part is decided by the `Region`s carved from it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes` (a multiple of the huge page size, not 0).
    fn new(bytes: usize, pages: Pages, what: &'static str) -> Result<Self> {
        let out_of_memory = || KernelError::OutOfMemory {
            what,
            requested: bytes,
            free: free_memory(),
        };
        // mmap aligns to small pages only: map one huge page more and leave the ends unused.
        let mapped = bytes.checked_add(HUGE_PAGE).ok_or_else(out_of_memory)?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(out_of_memory());
        }
        let advice = match pages {
            Pages::Huge => libc::MADV_HUGEPAGE,
            Pages::Small => libc::MADV_NOHUGEPAGE,
        };
        // Advice only: a kernel without huge pages serves small ones.
        // SAFETY: the range is the mapping just made.
        unsafe { libc::madvise(start, mapped, advice) };
        let base = NonNull::new(start.cast()).ok_or_else(out_of_memory)?;
        Ok(Self { base, bytes: mapped })
    }

    fn aligned(&self) -> NonNull<u8> {
        let skip = self.base.as_ptr().align_offset(HUGE_PAGE);
        // SAFETY: the mapping is a huge page longer than what is handed out, so the aligned address lies within it.
        unsafe { self.base.add(skip) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mmap; no region refers to the mapping any more (they hold an `Arc`).
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// Bytes of memory the machine has free, for error messages.
pub(crate) fn free_memory() -> usize {
    // SAFETY: sysinfo is plain data, for which zeros are valid.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live `sysinfo`.
    match unsafe { libc::sysinfo(&mut info) } {
        0 => (info.freeram as usize).saturating_mul(info.mem_unit as usize),
        _ => 0,
    }
}

/// A part of a mapping with one owner; zeroed when handed out, aligned to [`ALIGN`] bytes at least.
pub struct Region {
    /// Keeps the memory mapped.
    _mapping: Option<Arc<Mapping>>,
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a region owns its part of the mapping alone, like a `Box<[u8]>`.
unsafe impl Send for Region {}
// SAFETY: shared references only read.
unsafe impl Sync for Region {}

impl Region {
    /// Memory of its own, aligned to a huge page. `what` names it in the error.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] if the kernel refuses.
    pub fn zeroed(bytes: usize, pages: Pages, what: &'static str) -> Result<Self> {
        if bytes == 0 {
            return Ok(Self {
                _mapping: None,
                start: dangling(),
                bytes,
            });
        }
        let whole = bytes.checked_next_multiple_of(HUGE_PAGE).unwrap_or(usize::MAX);
        let mapping = Arc::new(Mapping::new(whole, pages, what)?);
        Ok(Self {
            start: mapping.aligned(),
            _mapping: Some(mapping),
            bytes,
        })
    }

    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `start` is valid for `bytes` initialized bytes while the mapping lives.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }

    /// The memory as f32: zeroed memory is valid, and [`ALIGN`] suffices. Trailing bytes are left out.
    pub fn as_f32(&self) -> &[f32] {
        // SAFETY: aligned, initialized, and every bit pattern is an f32.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.bytes / 4) }
    }

    /// As [`Region::as_f32`].
    pub fn as_mut_f32(&mut self) -> &mut [f32] {
        // SAFETY: as in `as_f32`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.bytes / 4) }
    }
}

fn dangling() -> NonNull<u8> {
    NonNull::<Aligned>::dangling().cast()
}

#[repr(align(128))]
struct Aligned;
const _: () = assert!(align_of::<Aligned>() == ALIGN);

/// Hands out regions one after another, so that the matrices of a model lie in the order they are used and share huge
/// pages. Nothing is reused: memory goes back when the last region of a mapping is dropped.
#[derive(Default)]
pub struct Arena {
    current: Mutex<Option<Segment>>,
}

struct Segment {
    mapping: Arc<Mapping>,
    /// Bytes handed out, up to the next multiple of [`ALIGN`].
    used: usize,
}

impl Arena {
    pub fn new() -> Self {
        Self::default()
    }

    /// `bytes` zeroed bytes. `what` names them in the error.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] if the kernel refuses.
    pub fn alloc(&self, bytes: usize, what: &'static str) -> Result<Region> {
        if bytes > SEGMENT || bytes == 0 {
            return Region::zeroed(bytes, Pages::Huge, what);
        }
        // A panic elsewhere cannot leave a segment half updated.
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let segment = match current.take() {
            Some(segment) if segment.used + bytes <= SEGMENT => segment,
            _ => Segment {
                mapping: Arc::new(Mapping::new(SEGMENT, Pages::Huge, what)?),
                used: 0,
            },
        };
        let segment = current.insert(segment);
        let at = segment.used;
        segment.used = (at + bytes).next_multiple_of(ALIGN);
        // SAFETY: `at + bytes` lies within the segment, whose aligned part is that long.
        let start = unsafe { segment.mapping.aligned().add(at) };
        Ok(Region {
            _mapping: Some(segment.mapping.clone()),
            start,
            bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_zeroed_aligned_and_disjoint() {
        let arena = Arena::new();
        let sizes = [1, 127, 128, 4096, 3 << 20, 0, 40 << 20, 5];
        let mut regions: Vec<Region> = sizes.iter().map(|&n| arena.alloc(n, "test").unwrap()).collect();
        for (i, region) in regions.iter_mut().enumerate() {
            assert_eq!(region.as_slice().len(), sizes[i]);
            assert_eq!(region.as_slice().as_ptr().align_offset(ALIGN), 0);
            assert!(
                region.as_slice().iter().all(|&b| b == 0),
                "region {i} is not zeroed"
            );
            region.as_mut_slice().fill(0xff);
        }
    }

    #[test]
    fn a_region_outlives_its_arena() {
        let arena = Arena::new();
        let mut region = arena.alloc(64, "test").unwrap();
        drop(arena);
        region.as_mut_f32()[15] = 1.5;
        assert_eq!(region.as_f32()[15], 1.5);
    }

    #[test]
    fn refusal_is_an_error() {
        for bytes in [usize::MAX, usize::MAX - HUGE_PAGE, 1 << 60] {
            let error = Region::zeroed(bytes, Pages::Huge, "weights")
                .err()
                .expect("no machine has that much");
            assert!(matches!(error, KernelError::OutOfMemory { what: "weights", .. }));
        }
    }
}
