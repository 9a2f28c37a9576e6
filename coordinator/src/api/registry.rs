//! Requests that are running, by id.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use phalanx_proto::RpcError;
use tokio::sync::oneshot;

/// The abort signal of every running request; none once it was sent.
type Running = HashMap<String, Option<oneshot::Sender<()>>>;

#[derive(Clone, Default)]
pub(super) struct Registry {
    running: Arc<Mutex<Running>>,
}

/// A running request. Dropping it frees the id.
pub(super) struct Registration {
    pub(super) id: String,
    /// Fires when somebody asks for an abort.
    pub(super) aborted: oneshot::Receiver<()>,
    registry: Registry,
}

impl Registry {
    /// Errors: `InvalidArgument` if a request of this id is running.
    pub(super) fn register(&self, id: String) -> Result<Registration, RpcError> {
        let (abort, aborted) = oneshot::channel();
        let mut running = self.lock();
        if running.contains_key(&id) {
            let message = format!("a request with the id {id:?} is already running.");
            return Err(RpcError::invalid("request_id", message));
        }
        running.insert(id.clone(), Some(abort));
        drop(running);
        Ok(Registration {
            id,
            aborted,
            registry: self.clone(),
        })
    }

    /// Asks a request to end; false if there is none of this id.
    pub(super) fn abort(&self, id: &str) -> bool {
        match self.lock().get_mut(id) {
            None => false,
            Some(abort) => {
                // A receiver that is gone belongs to a request that is ending anyway.
                let _ = abort.take().map(|abort| abort.send(()));
                true
            }
        }
    }

    /// The map is whole between any two statements, so a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.registry.lock().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_taken_until_its_request_ends() {
        let registry = Registry::default();
        let mut first = registry.register("a".into()).expect("free");
        let error = registry.register("a".into()).err().expect("taken");
        assert_eq!(error.param.as_deref(), Some("request_id"));
        assert!(registry.abort("a") && registry.abort("a") && !registry.abort("b"));
        assert_eq!(first.aborted.try_recv(), Ok(()));
        drop(first);
        assert!(!registry.abort("a"));
        registry.register("a".into()).expect("free again");
    }
}
