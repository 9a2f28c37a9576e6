//! Responses that are kept, so that clients can ask for them and go on from them.
//!
//! They live in this gateway's memory, for whoever has the API key that made them. Their number and their bytes are
//! bounded: the oldest that is finished goes first. vLLM keeps them all for ever.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::body::Bytes;
use phalanx_proto::{ErrorKind, RpcError, v1::ChatMessage};
use tokio::sync::watch;

use super::{
    items::add_output,
    reply::{Reply, Status},
};

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreLimits {
    /// Responses, those that are still being made included.
    pub responses: usize,
    /// Bytes of all of them: their JSON, the conversations they came from, the events of their streams.
    pub bytes: usize,
}

impl Default for StoreLimits {
    fn default() -> Self {
        Self {
            responses: 1024,
            bytes: 256 << 20,
        }
    }
}

/// Whose response, and its id.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) tenant: String,
    pub(super) id: String,
}

/// A response that is kept.
#[derive(Debug)]
pub(super) struct Record {
    /// What it answers, without its instructions.
    conversation: Vec<ChatMessage>,
    state: watch::Sender<State>,
}

/// As it is now.
#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) reply: Arc<Reply>,
    /// Those of a background response that streams.
    pub(super) events: Option<Vec<Bytes>>,
}

impl Record {
    /// `streams`: its events are kept, too.
    pub(super) fn new(reply: Reply, conversation: Vec<ChatMessage>, streams: bool) -> Self {
        let state = State {
            reply: Arc::new(reply),
            events: streams.then(Vec::new),
        };
        Self {
            conversation,
            state: watch::Sender::new(state),
        }
    }

    pub(super) fn reply(&self) -> Arc<Reply> {
        Arc::clone(&self.state.borrow().reply)
    }

    pub(super) fn is_running(&self) -> bool {
        self.state.borrow().reply.is_running()
    }

    /// The state now, and news of it.
    pub(super) fn watch(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Changes it, unless it has ended.
    pub(super) fn update(&self, change: impl FnOnce(&mut State)) {
        self.state.send_if_modified(|state| {
            let goes_on = state.reply.is_running();
            if goes_on {
                change(state);
            }
            goes_on
        });
    }

    /// Whether the events of its stream are kept.
    pub(super) fn has_events(&self) -> bool {
        self.state.borrow().events.is_some()
    }

    /// Resolves when it has ended.
    pub(super) async fn ended(&self) {
        // The sender is this record's.
        let _ = self.watch().wait_for(|state| !state.reply.is_running()).await;
    }

    /// Ends it, if it has not ended yet.
    pub(super) fn cancel(&self) {
        self.update(|state| Arc::make_mut(&mut state.reply).cancel());
    }

    /// The conversation with this response as its last turn.
    ///
    /// # Errors
    /// `InvalidArgument` naming `previous_response_id`, for a response without an answer.
    pub(super) fn continued(&self) -> Result<Vec<ChatMessage>, RpcError> {
        const PARAM: &str = "previous_response_id";
        let reply = self.reply();
        if !matches!(reply.status, Status::Completed | Status::Incomplete) {
            let message = format!("{PARAM}: the response {} has no answer to go on from", reply.id);
            return Err(RpcError::invalid(PARAM, message));
        }
        let mut messages = self.conversation.clone();
        add_output(&mut messages, &reply.output);
        Ok(messages)
    }

    fn bytes(&self) -> usize {
        let messages = self.conversation.iter().map(message_bytes).sum::<usize>();
        self.reply().bytes().saturating_add(messages)
    }
}

/// Bytes that a message takes, about.
fn message_bytes(message: &ChatMessage) -> usize {
    let calls = message.tool_calls.iter();
    let calls = calls.map(|call| call.id.len() + call.name.len() + call.arguments.len());
    let parts = message.text_parts.iter().map(String::len);
    let reasoning = message.reasoning.as_ref().map_or(0, String::len);
    size_of::<ChatMessage>() + message.content.len() + reasoning + calls.chain(parts).sum::<usize>()
}

/// Keeps one response that is yet to come.
#[derive(Debug)]
pub(super) struct Keeper {
    store: Arc<Store>,
    key: Key,
    conversation: Vec<ChatMessage>,
}

impl Keeper {
    /// `conversation`: what the response answers, without its instructions.
    pub(super) fn new(store: Arc<Store>, key: Key, conversation: Vec<ChatMessage>) -> Self {
        Self {
            store,
            key,
            conversation,
        }
    }

