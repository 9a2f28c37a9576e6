//! Ranks of this machine, reached through the rings of one shared segment: no gRPC and no lock on the way of a step.

use std::{
    thread,
    time::{Duration, Instant},
};

use phalanx_proto::step::{self, CodecError, StepLimits, StepMasks, StepOutput, StepPlan};
use phalanx_shm::{AbortReason, EnginePort, Party, Progress, ShmError};

use crate::{
    cluster::Cluster,
    engine::{Executor, ExecutorError},
};

/// Plans may wait in the ring for so long. The ring has room unless a rank has stopped reading.
const PUBLISH_LIMIT: Duration = Duration::from_secs(5);
/// A worker that died is explained by its stream and its exit status within this time, longer than those wait for each
/// other.
const EXPLANATION_LIMIT: Duration = Duration::from_millis(600);

pub struct ShmExecutor {
    port: EnginePort,
    cluster: Cluster,
    limits: StepLimits,
    /// Where ranks on GPUs say why they gave up.
    progress: Option<Progress>,
}

/// What filling a slot may end with.
enum PublishError {
    Codec(CodecError),
    Shm(ShmError),
}

impl From<ShmError> for PublishError {
    fn from(error: ShmError) -> Self {
        Self::Shm(error)
    }
}

impl ShmExecutor {
    /// The engine's end of a group whose ranks have all joined.
    pub fn new(port: EnginePort, cluster: Cluster, limits: StepLimits, progress: Option<Progress>) -> Self {
        Self {
            port,
            cluster,
            limits,
            progress,
        }
    }

    /// Gives every rank what `encode` writes.
    fn publish(
        &mut self,
        what: &str,
        step: u64,
        encode: impl FnOnce(&mut [u8]) -> Result<usize, CodecError>,
    ) -> Result<(), ExecutorError> {
        let fill = |slot: &mut [u8]| encode(slot).map_err(PublishError::Codec);
        self.port
            .publish_plan(PUBLISH_LIMIT, fill)
            .map_err(|error| match error {
                PublishError::Codec(error) => {
                    ExecutorError::Protocol(format!("{what} of step {step}: {error}"))
                }
                PublishError::Shm(error) => self.explain(&error),
            })
    }

    fn testimony(&self, rank: u32) -> Option<String> {
        self.progress.as_ref()?.testimony(rank)
    }

