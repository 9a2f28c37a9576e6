//! What a gateway is told at start, and why it may refuse.

use std::{io, path::PathBuf, time::Duration};

use phalanx_proto::{
    secret::ApiKeys,
    spans::Tracer,
    tls::{TlsError, TlsFiles},
};

use crate::{limits::HttpLimits, openai::output::ReplyOptions, responses::StoreLimits, router::Backends};

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
    /// Keys of which an operator must present one to control the engine; without any, nobody can. The coordinator is
    /// shown the first.
    pub admin_keys: ApiKeys,
    /// Which routes there are, and where.
    pub routes: RouteOptions,
    /// A log line for every request that is answered.
    pub log_requests: bool,
    /// Where the spans of requests go.
    pub tracer: Tracer,
    /// What replies contain.
    pub reply: ReplyOptions,
    /// How many of the responses of `/v1/responses` are stored; none without it, as with vLLM.
    pub responses: Option<StoreLimits>,
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
            admin_keys: ApiKeys::default(),
            routes: RouteOptions::default(),
            log_requests: false,
            tracer: Tracer::default(),
            reply: ReplyOptions::default(),
            responses: None,
            response_role: "assistant".to_owned(),
            drain_timeout: Duration::from_secs(30),
            limits: HttpLimits::default(),
        }
    }
}

/// The routes that a configuration adds, leaves out or moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteOptions {
    /// Where a proxy serves the gateway, `/llm`: every route answers there, too. Empty: nowhere else.
    pub root_path: String,
    /// `/tokenizer_info`, which shows the chat template.
    pub tokenizer_info: bool,
    /// `/openapi.json` and `/docs`.
    pub docs: bool,
}

impl Default for RouteOptions {
    fn default() -> Self {
        Self {
            root_path: String::new(),
            tokenizer_info: false,
            docs: true,
        }
    }
}

impl RouteOptions {
    /// Takes vLLM's forms of a root path, with or without a slash at its end.
    ///
    /// # Errors
    /// [`GatewayError::RootPath`].
    pub(crate) fn checked(mut self) -> Result<Self, GatewayError> {
        self.root_path
            .truncate(self.root_path.trim_end_matches('/').len());
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
        let usable = self.root_path.is_empty()
            || (self.root_path.starts_with('/')
                && !self.root_path.contains("//")
                && self.root_path.bytes().all(plain));
        if usable {
            return Ok(self);
        }
        Err(GatewayError::RootPath { path: self.root_path })
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
    /// The root path is no plain absolute path.
    #[error("root path {path:?} must start with / and hold letters, digits and -._~ only")]
    RootPath {
        /// The path as configured.
        path: String,
    },
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
        /// Name of the field in [`HttpLimits`] or [`StoreLimits`].
        field: &'static str,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_paths_are_plain_and_absolute() {
        let root = |path: &str| {
            let options = RouteOptions {
                root_path: path.to_owned(),
                ..RouteOptions::default()
            };
            options.checked().map(|options| options.root_path)
        };
        for (given, taken) in [("", ""), ("/", ""), ("/llm", "/llm"), ("/a/b-1/", "/a/b-1")] {
            assert_eq!(root(given).expect(given), taken);
        }
        for bad in ["llm", "/a//b", "/{a}", "/a b", "/a?b", "http://a"] {
            assert!(root(bad).is_err(), "{bad}");
        }
    }
}
