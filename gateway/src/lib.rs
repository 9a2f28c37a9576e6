//! The OpenAI-compatible HTTP front: translates JSON and server-sent events to the gRPC services `Inference`,
//! `Tokenizer`, `Admin` and `Control` of a coordinator, and back.
//!
//! Of several coordinators that serve one model it is the router: see `router`.
//!
//! It holds no model file, no tokenizer and no template: text work has one home, the coordinator, and a gateway can be
//! restarted or doubled at any time, if it was not told to store responses. What it does own is everything about HTTP:
//! limits on bodies and connections, API keys, OpenAI's error objects, the order of events in a stream, draining.
#![forbid(unsafe_code)]

mod anthropic;
mod auth;
mod backend;
mod config;
mod control;
mod exposition;
mod inference;
mod lifecycle;
mod limits;
mod metrics;
mod observe;
mod openai;
mod openapi;
mod operator;
mod query;
mod responses;
mod router;
mod routes;
mod sagemaker;
mod server;
mod stall;
mod tgi;
mod tokenizer;
mod trace;

pub use config::{GatewayConfig, GatewayError, RouteOptions};
pub use limits::HttpLimits;
pub use openai::output::ReplyOptions;
pub use responses::StoreLimits;
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
