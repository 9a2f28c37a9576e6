//! What operators ask of the engine, and the answers they wait for.

use phalanx_proto::RpcError;
use tokio::sync::oneshot;

use super::{EngineHandle, Message, stopped};
use crate::engine::{Command, Event, PauseMode};

/// Who waits for a command to have been carried out. Dropped unanswered when the engine ends.
#[derive(Default)]
pub(super) struct Waiters {
    pausing: Vec<oneshot::Sender<bool>>,
    resuming: Vec<oneshot::Sender<bool>>,
    resetting: Vec<oneshot::Sender<bool>>,
    /// Events of this turn that answer somebody.
    happened: Vec<Event>,
}

impl Waiters {
    /// Keeps `answer` until the event that answers `command`.
    pub(super) fn add(&mut self, command: &Command, answer: oneshot::Sender<bool>) {
        match command {
            Command::Pause { .. } => self.pausing.push(answer),
            Command::Resume => self.resuming.push(answer),
            Command::ResetPrefixCache { .. } => self.resetting.push(answer),
            // Nobody waits for those: their sequence has a stream.
            Command::Submit(_) | Command::Finish(..) => {}
        }
    }

    pub(super) fn note(&mut self, event: Event) {
        self.happened.push(event);
    }

    /// Tells everybody whom the noted events answer: after the turn has been published, so that who hears of a pause
    /// sees it in the status too.
    pub(super) fn answer(&mut self) {
        for event in std::mem::take(&mut self.happened) {
            self.tell(&event);
        }
    }

    fn tell(&mut self, event: &Event) {
        let tell = |waiting: &mut Vec<oneshot::Sender<bool>>, done: bool| {
            for answer in waiting.drain(..) {
                // Who has stopped waiting misses nothing.
                let _ = answer.send(done);
            }
        };
        match event {
            Event::Paused => tell(&mut self.pausing, true),
            Event::Resumed => {
                tell(&mut self.pausing, false);
                tell(&mut self.resuming, true);
            }
            Event::PrefixCacheReset => tell(&mut self.resetting, true),
            _ => {}
        }
    }
}

impl EngineHandle {
    /// Starts nothing new until [`EngineHandle::resume`]. Returns once nothing is in flight that `mode` lets go on; false
    /// if somebody resumed before. Has no deadline of its own, as a request may take as long as it likes; who stops
    /// waiting leaves the engine paused. Errors: `Unavailable`.
    pub async fn pause(&self, mode: PauseMode, clear_cache: bool) -> Result<bool, RpcError> {
        self.control(Command::Pause { mode, clear_cache }).await
    }

    /// Ends a pause. Errors: `Unavailable`.
    pub async fn resume(&self) -> Result<(), RpcError> {
        self.control(Command::Resume).await.map(drop)
    }

    /// Nothing computed so far will be found by later requests; `reset_running` also computes what runs again. Errors:
    /// `Unavailable`.
    pub async fn reset_prefix_cache(&self, reset_running: bool) -> Result<(), RpcError> {
        self.control(Command::ResetPrefixCache { reset_running })
            .await
            .map(drop)
    }

    async fn control(&self, command: Command) -> Result<bool, RpcError> {
        let (answer, answered) = oneshot::channel();
        self.inbox
            .send(Message::Control(command, answer))
            .map_err(|_| stopped())?;
        answered.await.map_err(|_| stopped())
    }
}
