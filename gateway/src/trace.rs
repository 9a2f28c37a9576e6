//! A request's place in its caller's trace: taken from HTTP, given on over gRPC, and told as a span of its own.

use std::time::SystemTime;

use http::{HeaderMap, Method};
use phalanx_proto::spans::{Span, TRACEPARENT, TraceContext, Tracer, Value};
use tokio::task_local;

task_local! {
    /// What calls to the coordinator are a part of, while a request is being answered.
    static CALLER: TraceContext;
}

/// Runs `answer` with `context` as the caller of what it calls.
pub(crate) async fn within<F: Future>(context: Option<TraceContext>, answer: F) -> F::Output {
    match context {
        Some(context) => CALLER.scope(context, answer).await,
        None => answer.await,
    }
}

/// The context of the request that is being answered.
pub(crate) fn caller() -> Option<TraceContext> {
    CALLER.try_with(|context| *context).ok()
}

/// The caller's span, from its headers.
pub(crate) fn parent_of(headers: &HeaderMap) -> Option<TraceContext> {
    TraceContext::parse(headers.get(TRACEPARENT)?.to_str().ok()?)
}

/// A request's span: from its head to the end of its reply, whoever drops it.
pub(crate) struct HttpSpan {
    tracer: Tracer,
    pub(crate) context: TraceContext,
    parent: Option<TraceContext>,
    start: SystemTime,
    method: Method,
    route: &'static str,
    request_id: String,
    /// None while there is no reply.
    pub(crate) status: Option<u16>,
}

impl HttpSpan {
    pub(crate) fn start(
        tracer: &Tracer,
        parent: Option<TraceContext>,
        (method, route): (Method, &'static str),
        request_id: &str,
    ) -> Self {
        Self {
            tracer: tracer.clone(),
            context: TraceContext::below(parent.as_ref()),
            parent,
            start: SystemTime::now(),
            method,
            route,
            request_id: request_id.to_owned(),
            status: None,
        }
    }
}

impl Drop for HttpSpan {
    fn drop(&mut self) {
        let mut attributes: Vec<(&'static str, Value)> = vec![
            ("http.request.method", self.method.to_string().into()),
            ("http.route", self.route.to_owned().into()),
            ("phalanx.request_id", self.request_id.clone().into()),
        ];
        if let Some(status) = self.status {
            attributes.push(("http.response.status_code", u32::from(status).into()));
        }
        // As the conventions have it, a client's mistake is no error of the server's span.
        let failed = self.status.is_none_or(|status| status >= 500);
        self.tracer.record(Span {
            name: format!("{} {}", self.method, self.route).into(),
            is_server: true,
            context: self.context,
            parent: self.parent.map(|parent| parent.span_id),
            start: self.start,
            end: SystemTime::now(),
            attributes,
            error: failed.then(|| match self.status {
                Some(status) => format!("status {status}"),
                None => "the client went away".to_owned(),
            }),
        });
    }
}
