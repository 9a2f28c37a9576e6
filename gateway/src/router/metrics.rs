//! What the router counts, by backend.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BackendLabel {
    backend: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    backend: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

const ACCEPTED: &str = "accepted";
const FAILED: &str = "failed";
const RESUMED: &str = "resumed";

/// Shared by the router and the registry that exposes it. Labels are the addresses of replicas there are.
#[derive(Clone, Debug, Default)]
pub(crate) struct RouterMetrics {
    up: Family<BackendLabel, Gauge>,
    running: Family<BackendLabel, Gauge>,
    requests: Family<RequestLabels, Counter>,
    ejections: Family<BackendLabel, Counter>,
    retries: Counter,
    migrations: Family<OutcomeLabel, Counter>,
}

/// Those of one replica.
pub(super) struct ReplicaMetrics {
    pub(super) up: Gauge,
    pub(super) running: Gauge,
    pub(super) succeeded: Counter,
    pub(super) failed: Counter,
    pub(super) ejections: Counter,
}

impl RouterMetrics {
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register(
            "phalanx_gateway_backend_up",
            "1 while the backend's health service says that it serves",
            self.up.clone(),
        );
        registry.register(
            "phalanx_gateway_backend_running_requests",
            "Requests of this gateway that the backend has running",
            self.running.clone(),
        );
        registry.register(
            "phalanx_gateway_backend_requests",
            "Requests given to the backend, by whether it took them; one that it lost later failed, too",
            self.requests.clone(),
        );
        registry.register(
            "phalanx_gateway_backend_ejections",
            "Times that the backend got no requests for a while because one had failed",
            self.ejections.clone(),
        );
        registry.register(
            "phalanx_gateway_retries",
            "Requests that were tried on another backend before their reply had begun",
            self.retries.clone(),
        );
        registry.register(
            "phalanx_gateway_migrations",
            "Streams whose backend was lost, by whether another went on with them",
            self.migrations.clone(),
        );
    }

    pub(super) fn of(&self, address: &str) -> ReplicaMetrics {
        let label = BackendLabel {
            backend: address.to_owned(),
        };
        let requests = |outcome| {
            self.requests
                .get_or_create(&requests_of(address, outcome))
                .clone()
        };
        ReplicaMetrics {
            up: self.up.get_or_create(&label).clone(),
            running: self.running.get_or_create(&label).clone(),
            succeeded: requests(ACCEPTED),
            failed: requests(FAILED),
            ejections: self.ejections.get_or_create(&label).clone(),
        }
    }

    /// The replica is gone: pods get new addresses, and old ones must not pile up.
    pub(super) fn forget(&self, address: &str) {
        let label = BackendLabel {
            backend: address.to_owned(),
        };
        self.up.remove(&label);
        self.running.remove(&label);
        self.ejections.remove(&label);
        for outcome in [ACCEPTED, FAILED] {
            self.requests.remove(&requests_of(address, outcome));
        }
    }

    pub(super) fn retried(&self) {
        self.retries.inc();
    }

    pub(super) fn migrated(&self, resumed: bool) {
        let outcome = if resumed { RESUMED } else { FAILED };
        self.migrations.get_or_create(&OutcomeLabel { outcome }).inc();
    }
}

fn requests_of(address: &str, outcome: &'static str) -> RequestLabels {
    RequestLabels {
        backend: address.to_owned(),
        outcome,
    }
}
