//! Events over ZeroMQ, as vLLM publishes them: PUB messages of topic, sequence number (8 bytes, big-endian) and batch,
//! and a ROUTER socket for batches that a subscriber has missed.

use std::{
    collections::VecDeque,
    io,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream, tcp::OwnedReadHalf},
    sync::{
        broadcast::{Receiver, error::RecvError},
        mpsc,
    },
    task::JoinSet,
    time::sleep,
};

use super::{KvEventBatch, KvEventHub, zmtp};

/// Subscribers at a time, and of replays.
const MAX_CONNECTIONS: usize = 64;
/// Prefixes that a subscriber asks for.
const MAX_SUBSCRIPTIONS: usize = 64;
/// Between attempts to reach a subscriber that is to be connected to.
const PAUSE: Duration = Duration::from_secs(1);
/// Ends the answer to a replay request, in place of a sequence number.
const END: [u8; 8] = (-1_i64).to_be_bytes();

/// What of `--kv-events-config` is ZeroMQ's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZmqOptions {
    /// `tcp://*:port` is listened on, another address is connected to.
    pub endpoint: String,
    /// Listened on.
    pub replay_endpoint: Option<String>,
    /// Batches that are kept for replay.
    pub buffer_steps: usize,
    pub topic: String,
}

#[derive(Debug, thiserror::Error)]
pub enum ZmqError {
    #[error("endpoint {0:?} must be tcp://host:port, or tcp://*:port to listen")]
    Endpoint(String),
    #[error("cannot listen on {endpoint}: {source}")]
    Bind { endpoint: String, source: io::Error },
}

/// The publisher's tasks; they end when it is dropped.
#[derive(Debug)]
pub struct ZmqPublisher {
    _tasks: JoinSet<()>,
}

impl ZmqPublisher {
    /// Opens the sockets and publishes what comes through `hub` from now on.
    ///
    /// # Errors
    /// An address that is malformed or taken.
    pub async fn start(options: &ZmqOptions, hub: &KvEventHub) -> Result<Self, ZmqError> {
        let mut tasks = JoinSet::new();
        let topic: Arc<[u8]> = options.topic.as_bytes().into();
        match Endpoint::parse(&options.endpoint)? {
            Endpoint::Connect(address) => {
                tasks.spawn(connect(address, topic, hub.clone()));
            }
            bind @ Endpoint::Bind(_) => {
                let listener = bind.listen(&options.endpoint).await?;
                let hub = hub.clone();
                tasks.spawn(accept(listener, move |stream| {
                    publish(stream, topic.clone(), hub.subscribe())
                }));
            }
        }
        if let Some(endpoint) = &options.replay_endpoint {
            let listener = Endpoint::parse(endpoint)?.listen(endpoint).await?;
            let kept = Kept::default();
            tasks.spawn(keep(kept.clone(), options.buffer_steps, hub.subscribe()));
            tasks.spawn(accept(listener, move |stream| replay(stream, kept.clone())));
        }
        Ok(Self { _tasks: tasks })
    }
}

enum Endpoint {
    Bind(String),
    Connect(String),
}

impl Endpoint {
    /// As vLLM tells them apart.
    fn parse(endpoint: &str) -> Result<Self, ZmqError> {
        let wrong = || ZmqError::Endpoint(endpoint.to_owned());
        let address = endpoint.strip_prefix("tcp://").ok_or_else(wrong)?;
        let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
        if port.parse::<u16>().is_err() || host.is_empty() {
            return Err(wrong());
        }
        Ok(match host {
            "*" | "0.0.0.0" => Self::Bind(format!("0.0.0.0:{port}")),
            host if host.contains("::") => Self::Bind(address.to_owned()),
            _ => Self::Connect(address.to_owned()),
        })
    }

    async fn listen(self, endpoint: &str) -> Result<TcpListener, ZmqError> {
        let (Self::Bind(address) | Self::Connect(address)) = self;
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| ZmqError::Bind {
                endpoint: endpoint.to_owned(),
                source,
            })?;
        tracing::info!(endpoint, "KV events listening");
        Ok(listener)
    }
}

