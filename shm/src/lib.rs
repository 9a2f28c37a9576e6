//! What the processes of one group on one host share: a file in `/dev/shm`, a ring of plans from the engine to every
//! rank, a ring of outputs from rank 0 to the engine, and barriers and collectives among the ranks.
//!
//! This crate knows bytes, not plans. It is the only one with `mmap`, atomics and futexes, and it is for Linux.
//!
//! # Parties and ports
//!
//! A group is one **engine** and `world_size` **ranks**. Somebody (the coordinator, or a host's first rank) creates the
//! [`Segment`] and tells the others its path; each party then opens it and takes its port, once per segment:
//! [`EnginePort`] or [`RankPort`]. When all have joined, [`Segment::unlink_when_joined`] removes the name, so that
//! nothing is left behind however the group ends.
//!
//! ```
//! # use std::{sync::Arc, time::Duration};
//! # use phalanx_shm::{EnginePort, GroupShape, RankPort, Segment, ShmError, Wait};
//! # let directory = tempfile::tempdir().unwrap();
//! # let dir = directory.path();
//! let shape = GroupShape {
//!     world_size: 1,
//!     epoch: 1,
//!     plan_slots: 4,
//!     plan_slot_bytes: 1 << 16,
//!     output_slots: 4,
//!     output_slot_bytes: 1 << 12,
//!     message_bytes: 1 << 16,
//!     arena_bytes: 1 << 20,
//! };
//! let limit = Duration::from_secs(10);
//! let segment = Arc::new(Segment::create(dir, "demo", shape)?);
//! let mut engine = EnginePort::join(Arc::clone(&segment), Wait::ADAPTIVE)?;
//!
//! // In the rank's process, which was told the path:
//! let opened = Arc::new(Segment::open(segment.path())?);
//! let mut rank = RankPort::join(opened, 0, Wait::ADAPTIVE, limit)?;
//! segment.unlink_when_joined(limit)?;
//!
//! let fill = |slot: &mut [u8]| {
//!     slot[..4].copy_from_slice(b"plan");
//!     Ok::<_, ShmError>(4)
//! };
//! engine.publish_plan(limit, fill)?;
//! assert_eq!(rank.next_plan(<[u8]>::to_vec)?, b"plan");
//! # Ok::<_, ShmError>(())
//! ```
//!
//! # When something goes wrong
//!
//! Any party or its supervisor may [`abort`](Segment::abort) the group from any thread: every wait in every process
//! ends at once with [`ShmError::Aborted`] and the first reason given. A rank's waits on its peers have a limit; the rank
//! that runs into it names the party that is missing and aborts the group itself. An aborted segment is finished: the
//! next incarnation of the group has a new epoch and a new segment, made after the old ranks are known to be dead,
//! because a stopped process that goes on may still write into its part of the old one.
//!
//! # Trust
//!
//! All parties run as one user. Every length, epoch and number read from the segment is checked, so a peer with a bug
//! makes a typed error; a peer that means harm could still change bytes while they are being read.
// A model uses the protocol and not all that is around it.
#![cfg_attr(loom, allow(dead_code))]

#[cfg(not(target_os = "linux"))]
compile_error!("phalanx-shm needs Linux: futexes that work across processes, and flock");

mod deadline;
mod futex;
mod gate;
mod protocol;
mod sync;

#[cfg(all(test, loom))]
mod loom_tests;

// Under loom only the protocol is built: a model has no files and no processes.
#[cfg(not(loom))]
mod arena;
#[cfg(not(loom))]
mod collective;
#[cfg(not(loom))]
mod direct;
#[cfg(not(loom))]
mod engine_port;
#[cfg(not(loom))]
mod error;
#[cfg(not(loom))]
mod file;
#[cfg(not(loom))]
mod header;
#[cfg(not(loom))]
mod janitor;
#[cfg(not(loom))]
mod mapped_file;
#[cfg(not(loom))]
mod mapping;
#[cfg(not(loom))]
mod progress;
#[cfg(not(loom))]
mod rank_port;
#[cfg(not(loom))]
mod segment;
#[cfg(not(loom))]
mod shape;
#[cfg(not(loom))]
mod slot;
#[cfg(not(loom))]
mod stream;
#[cfg(not(loom))]
mod wait;

#[cfg(not(loom))]
pub use {
    arena::Arena,
    collective::Element,
    engine_port::EnginePort,
    error::{AbortReason, Awaited, Corruption, HeaderProblem, OutOfRange, Party, ShmError},
    janitor::sweep_orphans,
    mapped_file::MappedFile,
    progress::Progress,
    rank_port::RankPort,
    segment::Segment,
    shape::{GroupShape, MAX_WORLD_SIZE},
    wait::Wait,
};