    /// Turns "the group was aborted" into which rank failed and why.
    fn explain(&self, error: &ShmError) -> ExecutorError {
        let reason = match error {
            ShmError::Aborted { reason } => Some(*reason),
            _ => None,
        };
        // Nobody will know better why a rank was given up, whose process may well be alive.
        if let Some(AbortReason::TimedOut(Party::Rank(rank))) = reason
            && let Some(said) = self.testimony(rank)
        {
            self.cluster.fail(rank, None, said);
        }
        let give_up = Instant::now() + EXPLANATION_LIMIT;
        loop {
            if let Some(failure) = self.cluster.failure() {
                return ExecutorError::RankLost {
                    rank: failure.rank,
                    cause: failure.cause,
                };
            }
            if self.cluster.is_closing() {
                return ExecutorError::Closed;
            }
            if Instant::now() > give_up {
                let Some(rank) = reason.and_then(AbortReason::rank) else {
                    return ExecutorError::Protocol(error.to_string());
                };
                // Its peers say so; nobody else does. The next look finds it.
                let said = self.testimony(rank).unwrap_or_else(|| error.to_string());
                self.cluster.fail(rank, None, said);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Executor for ShmExecutor {
    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        self.publish("plan", plan.step, |slot| step::encode_plan(plan, slot))
    }

    /// Through the ring of the plans: the ranks read it where they need it.
    fn post_masks(&mut self, masks: &StepMasks) -> Result<(), ExecutorError> {
        self.publish("masks", masks.step, |slot| step::encode_masks(masks, slot))
    }

    fn wait(&mut self, step: u64, limit: Duration) -> Result<StepOutput, ExecutorError> {
        let limits = self.limits;
        let output = match self
            .port
            .wait_output(limit, |bytes| step::decode_output(bytes, &limits))
        {
            Ok(output) => output,
            Err(ShmError::TimedOut { party, .. }) => {
                let Party::Rank(rank) = party else {
                    return Err(ExecutorError::Deadline { step });
                };
                let cause = format!("step {step} took longer than {limit:?}");
                self.cluster.fail(rank, None, cause.clone());
                return Err(ExecutorError::RankLost { rank, cause });
            }
            Err(error) => return Err(self.explain(&error)),
        };
        let output =
            output.map_err(|error| ExecutorError::Protocol(format!("output of step {step}: {error}")))?;
        let (epoch, current) = (output.epoch, self.port.segment().shape().epoch);
        if output.step != step || epoch != current {
            let message = format!(
                "expected step {step} of epoch {current}, got {} of {epoch}",
                output.step
            );
            return Err(ExecutorError::Protocol(message));
        }
        Ok(output)
    }

    /// A lost rank is not replaced yet: the caller reports the loss and ends.
    fn rebuild(&mut self) -> Result<u32, ExecutorError> {
        self.port.segment().abort(AbortReason::Shutdown);
        Err(ExecutorError::Closed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use phalanx_shm::{GroupShape, RankPort, Segment, Wait};

    use super::*;

    const LIMITS: StepLimits = StepLimits {
        max_rows: 1,
        max_tokens: 1,
        max_blocks_per_row: 1,
        num_blocks: 1,
        vocab_size: 1,
        max_edits_per_row: 0,
        max_logprobs: 0,
    };

    /// A group of two ranks that count their collectives, and the executor over it.
    fn group(directory: &tempfile::TempDir) -> (Arc<Segment>, Cluster, ShmExecutor) {
        let shape = GroupShape {
            world_size: 2,
            epoch: 1,
            plan_slots: 1,
            plan_slot_bytes: 64,
            output_slots: 1,
            output_slot_bytes: 64,
            message_bytes: 64,
            arena_bytes: Progress::bytes(2),
        };
        let segment = Arc::new(Segment::create(directory.path(), "test", shape).expect("a segment"));
        let port = EnginePort::join(Arc::clone(&segment), Wait::PASSIVE).expect("the engine's place");
        let cluster = Cluster::new(2, "");
        let progress = port.progress();
        let executor = ShmExecutor::new(port, cluster.clone(), LIMITS, progress);
        (segment, cluster, executor)
    }

    #[test]
    fn what_a_rank_says_of_another_is_why_the_step_failed() {
        let directory = tempfile::tempdir().expect("a directory");
        let (segment, cluster, mut executor) = group(&directory);
        let port = RankPort::join(Arc::clone(&segment), 0, Wait::PASSIVE, Duration::from_secs(1));
        let progress = Progress::new(port.expect("a place").arena(), 2).expect("room");
        progress.testify(0, 1, "never reached all_reduce #7 (layer 3, 64 bytes) within 9s");
        segment.abort(AbortReason::TimedOut(Party::Rank(1)));
        let lost = executor.wait(1, Duration::from_secs(1)).unwrap_err();
        assert_eq!(
            lost.to_string(),
            "rank 1 lost: never reached all_reduce #7 (layer 3, 64 bytes) within 9s"
        );
        let failure = cluster.failure().expect("recorded");
        assert_eq!(
            failure.to_string(),
            "rank 1 failed while starting: never reached all_reduce #7 (layer 3, 64 bytes) within 9s"
        );
    }

    #[test]
    fn a_step_that_nobody_gives_up_names_the_rank_that_is_behind() {
        let directory = tempfile::tempdir().expect("a directory");
        let (_segment, cluster, mut executor) = group(&directory);
        let lost = executor.wait(1, Duration::from_millis(1)).unwrap_err();
        assert_eq!(lost.to_string(), "rank 0 lost: step 1 took longer than 1ms");
        assert_eq!(cluster.failure().map(|failure| failure.rank), Some(0));
    }
}
