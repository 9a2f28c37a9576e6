//! A 32-bit word in shared memory that can be slept on (futex(2)).

use crate::deadline::{Deadline, Expired};
use crate::sync::AtomicU32;
#[cfg(loom)]
use crate::sync::Ordering;

#[derive(Default)]
#[repr(C)]
pub(crate) struct Futex {
    word: AtomicU32,
    #[cfg(loom)]
    bucket: (loom::sync::Mutex<()>, loom::sync::Condvar),
}

impl std::ops::Deref for Futex {
    type Target = AtomicU32;
    fn deref(&self) -> &AtomicU32 {
        &self.word
    }
}

#[cfg(not(loom))]
impl Futex {
    /// Sleeps while the word is `expected`: until woken, at most until the deadline or for one slice, and possibly for
    /// no reason at all. The caller looks again. If the kernel refuses futexes this returns at once, which costs CPU
    /// time but ends at the same deadline.
    pub(crate) fn sleep(&self, expected: u32, deadline: &mut Deadline) -> Result<(), Expired> {
        let max = deadline.next_sleep()?;
        let timeout = libc::timespec {
            tv_sec: max.as_secs().try_into().unwrap_or(libc::time_t::MAX),
            tv_nsec: max.subsec_nanos().into(),
        };
        // FUTEX_PRIVATE_FLAG is absent on purpose: the key must be the page of the file, not this process's address.
        // SAFETY: the word lies in a live mapping for as long as `self` is borrowed, and `timeout` outlives the call.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.word.as_ptr(),
                libc::FUTEX_WAIT,
                expected,
                &raw const timeout,
            )
        };
        Ok(())
    }

    pub(crate) fn wake_all(&self) {
        // SAFETY: the word lies in a live mapping for as long as `self` is borrowed.
        unsafe { libc::syscall(libc::SYS_futex, self.word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
    }
}

/// The kernel as a model: the check of the value and falling asleep are one step under the bucket's lock.
#[cfg(loom)]
impl Futex {
    pub(crate) fn sleep(&self, expected: u32, deadline: &mut Deadline) -> Result<(), Expired> {
        let bucket = self.bucket.0.lock().expect("no thread of a model panics");
        if deadline.expired() {
            return Err(Expired);
        }
        if self.word.load(Ordering::Relaxed) == expected {
            drop(self.bucket.1.wait(bucket).expect("no thread of a model panics"));
        }
        Ok(())
    }

    pub(crate) fn wake_all(&self) {
        let _bucket = self.bucket.0.lock().expect("no thread of a model panics");
        self.bucket.1.notify_all();
    }
}
