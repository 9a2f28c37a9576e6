//! What a worker asks of its operating system.

use std::{fs, io, sync::Arc};

use phalanx_shm::{AbortReason, Party};
use rustix::{
    process::{Signal, getppid, set_parent_process_death_signal},
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

use crate::{error::WorkerError, group::GroupSlot};

/// Ties this process's life to its parent's: when the parent dies, the kernel kills this one.
///
/// The kernel sends the signal when the parent's *thread* that started this process ends, so that thread must live as
/// long as the parent does.
///
/// # Errors
/// [`WorkerError::Orphaned`] if the parent is no longer `expected`: it died before the signal was asked for.
pub(crate) fn die_with_parent(expected: u32) -> Result<(), WorkerError> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|source| WorkerError::system("prctl(PR_SET_PDEATHSIG)", source.into()))?;
    let parent = getppid().map_or(0, |pid| pid.as_raw_nonzero().get() as u32);
    if parent == expected {
        Ok(())
    } else {
        Err(WorkerError::Orphaned {
            expected,
            found: parent,
        })
    }
}

/// Pins the calling thread, and every thread it starts from now on, to `cpus`.
pub(crate) fn pin_to(cpus: &[usize]) -> Result<(), WorkerError> {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        if cpu >= CpuSet::MAX_CPU {
            return Err(WorkerError::NoSuchCpu {
                cpu,
                limit: CpuSet::MAX_CPU,
            });
        }
        set.set(cpu);
    }
    sched_setaffinity(None, &set).map_err(|source| WorkerError::system("sched_setaffinity", source.into()))
}

/// The CPUs that the calling thread may run on; none where the kernel does not tell.
pub(crate) fn allowed_cpus() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(None) else {
        return Vec::new();
    };
    (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
}

/// Resident set of this process in bytes; 0 where `/proc` does not tell.
pub(crate) fn resident_bytes() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: Option<u64> = statm
        .split_whitespace()
        .nth(1)
        .and_then(|field| field.parse().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
}

pub(crate) fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

/// A panic anywhere ends the process, after the group has been told: a rank that is half alive would hang its peers.
pub(crate) fn abort_on_panic(group: Arc<GroupSlot>, rank: u32) {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        group.abort(AbortReason::Lost(Party::Rank(rank)));
        std::process::abort();
    }));
}

impl WorkerError {
    fn system(call: &'static str, source: io::Error) -> Self {
        Self::System { call, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_a_resident_set_and_a_host() {
        assert!(resident_bytes() > 1 << 20);
        assert!(!host_name().is_empty());
    }

    #[test]
    fn a_cpu_beyond_the_kernels_set_is_refused() {
        assert!(matches!(
            pin_to(&[CpuSet::MAX_CPU]),
            Err(WorkerError::NoSuchCpu { .. })
        ));
    }
}
