//! Spans to an OpenTelemetry collector, over OTLP/gRPC, in the background.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, channel},
    },
    thread,
    time::{Duration, SystemTime},
};

use tokio::{runtime, sync::mpsc, time::timeout};
use tonic::transport::Endpoint;

use super::{Span, Value};
use crate::otlp::{
    AnyValue, ExportTraceServiceRequest, InstrumentationScope, KeyValue, Resource, ResourceSpans, ScopeSpans,
    Span as Encoded, Status, any_value, span::SpanKind, status::StatusCode,
    trace_service_client::TraceServiceClient,
};

/// Spans that wait for the collector; more are dropped and counted.
const QUEUE: usize = 4096;
/// Spans of one message.
const BATCH: usize = 512;
/// How long spans wait for company.
const INTERVAL: Duration = Duration::from_millis(500);
/// A collector that takes longer loses the batch.
const EXPORT_LIMIT: Duration = Duration::from_secs(10);

/// What the end of a process waits for the last spans to leave.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum TracerError {
    #[error("traces endpoint {endpoint:?} is not http://host:port: {reason}")]
    Endpoint { endpoint: String, reason: String },
    /// No thread.
    #[error("spans cannot be exported: {0}")]
    System(#[from] io::Error),
}

/// Where spans go. Cheap to clone; without an endpoint it drops everything.
#[derive(Clone, Debug, Default)]
pub struct Tracer(Option<Arc<Queue>>);

#[derive(Debug)]
struct Queue {
    /// None while it is dropped.
    spans: Option<mpsc::Sender<Span>>,
    dropped: Arc<AtomicU64>,
    /// Says nothing, and ends with the exporter.
    exporter: Mutex<Receiver<()>>,
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.spans = None;
        if let Ok(exporter) = self.exporter.lock() {
            let _ = exporter.recv_timeout(FLUSH_LIMIT);
        }
    }
}

impl Tracer {
    /// Sends spans of `service` to the collector at `endpoint`, `http://host:port`, which need not be there yet. It has a
    /// thread of its own, which ends with the last clone.
    ///
    /// # Errors
    /// The endpoint is no such address; there is no thread.
    pub fn start(endpoint: &str, service: &str) -> Result<Self, TracerError> {
        let refuse = |reason: String| TracerError::Endpoint {
            endpoint: endpoint.to_owned(),
            reason,
        };
        // As other exporters have it for plain gRPC.
        let address = endpoint.replacen("grpc://", "http://", 1);
        if !address.starts_with("http://") {
            return Err(refuse("unknown scheme".to_owned()));
        }
        let endpoint = Endpoint::from_shared(address)
            .map_err(|error| refuse(error.to_string()))?
            .connect_timeout(EXPORT_LIMIT);
        let (spans, queue) = mpsc::channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let exporter = Exporter {
            queue,
            endpoint,
            service: service.to_owned(),
            dropped: dropped.clone(),
        };
        let (running, ended) = channel::<()>();
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        thread::Builder::new().name("otlp".into()).spawn(move || {
            runtime.block_on(exporter.run());
            drop(running);
        })?;
        Ok(Self(Some(Arc::new(Queue {
            spans: Some(spans),
            dropped,
            exporter: Mutex::new(ended),
        }))))
    }

    /// False: nobody would see a span.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Queues a span without waiting, unless its trace is not wanted.
    pub fn record(&self, span: Span) {
        if let Some(queue) = &self.0
            && span.context.sampled
            && let Some(spans) = &queue.spans
            && spans.try_send(span).is_err()
        {
            queue.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

struct Exporter {
    queue: mpsc::Receiver<Span>,
    endpoint: Endpoint,
    service: String,
    /// Spans that found the queue full.
    dropped: Arc<AtomicU64>,
}

impl Exporter {
    async fn run(mut self) {
        let mut client = TraceServiceClient::new(self.endpoint.connect_lazy());
        let mut batch = Vec::with_capacity(BATCH);
        let mut reachable = true;
        while self.queue.recv_many(&mut batch, BATCH).await > 0 {
            // Full, or the last clone is gone, or it is time.
            let _ = timeout(INTERVAL, fill(&mut self.queue, &mut batch)).await;
            let count = batch.len() as u64;
            let request = encode(&self.service, batch.drain(..));
            let sent = match timeout(EXPORT_LIMIT, client.export(request)).await {
                Ok(reply) => reply.map(drop).map_err(|status| status.to_string()),
                Err(_) => Err("no answer in time".to_owned()),
            };
            let lost = self.dropped.swap(0, Ordering::Relaxed) + if sent.is_err() { count } else { 0 };
            match &sent {
                // Once, not with every batch.
                Err(error) if reachable => tracing::warn!(%error, lost, "spans cannot be exported"),
                Ok(()) if !reachable || lost > 0 => tracing::info!(lost, "spans are exported again"),
                _ => {}
            }
            reachable = sent.is_ok();
        }
    }
}

async fn fill(queue: &mut mpsc::Receiver<Span>, batch: &mut Vec<Span>) {
    while batch.len() < BATCH {
        let room = BATCH - batch.len();
        if queue.recv_many(batch, room).await == 0 {
            return;
        }
    }
}

fn encode(service: &str, spans: impl Iterator<Item = Span>) -> ExportTraceServiceRequest {
    let attributes = [
        ("service.name", service),
        ("service.version", env!("CARGO_PKG_VERSION")),
    ];
    let attributes = attributes.map(|(key, value)| key_value(key, Value::Text(value.to_owned())));
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(Resource {
                attributes: attributes.into(),
            }),
            scope_spans: vec![ScopeSpans {
                scope: Some(InstrumentationScope {
                    name: "phalanx".to_owned(),
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                }),
                spans: spans.map(encode_span).collect(),
            }],
        }],
    }
}

fn encode_span(span: Span) -> Encoded {
    let kind = if span.is_server {
        SpanKind::Server
    } else {
        SpanKind::Internal
    };
    let attributes = span.attributes.into_iter();
    Encoded {
        trace_id: span.context.trace_id.to_vec(),
        span_id: span.context.span_id.to_vec(),
        parent_span_id: span.parent.map(Vec::from).unwrap_or_default(),
        name: span.name.into_owned(),
        kind: kind.into(),
        start_time_unix_nano: nanoseconds(span.start),
        end_time_unix_nano: nanoseconds(span.end),
        attributes: attributes.map(|(key, value)| key_value(key, value)).collect(),
        status: span.error.map(|message| Status {
            message,
            code: StatusCode::Error.into(),
        }),
    }
}

fn nanoseconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}

fn key_value(key: &str, value: Value) -> KeyValue {
    let value = match value {
        Value::Text(text) => any_value::Value::StringValue(text),
        Value::Integer(number) => any_value::Value::IntValue(number),
        Value::Number(number) => any_value::Value::DoubleValue(number),
    };
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
    }
}
