//! A range of address space that shows a file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Read only; what others write to the file may or may not be seen.
    Private,
    /// Read and write, seen by everyone who maps the file. All pages are mapped at once.
    Shared,
}

/// The first `len` bytes of a file; unmapped on drop. An empty mapping takes no address space.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is memory, not bound to the thread that made it. Who may touch which bytes is decided by the
// owners of this type: nobody writes a private one, and the gates order accesses to a shared one.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives out a pointer and no access of its own.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn new(file: &File, len: usize, access: Access) -> io::Result<Self> {
        if len == 0 {
            return Ok(Self {
                base: NonNull::dangling(),
                len,
            });
        }
        let (protection, flags) = match access {
            Access::Private => (libc::PROT_READ, libc::MAP_PRIVATE),
            Access::Shared => (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
            ),
        };
        // SAFETY: the kernel chooses a free address, so no existing mapping is replaced; the descriptor is open.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, file.as_raw_fd(), 0) };
        match NonNull::new(base.cast()) {
            Some(base) if base.as_ptr() != libc::MAP_FAILED.cast() => Ok(Self { base, len }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Asks the kernel to read a page-aligned range before it is touched. Advice only.
    pub(crate) fn will_need(&self, pages: Range<usize>) {
        debug_assert!(pages.start <= pages.end && pages.end <= self.len.next_multiple_of(page_size()));
        if pages.is_empty() {
            return;
        }
        // SAFETY: the range lies within this mapping, and the advice changes no contents.
        unsafe {
            libc::madvise(
                self.base.as_ptr().add(pages.start).cast(),
                pages.len(),
                libc::MADV_WILLNEED,
            )
        };
    }

    /// Lets the kernel take back the pages of a page-aligned range; they are read from the file again when touched.
    pub(crate) fn release(&self, pages: Range<usize>) {
        debug_assert!(pages.start <= pages.end && pages.end <= self.len.next_multiple_of(page_size()));
        if pages.is_empty() {
            return;
        }
        // SAFETY: the range lies within this mapping. Dropping pages of a file mapping nobody has written to keeps
        // its contents, which are the file's.
        let code = unsafe {
            libc::madvise(
                self.base.as_ptr().add(pages.start).cast(),
                pages.len(),
                libc::MADV_DONTNEED,
            )
        };
        debug_assert_eq!(code, 0, "{}", io::Error::last_os_error());
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len != 0 {
            // SAFETY: exactly the range that mmap returned, and nobody can borrow from it any more.
            unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
        }
    }
}

/// The kernel's page size in bytes, a power of two.
pub(crate) fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size)
        .ok()
        .filter(|size| size.is_power_of_two())
        .unwrap_or(crate::shape::PAGE)
}
