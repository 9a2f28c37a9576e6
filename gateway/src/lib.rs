//! The OpenAI-compatible HTTP front: translates JSON and server-sent events to the gRPC services `Inference` and
//! `Admin` of a coordinator, and back.
//!
//! Of several coordinators that serve one model it is the router: see `router`.
//!
//! It holds no model file, no tokenizer and no template: text work has one home, the coordinator, and a gateway can be
//! restarted or doubled at any time. What it does own is everything about HTTP: limits on bodies and connections, API
//! keys, OpenAI's error objects, the order of events in a stream, draining.
#![forbid(unsafe_code)]

mod auth;
mod backend;
mod config;
mod exposition;
mod lifecycle;
mod limits;
mod metrics;
mod observe;
mod openai;
mod operator;
mod router;
mod routes;
mod server;
mod stall;
mod trace;

pub use config::{GatewayConfig, GatewayError};
pub use limits::HttpLimits;
pub use openai::output::ReplyOptions;
pub use router::{Backends, RoutingPolicy};
pub use server::Gateway;

/// Binds and serves until `shutdown` resolves and the running requests have ended; see [`Gateway`].
///
/// # Errors
/// A [`GatewayError`] when the configuration is refused or an address cannot be bound. A coordinator that is not there
/// yet is no error: requests are answered 503 until it is.
pub async fn run(config: GatewayConfig, shutdown: impl Future<Output = ()>) -> Result<(), GatewayError> {
    Gateway::bind(config).await?.run(shutdown).await;
    Ok(())
}
