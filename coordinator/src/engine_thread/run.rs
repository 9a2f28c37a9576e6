//! The thread's loop: inbox to engine, events to streams.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        mpsc::{Receiver, TryRecvError},
    },
    thread,
    time::Instant,
};

use phalanx_proto::{ErrorKind, RpcError, step::SequenceId};

use super::{
    EngineState, Lifecycle, Message, Shared, StreamEvent, check_admits, control::Waiters, refusal,
    stream::Stream,
};
use crate::engine::{
    self, Clock, Command, ConfigError, EngineConfig, EngineCore, EngineFailure, Event, Executor,
    ExecutorError, FinishReason, Progress, Snapshot,
};

/// Time since the engine's start.
pub(super) struct MonotonicClock(Instant);

impl Clock for MonotonicClock {
    fn now(&self) -> engine::Instant {
        engine::Instant(self.0.elapsed())
    }
}

pub(super) fn new_core<E: Executor>(
    config: &EngineConfig,
    executor: E,
) -> Result<EngineCore<E, MonotonicClock>, ConfigError> {
    EngineCore::new(config.clone(), executor, MonotonicClock(Instant::now()))
}

struct Live {
    stream: Stream,
    lifecycle: Lifecycle,
}

pub(super) struct EngineThread<E> {
    core: EngineCore<E, MonotonicClock>,
    inbox: Receiver<Message>,
    shared: Arc<Shared>,
    live: BTreeMap<SequenceId, Live>,
    /// For the next turn.
    commands: Vec<Command>,
    waiters: Waiters,
    rank_lost: Option<(u32, ExecutorError)>,
    draining: bool,
    /// Of the last turn.
    events: Vec<Event>,
    snapshot: Snapshot,
}

