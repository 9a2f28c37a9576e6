//! The one OS thread that runs the engine, and the handle through which everybody else talks to it.
//!
//! Nothing here waits for the engine and the engine waits for nobody: sequences enter through an inbox that is bounded by
//! admission tickets, and leave through one bounded channel each, whose slow reader loses the sequence rather than
//! holding up a step. Without sequences the thread sleeps in `recv`.

mod admission;
mod control;
mod lifecycle;
mod run;
mod stream;
#[cfg(test)]
mod tests;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Sender, channel},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use phalanx_proto::{
    ErrorKind, RpcError, secret,
    step::{SampledToken, ScoredToken, SequenceId},
};
use tokio::sync::{mpsc, oneshot, watch};

pub(crate) use self::lifecycle::Milestones;
use self::{admission::AdmissionQueue, lifecycle::Lifecycle, stream::Stream};
use crate::{
    engine::{
        Command, ConfigError, Constraint, EngineConfig, EngineFailure, EngineRequest, Executor,
        ExecutorError, FinishReason, PrefixHashAlgo, RequestError, SamplingParams, SchedulingPolicy,
        Snapshot, StopRules, TenantId,
    },
    kv_events::KvEventHub,
    metrics::Metrics,
};

/// A sequence to be queued; its id is given out by [`EngineHandle::submit`].
#[derive(Clone, Debug)]
pub struct NewSequence {
    pub prompt: Vec<u32>,
    /// Output that another server has made already.
    pub output: Vec<u32>,
    pub sampling: SamplingParams,
    pub stop: StopRules,
    pub constraint: Constraint,
    pub priority: i32,
    pub cache_salt: Option<String>,
    pub tenant: TenantId,
}

/// What a sequence's owner hears of it. `Finished` or `Failed` is the last.
#[derive(Clone, Debug)]
pub enum StreamEvent {
    Started {
        cached_tokens: u32,
    },
    /// The next prompt tokens that were to be scored; all come before the first `Token`.
    PromptLogprobs(Vec<ScoredToken>),
    Token(SampledToken),
    Finished(FinishReason),
    Failed(RpcError),
}

/// A queued sequence. Dropping it aborts the sequence and frees its blocks within a step.
///
/// It has to be kept while `events` is read: moving `events` out and dropping the rest aborts as well.
#[derive(Debug)]
pub struct Submission {
    pub id: SequenceId,
    pub events: mpsc::Receiver<StreamEvent>,
    pub(crate) milestones: Arc<Milestones>,
    end: EndOnDrop,
}

impl Submission {
    /// Ends the sequence because its text is complete, which is not an abort.
    pub fn stop(mut self) {
        self.end.reason = FinishReason::Stop;
    }
}

#[derive(Debug)]
struct EndOnDrop {
    id: SequenceId,
    reason: FinishReason,
    inbox: Sender<Message>,
}

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        // Of an ended sequence the engine knows nothing and ignores this; an engine that is gone has nothing to abort.
        let _ = self.inbox.send(Message::Finish(self.id, self.reason));
    }
}

/// How the thread is set up: the engine's own configuration and the bounds of what surrounds it.
#[derive(Clone, Debug)]
pub struct EngineThreadConfig {
    pub engine: EngineConfig,
    /// Most sequences that have been submitted and have not started.
    pub max_num_queued_reqs: usize,
    /// Most prompt tokens of those; a prompt that queues alone may be longer.
    pub max_num_queued_tokens: usize,
    /// Most events a stream's reader may fall behind.
    pub stream_capacity: usize,
    /// Where changes of the prefix cache go; none: nobody is told.
    pub kv_events: Option<KvEventHub>,
    /// Starts the chains of block names that others can compute. Without it they start anywhere.
    pub prefix_hash_seed: Option<String>,
}

impl EngineThreadConfig {
    pub fn new(engine: EngineConfig) -> Self {
        Self {
            engine,
            max_num_queued_reqs: 1024,
            max_num_queued_tokens: 1 << 22,
            stream_capacity: 4096,
            kv_events: None,
            prefix_hash_seed: None,
        }
    }
}

