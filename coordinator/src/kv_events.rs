//! The prefix cache's changes on their way to indexers: over gRPC (`Admin.SubscribeKvEvents`) and over ZeroMQ.
//!
//! The engine thread hands over a batch and never waits. A subscriber that does not keep up misses batches and sees it by
//! the gap in their numbers.

mod msgpack;
mod zmq;
mod zmtp;

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use tokio::sync::broadcast;

pub use zmq::{ZmqError, ZmqOptions, ZmqPublisher};

use crate::engine::KvEvent;

/// Batches that a subscriber may be behind.
const CAPACITY: usize = 4096;

/// What one turn of the engine changed.
#[derive(Debug)]
pub struct KvEventBatch {
    /// Counts up by one from 0.
    pub sequence: u64,
    /// Unix time, seconds.
    pub timestamp: f64,
    /// Tokens per block.
    pub block_size: u32,
    pub events: Vec<KvEvent>,
    msgpack: OnceLock<Vec<u8>>,
}

impl KvEventBatch {
    /// vLLM's form of it, made once for all subscribers.
    fn msgpack(&self) -> &[u8] {
        self.msgpack.get_or_init(|| msgpack::encode(self))
    }
}

/// Where batches go through. Cheap to clone.
#[derive(Clone, Debug)]
pub struct KvEventHub {
    batches: broadcast::Sender<Arc<KvEventBatch>>,
    /// Of the next batch.
    sequence: Arc<AtomicU64>,
}

impl Default for KvEventHub {
    fn default() -> Self {
        Self {
            batches: broadcast::Sender::new(CAPACITY),
            sequence: Arc::default(),
        }
    }
}

impl KvEventHub {
    /// Sends the changes of one turn to whoever has subscribed. Called by one thread.
    pub(crate) fn publish(&self, block_size: u32, events: Vec<KvEvent>) {
        let timestamp = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let batch = KvEventBatch {
            // Only this thread counts.
            sequence: self.sequence.fetch_add(1, Ordering::Relaxed),
            timestamp: timestamp.map_or(0.0, |since| since.as_secs_f64()),
            block_size,
            events,
            msgpack: OnceLock::new(),
        };
        // Nobody has to listen.
        let _ = self.batches.send(Arc::new(batch));
    }

    /// Batches from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<KvEventBatch>> {
        self.batches.subscribe()
    }
}
