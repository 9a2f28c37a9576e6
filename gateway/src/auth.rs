//! API keys. Everything but the probes needs one when any is configured, metrics and unknown routes included.

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

/// Middleware: 401 unless the route is open or a key fits.
pub(crate) async fn require_key(State(keys): State<ApiKeys>, request: Request, next: Next) -> Response {
    let authorization = request.headers().get(header::AUTHORIZATION);
    let open = OPEN_ROUTES.contains(&request.uri().path());
    if open || keys.admit(authorization.map(HeaderValue::as_bytes)) {
        return next.run(request).await;
    }
    let message = "this server needs an API key: Authorization: Bearer <key>";
    let mut response = ApiError::from(RpcError::new(ErrorKind::Unauthenticated, message)).into_response();
    let challenge = HeaderValue::from_static("Bearer");
    response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    response
}
