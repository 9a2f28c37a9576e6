//! Files of segments: how they are opened, and pages that are certain to exist.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::error::ShmError;

/// Access to a segment's file: never through a symbolic link, never inherited by a child.
pub(crate) fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    // O_NONBLOCK: a FIFO put in place of the file is refused instead of waited for.
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK);
    options
}

pub(crate) fn effective_uid() -> u32 {
    // SAFETY: geteuid has no preconditions and cannot fail.
    unsafe { libc::geteuid() }
}

/// A regular file of this user that nobody else may touch.
pub(crate) fn check_ownership(path: &Path, file: &File) -> Result<(), ShmError> {
    let meta = file.metadata().map_err(ShmError::io(path))?;
    let uid = effective_uid();
    let problem = if !meta.is_file() {
        "not a regular file".to_owned()
    } else if meta.uid() != uid {
        format!("owned by uid {}, this is uid {uid}", meta.uid())
    } else if meta.mode() & 0o077 != 0 {
        format!("mode {:o}, others must have no access", meta.mode() & 0o7777)
    } else {
        return Ok(());
    };
    Err(ShmError::NotOurs {
        path: path.to_owned(),
        problem,
    })
}

/// True if `path` is still the name of this very file.
pub(crate) fn names(path: &Path, file: &File) -> io::Result<bool> {
    let ours = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Allocates every page of the file's first `len` bytes, growing it if needed: a volume that is too small is an error
/// here and not a SIGBUS when a page is first touched.
///
/// fallocate(2) itself and not posix_fallocate(3): where a filesystem has none, glibc's stand-in writes to the file,
/// which would undo what others write to a segment at the same time.
pub(crate) fn reserve(file: &File, len: u64, dir: &Path) -> Result<(), ShmError> {
    let length = libc::off_t::try_from(len).map_err(|_| ShmError::TooLong {
        len,
        limit: libc::off_t::MAX.cast_unsigned(),
    })?;
    loop {
        // SAFETY: a call on an open descriptor; no memory of ours is involved.
        if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, length) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::StorageFull => {
                let free = free_bytes(dir)?.unwrap_or(0);
                return Err(ShmError::NoSpace {
                    needed: len,
                    free,
                    dir: dir.to_owned(),
                });
            }
            _ => return Err(ShmError::io(dir)(error)),
        }
    }
}

/// Fails if `needed` bytes certainly do not fit, before any page is taken from others.
pub(crate) fn check_free(dir: &Path, needed: u64) -> Result<(), ShmError> {
    match free_bytes(dir)? {
        Some(free) if free < needed => Err(ShmError::NoSpace {
            needed,
            free,
            dir: dir.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// Bytes available to this user on the filesystem of `dir`; none if it is a tmpfs without a limit.
fn free_bytes(dir: &Path) -> Result<Option<u64>, ShmError> {
    let path = CString::new(dir.as_os_str().as_bytes()).map_err(|e| ShmError::io(dir)(e.into()))?;
    // SAFETY: statvfs is plain integers, for which zero is a value.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` is NUL-terminated and `stat` is writable, both for the length of the call.
    if unsafe { libc::statvfs(path.as_ptr(), &raw mut stat) } != 0 {
        return Err(ShmError::io(dir)(io::Error::last_os_error()));
    }
    Ok((stat.f_blocks != 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Others may fill the volume after it has been looked at.
    #[test]
    fn a_volume_that_fills_up_is_an_error() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        assert!(
            free_bytes(directory.path()).unwrap().is_some(),
            "/dev/shm without a limit would really be filled"
        );
        let file = tempfile::tempfile_in(directory.path()).unwrap();
        let error = reserve(&file, 1 << 46, directory.path()).unwrap_err();
        assert!(
            matches!(error, ShmError::NoSpace { needed, .. } if needed == 1 << 46),
            "{error}"
        );
        assert_eq!(file.metadata().unwrap().blocks(), 0, "nothing is kept");
    }

    #[test]
    fn a_name_that_has_passed_to_another_file_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("name");
        let file = File::create(&path).unwrap();
        assert!(names(&path, &file).unwrap());
        std::fs::remove_file(&path).unwrap();
        assert!(!names(&path, &file).unwrap());
        let _other = File::create(&path).unwrap();
        assert!(!names(&path, &file).unwrap());
    }
}
