//! The file that a group shares, from its creation to the removal of its name.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::deadline::{Deadline, Expired};
use crate::error::{AbortReason, HeaderProblem, Party, ShmError};
use crate::file;
use crate::futex::Futex;
use crate::gate::{Gate, distance};
use crate::header::{self, HEADER_BYTES};
use crate::janitor::segment_name;
use crate::mapping::{Access, Mapping};
use crate::protocol;
use crate::shape::{GATES_OFFSET, GroupShape, LINE, Layout};
use crate::sync::{AtomicU32, Ordering};

/// Bits of [`Cold::joined`] above those of the ranks.
const ENGINE_BIT: u32 = 1 << 31;
const ABORTED_BIT: u32 = 1 << 30;

/// What is touched when parties join and when the group is aborted, and never in between.
#[derive(Default)]
#[repr(C, align(128))]
struct Cold {
    /// A bit for every party that has its port, and one that says "aborted" to those who wait for the others.
    joined: Futex,
    /// 0, or the code of the first [`AbortReason`] given.
    reason: AtomicU32,
}

const _: () = assert!(HEADER_BYTES + size_of::<Cold>() <= GATES_OFFSET && HEADER_BYTES.is_multiple_of(LINE));
const _: () = assert!(size_of::<Gate>() == LINE);

/// The memory of one group in one epoch. Ports hold it through an `Arc`; any thread may abort it.
///
/// Dropping the creator's segment removes the file's name if it is still there, and tells ranks that wait for work that
/// the group is over.
#[derive(Debug)]
pub struct Segment {
    mapping: Mapping,
    shape: GroupShape,
    layout: Layout,
    path: PathBuf,
    /// The creator's descriptor carries the lock that means "alive".
    file: File,
    creator: bool,
    linked: AtomicBool,
}

impl Segment {
    /// Makes the file `phalanx.<boot id>.<group>.<epoch>` in `dir` (`/dev/shm`), with every page allocated.
    ///
    /// # Errors
    /// [`ShmError::BadShape`] and [`ShmError::BadName`] for arguments beyond their limits; [`ShmError::NoSpace`] if the
    /// volume is too small; [`ShmError::Exists`] if there is such a file; [`ShmError::Io`]. Nothing is left behind.
    pub fn create(dir: &Path, group: &str, shape: GroupShape) -> Result<Self, ShmError> {
        shape.validate()?;
        let path = dir.join(segment_name(group, shape.epoch)?);
        file::check_free(dir, shape.total_bytes())?;
        let file = create_locked(&path)?;
        let mapped = file::reserve(&file, shape.total_bytes(), dir).and_then(|()| {
            file.write_all_at(&header::encode(&shape), 0)
                .map_err(ShmError::io(&path))?;
            Mapping::new(&file, shape.layout().total, Access::Shared).map_err(ShmError::io(&path))
        });
        match mapped {
            Ok(mapping) => Ok(Self::new(mapping, file, path, shape, true)),
            Err(error) => {
                // While the lock is held, so that the name is still that of our file. The first error is reported.
                let _ = fs::remove_file(&path);
                Err(error)
            }
        }
    }

    /// Maps a segment that another process has created. Its shape is checked and copied here, once.
    ///
    /// # Errors
    /// [`ShmError::NotOurs`] unless it is a regular file of this user with no access for others;
    /// [`ShmError::BadHeader`] if it is not a whole segment of this version; [`ShmError::NoSpace`]; [`ShmError::Io`],
    /// with `NotFound` once the name has been removed.
    pub fn open(path: &Path) -> Result<Self, ShmError> {
        let file = file::options().open(path).map_err(ShmError::io(path))?;
        file::check_ownership(path, &file)?;
        let bad = |problem| ShmError::BadHeader {
            path: path.to_owned(),
            problem,
        };
        let found = file.metadata().map_err(ShmError::io(path))?.len();
        if found < HEADER_BYTES as u64 {
            return Err(bad(HeaderProblem::Size {
                expected: HEADER_BYTES as u64,
                found,
            }));
        }
        let mut bytes = [0; HEADER_BYTES];
        file.read_exact_at(&mut bytes, 0).map_err(ShmError::io(path))?;
        let shape = header::decode(&bytes, found).map_err(bad)?;
        // Costs nothing if all pages are there, as they should be; a file with holes must not become a SIGBUS.
        file::reserve(&file, found, path.parent().unwrap_or(path))?;
        let mapping =
            Mapping::new(&file, shape.layout().total, Access::Shared).map_err(ShmError::io(path))?;
        Ok(Self::new(mapping, file, path.to_owned(), shape, false))
    }

