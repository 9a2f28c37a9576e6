//! The gateway's own metrics, and one exposition that holds the coordinator's too.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use axum::body::{Body, Bytes, HttpBody};
use http::{Method, StatusCode};
use hyper::body::{Frame, SizeHint};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode_registry},
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};

use crate::{router::RouterMetrics, trace::HttpSpan};
const END: &str = "# EOF\n";

/// Seconds; from a refused body to a long generation.
const DURATION_BUCKETS: [f64; 14] = [
    0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];
/// Finer, for all routes together.
const HIGHR_BUCKETS: [f64; 21] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0,
    30.0, 60.0,
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: &'static str,
    handler: &'static str,
    status: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DurationLabels {
    method: &'static str,
    handler: &'static str,
}

type Durations = Family<DurationLabels, Histogram, fn() -> Histogram>;

/// Counts and times of HTTP requests, named and labelled as vLLM's server names them.
pub(crate) struct HttpMetrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    durations: Durations,
    highr: Histogram,
}

impl HttpMetrics {
    /// With those of the router in the same exposition.
    pub(crate) fn new(router: &RouterMetrics) -> Self {
        let requests = Family::default();
        let durations: Durations = Family::new_with_constructor(|| Histogram::new(DURATION_BUCKETS));
        let mut registry = Registry::default();
        registry.register(
            "http_requests",
            "HTTP requests by method, route and class of status",
            requests.clone(),
        );
        registry.register(
            "http_request_duration_seconds",
            "Time from a request's head to the end of its reply",
            durations.clone(),
        );
        router.register(&mut registry);
        let highr = Histogram::new(HIGHR_BUCKETS);
        registry.register(
            "http_request_duration_highr_seconds",
            "The same over all routes, in finer steps",
            highr.clone(),
        );
        Self {
            registry,
            requests,
            durations,
            highr,
        }
    }

    /// One valid OpenMetrics exposition of the coordinator's metrics, if there are any, and the gateway's.
    pub(crate) fn exposition(&self, coordinator: Option<&str>) -> String {
        let mut text = String::new();
        if let Some(body) = coordinator {
            let body = body.trim_end();
            let body = body.strip_suffix(END.trim_end()).unwrap_or(body).trim_end();
            if !body.is_empty() {
                text.push_str(body);
                text.push('\n');
            }
        }
        // Writing to a String cannot fail.
        let _ = encode_registry(&mut text, &self.registry);
        text.push_str(END);
        text
    }
}

/// A request being measured. Recorded when dropped, so a reply that its client walked away from counts too.
pub(crate) struct Measurement {
    metrics: Arc<HttpMetrics>,
    labels: DurationLabels,
    start: Instant,
    status: &'static str,
    /// Ends with the measurement.
    pub(crate) span: Option<HttpSpan>,
}

impl Measurement {
    /// `handler` is a route of the table, not a client's path: labels must not grow with what clients send.
    pub(crate) fn start(metrics: Arc<HttpMetrics>, method: &Method, handler: &'static str) -> Self {
        let labels = DurationLabels {
            method: method_label(method),
            handler,
        };
        Self {
            metrics,
            labels,
            start: Instant::now(),
            // Stays so when the client leaves before there is a status.
            status: "4xx",
            span: None,
        }
    }

    /// Measures on, to the end of `body`.
    pub(crate) fn follow(mut self, status: StatusCode, body: Body) -> Body {
        self.status = status_label(status);
        if let Some(span) = &mut self.span {
            span.status = Some(status.as_u16());
        }
        Body::new(MeasuredBody {
            body,
            _measurement: self,
        })
    }
}

impl Drop for Measurement {
    fn drop(&mut self) {
        let DurationLabels { method, handler } = self.labels;
        let labels = RequestLabels {
            method,
            handler,
            status: self.status,
        };
        self.metrics.requests.get_or_create(&labels).inc();
        let seconds = self.start.elapsed().as_secs_f64();
        self.metrics
            .durations
            .get_or_create(&self.labels)
            .observe(seconds);
        self.metrics.highr.observe(seconds);
    }
}

struct MeasuredBody {
    body: Body,
    _measurement: Measurement,
}

impl HttpBody for MeasuredBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn method_label(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "POST" => "POST",
        "HEAD" => "HEAD",
        "PUT" => "PUT",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        "PATCH" => "PATCH",
        _ => "other",
    }
}

fn status_label(status: StatusCode) -> &'static str {
    match status.as_u16() / 100 {
        2 => "2xx",
        3 => "3xx",
        4 => "4xx",
        _ => "5xx",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expositions_are_merged_under_one_end() {
        let metrics = Arc::new(HttpMetrics::new(&RouterMetrics::default()));
        let measurement = Measurement::start(Arc::clone(&metrics), &Method::GET, "/health");
        drop(measurement.follow(StatusCode::OK, Body::empty()));
        let theirs = "# HELP a b.\n# TYPE a counter\na_total 1\n# EOF\n";
        for body in [theirs, theirs.trim_end(), "# EOF\n", ""] {
            let text = metrics.exposition(Some(body));
            assert_eq!(text.matches("# EOF").count(), 1, "{text}");
            assert!(text.ends_with("# EOF\n"));
            assert!(!text.contains("\n\n"), "an empty line is no OpenMetrics: {text}");
            assert!(text.contains(r#"http_requests_total{method="GET",handler="/health",status="2xx"} 1"#));
        }
        assert!(
            metrics
                .exposition(Some(theirs))
                .contains("a_total 1\n# HELP http")
        );
        assert!(metrics.exposition(None).starts_with("# HELP http"));
    }
}
