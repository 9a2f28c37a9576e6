//! Large read-only files, such as a model's weights.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::ShmError;
use crate::mapping::{Access, Mapping, page_size};

/// A whole regular file, mapped read-only.
///
/// Pages come from the page cache as they are touched, and are shared with every other process that maps the file.
///
/// # Files that change
///
/// A file that is *replaced* (a new file renamed over it) is safe: the mapping keeps the old one. A file that is
/// *truncated* under the mapping is not: the kernel answers a touch of the missing pages with SIGBUS, which ends the
/// process. [`still_whole`](Self::still_whole) is a cheap check before a long read, not a guarantee. A file that is
/// written to in place shows a mix of old and new bytes; nothing read from it may be trusted as a length in any case.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    file: File,
    mapping: Mapping,
}

impl MappedFile {
    /// Symbolic links are followed. A file of length 0 is mapped to no bytes.
    ///
    /// # Errors
    /// [`ShmError::Io`] if it cannot be opened or mapped or is not a regular file.
    pub fn open(path: &Path) -> Result<Self, ShmError> {
        // O_NONBLOCK: opening a FIFO must not wait for its writer. It means nothing to a regular file.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .map_err(ShmError::io(path))?;
        let meta = file.metadata().map_err(ShmError::io(path))?;
        if !meta.is_file() {
            let problem = io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
            return Err(ShmError::io(path)(problem));
        }
        let len = usize::try_from(meta.len())
            .map_err(|_| ShmError::io(path)(io::ErrorKind::FileTooLarge.into()))?;
        let mapping = Mapping::new(&file, len, Access::Private).map_err(ShmError::io(path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            mapping,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is readable, `len` bytes long and lives as long as `self`; this process has no other
        // view of it that writes. What others do to the file is said in the type's documentation.
        unsafe { std::slice::from_raw_parts(self.mapping.base().as_ptr(), self.mapping.len()) }
    }

    /// Gives back the memory of the pages that lie wholly within these bytes, so that the process does not grow with
    /// what it has read. The bytes stay readable: they come from the page cache or the disk again. Advice only; what
    /// lies beyond the file is ignored.
    pub fn release(&self, bytes: Range<usize>) {
        self.mapping
            .release(whole_pages(bytes, self.mapping.len(), page_size()));
    }

    /// Asks the kernel to read the pages of these bytes from the disk, without waiting for it. Advice only; what lies
    /// beyond the file is ignored.
    pub fn will_need(&self, bytes: Range<usize>) {
        let (page, len) = (page_size(), self.mapping.len());
        let start = bytes.start.min(len) / page * page;
        let end = bytes.end.min(len).next_multiple_of(page);
        self.mapping.will_need(start..end.max(start));
    }

    /// False once the file has become shorter than what was mapped.
    ///
    /// # Errors
    /// [`ShmError::Io`] if its length cannot be found out.
    pub fn still_whole(&self) -> Result<bool, ShmError> {
        let meta = self.file.metadata().map_err(ShmError::io(&self.path))?;
        Ok(meta.len() >= self.mapping.len() as u64)
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

/// The pages that lie within `bytes` of a file of `len` bytes. The file's last page counts as whole with its last byte.
fn whole_pages(bytes: Range<usize>, len: usize, page: usize) -> Range<usize> {
    let start = bytes.start.min(len).next_multiple_of(page);
    let end = if bytes.end >= len {
        len.next_multiple_of(page)
    } else {
        bytes.end / page * page
    };
    start..end.max(start)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_whole_pages_are_released() {
        assert_eq!(whole_pages(0..10_000, 20_000, 4096), 0..8192);
        assert_eq!(whole_pages(1..10_000, 20_000, 4096), 4096..8192);
        assert_eq!(
            whole_pages(4096..20_000, 20_000, 4096),
            4096..20_480,
            "the last page"
        );
        assert!(whole_pages(5000..6000, 20_000, 4096).is_empty());
        assert!(whole_pages(30_000..usize::MAX, 20_000, 4096).is_empty());
    }

    proptest! {
        #[test]
        fn released_pages_stay_within_the_mapping(start: usize, end: usize, len in 0usize..1 << 40) {
            let pages = whole_pages(start..end, len, 4096);
            prop_assert!(pages.start <= pages.end);
            prop_assert!(pages.is_empty() || pages.end <= len.next_multiple_of(4096));
        }
    }
}
