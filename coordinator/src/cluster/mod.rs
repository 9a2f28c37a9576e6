//! Membership: the workers that attach, load their share and form a group.
//!
//! [`Cluster`] is the table of ranks. `attach` feeds it from the gRPC streams, `launcher` from the exit statuses of local
//! child processes, and from their being stopped; whoever drives the start-up or the steps waits on it. The first failure
//! of any rank is kept, with rank and phase, and ends the current group at once: nobody waits for a timeout to learn
//! that a process is gone.

mod attach;
mod child;
mod cuda_libraries;
mod launcher;
mod members;

pub use attach::AttachService;
pub use cuda_libraries::CudaLibraries;
pub use launcher::{LaunchSpec, Launcher, split_cpus, split_threads, visible_devices};
pub use members::{Cluster, ClusterError, RankFailure};
