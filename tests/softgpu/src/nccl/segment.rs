//! What the ranks of a communicator share: a file without a name, so that nothing is left of it however they end. It is
//! reached through `/proc` of the process that made the unique id, which holds it until all ranks have mapped it.

use std::{
    collections::HashMap,
    fs::{self, OpenOptions},
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        LazyLock, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use libc::c_void;

use super::{INVALID_ARGUMENT, INVALID_USAGE, NcclStatus, REMOTE_ERROR, SYSTEM_ERROR};
use crate::{
    handles::lock,
    memory::unnamed_file,
    settings::{log, settings},
};

pub(super) const MAX_RANKS: usize = 16;
/// Bytes that a rank hands over at a time in a collective.
pub(super) const SLOT: usize = 1 << 20;
/// Bytes under way from one rank to another.
pub(super) const RING: usize = 256 << 10;
const HEADER: usize = size_of::<Header>().next_multiple_of(4096);
/// All of it is reserved and little of it touched: pages come with use.
const LEN: usize = HEADER + MAX_RANKS * SLOT + MAX_RANKS * MAX_RANKS * RING;
/// Checks without sleeping, before a waiter sleeps.
const SPINS: u32 = 200;
/// A sleeper looks again after this, for an abort of its own process or the death of a peer.
const LOOK: Duration = Duration::from_millis(20);

/// A word of its own cache line.
#[repr(C, align(64))]
pub(super) struct Word(pub(super) AtomicU64);

#[repr(C)]
pub(super) struct Header {
    cookie: AtomicU64,
    world: AtomicU32,
    joined: AtomicU32,
    /// Changes with everything a waiter may wait for; a futex.
    pulse: AtomicU32,
    processes: [AtomicU32; MAX_RANKS],
    /// The number of barriers that each rank has come to.
    pub(super) arrived: [Word; MAX_RANKS],
    /// What each rank is about to do, in turns, so that the next call's does not overwrite this one's.
    pub(super) signatures: [[AtomicU64; MAX_RANKS]; 2],
    /// Bytes written to and read from the ring of each pair, `[from][to]`.
    pub(super) sent: [[AtomicU64; MAX_RANKS]; MAX_RANKS],
    pub(super) received: [[AtomicU64; MAX_RANKS]; MAX_RANKS],
}

/// Files of unique ids made by this process, by cookie, until their ranks have met.
static OFFERED: LazyLock<Mutex<HashMap<u64, OwnedFd>>> = LazyLock::new(Mutex::default);

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId([u8; 128]);

const ID_MARK: &str = "softgpu.nccl";

impl UniqueId {
    pub(super) fn new() -> Result<Self, NcclStatus> {
        let file = unnamed_file(c"softgpu.nccl", LEN).map_err(|error| {
            log(&format!("nccl: no memory for a communicator: {error}"));
            SYSTEM_ERROR
        })?;
        let mut random = [0u8; 8];
        // SAFETY: the buffer has the length given.
        if unsafe { libc::getrandom(random.as_mut_ptr().cast(), random.len(), 0) } != random.len() as isize {
            return Err(SYSTEM_ERROR);
        }
        let cookie = u64::from_ne_bytes(random) | 1;
        Segment::map(&file)?
            .header()
            .cookie
            .store(cookie, Ordering::Release);
        let text = format!("{ID_MARK} {} {} {cookie}", std::process::id(), file.as_raw_fd());
        let mut id = Self([0; 128]);
        id.0[..text.len()].copy_from_slice(text.as_bytes());
        lock(&OFFERED).insert(cookie, file);
        Ok(id)
    }

    /// Process, descriptor, cookie.
    fn parse(&self) -> Option<(u32, u32, u64)> {
        let end = self.0.iter().position(|byte| *byte == 0)?;
        let mut words = std::str::from_utf8(&self.0[..end])
            .ok()?
            .strip_prefix(ID_MARK)?
            .split_whitespace();
        let parsed = (
            words.next()?.parse().ok()?,
            words.next()?.parse().ok()?,
            words.next()?.parse().ok()?,
        );
        words.next().is_none().then_some(parsed)
    }
}

pub(super) struct Segment {
    base: usize,
}

impl Segment {
    fn map(file: &OwnedFd) -> Result<Self, NcclStatus> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel chooses the place; the file has LEN bytes, made or checked by the caller.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                LEN,
                access,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            Err(SYSTEM_ERROR)
        } else {
            Ok(Self { base: base as usize })
        }
    }

    /// Takes the place of `rank` among `world`.
    pub(super) fn join(id: &UniqueId, world: usize, rank: usize) -> Result<Self, NcclStatus> {
        let (process, fd, cookie) = id.parse().ok_or(INVALID_ARGUMENT)?;
        let path = format!("/proc/{process}/fd/{fd}");
        let gone = |why: String| {
            log(&format!(
                "nccl: the process that made the unique id cannot be reached ({path}: {why})"
            ));
            SYSTEM_ERROR
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|e| gone(e.to_string()))?;
        if file.metadata().map_err(|e| gone(e.to_string()))?.len() != LEN as u64 {
            return Err(gone("another file".into()));
        }
        let segment = Self::map(&file.into())?;
        let header = segment.header();
        if header.cookie.load(Ordering::Acquire) != cookie {
            return Err(gone("another communicator".into()));
        }
        let agreed = header
            .world
            .compare_exchange(0, world as u32, Ordering::AcqRel, Ordering::Acquire);
        if agreed.is_err_and(|others| others != world as u32) {
            log(&format!(
                "nccl: rank {rank} says {world} ranks, another says otherwise"
            ));
            return Err(INVALID_ARGUMENT);
        }
        let own = std::process::id();
        if header.processes[rank]
            .compare_exchange(0, own, Ordering::AcqRel, Ordering::Acquire)
            .is_err()
        {
            log(&format!("nccl: rank {rank} has joined twice"));
            return Err(INVALID_USAGE);
        }
        header.joined.fetch_add(1, Ordering::AcqRel);
        segment.notify();
        Ok(segment)
    }

    /// Waits for the other ranks, for as long as the settings say.
    pub(super) fn meet(&self, id: &UniqueId, world: usize, aborted: &AtomicBool) -> Result<(), NcclStatus> {
        let limit = Duration::from_secs(settings().nccl_init_timeout_s);
        let all = || self.header().joined.load(Ordering::Acquire) as usize >= world;
        let met = self.wait(aborted, Some(Instant::now() + limit), all);
        if let Some((_, _, cookie)) = id.parse() {
            lock(&OFFERED).remove(&cookie);
        }
        met
    }

    pub(super) fn header(&self) -> &Header {
        // SAFETY: the mapping begins with a header, is aligned to a page and lives as long as `self`; all fields are
        // atomics, for which any bytes are a value.
        unsafe { &*(self.base as *const Header) }
    }

    /// The address of a rank's slot.
    pub(super) fn slot(&self, rank: usize) -> usize {
        self.base + HEADER + rank * SLOT
    }

    /// The address of the ring between two ranks.
    pub(super) fn ring(&self, from: usize, to: usize) -> usize {
        self.base + HEADER + MAX_RANKS * SLOT + (from * MAX_RANKS + to) * RING
    }

    /// Wakes everybody who waits for a change.
    pub(super) fn notify(&self) {
        let pulse = &self.header().pulse;
        pulse.fetch_add(1, Ordering::AcqRel);
        // SAFETY: the word is mapped; a wake has no other precondition.
        unsafe { libc::syscall(libc::SYS_futex, pulse.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
    }

    /// Waits until `ready`. Without a deadline a lost peer hangs the caller until it is aborted, as with NCCL.
    pub(super) fn wait(
        &self,
        aborted: &AtomicBool,
        deadline: Option<Instant>,
        mut ready: impl FnMut() -> bool,
    ) -> Result<(), NcclStatus> {
        let mut spins = 0;
        loop {
            let pulse = self.header().pulse.load(Ordering::Acquire);
            if ready() {
                return Ok(());
            }
            if aborted.load(Ordering::Acquire) {
                return Err(INVALID_USAGE);
            }
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
                continue;
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                log("nccl: the other ranks have not come in time");
                return Err(SYSTEM_ERROR);
            }
            self.sleep(pulse);
            if settings().nccl_detect && self.peer_is_lost() {
                return Err(REMOTE_ERROR);
            }
        }
    }

    /// Sleeps while the pulse is `pulse`, for [`LOOK`] at most.
    fn sleep(&self, pulse: u32) {
        let limit = libc::timespec {
            tv_sec: 0,
            tv_nsec: LOOK.as_nanos() as libc::c_long,
        };
        let word = self.header().pulse.as_ptr();
        // SAFETY: the word is mapped and the limit outlives the call. Whatever it returns, the caller looks again.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word,
                libc::FUTEX_WAIT,
                pulse,
                std::ptr::from_ref(&limit),
            );
        }
    }

    fn peer_is_lost(&self) -> bool {
        let processes = self
            .header()
            .processes
            .iter()
            .map(|process| process.load(Ordering::Relaxed));
        processes.filter(|process| *process != 0).any(|process| {
            // A process that has ended but was not waited for is still listed, as a zombie.
            let state = fs::read_to_string(format!("/proc/{process}/stat"));
            state.map_or(true, |stat| {
                stat.rsplit(')')
                    .next()
                    .is_some_and(|rest| rest.trim_start().starts_with('Z'))
            })
        })
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`; every user of the memory borrows `self`.
        unsafe { libc::munmap(self.base as *mut c_void, LEN) };
    }
}
