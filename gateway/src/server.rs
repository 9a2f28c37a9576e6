//! Listeners, connections, and the way down.

use std::{future::pending, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use phalanx_proto::{
    socket::{Access, UnixSocket},
    tls::ServerTls,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    auth::Keys,
    config::{GatewayConfig, GatewayError},
    lifecycle::Lifecycle,
    limits::{HttpLimits, MAX_HEAD_BYTES, MAX_HEADERS},
    metrics::HttpMetrics,
    observe::Observer,
    openapi::Document,
    responses::{Store, StoreLimits},
    router::{Replicas, RouterMetrics},
    routes::{Service, router, table},
    stall::StallGuard,
};

/// Pause after a failed `accept`, which mostly means that the process is out of file descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// Time for the last replies to leave once every request has ended.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// What a TLS client may speak here.
const PROTOCOLS: &[&[u8]] = &[b"http/1.1"];

/// A gateway that has its addresses and is ready to serve.
pub struct Gateway {
    listeners: Vec<Listener>,
    local_addrs: Vec<SocketAddr>,
    lifecycle: Arc<Lifecycle>,
    front: Front,
    drain_timeout: Duration,
}

impl Gateway {
    /// Checks the configuration and binds every address. Does not connect to the coordinator.
    ///
    /// # Errors
    /// A [`GatewayError`] that names the address or the field.
    pub async fn bind(config: GatewayConfig) -> Result<Self, GatewayError> {
        check(&config.limits)?;
        config.responses.as_ref().map_or(Ok(()), check_store)?;
        let options = config.routes.checked()?;
        let keys = Keys {
            clients: config.api_keys,
            admins: config.admin_keys,
        };
        let routes = table(&options);
        let lifecycle = Arc::new(Lifecycle::new(config.limits.running_prompts));
        let router_metrics = RouterMetrics::default();
        let service = Service {
            metrics: Arc::new(HttpMetrics::new(&router_metrics)),
            backend: Replicas::new(&config.backends, &keys, router_metrics)?,
            lifecycle: Arc::clone(&lifecycle),
            limits: config.limits.clone(),
            document: Arc::new(Document::of(&routes, &options.root_path)),
            reply: config.reply,
            responses: config.responses.map(Store::new).map(Arc::new),
            response_role: config.response_role.into(),
        };
        let observer = Observer {
            metrics: Arc::clone(&service.metrics),
            tracer: config.tracer,
            log_requests: config.log_requests,
        };
        let tls = config
            .tls
            .map(|files| ServerTls::new(files, PROTOCOLS))
            .transpose()?;
        let mut listeners = Vec::new();
        let mut local_addrs = Vec::new();
        for address in &config.listen {
            let (listener, local) = bind_tcp(address).await?;
            listeners.push(Listener::Tcp(listener));
            local_addrs.push(local);
        }
        if let Some(path) = config.uds {
            let socket = UnixSocket::bind(&path, Access::Umask).map_err(|source| GatewayError::Bind {
                address: path.display().to_string(),
                source,
            })?;
            listeners.push(Listener::Unix(socket));
        }
        if listeners.is_empty() {
            return Err(GatewayError::NoListener);
        }
        Ok(Self {
            listeners,
            local_addrs,
            lifecycle,
            front: Front {
                tls,
                router: router(service, routes, &options, (keys, observer)),
                permits: Arc::new(Semaphore::new(config.limits.connections)),
                limits: config.limits,
            },
            drain_timeout: config.drain_timeout,
        })
    }

    /// The bound TCP addresses, in the order of the configuration.
    pub fn local_addrs(&self) -> &[SocketAddr] {
        &self.local_addrs
    }

    /// Serves until `shutdown` resolves, then drains: `/health` answers 503 and new requests are refused at once,
    /// running ones may end within the drain time, and what is left then ends with an error.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let (closing, closed) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for listener in self.listeners {
            tasks.spawn(accept(listener, self.front.clone(), closed.clone()));
        }
        drop(closed);
        shutdown.await;
        self.lifecycle.drain();
        tracing::info!(running = self.lifecycle.running(), "draining");
        if timeout(self.drain_timeout, self.lifecycle.idle()).await.is_err() {
            tracing::warn!(running = self.lifecycle.running(), "the drain time is over");
            self.lifecycle.stop();
            // Their streams are told why; only a client that does not read keeps one alive longer than this.
            let _ = timeout(CLOSE_TIMEOUT, self.lifecycle.idle()).await;
        }
        // No receiver is left if every accept task has failed: then there is nobody to tell.
        let _ = closing.send(true);
        let ended = async { while tasks.join_next().await.is_some() {} };
        // What has not ended by then is aborted with the JoinSet.
        let _ = timeout(CLOSE_TIMEOUT, ended).await;
    }
}