impl<E: Executor> EngineThread<E> {
    pub(super) fn new(
        core: EngineCore<E, MonotonicClock>,
        inbox: Receiver<Message>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            snapshot: core.snapshot(),
            core,
            inbox,
            shared,
            live: BTreeMap::new(),
            commands: Vec::new(),
            waiters: Waiters::default(),
            rank_lost: None,
            draining: false,
            events: Vec::new(),
        }
    }

    pub(super) fn run(mut self) -> Result<(), EngineFailure> {
        // Declared after `self`, so dropped first: no stream ends before admission does.
        let ending = Ending(Arc::clone(&self.shared));
        while self.receive() {
            let began = Instant::now();
            let progress = match self.rank_lost.take() {
                Some((epoch, cause)) => self.core.rank_lost(epoch, cause, &mut self.events),
                None => self.core.step(self.commands.drain(..), &mut self.events),
            };
            let now = self.core.snapshot();
            // Before those that have begun leave the queue.
            self.shared.admission.set_free_seats(self.free_seats(&now));
            self.route_events(began);
            self.publish_kv_events();
            self.publish(&progress, now);
            self.waiters.answer();
            if let Progress::Fatal(failure) = progress {
                ending.set(EngineState::Failed);
                match &failure {
                    EngineFailure::Closed(_) => tracing::info!("the engine has ended with its group"),
                    EngineFailure::NotRebuilt { .. } => {
                        tracing::error!(%failure, sequences = self.live.len(), "the engine has failed");
                    }
                }
                self.fail_all(&failure);
                return Err(failure);
            }
        }
        ending.set(EngineState::Stopped);
        Ok(())
    }

    /// Collects what has come in, sleeping if there is nothing to do. False: the thread shall end.
    fn receive(&mut self) -> bool {
        let idle = !self.core.has_work() && self.commands.is_empty();
        if idle {
            match self.inbox.recv() {
                Ok(message) => {
                    if !self.take(message) {
                        return false;
                    }
                }
                Err(_) => return false,
            }
        }
        loop {
            match self.inbox.try_recv() {
                Ok(message) => {
                    if !self.take(message) {
                        return false;
                    }
                }
                Err(TryRecvError::Empty) => return true,
                // Nobody is left to ask for anything, nor to listen: every submission holds a sender.
                Err(TryRecvError::Disconnected) => return !idle,
            }
        }
    }

    fn take(&mut self, message: Message) -> bool {
        match message {
            Message::Submit(submitted) => {
                let (request, stream, lifecycle) = *submitted;
                // It may have passed the handle's check just before the drain.
                if self.draining
                    && let Err(error) = check_admits(EngineState::Draining)
                {
                    stream.end(StreamEvent::Failed(error));
                    return true;
                }
                self.live.insert(request.id, Live { stream, lifecycle });
                self.commands.push(Command::Submit(request));
            }
            Message::Finish(id, reason) => self.commands.push(Command::Finish(id, reason)),
            Message::Control(command, answer) => {
                self.waiters.add(&command, answer);
                self.commands.push(command);
            }
            Message::RankLost { epoch, cause } => {
                // A late report of an earlier group must not hide one of this group.
                if self.rank_lost.as_ref().is_none_or(|(known, _)| *known <= epoch) {
                    self.rank_lost = Some((epoch, cause));
                }
            }
            Message::Drain => self.draining = true,
            Message::Shutdown => return false,
        }
        true
    }

    fn route_events(&mut self, began: Instant) {
        let now = Instant::now();
        for event in std::mem::take(&mut self.events) {
            match event {
                Event::Started {
                    sequence,
                    cached_tokens,
                } => {
                    if let Some(live) = self.live.get_mut(&sequence) {
                        live.stream.start();
                        live.lifecycle.start(began, cached_tokens);
                        self.send(sequence, StreamEvent::Started { cached_tokens });
                    }
                }
                Event::PromptLogprobs { sequence, tokens } => {
                    self.send(sequence, StreamEvent::PromptLogprobs(tokens));
                }
                Event::Token(sampled) => {
                    if let Some(live) = self.live.get_mut(&sampled.sequence) {
                        live.lifecycle.token(now, &self.shared.metrics);
                        self.send(sampled.sequence, StreamEvent::Token(sampled));
                    }
                }
                Event::Preempted { sequence } => {
                    if let Some(live) = self.live.get_mut(&sequence) {
                        live.lifecycle.preempt();
                    }
                }
                Event::Finished { sequence, reason } => {
                    if let Some(live) = self.live.remove(&sequence) {
                        if live.lifecycle.is_measured() {
                            let stats = live.lifecycle.finish(now, reason);
                            self.shared.metrics.request_finished(&stats);
                        }
                        live.stream.end(StreamEvent::Finished(reason));
                    }
                }
                Event::Rejected { sequence, cause } => self.fail(sequence, refusal(cause)),
                Event::Failed { sequence, cause } => {
                    self.fail(
                        sequence,
                        RpcError::new(ErrorKind::InvalidArgument, cause.to_string()),
                    );
                }
                Event::Lost {
                    sequence,
                    failed_steps,
                } => {
                    let why =
                        format!("ranks were lost in {failed_steps} steps in a row that ran this request");
                    self.fail(sequence, RpcError::new(ErrorKind::WorkerLost, why));
                }
                Event::Paused | Event::Resumed | Event::PrefixCacheReset => self.waiters.note(event),
            }
        }
    }

    /// Where somebody waits, it is not for a seat, or there is none.
    fn free_seats(&self, now: &Snapshot) -> usize {
        if now.num_waiting > 0 || now.paused {
            return 0;
        }
        let seats = self.shared.config.engine.max_num_seqs as usize;
        seats.saturating_sub(now.num_running)
    }

    fn publish_kv_events(&mut self) {
        let config = &self.shared.config;
        let events = self.core.take_kv_events();
        if let Some(hub) = config.kv_events.as_ref().filter(|_| !events.is_empty()) {
            hub.publish(config.engine.block_size, events);
        }
    }

    /// A reader that does not keep up loses its sequence; waiting for it would hold up everybody else's.
    fn send(&mut self, id: SequenceId, event: StreamEvent) {
        if let Some(live) = self.live.get_mut(&id)
            && live.stream.send(event).is_err()
        {
            let capacity = self.shared.config.stream_capacity;
            let why = format!("the response was not read while {capacity} events were waiting");
            self.fail(id, RpcError::new(ErrorKind::QueueFull, why));
            self.commands.push(Command::Finish(id, FinishReason::Abort));
        }
    }

    fn fail(&mut self, id: SequenceId, error: RpcError) {
        if let Some(live) = self.live.remove(&id) {
            self.shared.metrics.request_failed();
            live.stream.end(StreamEvent::Failed(error));
        }
    }

    fn fail_all(&mut self, failure: &EngineFailure) {
        let error = RpcError::new(ErrorKind::WorkerLost, failure.to_string());
        while let Some((&id, _)) = self.live.first_key_value() {
            self.fail(id, error.clone());
        }
    }

    fn publish(&mut self, progress: &Progress, now: Snapshot) {
        let metrics = &self.shared.metrics;
        match progress {
            Progress::Idle => {}
            Progress::Stepped(step) => metrics.stepped(step),
            Progress::Recovered { epoch, cause, took } => {
                tracing::warn!(%cause, epoch, ?took, "the rank group was replaced");
                metrics.group_lost(cause);
                metrics.group_recovered(*took);
            }
            Progress::Fatal(EngineFailure::NotRebuilt { cause, .. }) => metrics.group_lost(cause),
            Progress::Fatal(EngineFailure::Closed(_)) => {}
        }
        let before = std::mem::replace(&mut self.snapshot, now);
        metrics.engine_turned(&before, &self.snapshot);
        let drained = self.draining && self.core.is_idle() && self.commands.is_empty();
        self.shared.status.send_modify(|status| {
            status.snapshot = self.snapshot;
            if matches!(progress, Progress::Stepped(_)) {
                status.last_step = Some(Instant::now());
            }
            if drained {
                status.state = EngineState::Drained;
            }
        });
    }
}

/// Says how the thread ended, also if it panics, and leaves no gauge standing.
struct Ending(Arc<Shared>);

impl Ending {
    fn set(&self, state: EngineState) {
        self.0.status.send_modify(|status| status.state = state);
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if thread::panicking() {
            self.set(EngineState::Failed);
        }
        self.0.metrics.engine_ended();
    }
}
