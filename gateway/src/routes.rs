//! The table of routes, and what answers beside it.

use std::sync::Arc;

use axum::{
    Router,
    extract::Request,
    middleware::from_fn_with_state,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::{Method, Uri};
use phalanx_proto::{ErrorKind, RpcError, secret::ApiKeys};

use crate::{
    auth::require_key,
    lifecycle::Lifecycle,
    limits::HttpLimits,
    metrics::HttpMetrics,
    observe::{Observer, observe},
    openai::{self, error::ApiError, output::ReplyOptions},
    operator,
    router::Replicas,
};

/// What the handlers share.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) backend: Replicas,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) metrics: Arc<HttpMetrics>,
    pub(crate) limits: HttpLimits,
    pub(crate) reply: ReplyOptions,
    pub(crate) response_role: Arc<str>,
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const MODELS: &str = "/v1/models";
const HEALTH: &str = "/health";
const PING: &str = "/ping";
const VERSION: &str = "/version";
const LOAD: &str = "/load";
const METRICS: &str = "/metrics";

/// The route of `path` as a metric label; `none` for a path that is no route.
pub(crate) fn handler_label(path: &str) -> &'static str {
    [CHAT, COMPLETIONS, MODELS, HEALTH, PING, VERSION, LOAD, METRICS]
        .into_iter()
        .find(|route| *route == path)
        .unwrap_or("none")
}

/// Every route, behind the key check, behind the observer.
pub(crate) fn router(service: Service, keys: ApiKeys, observer: Observer) -> Router {
    Router::new()
        .route(CHAT, post(openai::chat::handle))
        .route(COMPLETIONS, post(openai::completions::handle))
        .route(MODELS, get(openai::models::handle))
        .route(HEALTH, get(operator::health))
        .route(PING, get(operator::health).post(operator::health))
        .route(VERSION, get(operator::version))
        .route(LOAD, get(operator::load))
        .route(METRICS, get(operator::metrics))
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .with_state(service)
        .layer(from_fn_with_state(keys, require_key))
        .layer(from_fn_with_state(observer, observe))
}

async fn no_route(method: Method, uri: Uri) -> Response {
    let message = format!("no route {method} {}", uri.path());
    ApiError::from(RpcError::new(ErrorKind::NotFound, message)).into_response()
}

async fn wrong_method(request: Request) -> Response {
    ApiError::method_not_allowed(request.method(), request.uri().path()).into_response()
}
