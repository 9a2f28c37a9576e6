//! TCP connections whose handshake is over.

use std::time::Duration;

use phalanx_proto::tls::ServerTls;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
    time::sleep,
};
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;

/// Handshakes at a time; further clients wait in the kernel's queue.
const MAX_HANDSHAKES: usize = 256;
/// Pause after a failed `accept`, which mostly means that the process is out of file descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

type Connection = std::io::Result<TlsStream<TcpStream>>;

/// Accepts until the stream is dropped. A client that is slow with its handshake holds up nobody else.
pub(super) fn secured(listener: TcpListener, tls: ServerTls) -> ReceiverStream<Connection> {
    let (ready, connections) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut handshakes = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = ready.closed() => return,
                Some(_) = handshakes.join_next() => continue,
                accepted = listener.accept(), if handshakes.len() < MAX_HANDSHAKES => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    handshakes.spawn(shake_hands(stream, tls.clone(), ready.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    });
    ReceiverStream::new(connections)
}

async fn shake_hands(stream: TcpStream, tls: ServerTls, ready: mpsc::Sender<Connection>) {
    let handshake = async {
        // Each token is its own small write.
        stream.set_nodelay(true)?;
        tls.accept(stream).await
    };
    match handshake.await {
        // Nobody takes it once the server has ended.
        Ok(stream) => drop(ready.send(Ok(stream)).await),
        Err(error) => tracing::debug!(%error, "no TLS with a client"),
    }
}
