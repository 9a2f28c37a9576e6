//! The cluster's state as operators, load balancers and probes see it.

use std::sync::Arc;

use phalanx_proto::{
    v1::{self, GetStatusResponse, GroupState},
    vllm,
};
use tokio::sync::watch;
use tonic_health::{ServingStatus, server::HealthReporter};

/// Holds the cluster's status: its owners update it, `GetStatus` and the health service read it.
#[derive(Clone, Debug)]
pub struct StatusHandle {
    status: Arc<watch::Sender<GetStatusResponse>>,
}

impl Default for StatusHandle {
    fn default() -> Self {
        Self::new()
    }
}

impl StatusHandle {
    /// Starting, with no ranks yet.
    pub fn new() -> Self {
        let status = GetStatusResponse {
            state: GroupState::Starting.into(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..GetStatusResponse::default()
        };
        Self {
            status: Arc::new(watch::Sender::new(status)),
        }
    }
    pub fn update(&self, edit: impl FnOnce(&mut GetStatusResponse)) {
        self.status.send_modify(edit);
    }
    pub fn get(&self) -> GetStatusResponse {
        self.status.borrow().clone()
    }
    /// Sees every later update; ends when the last handle is gone.
    pub fn subscribe(&self) -> watch::Receiver<GetStatusResponse> {
        self.status.subscribe()
    }
}

/// Keeps grpc.health.v1 in step with the group's state: SERVING only while it is ready.
pub(super) async fn follow(mut status: watch::Receiver<GetStatusResponse>, reporter: HealthReporter) {
    const SERVICES: [&str; 3] = [
        "",
        v1::inference_server::SERVICE_NAME,
        vllm::inference_server::SERVICE_NAME,
    ];
    loop {
        let ready = status.borrow_and_update().state() == GroupState::Ready;
        let serving = if ready {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        for service in SERVICES {
            reporter.set_service_status(service, serving).await;
        }
        let changed = status.wait_for(|status| (status.state() == GroupState::Ready) != ready);
        if changed.await.is_err() {
            return;
        }
    }
}
