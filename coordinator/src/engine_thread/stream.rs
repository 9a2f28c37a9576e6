//! The engine's end of a sequence's channel.

use tokio::sync::mpsc::{self, error::TrySendError};

use super::{StreamEvent, admission::Ticket, stopped};

/// Sends without waiting, and always ends: whatever happens to the engine, the reader gets one `Finished` or `Failed`
/// as its last event, for which one slot of the channel is never used otherwise.
pub(super) struct Stream {
    sender: mpsc::Sender<StreamEvent>,
    /// Held until the sequence starts.
    ticket: Option<Ticket>,
    ended: bool,
}

/// The reader has fallen behind by the whole capacity.
#[derive(Debug)]
pub(super) struct Overflow;

impl Stream {
    pub(super) fn new(capacity: usize, ticket: Ticket) -> (Self, mpsc::Receiver<StreamEvent>) {
        let (sender, receiver) = mpsc::channel(capacity + 1);
        let stream = Self {
            sender,
            ticket: Some(ticket),
            ended: false,
        };
        (stream, receiver)
    }

    /// The sequence has left the queue.
    pub(super) fn start(&mut self) {
        self.ticket = None;
    }

    /// A reader that is gone counts as served; its submission's drop aborts the sequence.
    pub(super) fn send(&mut self, event: StreamEvent) -> Result<(), Overflow> {
        // Only this side takes slots, so there cannot be fewer when the event is sent.
        if self.sender.capacity() <= 1 && !self.sender.is_closed() {
            return Err(Overflow);
        }
        self.put(event);
        Ok(())
    }

    pub(super) fn end(mut self, event: StreamEvent) {
        self.ended = true;
        self.put(event);
    }

    fn put(&self, event: StreamEvent) {
        match self.sender.try_send(event) {
            Ok(()) | Err(TrySendError::Closed(_)) => {}
            Err(TrySendError::Full(event)) => {
                debug_assert!(false, "no slot was kept for {event:?}");
            }
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.ended {
            self.put(StreamEvent::Failed(stopped()));
        }
    }
}
