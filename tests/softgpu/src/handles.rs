//! Handles are numbers, not addresses: a stale or foreign one is not found instead of being followed.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Handles of all kinds are distinct, so that an event passed for a stream is not found.
static NEXT: AtomicUsize = AtomicUsize::new(0x5f00_0000);

/// Objects of one kind by handle.
pub(crate) struct Handles<T> {
    objects: Mutex<BTreeMap<usize, Arc<T>>>,
}

impl<T> Handles<T> {
    pub(crate) const fn new() -> Self {
        Self {
            objects: Mutex::new(BTreeMap::new()),
        }
    }

    pub(crate) fn insert(&self, object: T) -> usize {
        self.insert_shared(Arc::new(object))
    }

    pub(crate) fn insert_shared(&self, object: Arc<T>) -> usize {
        // A multiple of 16, as the low bits of a real handle are never set.
        let handle = NEXT.fetch_add(16, Ordering::Relaxed);
        lock(&self.objects).insert(handle, object);
        handle
    }

    pub(crate) fn get(&self, handle: usize) -> Option<Arc<T>> {
        lock(&self.objects).get(&handle).cloned()
    }

    pub(crate) fn remove(&self, handle: usize) -> Option<Arc<T>> {
        lock(&self.objects).remove(&handle)
    }

    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        lock(&self.objects).values().cloned().collect()
    }
}

/// Locks; a thread that panicked while it held the lock has left nothing half done that matters more than going on.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
