//! The outermost middleware: a name for every request, its metrics and its log line.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use phalanx_proto::{secret, spans::Tracer};

use crate::{
    limits::MAX_REQUEST_ID,
    metrics::{HttpMetrics, Measurement},
    routes::RouteTable,
    trace::{self, HttpSpan},
};

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The client's `X-Request-Id`, or one made here. Visible ASCII, at most [`MAX_REQUEST_ID`] bytes.
#[derive(Clone, Debug)]
pub(crate) struct RequestId(pub(crate) Arc<str>);

impl RequestId {
    fn of(headers: &HeaderMap) -> Self {
        let given = headers.get(X_REQUEST_ID).and_then(|value| value.to_str().ok());
        match given.filter(|id| is_usable(id)) {
            Some(id) => Self(id.into()),
            None => Self(random_hex().into()),
        }
    }
}

/// Whether a client's name for a request is visible ASCII and at most [`MAX_REQUEST_ID`] bytes.
pub(crate) fn is_usable(id: &str) -> bool {
    (1..=MAX_REQUEST_ID).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}

/// 128 bits that no other request of any gateway has.
pub(crate) fn random_hex() -> String {
    format!("{:032x}", u128::from_ne_bytes(secret::random()))
}

/// Who wants to know of requests.
#[derive(Clone)]
pub(crate) struct Observer {
    pub(crate) metrics: Arc<HttpMetrics>,
    pub(crate) tracer: Tracer,
    /// Answers are worth a line at the level that is shown.
    pub(crate) log_requests: bool,
}

/// Middleware: gives the request its id, answers with it, measures, traces and logs.
pub(crate) async fn observe(
    State((table, observer)): State<(RouteTable, Observer)>,
    mut request: Request,
    next: Next,
) -> Response {
    let method = request.method().clone();
    // A client's own path is no label: labels must not grow with what clients send.
    let handler = table.find(&request).map_or("none", |route| route.path);
    let mut measurement = Measurement::start(observer.metrics, &method, handler);
    let id = RequestId::of(request.headers());
    let mut context = trace::parent_of(request.headers());
    // What is only looked at, like probes and metrics, is no one's trace.
    if observer.tracer.is_on() && method == Method::POST {
        let span = HttpSpan::start(&observer.tracer, context, (method.clone(), handler), &id.0);
        context = Some(span.context);
        measurement.span = Some(span);
    }
    request.extensions_mut().insert(id.clone());
    let mut response = trace::within(context, next.run(request)).await;
    let status = response.status();
    if observer.log_requests {
        tracing::info!(request_id = %id.0, %method, handler, status = status.as_u16(), "answered");
    } else {
        tracing::debug!(request_id = %id.0, %method, handler, status = status.as_u16(), "answered");
    }
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(X_REQUEST_ID, value);
    }
    response.map(|body| measurement.follow(status, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usable_ids_are_kept_and_others_replaced() {
        let id = |value: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(
                X_REQUEST_ID,
                HeaderValue::from_bytes(value).expect("a header value"),
            );
            RequestId::of(&headers).0
        };
        assert_eq!(&*id(b"trace-17"), "trace-17");
        for bad in [&b""[..], b"a b", "naïve".as_bytes(), &[b'a'; MAX_REQUEST_ID + 1]] {
            assert_eq!(id(bad).len(), 32);
        }
        assert_ne!(id(b""), id(b""));
    }
}
