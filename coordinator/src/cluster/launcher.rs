//! Worker processes of this machine: started pinned, watched, and never left behind.

use std::{
    ffi::OsString,
    io,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::mpsc;

use super::{child, members::Cluster};
use crate::config::DeviceChoice;

/// How to start a worker: the binary, and what every worker is told.
#[derive(Clone, Debug)]
pub struct LaunchSpec {
    /// A binary that understands `worker`; normally this one.
    pub program: PathBuf,
    /// Flags for every worker.
    pub arguments: Vec<String>,
    /// `unix:/path` or `http://host:port` of this coordinator.
    pub coordinator: String,
    pub join_token: String,
    /// One CPU set per rank; empty sets are not pinned.
    pub cpus: Vec<Vec<usize>>,
    pub device: DeviceChoice,
    /// `CUDA_VISIBLE_DEVICES` of each rank: one device, or none.
    pub visible_devices: Vec<String>,
    /// `LD_LIBRARY_PATH` of the workers, where it is not this process's.
    pub search_path: Option<OsString>,
}

/// Local workers that run. Dropping it kills whatever is left.
pub struct Launcher {
    children: Arc<Mutex<Vec<Child>>>,
    /// Closed when the last child has been reaped.
    all_gone: mpsc::Receiver<()>,
}

struct Child {
    rank: u32,
    pidfd: rustix::fd::OwnedFd,
}

impl Launcher {
    /// Starts one worker per CPU set. A worker's exit, or being stopped for long, becomes its rank's failure in `cluster`.
    pub fn start(spec: &LaunchSpec, cluster: &Cluster) -> io::Result<Self> {
        let (alive, all_gone) = mpsc::channel(1);
        let launcher = Self {
            children: Arc::default(),
            all_gone,
        };
        for rank in 0..spec.cpus.len() {
            launcher.spawn(spec, rank as u32, (cluster.clone(), alive.clone()))?;
        }
        Ok(launcher)
    }

    /// Starts one worker on a thread of its own. The kernel sends the parent-death signal when the *thread* that forked
    /// ends, so that thread lives exactly as long as the child.
    fn spawn(&self, spec: &LaunchSpec, rank: u32, watch: (Cluster, mpsc::Sender<()>)) -> io::Result<()> {
        let mut command = worker_command(spec, rank);
        let children = self.children.clone();
        let (started, result) = std::sync::mpsc::sync_channel(1);
        thread::Builder::new()
            .name(format!("rank-{rank}-watch"))
            .spawn(move || {
                let (cluster, _alive) = watch;
                let spawned = command.spawn().and_then(|child| {
                    let pid = Pid::from_child(&child);
                    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
                    lock(&children).push(Child {
                        rank,
                        pidfd: pidfd.try_clone()?,
                    });
                    Ok((child, pidfd))
                });
                let (mut child, pidfd) = match spawned {
                    Ok(spawned) => spawned,
                    Err(error) => return drop(started.send(Err(error))),
                };
                let _ = started.send(Ok(()));
                let stopped = |why| cluster.fail(rank, None, why);
                let end = child::follow(&mut child, &pidfd, stopped)
                    .unwrap_or_else(|error| format!("cannot be waited for: {error}"));
                lock(&children).retain(|child| child.rank != rank);
                cluster.fail(rank, None, end);
            })?;
        result
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the watching thread ended")))
    }

    /// Waits until every worker has ended; kills those that have not when `grace` is over.
    pub async fn stop(mut self, grace: Duration) {
        let deadline = Instant::now() + grace;
        if tokio::time::timeout_at(deadline.into(), self.all_gone.recv())
            .await
            .is_err()
        {
            self.kill_all();
            self.all_gone.recv().await;
        }
    }

    fn kill_all(&self) {
        for child in lock(&self.children).iter() {
            tracing::warn!(rank = child.rank, "worker did not leave in time, killing it");
            let _ = pidfd_send_signal(&child.pidfd, Signal::KILL);
        }
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        self.kill_all();
    }
}

fn lock(children: &Mutex<Vec<Child>>) -> std::sync::MutexGuard<'_, Vec<Child>> {
    children.lock().unwrap_or_else(PoisonError::into_inner)
}

