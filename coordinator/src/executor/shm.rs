//! Ranks of this machine, reached through the rings of one shared segment: no gRPC and no lock on the way of a step.

use std::{sync::Arc, time::Duration};

use phalanx_proto::step::{self, CodecError, StepLimits, StepOutput, StepPlan};
use phalanx_shm::{EnginePort, Segment, ShmError};

use crate::{
    cluster::Cluster,
    engine::{Executor, ExecutorError},
};

/// Plans may wait in the ring for so long. The ring has room unless a rank has stopped reading.
const PUBLISH_LIMIT: Duration = Duration::from_secs(5);
/// A worker that died is explained by its stream and its exit status within this time.
const EXPLANATION_LIMIT: Duration = Duration::from_millis(200);

pub struct ShmExecutor {
    port: EnginePort,
    segment: Arc<Segment>,
    cluster: Cluster,
    limits: StepLimits,
}

impl ShmExecutor {
    /// The engine's end of a group whose ranks have all joined.
    pub fn new(port: EnginePort, segment: Arc<Segment>, cluster: Cluster, limits: StepLimits) -> Self {
        Self { port, segment, cluster, limits }
    }

    /// Turns "the group was aborted" into which rank failed and why.
    fn explain(&self, error: ShmError) -> ExecutorError {
        let give_up = std::time::Instant::now() + EXPLANATION_LIMIT;
        loop {
            if let Some(failure) = self.cluster.failure() {
                return ExecutorError::RankLost { rank: failure.rank, cause: failure.to_string() };
            }
            if self.cluster.is_closing() {
                return ExecutorError::Closed;
            }
            if std::time::Instant::now() > give_up {
                return ExecutorError::Protocol(error.to_string());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Executor for ShmExecutor {
    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        let mut encoded = Ok(0);
        let published = self.port.publish_plan(PUBLISH_LIMIT, |slot| {
            encoded = step::encode_plan(plan, slot);
            *encoded.as_ref().unwrap_or(&0)
        });
        encoded.map_err(|error| ExecutorError::Protocol(format!("plan of step {}: {error}", plan.step)))?;
        published.map_err(|error| self.explain(error))
    }

    fn wait(&mut self, step: u64, limit: Duration) -> Result<StepOutput, ExecutorError> {
        let limits = self.limits;
        let read = self.port.wait_output(limit, |bytes| step::decode_output(bytes, &limits));
        let output: Result<StepOutput, CodecError> = match read {
            Ok(output) => output,
            Err(ShmError::TimedOut { .. }) => {
                self.segment.abort(u32::MAX);
                return Err(ExecutorError::Deadline { step });
            }
            Err(error) => return Err(self.explain(error)),
        };
        let output = output.map_err(|error| ExecutorError::Protocol(format!("output of step {step}: {error}")))?;
        let (epoch, current) = (output.epoch, self.segment.shape().epoch);
        if output.step != step || epoch != current {
            let message = format!("expected step {step} of epoch {current}, got {} of {epoch}", output.step);
            return Err(ExecutorError::Protocol(message));
        }
        Ok(output)
    }

    /// A lost rank is not replaced yet: the caller reports the loss and ends.
    fn rebuild(&mut self) -> Result<u32, ExecutorError> {
        self.segment.abort(u32::MAX);
        Err(ExecutorError::Closed)
    }
}
