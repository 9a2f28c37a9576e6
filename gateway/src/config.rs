//! What a gateway is told at start, and why it may refuse.

use std::{io, path::PathBuf, time::Duration};

use phalanx_proto::{
    secret::ApiKeys,
    spans::Tracer,
    tls::{TlsError, TlsFiles},
};

use crate::{limits::HttpLimits, openai::output::ReplyOptions, router::Backends};

/// A gateway's configuration. All of it is fixed at start.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// TCP addresses to listen on, `host:port`; port 0 takes a free one.
    pub listen: Vec<String>,
    /// A unix socket to listen on, beside or instead of TCP.
    pub uds: Option<PathBuf>,
    /// TLS of the TCP listeners.
    pub tls: Option<TlsFiles>,
    /// Where coordinators serve gRPC, and which of them gets a request.
    pub backends: Backends,
    /// Keys of which a client must present one; without any, no key is needed. Coordinators are shown the first.
    pub api_keys: ApiKeys,
    /// A log line for every request that is answered.
    pub log_requests: bool,
    /// Where the spans of requests go.
    pub tracer: Tracer,
    /// What replies contain.
    pub reply: ReplyOptions,
    /// Role of the messages that the model makes.
    pub response_role: String,
    /// How long running requests may go on after the shutdown signal.
    pub drain_timeout: Duration,
    /// Bounds of the HTTP server.
    pub limits: HttpLimits,
}

impl GatewayConfig {
    /// A gateway for `backends` that listens on `listen`, with everything else at its default.
    pub fn new(listen: impl Into<String>, backends: Backends) -> Self {
        Self {
            listen: vec![listen.into()],
            uds: None,
            tls: None,
            backends,
            api_keys: ApiKeys::default(),
            log_requests: false,
            tracer: Tracer::default(),
            reply: ReplyOptions::default(),
            response_role: "assistant".to_owned(),
            drain_timeout: Duration::from_secs(30),
            limits: HttpLimits::default(),
        }
    }
}

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// Neither a TCP address nor a unix socket was given.
    #[error("no address to listen on: give at least one host:port or a unix socket")]
    NoListener,
    /// The address is taken, not ours, or cannot be resolved.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address as configured.
        address: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The coordinator's address is neither of the two forms.
    #[error(
        "coordinator address {address:?} is none of http://host:port, https://host:port and unix:/path: {reason}"
    )]
    CoordinatorAddress {
        /// The address as configured.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate or a key that cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// There is no coordinator to ask.
    #[error("no coordinator: give the address of at least one, or a name that resolves to them")]
    NoBackend,
    /// More coordinators than a gateway watches.
    #[error("{count} backends are more than {limit}")]
    TooManyBackends {
        /// Addresses given.
        count: usize,
        /// Most that are allowed.
        limit: usize,
    },
    /// The name that resolves to coordinators has no port, or more than a port.
    #[error("backend name {name:?} is not of the form name:port")]
    BackendDns {
        /// The name as configured.
        name: String,
    },
    /// A limit of zero would refuse everything.
    #[error("limit {field} must be at least 1")]
    ZeroLimit {
        /// Name of the field in [`HttpLimits`].
        field: &'static str,
    },
}
