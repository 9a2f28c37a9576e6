//! API keys. Everything but the probes needs one when any is configured, metrics and unknown routes included.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, header};
use phalanx_proto::{ErrorKind, RpcError, secret::ApiKeys};

use crate::openai::error::ApiError;

/// Routes that answer without a key: what a kubelet and a load balancer ask. A scraper can bring one.
const OPEN_ROUTES: [&str; 2] = ["/health", "/ping"];

/// Whose request it is: a name made of the key it came with, which tells nothing of it. An extension of the request.
#[derive(Clone, Debug)]
pub(crate) struct Tenant(pub(crate) Arc<str>);

/// Middleware: 401 unless the route is open or a key fits.
pub(crate) async fn require_key(State(keys): State<ApiKeys>, mut request: Request, next: Next) -> Response {
    let authorization = request.headers().get(header::AUTHORIZATION);
    let open = OPEN_ROUTES.contains(&request.uri().path());
    let authorization = authorization.map(HeaderValue::as_bytes);
    if open || keys.admit(authorization) {
        if let Some(tenant) = ApiKeys::tenant(authorization).filter(|_| !keys.is_empty()) {
            request.extensions_mut().insert(Tenant(tenant.into()));
        }
        return next.run(request).await;
    }
    let message = "this server needs an API key: Authorization: Bearer <key>";
    let mut response = ApiError::from(RpcError::new(ErrorKind::Unauthenticated, message)).into_response();
    let challenge = HeaderValue::from_static("Bearer");
    response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    response
}
