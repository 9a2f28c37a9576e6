//! Ownership of an NCCL communicator.
//!
//! cudarc's safe wrapper cannot be used here: its communicators block while they are set up, cannot be asked for errors,
//! and cannot be aborted while somebody waits for them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cudarc::nccl::result::{self, NcclError, NcclStatus};
use cudarc::nccl::sys;

use crate::cuda::HostFlag;
use crate::{KernelError, Result};

/// Between two looks at a call that NCCL has not finished.
const PAUSE: Duration = Duration::from_micros(50);
/// `NCCL_CONFIG_UNDEF_INT`: as the library sees fit.
const UNDEFINED: i32 = i32::MIN;
const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// 2.30.0, whose `ncclConfig_t` this is. An older library reads what it knows of it.
const CONFIG_VERSION: u32 = 23_000;

/// The pointer that NCCL gave.
struct RawComm(sys::ncclComm_t);

// SAFETY: NCCL lets any thread use a communicator as long as two do not at once, which the mutex around it prevents.
unsafe impl Send for RawComm {}

enum State {
    Live(RawComm),
    /// Why, and who frees it.
    Aborted {
        reason: String,
        ending: Option<JoinHandle<()>>,
    },
}

/// A communicator that one thread works with and another may abort. It never blocks: calls that take longer are asked
/// for until they are done.
pub(super) struct Handle {
    state: Mutex<State>,
    /// Ends kernels of our own that wait for a peer, of which NCCL does not know.
    given_up: Option<Arc<HostFlag>>,
}

/// Who is in it.
pub(super) struct Clique {
    pub(super) unique_id: sys::ncclUniqueId,
    pub(super) rank: usize,
    pub(super) world_size: usize,
}

/// A new identity for a clique. The process that made it must live until all ranks are in.
///
/// # Errors
/// [`KernelError::Device`]: NCCL finds no network interface, for example.
pub(super) fn unique_id() -> Result<sys::ncclUniqueId> {
    result::get_uniqueid().map_err(|error| failed("ncclGetUniqueId", &error))
}