/// Serves each connection, a bounded number of them at a time.
async fn accept<F: Future<Output = Result<(), zmtp::ZmtpError>> + Send + 'static>(
    listener: TcpListener,
    serve: impl Fn(TcpStream) -> F,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, peer)) => {
                    let session = serve(stream);
                    connections.spawn(async move {
                        if let Err(error) = session.await {
                            tracing::debug!(%peer, %error, "a KV event connection ended");
                        }
                    });
                }
                // Out of descriptors, say: others may become free.
                Err(error) => {
                    tracing::warn!(%error, "a KV event connection was not accepted");
                    sleep(PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Publishes to one address for as long as this lives, whether or not anybody is there yet.
async fn connect(address: String, topic: Arc<[u8]>, hub: KvEventHub) {
    loop {
        let session = async {
            let stream = TcpStream::connect(&address).await?;
            publish(stream, topic.clone(), hub.subscribe()).await
        };
        if let Err(error) = session.await {
            tracing::debug!(address, %error, "the subscriber of KV events is not there");
        }
        sleep(PAUSE).await;
    }
}

async fn publish(
    mut stream: TcpStream,
    topic: Arc<[u8]>,
    mut batches: Receiver<Arc<KvEventBatch>>,
) -> Result<(), zmtp::ZmtpError> {
    stream.set_nodelay(true)?;
    zmtp::handshake(&mut stream, "PUB", &["SUB", "XSUB"]).await?;
    let (reader, mut writer) = stream.into_split();
    let mut subscriptions = Subscriptions::default();
    let (sender, mut changes) = mpsc::channel(1);
    // Pinned, so that a half-read frame is not lost when there is something to send first.
    let mut reading = pin!(read_changes(reader, sender));
    loop {
        tokio::select! {
            ended = &mut reading => return ended,
            Some(change) = changes.recv() => subscriptions.change(&change)?,
            batch = batches.recv() => match batch {
                Ok(batch) if subscriptions.want(&topic) => {
                    let sequence = batch.sequence.to_be_bytes();
                    zmtp::write_message(&mut writer, &[&topic, &sequence, batch.msgpack()]).await?;
                }
                // One that falls behind sees it by the numbers.
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Ok(()),
            },
        }
    }
}

async fn read_changes(
    mut reader: OwnedReadHalf,
    changes: mpsc::Sender<Vec<u8>>,
) -> Result<(), zmtp::ZmtpError> {
    loop {
        let message = zmtp::read_message(&mut reader).await?;
        let change = message.into_iter().next().unwrap_or_default();
        if changes.send(change).await.is_err() {
            return Ok(());
        }
    }
}

#[derive(Default)]
struct Subscriptions(Vec<Vec<u8>>);

impl Subscriptions {
    /// A message of a 1 and a prefix subscribes, of a 0 and a prefix ends that.
    fn change(&mut self, message: &[u8]) -> Result<(), zmtp::ZmtpError> {
        match message.split_first() {
            Some((1, prefix)) if self.0.len() < MAX_SUBSCRIPTIONS => self.0.push(prefix.to_vec()),
            Some((1, _)) => return Err(zmtp::ZmtpError::Peer("has too many subscriptions")),
            Some((0, prefix)) => {
                if let Some(at) = self.0.iter().position(|known| known == prefix) {
                    self.0.swap_remove(at);
                }
            }
            _ => return Err(zmtp::ZmtpError::Peer("sends something else than subscriptions")),
        }
        Ok(())
    }

    fn want(&self, topic: &[u8]) -> bool {
        self.0.iter().any(|prefix| topic.starts_with(prefix))
    }
}

/// Past batches, the oldest first.
type Kept = Arc<Mutex<VecDeque<Arc<KvEventBatch>>>>;

async fn keep(kept: Kept, most: usize, mut batches: Receiver<Arc<KvEventBatch>>) {
    loop {
        match batches.recv().await {
            Ok(batch) => {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                while kept.len() >= most.max(1) {
                    kept.pop_front();
                }
                kept.push_back(batch);
            }
            Err(RecvError::Lagged(missed)) => tracing::warn!(missed, "KV events were not kept for replay"),
            Err(RecvError::Closed) => return,
        }
    }
}

/// Answers requests for everything from a sequence number on: one message for each batch, and one that ends them.
async fn replay(mut stream: TcpStream, kept: Kept) -> Result<(), zmtp::ZmtpError> {
    stream.set_nodelay(true)?;
    zmtp::handshake(&mut stream, "ROUTER", &["REQ", "DEALER"]).await?;
    loop {
        let request = zmtp::read_message(&mut stream).await?;
        let first = match &request[..] {
            [delimiter, first] if delimiter.is_empty() => <[u8; 8]>::try_from(&first[..]).ok(),
            _ => None,
        };
        let first = first.ok_or(zmtp::ZmtpError::Peer("does not name a sequence number"))?;
        let first = u64::from_be_bytes(first);
        let batches: Vec<_> = {
            let kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.iter()
                .filter(|batch| batch.sequence >= first)
                .cloned()
                .collect()
        };
        for batch in batches {
            let sequence = batch.sequence.to_be_bytes();
            zmtp::write_message(&mut stream, &[&[], &sequence, batch.msgpack()]).await?;
        }
        zmtp::write_message(&mut stream, &[&[], &END, &[]]).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::KvEvent;

    #[test]
    fn endpoints_are_told_apart_as_vllm_does() {
        let bound = |endpoint| match Endpoint::parse(endpoint) {
            Ok(Endpoint::Bind(address)) => Ok(address),
            Ok(Endpoint::Connect(address)) => Err(address),
            Err(error) => panic!("{error}"),
        };
        assert_eq!(bound("tcp://*:5557"), Ok("0.0.0.0:5557".to_owned()));
        assert_eq!(bound("tcp://[::1]:5557"), Ok("[::1]:5557".to_owned()));
        assert_eq!(bound("tcp://indexer:5557"), Err("indexer:5557".to_owned()));
        for wrong in ["ipc:///tmp/x", "tcp://*", "tcp://:5", "tcp://host:port", "5557"] {
            assert!(Endpoint::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_subscriber_gets_what_it_asked_for_and_replays_the_rest() {
        let hub = KvEventHub::default();
        let options = ZmqOptions {
            endpoint: "tcp://[::1]:0".to_owned(),
            replay_endpoint: None,
            buffer_steps: 2,
            topic: "kv-events".to_owned(),
        };
        let listener = Endpoint::parse(&options.endpoint).expect("an address");
        let listener = listener.listen(&options.endpoint).await.expect("free");
        let address = listener.local_addr().expect("bound");
        let (topic, server) = (Arc::from(options.topic.as_bytes()), hub.clone());
        let serving = accept(listener, move |stream| {
            publish(stream, Arc::clone(&topic), server.subscribe())
        });
        let _serving = tokio::spawn(serving);
        let mut subscriber = TcpStream::connect(address).await.expect("connected");
        zmtp::handshake(&mut subscriber, "SUB", &["PUB"])
            .await
            .expect("a publisher");
        zmtp::write_message(&mut subscriber, &[b"\x01kv-"])
            .await
            .expect("subscribed");
        // Nothing says that a subscription has arrived: publish until it has.
        let publishing = hub.clone();
        let _publishing = tokio::spawn(async move {
            loop {
                publishing.publish(16, vec![KvEvent::Cleared]);
                sleep(Duration::from_millis(1)).await;
            }
        });
        let message = zmtp::read_message(&mut subscriber).await.expect("a message");
        let [topic, sequence, batch] = &message[..] else {
            panic!("{} frames", message.len());
        };
        assert_eq!((&topic[..], sequence.len()), (&b"kv-events"[..], 8));
        assert!(batch.windows(16).any(|window| window == b"AllBlocksCleared"));
        let next = zmtp::read_message(&mut subscriber).await.expect("a message");
        let number = |frame: &[u8]| u64::from_be_bytes(frame.try_into().expect("8 bytes"));
        assert_eq!(number(&next[1]), number(sequence) + 1);
    }
}
