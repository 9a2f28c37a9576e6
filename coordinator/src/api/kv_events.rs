//! The prefix cache's changes as a gRPC stream.

use futures_util::stream::{self, BoxStream, StreamExt};
use phalanx_proto::{
    ErrorKind, RpcError,
    v1::{self, kv_event::Event},
};
use tokio::sync::broadcast::error::RecvError;
use tonic::Status;

use crate::{
    engine::KvEvent,
    kv_events::{KvEventBatch, KvEventHub},
};

pub(super) type KvEventStream = BoxStream<'static, Result<v1::KvEventBatch, Status>>;

/// Batches from now on, until the subscriber leaves or falls too far behind.
///
/// # Errors
/// `Unimplemented` if the server was not told to offer them.
pub(super) fn stream(hub: Option<&KvEventHub>) -> Result<KvEventStream, RpcError> {
    let Some(hub) = hub else {
        let message = "KV events are off; start the server with --kv-events-config '{\"enable_kv_cache_events\": true}'";
        return Err(RpcError::new(ErrorKind::Unimplemented, message));
    };
    let batches = stream::unfold(Some(hub.subscribe()), |batches| async move {
        let mut batches = batches?;
        match batches.recv().await {
            Ok(batch) => Some((Ok(to_grpc(&batch)), Some(batches))),
            Err(RecvError::Lagged(missed)) => {
                let message = format!("{missed} batches were missed: the stream was not read fast enough");
                let error = RpcError::new(ErrorKind::QueueFull, message);
                Some((Err(error.into()), None))
            }
            Err(RecvError::Closed) => None,
        }
    });
    Ok(batches.boxed())
}

fn to_grpc(batch: &KvEventBatch) -> v1::KvEventBatch {
    let events = batch.events.iter().map(|event| v1::KvEvent {
        event: Some(match event {
            KvEvent::Stored {
                hashes,
                parent,
                token_ids,
                salt,
            } => Event::BlockStored(v1::BlockStored {
                block_hashes: hashes.iter().map(|hash| hash.0.to_vec()).collect(),
                parent_block_hash: parent.map(|parent| parent.0.to_vec()),
                token_ids: token_ids.clone(),
                block_size: batch.block_size,
                cache_salt: salt.clone(),
            }),
            KvEvent::Removed { hashes } => Event::BlockRemoved(v1::BlockRemoved {
                block_hashes: hashes.iter().map(|hash| hash.0.to_vec()).collect(),
            }),
            KvEvent::Cleared => Event::AllBlocksCleared(v1::AllBlocksCleared {}),
        }),
    });
    v1::KvEventBatch {
        sequence: batch.sequence,
        timestamp: batch.timestamp,
        events: events.collect(),
    }
}
