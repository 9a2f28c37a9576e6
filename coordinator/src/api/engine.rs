//! The engine as the services see it: perhaps not there yet.

use std::sync::{Arc, OnceLock};

use phalanx_proto::{ErrorKind, RpcError};

use crate::engine_thread::{EngineHandle, NewSequence, Submission};

/// A place for the engine: the services answer from the first second, the engine starts once the ranks have loaded.
#[derive(Clone, Default)]
pub struct EngineSlot {
    engine: Arc<OnceLock<EngineHandle>>,
}

impl EngineSlot {
    /// Sets the engine, once; later ones are dropped.
    pub fn set(&self, engine: EngineHandle) {
        if self.engine.set(engine).is_err() {
            tracing::warn!("an engine was started twice; the second is not used");
        }
    }

    /// Queues a sequence without waiting. Errors: `Unavailable` while there is no engine, and the engine's own.
    pub(super) fn submit(&self, sequence: NewSequence) -> Result<Submission, RpcError> {
        self.running()?.submit(sequence)
    }

    /// Errors: `Unavailable` while there is no engine.
    pub(super) fn running(&self) -> Result<&EngineHandle, RpcError> {
        self.engine
            .get()
            .ok_or_else(|| RpcError::new(ErrorKind::Unavailable, "the model is still being loaded"))
    }

    /// Whether an operator holds the engine still.
    pub(super) fn is_paused(&self) -> bool {
        self.engine
            .get()
            .is_some_and(|engine| engine.status().snapshot.paused)
    }
}
