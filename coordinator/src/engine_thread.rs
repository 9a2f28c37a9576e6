//! The one OS thread that runs the engine, and the handle through which everybody else talks to it.

use phalanx_proto::{
    RpcError,
    step::{SampledToken, SequenceId},
};
use tokio::sync::mpsc;

use crate::engine::{FinishReason, SamplingParams, StopRules};

/// A sequence to be queued; its id is given out by [`EngineHandle::submit`].
#[derive(Clone, Debug)]
pub struct NewSequence {
    pub prompt: Vec<u32>,
    pub sampling: SamplingParams,
    pub stop: StopRules,
    pub priority: i32,
    pub cache_salt: Option<String>,
}

/// What a sequence's owner hears of it. `Finished` or `Failed` is the last.
#[derive(Clone, Debug)]
pub enum StreamEvent {
    Started { cached_tokens: u32 },
    Token(SampledToken),
    Finished(FinishReason),
    Failed(RpcError),
}

/// A queued sequence. Dropping it aborts the sequence and frees its blocks within a step.
pub struct Submission {
    pub id: SequenceId,
    pub events: mpsc::Receiver<StreamEvent>,
}

/// Cheap to clone; safe to call from anywhere.
#[derive(Clone)]
pub struct EngineHandle {}

impl EngineHandle {
    /// Queues a sequence without waiting. Errors: `QueueFull`, `Unavailable` (draining, or the group has failed).
    pub fn submit(&self, _request: NewSequence) -> Result<Submission, RpcError> {
        Err(RpcError::new(
            phalanx_proto::ErrorKind::Unavailable,
            "the engine is not running",
        ))
    }
}
