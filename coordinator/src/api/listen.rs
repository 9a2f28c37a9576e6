//! Where the services are served: TCP, perhaps with TLS, and unix sockets.

use std::{io, net::SocketAddr, path::Path, time::Duration};

use phalanx_proto::{
    socket::{Access, UnixSocket},
    tls::{ServerTls, TlsError, TlsFiles},
};
use tokio::{net::TcpListener, sync::watch, task::JoinSet, time::timeout};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{
    service::Routes,
    transport::{Server, server::TcpIncoming},
};

use super::secured::secured;

/// Streams of one connection at a time; a gateway opens one connection and multiplexes.
const MAX_CONCURRENT_STREAMS: u32 = 1024;
const MAX_HEADER_LIST_BYTES: u32 = 16 << 10;
/// A peer that does not answer a ping for so long is gone, and its streams with it.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// What a TLS client must speak here.
const PROTOCOLS: &[&[u8]] = &[b"h2"];

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("cannot listen on {address}: {source}")]
    Bind { address: String, source: io::Error },
    #[error("serving failed: {0}")]
    Serve(#[from] tonic::transport::Error),
    #[error("a listener's task panicked")]
    Panicked,
}

/// Bound sockets that nobody serves yet.
#[derive(Default)]
pub struct Listeners {
    tcp: Vec<TcpListener>,
    /// Of the TCP listeners.
    tls: Option<ServerTls>,
    unix: Vec<UnixSocket>,
}

impl Listeners {
    /// Adds a TCP listener; returns its address, which has the port chosen if port 0 was asked for.
    pub async fn bind_tcp(&mut self, address: SocketAddr) -> Result<SocketAddr, ListenError> {
        let failed = |source| ListenError::Bind {
            address: address.to_string(),
            source,
        };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        self.tcp.push(listener);
        Ok(bound)
    }

    /// Has TLS on the TCP listeners. Errors: a file that is missing or holds something else.
    pub fn secure(&mut self, files: TlsFiles) -> Result<(), ListenError> {
        self.tls = Some(ServerTls::new(files, PROTOCOLS)?);
        Ok(())
    }

    /// Adds a unix socket (mode 0600), replacing a socket file that nobody listens on. It is removed when serving ends.
    pub fn bind_unix(&mut self, path: &Path) -> Result<(), ListenError> {
        let socket = UnixSocket::bind(path, Access::Owner).map_err(|source| ListenError::Bind {
            address: path.display().to_string(),
            source,
        })?;
        self.unix.push(socket);
        Ok(())
    }
}

/// Serves `routes` on every listener until `shutdown`, then lets running requests finish for at most `drain`.
/// Errors: a listener failed; the others are stopped.
pub async fn serve(
    routes: Routes,
    listeners: Listeners,
    shutdown: impl Future<Output = ()>,
    drain: Duration,
) -> Result<(), ListenError> {
    let routes = routes.prepare();
    let (stop, _) = watch::channel(false);
    let mut servers = JoinSet::new();
    let mut socket_files = Vec::new();
    for listener in listeners.tcp {
        let server = server().add_routes(routes.clone());
        let stopped = stopped(stop.subscribe());
        match &listeners.tls {
            Some(tls) => {
                let incoming = secured(listener, tls.clone());
                servers.spawn(server.serve_with_incoming_shutdown(incoming, stopped));
            }
            None => {
                let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
                servers.spawn(server.serve_with_incoming_shutdown(incoming, stopped));
            }
        }
    }
    for UnixSocket { listener, file } in listeners.unix {
        let stopped = stopped(stop.subscribe());
        let incoming = UnixListenerStream::new(listener);
        servers.spawn(
            server()
                .add_routes(routes.clone())
                .serve_with_incoming_shutdown(incoming, stopped),
        );
        socket_files.push(file);
    }
    tokio::select! {
        () = shutdown => {}
        Some(ended) = servers.join_next() => {
            ended.map_err(|_| ListenError::Panicked)??;
        }
    }
    stop.send_replace(true);
    // New clients find no socket while the old ones' requests finish.
    drop(socket_files);
    let rest = async {
        while let Some(ended) = servers.join_next().await {
            ended.map_err(|_| ListenError::Panicked)??;
        }
        Ok(())
    };
    timeout(drain, rest).await.unwrap_or_else(|_| {
        tracing::warn!(
            ?drain,
            "requests still run after the drain time; they are cut off"
        );
        Ok(())
    })
}

fn server() -> Server {
    Server::builder()
        .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
        .http2_max_header_list_size(MAX_HEADER_LIST_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}

/// Until told to stop, or the one who would tell is gone.
async fn stopped(mut stop: watch::Receiver<bool>) {
    let _ = stop.wait_for(|&stop| stop).await;
}