impl Handle {
    /// Starts to set up a communicator on the current CUDA context; [`settle`](Self::settle) tells when it is done.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub(super) fn init(clique: &Clique) -> Result<Self> {
        const OP: &str = "ncclCommInitRankConfig";
        let mut config = non_blocking();
        let mut comm = std::ptr::null_mut();
        // SAFETY: both pointers are valid for the call, which copies the configuration.
        let status = unsafe {
            result::comm_init_rank_config(
                &mut comm,
                clique.world_size as i32,
                clique.unique_id,
                clique.rank as i32,
                &mut config,
            )
        };
        status.map_err(|error| failed(OP, &error))?;
        if comm.is_null() {
            return Err(KernelError::Device {
                op: OP,
                message: "no communicator".to_owned(),
            });
        }
        Ok(Self {
            state: Mutex::new(State::Live(RawComm(comm))),
            given_up: None,
        })
    }

    /// The flag is set whenever the communicator is aborted.
    pub(super) fn give_up_with(&mut self, flag: Arc<HostFlag>) {
        self.given_up = Some(flag);
    }

    /// Makes a call, or several in a group, on the communicator, and waits until NCCL has taken it; not until it is done
    /// on the device.
    ///
    /// # Errors
    /// [`KernelError::Collective`].
    pub(super) fn call(
        &self,
        op: &'static str,
        call: impl FnOnce(sys::ncclComm_t) -> Result<NcclStatus, NcclError>,
    ) -> Result<()> {
        let status = match &*self.lock() {
            State::Live(comm) => call(comm.0),
            State::Aborted { reason, .. } => return Err(KernelError::Collective(reason.clone())),
        };
        match status {
            Ok(NcclStatus::InProgress) => self.settle(|| Ok(())),
            Ok(_) => Ok(()),
            Err(error) => Err(KernelError::Collective(format!("{op}: {:?}", error.0))),
        }
    }

    /// Waits until NCCL has nothing in progress on the host's side. `go_on` is asked in between.
    ///
    /// # Errors
    /// [`KernelError::Collective`]; what `go_on` returns.
    pub(super) fn settle(&self, mut go_on: impl FnMut() -> Result<()>) -> Result<()> {
        loop {
            match self.poll() {
                Poll::Settled => return Ok(()),
                Poll::InProgress => go_on()?,
                Poll::Failed(reason) | Poll::Aborted(reason) => return Err(KernelError::Collective(reason)),
            }
            thread::sleep(PAUSE);
        }
    }

    /// What NCCL has noticed meanwhile: a peer's connection that broke, a kernel that failed.
    pub(super) fn poll(&self) -> Poll {
        let state = self.lock();
        let comm = match &*state {
            State::Live(comm) => comm.0,
            State::Aborted { reason, .. } => return Poll::Aborted(reason.clone()),
        };
        let mut status = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is live while the lock is held, and `status` outlives the call.
        let asked = unsafe { sys::ncclCommGetAsyncError(comm, &mut status) };
        match (asked, status) {
            (sys::ncclResult_t::ncclSuccess, sys::ncclResult_t::ncclSuccess) => Poll::Settled,
            (sys::ncclResult_t::ncclSuccess, sys::ncclResult_t::ncclInProgress) => Poll::InProgress,
            (sys::ncclResult_t::ncclSuccess, error) | (error, _) => {
                Poll::Failed(format!("NCCL reports {error:?}"))
            }
        }
    }

    /// Why it was aborted, if it was.
    pub(super) fn aborted(&self) -> Option<String> {
        match &*self.lock() {
            State::Live(_) => None,
            State::Aborted { reason, .. } => Some(reason.clone()),
        }
    }

    /// Ends what runs on the device, and frees the communicator when the last graph of its collectives is gone. The first
    /// reason is what every later call is told.
    pub(super) fn abort(&self, reason: &str) {
        self.give_up();
        self.lock().abort(reason);
    }

    /// As [`abort`](Self::abort); false if another thread is inside a call.
    pub(super) fn try_abort(&self, reason: &str) -> bool {
        self.give_up();
        match self.state.try_lock() {
            Ok(mut state) => state.abort(reason),
            Err(TryLockError::Poisoned(state)) => state.into_inner().abort(reason),
            Err(TryLockError::WouldBlock) => return false,
        }
        true
    }

    /// First: whoever holds the lock may be waiting for such a kernel.
    fn give_up(&self) {
        if let Some(flag) = &self.given_up {
            flag.set();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole whenever a panic could happen.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn abort(&mut self, reason: &str) {
        let Self::Live(RawComm(comm)) = *self else {
            return;
        };
        let comm = RawComm(comm);
        // A thread of its own: NCCL waits here for the end of the graphs, and whoever called may be who drops them.
        let thread = thread::Builder::new()
            .name("nccl-abort".to_owned())
            .spawn(move || comm.abort());
        *self = Self::Aborted {
            reason: reason.to_owned(),
            // Without a thread the communicator stays as it is, and what waits for it on the device ends the process.
            ending: thread.ok(),
        };
    }
}

impl RawComm {
    fn abort(self) {
        // SAFETY: the state has given up the pointer, so this is its last use. A failure leaves nothing that could be done
        // about it.
        let _ = unsafe { result::comm_abort(self.0) };
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.give_up();
        // Not `ncclCommDestroy`, which waits for peers that may be gone.
        let mut state = self.lock();
        state.abort("the group is closed");
        if let State::Aborted { ending, .. } = &mut *state
            && let Some(ending) = ending.take()
        {
            // Memory of collectives is freed after this. It has not panicked: that would have ended the process.
            let _ = ending.join();
        }
    }
}

/// How a communicator is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Poll {
    /// Everything has been handed to the device.
    Settled,
    InProgress,
    /// With NCCL's error.
    Failed(String),
    /// With the reason that was given.
    Aborted(String),
}

fn failed(op: &'static str, error: &NcclError) -> KernelError {
    KernelError::Device {
        op,
        message: format!("{:?}", error.0),
    }
}

/// `NCCL_CONFIG_INITIALIZER` with `blocking = 0`.
fn non_blocking() -> sys::ncclConfig_t {
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: CONFIG_MAGIC,
        version: CONFIG_VERSION,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: std::ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
        graphUsageMode: UNDEFINED,
        numRmaCtx: UNDEFINED,
        maxP2pPeers: UNDEFINED,
    }
}

/// A point in time that setting up must not pass.
pub(super) struct InitDeadline {
    end: Instant,
    limit: Duration,
}

impl InitDeadline {
    pub(super) fn after(limit: Duration) -> Self {
        Self {
            end: Instant::now() + limit,
            limit,
        }
    }

    /// # Errors
    /// [`KernelError::Collective`] when it has passed.
    pub(super) fn check(&self) -> Result<()> {
        if Instant::now() < self.end {
            return Ok(());
        }
        Err(KernelError::Collective(format!(
            "NCCL did not connect the ranks within {:?}",
            self.limit
        )))
    }
}