    /// Keeps it now that it has ended.
    pub(super) fn keep(self, reply: Reply) {
        let record = Record::new(reply, self.conversation, false);
        if let Err(error) = self.store.insert(self.key, Arc::new(record)) {
            // Two requests at a time had the same name.
            tracing::warn!(%error, "a response is not stored");
        }
    }

    /// Keeps it before it has ended; `streams`: with its events.
    ///
    /// # Errors
    /// Those of [`Store::insert`].
    pub(super) fn begin(
        self,
        reply: Reply,
        streams: bool,
    ) -> Result<(Arc<Store>, Key, Arc<Record>), RpcError> {
        let record = Arc::new(Record::new(reply, self.conversation, streams));
        self.store.insert(self.key.clone(), Arc::clone(&record))?;
        Ok((self.store, self.key, record))
    }
}

#[derive(Debug)]
pub(crate) struct Store {
    limits: StoreLimits,
    shelf: Mutex<Shelf>,
}

#[derive(Debug, Default)]
struct Shelf {
    /// By age.
    slots: BTreeMap<u64, Slot>,
    numbers: HashMap<Key, u64>,
    next: u64,
    bytes: usize,
}

#[derive(Debug)]
struct Slot {
    key: Key,
    record: Arc<Record>,
    bytes: usize,
}

impl Store {
    pub(crate) fn new(limits: StoreLimits) -> Self {
        Self {
            limits,
            shelf: Mutex::default(),
        }
    }

    pub(super) fn get(&self, key: &Key) -> Option<Arc<Record>> {
        let shelf = self.shelf();
        let number = shelf.numbers.get(key)?;
        shelf.slots.get(number).map(|slot| Arc::clone(&slot.record))
    }

    /// Keeps a response. One that is finished and larger than the store is gone at once.
    ///
    /// # Errors
    /// `InvalidArgument` if its id is taken, `QueueFull` if it is still running and there is no room for it.
    pub(super) fn insert(&self, key: Key, record: Arc<Record>) -> Result<(), RpcError> {
        let bytes = record.bytes();
        let mut shelf = self.shelf();
        if shelf.numbers.contains_key(&key) {
            return Err(id_is_taken());
        }
        let number = shelf.next;
        shelf.next += 1;
        shelf.bytes += bytes;
        shelf.numbers.insert(key.clone(), number);
        shelf.slots.insert(number, Slot { key, record, bytes });
        if shelf.settle(self.limits) {
            return Ok(());
        }
        shelf.remove(number);
        Err(is_full())
    }

    /// Counts what a response has grown by.
    ///
    /// # Errors
    /// `QueueFull` if it is still running and there is no room for it.
    pub(super) fn grow(&self, key: &Key, bytes: usize) -> Result<(), RpcError> {
        let mut shelf = self.shelf();
        let Some(number) = shelf.numbers.get(key).copied() else {
            return Ok(());
        };
        if let Some(slot) = shelf.slots.get_mut(&number) {
            slot.bytes += bytes;
            shelf.bytes += bytes;
        }
        if shelf.settle(self.limits) {
            Ok(())
        } else {
            Err(is_full())
        }
    }