fn check(limits: &HttpLimits) -> Result<(), GatewayError> {
    let fields = [
        ("body_bytes", limits.body_bytes),
        ("connections", limits.connections),
        ("running_prompts", limits.running_prompts),
    ];
    none_is_zero(&fields)
}

fn check_store(limits: &StoreLimits) -> Result<(), GatewayError> {
    none_is_zero(&[("responses", limits.responses), ("bytes", limits.bytes)])
}

fn none_is_zero(fields: &[(&'static str, usize)]) -> Result<(), GatewayError> {
    match fields.iter().find(|(_, value)| *value == 0) {
        Some((field, _)) => Err(GatewayError::ZeroLimit { field }),
        None => Ok(()),
    }
}

async fn bind_tcp(address: &str) -> Result<(TcpListener, SocketAddr), GatewayError> {
    let bind = async {
        let listener = TcpListener::bind(address).await?;
        let local = listener.local_addr()?;
        Ok((listener, local))
    };
    bind.await.map_err(|source| GatewayError::Bind {
        address: address.to_owned(),
        source,
    })
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixSocket),
}

enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Listener {
    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Each token is its own small write.
                stream.set_nodelay(true)?;
                Ok(Accepted::Tcp(stream))
            }
            Self::Unix(socket) => Ok(Accepted::Unix(socket.listener.accept().await?.0)),
        }
    }
}

/// What every connection needs.
#[derive(Clone)]
struct Front {
    /// Of TCP connections.
    tls: Option<ServerTls>,
    router: Router,
    permits: Arc<Semaphore>,
    limits: HttpLimits,
}

/// Accepts until told to close, then waits for this listener's connections.
async fn accept(listener: Listener, front: Front, mut closing: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        // The permit first: a connection beyond the limit stays in the kernel's queue.
        let next = async {
            match Arc::clone(&front.permits).acquire_owned().await {
                Ok(permit) => listener.accept().await.map(|stream| (stream, permit)),
                Err(_) => pending().await,
            }
        };
        let next = tokio::select! {
            next = next => next,
            Some(_) = connections.join_next() => continue,
            _ = closing.changed() => break,
        };
        match next {
            Ok((Accepted::Tcp(stream), permit)) => {
                connections.spawn(serve_tcp(stream, front.clone(), permit, closing.clone()));
            }
            Ok((Accepted::Unix(stream), permit)) => {
                connections.spawn(serve(stream, front.clone(), permit, closing.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn serve_tcp(
    stream: TcpStream,
    front: Front,
    permit: OwnedSemaphorePermit,
    closing: watch::Receiver<bool>,
) {
    let Some(tls) = front.tls.clone() else {
        return serve(stream, front, permit, closing).await;
    };
    match tls.accept(stream).await {
        Ok(stream) => serve(stream, front, permit, closing).await,
        Err(error) => tracing::debug!(%error, "no TLS with a client"),
    }
}

async fn serve<T>(stream: T, front: Front, _permit: OwnedSemaphorePermit, mut closing: watch::Receiver<bool>)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let io = TokioIo::new(StallGuard::new(stream, front.limits.write_stall_timeout));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(front.limits.header_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(io, TowerToHyperService::new(front.router));
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        _ = closing.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}