    fn new(mapping: Mapping, file: File, path: PathBuf, shape: GroupShape, creator: bool) -> Self {
        let layout = shape.layout();
        Self {
            mapping,
            shape,
            layout,
            path,
            file,
            creator,
            linked: AtomicBool::new(creator),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn shape(&self) -> &GroupShape {
        &self.shape
    }

    /// Creator only: waits until the engine and every rank have joined, then removes the file's name. From then on the
    /// kernel frees the memory with the last process that maps it. May be repeated after [`ShmError::NotJoined`].
    ///
    /// # Errors
    /// [`ShmError::NotJoined`] names who is missing; [`ShmError::Aborted`]; [`ShmError::NotOurs`] if another process
    /// created it; [`ShmError::Io`].
    pub fn unlink_when_joined(&self, limit: Duration) -> Result<(), ShmError> {
        if !self.creator {
            let problem = "created by another process, which removes its name".to_owned();
            return Err(ShmError::NotOurs {
                path: self.path.clone(),
                problem,
            });
        }
        let everyone = ENGINE_BIT | u32::MAX >> (u32::BITS - self.shape.world_size);
        let joined = &self.cold().joined;
        let mut deadline = Deadline::after(limit);
        loop {
            let now = joined.load(Ordering::Acquire);
            if now & ABORTED_BIT != 0 {
                return Err(self.aborted());
            }
            if now & everyone == everyone {
                return self.unlink();
            }
            joined
                .sleep(now, &mut deadline)
                .map_err(|Expired| ShmError::NotJoined {
                    missing: self.missing(now),
                    limit,
                })?;
        }
    }

    fn missing(&self, joined: u32) -> Vec<Party> {
        let ranks = (0..self.shape.world_size).map(Party::Rank);
        ranks
            .chain([Party::Engine])
            .filter(|party| joined & bit(*party) == 0)
            .collect()
    }

    fn unlink(&self) -> Result<(), ShmError> {
        if self.linked.swap(false, Ordering::Relaxed)
            && file::names(&self.path, &self.file).map_err(ShmError::io(&self.path))?
        {
            fs::remove_file(&self.path).map_err(ShmError::io(&self.path))?;
        }
        Ok(())
    }

    /// Ends every wait of every party, now and in future. The first reason given stays.
    pub fn abort(&self, reason: AbortReason) {
        protocol::abort(&self.cold().reason, self.gates(), reason.code());
        self.cold().joined.fetch_or(ABORTED_BIT, Ordering::Release);
        self.cold().joined.wake_all();
    }

    /// None while the group has not been aborted.
    pub fn abort_reason(&self) -> Option<AbortReason> {
        AbortReason::from_code(self.cold().reason.load(Ordering::Acquire))
    }

    /// Barriers each rank has arrived at, modulo 2^30. In a group that is stuck, the rank that is behind the others is
    /// the one they wait for.
    pub fn barrier_counts(&self) -> Vec<u32> {
        self.barrier_gates().iter().map(Gate::count).collect()
    }

    /// The rank that has arrived at the fewest barriers; among those, the one that has read the fewest plans.
    pub(crate) fn slowest_rank(&self) -> u32 {
        let base = (self.barrier_gates()[0].count(), self.plan_cursors()[0].count());
        let progress = |rank: &u32| {
            let gate = *rank as usize;
            let barriers = distance(self.barrier_gates()[gate].count(), base.0);
            (barriers, distance(self.plan_cursors()[gate].count(), base.1))
        };
        (0..self.shape.world_size).min_by_key(progress).unwrap_or(0)
    }

    /// True if the process that created the segment is gone, or has dropped it.
    pub(crate) fn creator_gone(&self) -> bool {
        // The creator must not try: it would weaken its own lock.
        if self.creator || self.file.try_lock_shared().is_err() {
            return false;
        }
        // A failure changes nothing: a shared lock stops nobody who looks for a dead creator.
        let _ = self.file.unlock();
        true
    }

    /// A party may join once per segment.
    pub(crate) fn join(&self, party: Party) -> Result<(), ShmError> {
        let world_size = self.shape.world_size;
        if let Party::Rank(rank) = party
            && rank >= world_size
        {
            return Err(ShmError::NoSuchRank { rank, world_size });
        }
        let before = self.cold().joined.fetch_or(bit(party), Ordering::AcqRel);
        if before & bit(party) != 0 {
            return Err(ShmError::RankTaken { party });
        }
        self.cold().joined.wake_all();
        if before & ABORTED_BIT != 0 {
            Err(self.aborted())
        } else {
            Ok(())
        }
    }

    pub(crate) fn aborted(&self) -> ShmError {
        // A gate says ABORT only after the reason has been written; a peer may still have overwritten it.
        ShmError::Aborted {
            reason: self.abort_reason().unwrap_or(AbortReason::Other(0)),
        }
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.mapping.base().as_ptr()
    }

    fn cold(&self) -> &Cold {
        // SAFETY: within the first page, aligned to 128 bytes, and made of atomics only, for which any bytes are
        // values; every process accesses these bytes as atomics. The mapping lives as long as `self`.
        unsafe { &*self.base().add(HEADER_BYTES).cast() }
    }

    /// `[plan head | output head | output cursor | plan cursor of each rank | barrier of each rank]`
    fn gates(&self) -> &[Gate] {
        // SAFETY: the layout keeps these bytes for gates, aligned to 128; as for `cold`, they are atomics to everyone.
        unsafe { std::slice::from_raw_parts(self.base().add(GATES_OFFSET).cast(), self.layout.num_gates) }
    }

    /// Owner: the engine.
    pub(crate) fn plan_head(&self) -> &Gate {
        &self.gates()[0]
    }

    /// Owner: rank 0.
    pub(crate) fn output_head(&self) -> &Gate {
        &self.gates()[1]
    }

    /// Owner: the engine. A slice of one, as a ring's writer takes its readers.
    pub(crate) fn output_cursor(&self) -> &[Gate] {
        &self.gates()[2..3]
    }

    /// Owners: the ranks, in order.
    pub(crate) fn plan_cursors(&self) -> &[Gate] {
        &self.gates()[3..3 + self.shape.world_size as usize]
    }

    /// Owners: the ranks, in order.
    pub(crate) fn barrier_gates(&self) -> &[Gate] {
        &self.gates()[3 + self.shape.world_size as usize..]
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // There is nobody to tell; what stays is an orphan and found by the next sweep.
        let _ = self.unlink();
    }
}

fn bit(party: Party) -> u32 {
    match party {
        Party::Engine => ENGINE_BIT,
        Party::Rank(rank) => 1 << rank,
    }
}

/// A new file with the lock held. A janitor may look at it before it is locked, and then removes it.
fn create_locked(path: &Path) -> Result<File, ShmError> {
    const ATTEMPTS: usize = 3;
    for _ in 0..ATTEMPTS {
        let file = file::options()
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => ShmError::Exists {
                    path: path.to_owned(),
                },
                _ => ShmError::io(path)(error),
            })?;
        lock(path, &file)?;
        if file.metadata().map_err(ShmError::io(path))?.nlink() > 0 {
            return Ok(file);
        }
    }
    Err(ShmError::io(path)(io::ErrorKind::ResourceBusy.into()))
}

fn lock(path: &Path, file: &File) -> Result<(), ShmError> {
    const LIMIT: Duration = Duration::from_secs(1);
    let start = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if start.elapsed() < LIMIT => {
                std::thread::sleep(Duration::from_millis(1));
            }
            // The janitor that holds it removes the file; if locks do not work here, nobody can tell an orphan.
            Err(error) => return Err(ShmError::io(path)(error.into())),
        }
    }
}