    /// No code panics with the lock held; were it so, counts would be off and nothing worse.
    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf {
    /// Forgets the oldest finished responses until the others are within the limits; false if they are not even then.
    fn settle(&mut self, limits: StoreLimits) -> bool {
        while self.slots.len() > limits.responses || self.bytes > limits.bytes {
            let mut finished = self.slots.iter().filter(|(_, slot)| !slot.record.is_running());
            let Some(oldest) = finished.next().map(|(number, _)| *number) else {
                return false;
            };
            self.remove(oldest);
        }
        true
    }

    fn remove(&mut self, number: u64) {
        if let Some(slot) = self.slots.remove(&number) {
            self.bytes -= slot.bytes;
            self.numbers.remove(&slot.key);
        }
    }
}

pub(super) fn id_is_taken() -> RpcError {
    RpcError::invalid("request_id", "request_id is the id of a response that is stored")
}

fn is_full() -> RpcError {
    let message = "the store of responses is full of those that are still running";
    RpcError::new(ErrorKind::QueueFull, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::responses::request::tests::reply;

    fn key(tenant: &str, id: &str) -> Key {
        Key {
            tenant: tenant.to_owned(),
            id: id.to_owned(),
        }
    }

    fn record(status: Status) -> Arc<Record> {
        let mut reply = reply();
        reply.status = status;
        Arc::new(Record::new(reply, Vec::new(), false))
    }

    fn store(responses: usize, bytes: usize) -> Store {
        Store::new(StoreLimits { responses, bytes })
    }

    #[test]
    fn the_oldest_that_is_finished_goes_first() {
        let store = store(2, usize::MAX);
        let running = record(Status::InProgress);
        store.insert(key("a", "1"), Arc::clone(&running)).expect("room");
        for id in ["2", "3"] {
            store
                .insert(key("a", id), record(Status::Completed))
                .expect("room");
        }
        let kept = |id| store.get(&key("a", id)).is_some();
        assert!(kept("1") && !kept("2") && kept("3"));
        assert!(store.get(&key("b", "3")).is_none(), "another one's");
        let taken = store.insert(key("a", "3"), record(Status::Completed));
        assert_eq!(taken.expect_err("taken").param.as_deref(), Some("request_id"));
        store.insert(key("a", "4"), record(Status::Queued)).expect("room");
        let full = store.insert(key("a", "5"), record(Status::Queued));
        assert_eq!(full.expect_err("full").kind, ErrorKind::QueueFull);
        running.cancel();
        store.insert(key("a", "5"), record(Status::Queued)).expect("room");
        assert!(store.get(&key("a", "1")).is_none());
    }

    #[test]
    fn bytes_are_bounded_too() {
        let bytes = record(Status::Completed).bytes();
        assert!(bytes > 100);
        let small = store(100, bytes - 1);
        small
            .insert(key("", "1"), record(Status::Completed))
            .expect("finished");
        assert!(small.get(&key("", "1")).is_none());
        // Three, one of which has a longer status.
        let store = store(100, 3 * bytes + 8);
        for id in ["1", "2"] {
            store
                .insert(key("", id), record(Status::Completed))
                .expect("room");
        }
        store
            .insert(key("", "3"), record(Status::InProgress))
            .expect("room");
        store
            .grow(&key("", "3"), bytes)
            .expect("room after another one goes");
        assert!(store.get(&key("", "1")).is_none() && store.get(&key("", "2")).is_some());
        let full = store.grow(&key("", "3"), 3 * bytes);
        assert_eq!(full.expect_err("full").kind, ErrorKind::QueueFull);
        let shelf = store.shelf();
        assert_eq!(shelf.slots.len(), 1);
    }

    #[test]
    fn a_response_that_has_ended_does_not_change() {
        let record = record(Status::InProgress);
        assert!(record.continued().is_err());
        record.cancel();
        record.update(|state| Arc::make_mut(&mut state.reply).status = Status::Completed);
        assert_eq!(record.reply().status, Status::Cancelled);
        let error = record.continued().expect_err("no answer");
        assert_eq!(error.param.as_deref(), Some("previous_response_id"));
    }
}
