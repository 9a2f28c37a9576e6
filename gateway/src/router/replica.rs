//! One coordinator of several: what is known of its health, and what it has to do.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use phalanx_proto::{ErrorKind, RpcError};
use serde::Serialize;
use tokio::task::JoinHandle;

use super::{
    health,
    metrics::{ReplicaMetrics, RouterMetrics},
};
use crate::backend::Backend;

/// A replica that has failed a request gets none for so long; twice as long each time that it fails again.
const FIRST_EJECTION: Duration = Duration::from_millis(250);
const LONGEST_EJECTION: Duration = Duration::from_secs(8);

/// What the replica's health service says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reported {
    /// Nothing yet.
    Unknown,
    Serving,
    /// Starting, draining or failed.
    NotServing,
    /// There is no connection to it.
    Unreachable,
}

#[derive(Debug)]
struct State {
    reported: Reported,
    /// Ejections since its last success.
    ejections: u32,
    ejected_until: Option<Instant>,
}

impl State {
    fn is_ejected(&self, now: Instant) -> bool {
        self.ejected_until.is_some_and(|until| now < until)
    }
}

pub(super) struct Replica {
    address: String,
    id: u64,
    backend: Backend,
    state: Mutex<State>,
    metrics: ReplicaMetrics,
    watcher: OnceLock<JoinHandle<()>>,
}

/// A replica for `/health`.
#[derive(Debug, Serialize)]
pub(crate) struct Overview {
    pub(crate) backend: String,
    pub(crate) state: &'static str,
    /// Requests of this gateway.
    pub(crate) running: i64,
}

impl Overview {
    pub(crate) fn is_serving(&self) -> bool {
        self.state == SERVING
    }
}

const SERVING: &str = "serving";

impl Replica {
    /// The replica at `address`, whose health is watched for as long as somebody holds it.
    pub(super) fn watched(address: &str, backend: Backend, metrics: &RouterMetrics) -> Arc<Self> {
        let replica = Arc::new(Self::unwatched(address, backend, metrics));
        let watch = health::watch(replica.backend.clone(), Arc::downgrade(&replica));
        // It is new, so nobody else has set it.
        let _ = replica.watcher.set(tokio::spawn(watch));
        replica
    }

    pub(super) fn unwatched(address: &str, backend: Backend, metrics: &RouterMetrics) -> Self {
        // The same on every gateway, so that they agree on where a session belongs.
        let mut hasher = DefaultHasher::new();
        address.hash(&mut hasher);
        Self {
            address: address.to_owned(),
            id: hasher.finish(),
            backend,
            state: Mutex::new(State {
                reported: Reported::Unknown,
                ejections: 0,
                ejected_until: None,
            }),
            metrics: metrics.of(address),
            watcher: OnceLock::new(),
        }
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Requests of this gateway that it has running.
    pub(super) fn running(&self) -> i64 {
        self.metrics.running.get()
    }

    /// Whether it may be given a request: one of which nothing is known yet is tried.
    pub(super) fn is_eligible(&self, now: Instant) -> bool {
        let state = self.lock();
        matches!(state.reported, Reported::Unknown | Reported::Serving) && !state.is_ejected(now)
    }

    pub(super) fn overview(&self) -> Overview {
        let state = self.lock();
        let state = match state.reported {
            Reported::Unknown => "unknown",
            Reported::Serving if state.is_ejected(Instant::now()) => "ejected",
            Reported::Serving => SERVING,
            Reported::NotServing => "not_serving",
            Reported::Unreachable => "unreachable",
        };
        Overview {
            backend: self.address.clone(),
            state,
            running: self.running(),
        }
    }

    /// Its health service has spoken, or is gone.
    pub(super) fn report(&self, reported: Reported) {
        let mut state = self.lock();
        if reported == Reported::Serving {
            state.ejections = 0;
            state.ejected_until = None;
        }
        let before = std::mem::replace(&mut state.reported, reported);
        drop(state);
        self.metrics.up.set((reported == Reported::Serving).into());
        if before != reported {
            tracing::info!(backend = self.address, state = ?reported, "health");
        }
    }

    pub(super) fn succeeded(&self) {
        self.metrics.succeeded.inc();
        let mut state = self.lock();
        state.ejections = 0;
        state.ejected_until = None;
    }

    /// It has refused a request that another may take, or was lost over it. A full queue is no illness.
    pub(super) fn failed(&self, error: &RpcError) {
        self.metrics.failed.inc();
        if error.kind == ErrorKind::QueueFull {
            return;
        }
        let now = Instant::now();
        let mut state = self.lock();
        // All streams of a lost replica fail at once: that is one failure.
        if state.is_ejected(now) {
            return;
        }
        let pause = FIRST_EJECTION * 2_u32.saturating_pow(state.ejections.min(16));
        let pause = pause.min(LONGEST_EJECTION);
        state.ejections += 1;
        state.ejected_until = Some(now + pause);
        drop(state);
        self.metrics.ejections.inc();
        tracing::warn!(backend = self.address, %error, ?pause, "ejected");
    }

    /// Every change is one assignment, so a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        if let Some(watcher) = self.watcher.get() {
            watcher.abort();
        }
    }
}

/// A request on a replica, which counts as running there until this is dropped.
pub(super) struct Running(Arc<Replica>);

impl Running {
    pub(super) fn on(replica: Arc<Replica>) -> Self {
        replica.metrics.running.inc();
        Self(replica)
    }

    pub(super) fn replica(&self) -> &Arc<Replica> {
        &self.0
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.metrics.running.dec();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::auth::Keys;

    /// Replicas at `unix:/0`, `unix:/1` and so on, of which nothing is known. Needs a runtime.
    pub(in crate::router) fn replicas(count: usize) -> Vec<Arc<Replica>> {
        let metrics = RouterMetrics::default();
        let one = |index| {
            let address = format!("unix:/{index}");
            let backend = Backend::new(&address, &Keys::default(), None).expect("a good address");
            Arc::new(Replica::unwatched(&address, backend, &metrics))
        };
        (0..count).map(one).collect()
    }

    #[tokio::test]
    async fn a_failure_ejects_for_a_while_and_health_takes_back() {
        let replica = &replicas(1)[0];
        let now = Instant::now();
        assert!(replica.is_eligible(now), "one that is unknown is tried");
        replica.failed(&RpcError::new(ErrorKind::QueueFull, "full"));
        assert!(replica.is_eligible(now), "a full queue is no illness");
        let lost = RpcError::new(ErrorKind::Unavailable, "gone");
        for _ in 0..32 {
            replica.failed(&lost);
        }
        assert!(!replica.is_eligible(now));
        assert!(
            replica.is_eligible(Instant::now() + FIRST_EJECTION),
            "all at once count once"
        );
        replica.report(Reported::Serving);
        assert!(replica.is_eligible(Instant::now()) && replica.overview().is_serving());
        replica.report(Reported::NotServing);
        assert!(!replica.is_eligible(Instant::now()));
    }

    #[tokio::test]
    async fn running_requests_are_counted() {
        let replica = &replicas(1)[0];
        let first = Running::on(Arc::clone(replica));
        let second = Running::on(Arc::clone(replica));
        assert_eq!(replica.running(), 2);
        drop((first, second));
        assert_eq!(replica.running(), 0);
    }
}