/// Why the thread could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{field} is zero")]
    Zero { field: &'static str },
    /// No thread.
    #[error("the engine could not be started: {0}")]
    System(#[from] io::Error),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineState {
    Running,
    /// Admits nothing; what was admitted goes on.
    Draining,
    /// Was draining and has nothing left.
    Drained,
    /// Ended by [`EngineHandle::shutdown`], or because nobody had a handle any more.
    Stopped,
    /// The group was lost for good, or the engine has panicked.
    Failed,
}

/// The engine as of its last turn.
#[derive(Clone, Copy, Debug)]
pub struct EngineStatus {
    pub state: EngineState,
    pub snapshot: Snapshot,
    /// When a step last went through every rank.
    pub last_step: Option<Instant>,
}

/// What handles and the thread share.
struct Shared {
    config: EngineThreadConfig,
    metrics: Arc<Metrics>,
    admission: Arc<AdmissionQueue>,
    next_id: AtomicU64,
    status: watch::Sender<EngineStatus>,
}

/// What the thread finds in its inbox. The channel has no bound of its own, but needs none: there is one `Submit` for
/// each admission ticket and one `Finish` for each submission, and operators wait for the answer to a `Control`.
#[expect(
    clippy::large_enum_variant,
    reason = "few wait in the inbox, which is bounded"
)]
enum Message {
    Submit(Box<(EngineRequest, Stream, Lifecycle)>),
    Finish(SequenceId, FinishReason),
    Control(Command, oneshot::Sender<bool>),
    RankLost { epoch: u32, cause: ExecutorError },
    Drain,
    Shutdown,
}

/// Cheap to clone; safe to call from anywhere.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
    inbox: Sender<Message>,
}

/// Starts the engine over a group that is ready. Joining the thread tells why it ended. What is cached can neither be
/// guessed nor collided with from outside: the builtin block names get a secret of this process's own, whatever the
/// configuration says.
pub fn spawn_engine(
    mut config: EngineThreadConfig,
    executor: impl Executor + Send + 'static,
    metrics: Arc<Metrics>,
) -> Result<(EngineHandle, JoinHandle<Result<(), EngineFailure>>), StartError> {
    config.engine.validate()?;
    for (field, value) in [
        ("max_num_queued_reqs", config.max_num_queued_reqs),
        ("stream_capacity", config.stream_capacity),
    ] {
        if value == 0 {
            return Err(StartError::Zero { field });
        }
    }
    config.engine.kv_events = config.kv_events.is_some();
    config.engine.prefix_cache_seed = match (config.engine.prefix_hash_algo, &config.prefix_hash_seed) {
        (PrefixHashAlgo::Sha256Cbor, Some(seed)) => PrefixHashAlgo::none_hash(seed),
        _ => secret::random(),
    };
    metrics.engine_started(&config.engine);
    let core = run::new_core(&config.engine, executor)?;
    let status = EngineStatus {
        state: EngineState::Running,
        snapshot: core.snapshot(),
        last_step: None,
    };
    let shared = Arc::new(Shared {
        admission: Arc::new(AdmissionQueue::new(
            config.max_num_queued_reqs,
            config.max_num_queued_tokens,
            config.engine.max_num_seqs as usize,
        )),
        metrics,
        next_id: AtomicU64::new(0),
        status: watch::Sender::new(status),
        config,
    });
    let (inbox, messages) = channel();
    let handle = EngineHandle {
        shared: Arc::clone(&shared),
        inbox,
    };
    let thread = thread::Builder::new()
        .name("engine".into())
        .spawn(move || run::EngineThread::new(core, messages, shared).run())?;
    Ok((handle, thread))
}

impl EngineHandle {
    /// Queues a sequence without waiting. Errors: `QueueFull`, `Unavailable` (draining, or the group has failed), and
    /// `InvalidArgument` or `ContextLengthExceeded` for a request that could never run.
    pub fn submit(&self, request: NewSequence) -> Result<Submission, RpcError> {
        let lifecycle = Lifecycle::new(request.prompt.len(), request.stop.max_tokens);
        self.queue(request, lifecycle)
    }

    /// The same for a sequence of the server's own, which is no client's: no metric of requests and tokens counts it.
    pub fn probe(&self, request: NewSequence) -> Result<Submission, RpcError> {
        let lifecycle = Lifecycle::new(request.prompt.len(), request.stop.max_tokens);
        self.queue(request, lifecycle.unmeasured())
    }

