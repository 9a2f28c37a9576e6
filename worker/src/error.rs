//! What can go wrong on a rank.

use std::{io, time::Duration};

use phalanx_kernels::KernelError;
use phalanx_proto::{step::CodecError, v1::Phase};
use phalanx_shm::ShmError;

use crate::{assignment::AssignmentError, loader::LoadError, sampler::WireError};

/// Ends the worker's process.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error("the parent process was {expected}, now it is {found}")]
    Orphaned { expected: u32, found: u32 },
    #[error("cpu {cpu}: this system numbers its CPUs below {limit}")]
    NoSuchCpu { cpu: usize, limit: usize },
    #[error("{call}: {source}")]
    System { call: &'static str, source: io::Error },
    #[error("coordinator address {address:?}: {message}")]
    BadAddress { address: String, message: String },
    #[error("coordinator {address} not reached within {limit:?}: {source}")]
    Unreachable {
        address: String,
        limit: Duration,
        source: tonic::transport::Error,
    },
    #[error("refused by the coordinator: {}", .0.message())]
    Refused(Box<tonic::Status>),
    #[error("the coordinator sent {found} where {expected} was due")]
    Protocol {
        expected: &'static str,
        found: &'static str,
    },
    #[error("assignment: {0}")]
    Assignment(#[from] AssignmentError),
    #[error("loading: {0}")]
    Load(#[from] LoadError),
    #[error("the largest step, without a KV cache: {0}")]
    Profile(RunError),
    #[error("KV cache of {num_blocks} blocks: {source}")]
    AllocateKv { num_blocks: u32, source: KernelError },
    #[error("group of epoch {epoch}: {source}")]
    Join { epoch: u32, source: JoinError },
    #[error("step: {0}")]
    Run(#[from] RunError),
    #[error("the rank's thread ended without a word")]
    ThreadLost,
}

impl WorkerError {
    /// What the rank was about when this happened.
    pub fn phase(&self) -> Phase {
        match self {
            Self::Load(_) | Self::Profile(_) => Phase::LoadingWeights,
            Self::AllocateKv { .. } => Phase::AllocatingKv,
            Self::Join { .. } => Phase::JoiningGroup,
            Self::Run(_) => Phase::Serving,
            _ => Phase::Starting,
        }
    }
}

/// Why a group cannot be joined.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error(transparent)]
    Segment(#[from] ShmError),
    #[error("the segment's {field} is {found}, expected {expected}")]
    Shape {
        field: &'static str,
        found: u64,
        expected: u64,
    },
}

/// Ends a step, and with it the group's epoch.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Shm(#[from] ShmError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("plan: {0}")]
    DecodePlan(CodecError),
    #[error("masks: {0}")]
    DecodeMasks(CodecError),
    #[error("output: {0}")]
    EncodeOutput(CodecError),
    #[error("plan of epoch {found}, the group's is {expected}")]
    Epoch { expected: u32, found: u32 },
    #[error("plan of step {found}, expected {expected}")]
    StepNumber { expected: u64, found: u64 },
    #[error("candidates of rank {rank}: {error}")]
    Peer { rank: usize, error: WireError },
    #[error("{found} ranks answered, the group has {expected}")]
    WorldSize { expected: usize, found: usize },
}

impl RunError {
    /// Whether the device is what failed.
    pub(crate) fn is_of_device(&self) -> bool {
        matches!(self, Self::Kernel(KernelError::Device { .. }))
    }

    /// Whether the group ended under this rank, which is itself in order and may join the next one.
    pub fn is_group_end(&self) -> bool {
        matches!(
            self,
            Self::Kernel(KernelError::Collective(_))
                | Self::Shm(ShmError::Aborted { .. } | ShmError::TimedOut { .. } | ShmError::Corrupt { .. })
                | Self::Peer { .. }
        )
    }
}

/// A plan that this rank cannot carry out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("row {row}: {field} is {value}, limit {limit}")]
    OverLimit {
        row: usize,
        field: &'static str,
        value: u64,
        limit: u64,
    },
    #[error("row {row}: no tokens")]
    Empty { row: usize },
    #[error("row {row}: {blocks} blocks hold {capacity} tokens, {needed} are needed")]
    ShortBlockTable {
        row: usize,
        blocks: usize,
        capacity: u64,
        needed: u64,
    },
    #[error("masks of epoch {epoch} step {step} follow the plan of another step")]
    ForeignMasks { epoch: u32, step: u64 },
    #[error("a mask for sequence {0}, which is not sampled in its place")]
    MaskWithoutRow(u64),
}