fn worker_command(spec: &LaunchSpec, rank: u32) -> Command {
    let cpus: Vec<String> = spec.cpus[rank as usize].iter().map(usize::to_string).collect();
    let mut command = Command::new(&spec.program);
    command.arg("worker").args(&spec.arguments).args([
        "--coordinator",
        &spec.coordinator,
        "--rank",
        &rank.to_string(),
    ]);
    command.args(["--parent-pid", &std::process::id().to_string()]);
    if !cpus.is_empty() {
        command.args(["--cpus", &cpus.join(",")]);
    }
    command.args(["--device", spec.device.name()]);
    command.env("CUDA_VISIBLE_DEVICES", &spec.visible_devices[rank as usize]);
    if let Some(path) = &spec.search_path {
        command.env("LD_LIBRARY_PATH", path);
    }
    // In a process group of its own: Ctrl-C at a terminal is for the coordinator, which then stops its workers.
    command.process_group(0);
    // Its flags are all here; the file's are not its own.
    command.env_remove("PHALANX_CONFIG");
    // Not an argument: those are readable by everybody on the machine.
    command
        .env("PHALANX_JOIN_TOKEN", &spec.join_token)
        .stdin(Stdio::null());
    command
}

/// Disjoint, contiguous CPU sets for `ranks` workers, the first ones larger when the division leaves a rest. With fewer
/// CPUs than ranks, ranks share them in turn.
pub fn split_cpus(cpus: &[usize], ranks: usize) -> Vec<Vec<usize>> {
    if cpus.is_empty() {
        return vec![Vec::new(); ranks];
    }
    if cpus.len() < ranks {
        return (0..ranks).map(|rank| vec![cpus[rank % cpus.len()]]).collect();
    }
    let (each, rest) = (cpus.len() / ranks, cpus.len() % ranks);
    let start = |rank: usize| rank * each + rank.min(rest);
    (0..ranks)
        .map(|rank| cpus[start(rank)..start(rank + 1)].to_vec())
        .collect()
}

/// Threads of each rank: a CPU each, but together no more than `limit`, and one at least.
pub fn split_threads(cpus: &[Vec<usize>], limit: usize) -> Vec<usize> {
    let ranks = cpus.len().max(1);
    let (each, rest) = (limit / ranks, limit % ranks);
    let share = |rank: usize| each + usize::from(rank < rest);
    let threads = cpus.iter().enumerate();
    threads
        .map(|(rank, set)| set.len().min(share(rank)).max(1))
        .collect()
}

/// `CUDA_VISIBLE_DEVICES` of each of `ranks` workers: one of those this process was given, in order, or by number if it
/// was given no list. Ranks beyond the list see none.
pub fn visible_devices(given: Option<&str>, ranks: usize) -> Vec<String> {
    match given {
        None => (0..ranks).map(|rank| rank.to_string()).collect(),
        Some(list) => {
            let devices = list.split(',').map(|device| device.trim().to_owned());
            devices
                .chain(std::iter::repeat(String::new()))
                .take(ranks)
                .collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_sees_one_gpu() {
        assert_eq!(visible_devices(None, 3), ["0", "1", "2"]);
        assert_eq!(visible_devices(Some("4, GPU-5f3a"), 2), ["4", "GPU-5f3a"]);
        assert_eq!(visible_devices(Some("4"), 2), ["4", ""]);
        assert_eq!(visible_devices(Some(""), 1), [""]);
    }

    #[test]
    fn threads_follow_the_cpus_and_the_quota() {
        let halves = split_cpus(&[0, 1, 2, 3, 4], 2);
        assert_eq!(split_threads(&halves, 5), [3, 2]);
        assert_eq!(split_threads(&halves, 64), [3, 2]);
        assert_eq!(split_threads(&halves, 3), [2, 1]);
        assert_eq!(split_threads(&halves, 1), [1, 1]);
        assert_eq!(split_threads(&[vec![], vec![]], 4), [1, 1]);
    }

    #[test]
    fn cpu_sets_are_disjoint_and_cover_everything() {
        assert_eq!(split_cpus(&[0, 1], 2), [vec![0], vec![1]]);
        assert_eq!(split_cpus(&[3, 4, 5, 6, 9], 2), [vec![3, 4, 5], vec![6, 9]]);
        assert_eq!(split_cpus(&[0, 1], 3), [vec![0], vec![1], vec![0]]);
        assert_eq!(split_cpus(&[], 2), [vec![], vec![]] as [Vec<usize>; 2]);
    }
}
