//! Requests that are running, by id.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

use super::caller::Deadline;

/// Clients choose ids, so that several running requests may have the same: they are told apart by a number.
#[derive(Default)]
struct Running {
    by_id: HashMap<String, Vec<Entry>>,
    next: u64,
}

struct Entry {
    number: u64,
    /// None once it was sent.
    abort: Option<oneshot::Sender<()>>,
}

impl Entry {
    fn abort(&mut self) {
        if let Some(abort) = self.abort.take() {
            // A receiver that is gone belongs to a request that is ending anyway.
            let _ = abort.send(());
        }
    }
}

#[derive(Clone, Default)]
pub(super) struct Registry {
    running: Arc<Mutex<Running>>,
}

/// A running request. Dropping it takes it off the list.
pub(super) struct Registration {
    pub(super) id: String,
    /// Fires when somebody asks for an abort.
    pub(super) aborted: oneshot::Receiver<()>,
    /// When it is ended with an error, if not before.
    pub(super) deadline: Option<Deadline>,
    number: u64,
    registry: Registry,
}

impl Registry {
    pub(super) fn register(&self, id: String) -> Registration {
        let (abort, aborted) = oneshot::channel();
        let mut running = self.lock();
        let number = running.next;
        running.next += 1;
        running.by_id.entry(id.clone()).or_default().push(Entry {
            number,
            abort: Some(abort),
        });
        drop(running);
        Registration {
            id,
            aborted,
            deadline: None,
            number,
            registry: self.clone(),
        }
    }

    /// Asks every request of this id to end; false if there is none. The prompts of one HTTP request are requests
    /// `id-0`, `id-1` and so on.
    pub(super) fn abort(&self, id: &str) -> bool {
        let mut running = self.lock();
        if let Some(entries) = running.by_id.get_mut(id) {
            entries.iter_mut().for_each(Entry::abort);
            return true;
        }
        let is_part = |other: &str| {
            let number = other.strip_prefix(id).and_then(|rest| rest.strip_prefix('-'));
            number.is_some_and(|number| number.parse::<u32>().is_ok())
        };
        let parts = running.by_id.iter_mut().filter(|(other, _)| is_part(other));
        let mut found = false;
        for entry in parts.flat_map(|(_, entries)| entries) {
            entry.abort();
            found = true;
        }
        found
    }

    /// Asks every request to end; returns how many there are.
    pub(super) fn abort_all(&self) -> usize {
        let mut count = 0;
        for entry in self.lock().by_id.values_mut().flatten() {
            entry.abort();
            count += 1;
        }
        count
    }

    /// The lists are whole between any two statements, so a panic elsewhere does not spoil them.
    fn lock(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut running = self.registry.lock();
        if let Some(entries) = running.by_id.get_mut(&self.id) {
            entries.retain(|entry| entry.number != self.number);
            if entries.is_empty() {
                running.by_id.remove(&self.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_names_its_requests_until_the_last_has_ended() {
        let registry = Registry::default();
        let (first, mut second) = (registry.register("a".into()), registry.register("a".into()));
        drop(first);
        assert!(registry.abort("a") && registry.abort("a") && !registry.abort("b"));
        assert_eq!(second.aborted.try_recv(), Ok(()));
        drop(second);
        assert!(!registry.abort("a"));
        let mut prompts = ["d-0", "d-1"].map(|id| registry.register(id.into()));
        assert!(registry.abort("d") && !registry.abort("d-"));
        assert!(
            prompts
                .iter_mut()
                .all(|prompt| prompt.aborted.try_recv() == Ok(()))
        );
        drop(prompts);
        let mut others = ["b", "c"].map(|id| registry.register(id.into()));
        assert_eq!(registry.abort_all(), 2);
        assert!(others.iter_mut().all(|other| other.aborted.try_recv() == Ok(())));
        drop(others);
        assert!(registry.lock().by_id.is_empty());
    }
}