    fn queue(&self, request: NewSequence, lifecycle: Lifecycle) -> Result<Submission, RpcError> {
        let shared = &self.shared;
        check_admits(shared.status.borrow().state)?;
        let id = SequenceId(shared.next_id.fetch_add(1, Ordering::Relaxed));
        let request = EngineRequest {
            id,
            prompt: request.prompt,
            output: request.output,
            sampling: request.sampling,
            stop: request.stop,
            constraint: Box::new(request.constraint),
            priority: request.priority,
            cache_salt: request.cache_salt,
            tenant: request.tenant,
        };
        check_priority(request.priority, shared.config.engine.policy)?;
        request.check(&shared.config.engine).map_err(refusal)?;
        let ticket = shared
            .admission
            .take(request.prompt.len() + request.output.len())
            .inspect_err(|full| shared.metrics.rejected(full.limit))?;
        let (stream, events) = Stream::new(shared.config.stream_capacity, ticket);
        let milestones = lifecycle.milestones();
        self.inbox
            .send(Message::Submit(Box::new((request, stream, lifecycle))))
            .map_err(|_| stopped())?;
        let inbox = self.inbox.clone();
        Ok(Submission {
            id,
            events,
            milestones,
            end: EndOnDrop {
                id,
                reason: FinishReason::Abort,
                inbox,
            },
        })
    }

    /// What the engine was started with.
    pub fn config(&self) -> &EngineConfig {
        &self.shared.config.engine
    }

    pub fn status(&self) -> EngineStatus {
        *self.shared.status.borrow()
    }

    /// Stops admission: [`EngineHandle::submit`] is refused from now on, what was admitted goes on.
    pub fn drain(&self) {
        self.shared.status.send_modify(|status| {
            if status.state == EngineState::Running {
                status.state = EngineState::Draining;
            }
        });
        // An engine that is gone has nothing to drain; the same holds below.
        let _ = self.inbox.send(Message::Drain);
    }

    /// Returns once [`EngineHandle::drain`] was called and nothing is left, or the engine has ended. Has no deadline of
    /// its own: the caller knows how long it may wait for its clients.
    pub async fn drained(&self) {
        let over =
            |status: &EngineStatus| !matches!(status.state, EngineState::Running | EngineState::Draining);
        // Cannot fail: the sender lives in `self`.
        let _ = self.shared.status.subscribe().wait_for(over).await;
    }

    /// Ends the thread after the step it is in. Every stream that is still open fails with `Unavailable`.
    pub fn shutdown(&self) {
        let _ = self.inbox.send(Message::Shutdown);
    }

    /// Lets an engine that may be idle know that a rank of the group of `epoch` is gone, so that it is replaced before
    /// the next request needs it.
    pub fn rank_lost(&self, epoch: u32, rank: u32, cause: impl Into<String>) {
        let cause = ExecutorError::RankLost {
            rank,
            cause: cause.into(),
        };
        let _ = self.inbox.send(Message::RankLost { epoch, cause });
    }
}

fn check_admits(state: EngineState) -> Result<(), RpcError> {
    let why = match state {
        EngineState::Running => return Ok(()),
        EngineState::Draining | EngineState::Drained => {
            "the server is shutting down and admits no more requests"
        }
        EngineState::Stopped => return Err(stopped()),
        EngineState::Failed => "the engine has failed",
    };
    Err(RpcError::new(ErrorKind::Unavailable, why))
}

/// A priority that nobody looks at would answer another question than the one asked.
fn check_priority(priority: i32, policy: SchedulingPolicy) -> Result<(), RpcError> {
    if priority == 0 || policy == SchedulingPolicy::Priority {
        return Ok(());
    }
    let message = format!("Got priority {priority} but Priority scheduling is not enabled.");
    Err(RpcError::invalid("priority", message))
}

fn stopped() -> RpcError {
    RpcError::new(ErrorKind::Unavailable, "the engine has stopped")
}

fn refusal(error: RequestError) -> RpcError {
    let kind = match error {
        RequestError::ContextLengthExceeded { .. } | RequestError::NeverFits { .. } => {
            ErrorKind::ContextLengthExceeded
        }
        _ => ErrorKind::InvalidArgument,
    };
    RpcError::new(kind, error.to_string()).with_param(error.param())
}
