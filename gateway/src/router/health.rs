//! Follows a replica's own word on its health (grpc.health.v1, `Watch`).
//!
//! The call stays open, so that a drain is heard when it begins and a death when the connection breaks; it costs nothing
//! while nothing changes.

use std::{
    sync::Weak,
    time::{Duration, Instant},
};

use phalanx_proto::secret::random_u64;
use tokio::time::sleep;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use super::replica::{Replica, Reported};
use crate::backend::Backend;

/// Between attempts to reach a replica that is not there; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Reports to `replica` until it is gone, or has no health service: then it counts as serving, as gRPC's own clients
/// have it, and only failed requests speak against it.
pub(super) async fn watch(backend: Backend, replica: Weak<Replica>) {
    let mut pause = FIRST_PAUSE;
    loop {
        match backend.watch_health().await {
            Ok(mut updates) => {
                let began = Instant::now();
                while let Ok(Some(update)) = updates.message().await {
                    let reported = match update.status() {
                        ServingStatus::Serving => Reported::Serving,
                        _ => Reported::NotServing,
                    };
                    let Some(replica) = replica.upgrade() else { return };
                    replica.report(reported);
                }
                // The next attempt says whether the replica is gone or only the connection was.
                if began.elapsed() > LONGEST_PAUSE {
                    pause = FIRST_PAUSE;
                    continue;
                }
            }
            Err(status) => {
                let Some(replica) = replica.upgrade() else { return };
                if status.code() == Code::Unimplemented {
                    return replica.report(Reported::Serving);
                }
                replica.report(Reported::Unreachable);
            }
        }
        // Many gateways that lose the same replica must not come back in step.
        sleep(pause.mul_f64(0.5 + (random_u64() % 1024) as f64 / 1024.0)).await;
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}
