//! A request's trace, from its caller through gateway and coordinator to a collector that is this test.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::TcpStream,
    sync::{Arc, Mutex},
    time::Duration,
};

use phalanx_proto::otlp::{
    ExportTraceServiceRequest, ExportTraceServiceResponse, Span,
    any_value::Value,
    span::SpanKind,
    trace_service_server::{TraceService, TraceServiceServer},
};
use phalanx_tests::{processes::eventually, server::Server};
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let resources = request.into_inner().resource_spans.into_iter();
        let spans = resources
            .flat_map(|resource| resource.scope_spans)
            .flat_map(|scope| scope.spans);
        self.0.lock().expect("not poisoned").extend(spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    /// Serves until the runtime is dropped; returns the address.
    fn serve(&self, runtime: &Runtime) -> String {
        let listener = runtime
            .block_on(TcpListener::bind("127.0.0.1:0"))
            .expect("a free port");
        let address = listener.local_addr().expect("an address");
        let service = TraceServiceServer::new(self.clone());
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        format!("http://{address}")
    }

    /// The spans of the caller's trace, by name.
    fn spans(&self) -> BTreeMap<String, Span> {
        let spans = self.0.lock().expect("not poisoned");
        let ours = spans.iter().filter(|span| hex(&span.trace_id) == TRACE);
        ours.map(|span| (span.name.clone(), span.clone())).collect()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attribute<'a>(span: &'a Span, key: &str) -> &'a Value {
    let found = span.attributes.iter().find(|attribute| attribute.key == key);
    found
        .and_then(|attribute| attribute.value.as_ref()?.value.as_ref())
        .unwrap_or_else(|| panic!("no {key} in {span:?}"))
}

/// A completion asked for within a trace, by hand: the headers are the point.
fn ask(address: &str) -> String {
    let body = r#"{"prompt": "The secret word is", "max_tokens": 5, "temperature": 0, "ignore_eos": true}"#;
    let mut stream = TcpStream::connect(address).expect("connected");
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: traced-1\r\n\
         traceparent: 00-{TRACE}-{CALLER}-01\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("sent");
    let mut reply = String::new();
    stream.read_to_string(&mut reply).expect("a reply");
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    reply
}

#[test]
fn a_request_is_one_trace_and_one_line_without_its_text() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let collector = Collector::default();
    let endpoint = collector.serve(&runtime);
    let server = Server::start(&[
        "-tp",
        "2",
        "--max-model-len",
        "512",
        "--enable-log-requests",
        "--log-format",
        "json",
        "--otlp-traces-endpoint",
        &endpoint,
    ]);
    ask(&server.address);
    let names = [
        "POST /v1/completions",
        "llm_request",
        "queue",
        "prefill",
        "decode",
    ];
    eventually("all spans", Duration::from_secs(20), || {
        let spans = collector.spans();
        names.iter().all(|name| spans.contains_key(*name))
    });
    let spans = collector.spans();
    let (http, request) = (&spans[names[0]], &spans[names[1]]);
    assert_eq!(hex(&http.parent_span_id), CALLER);
    assert_eq!(request.parent_span_id, http.span_id);
    assert_eq!(
        (http.kind(), request.kind()),
        (SpanKind::Server, SpanKind::Server)
    );
    assert_eq!(
        attribute(http, "http.response.status_code"),
        &Value::IntValue(200)
    );
    assert_eq!(
        attribute(request, "gen_ai.usage.completion_tokens"),
        &Value::IntValue(5)
    );
    assert_eq!(
        attribute(request, "gen_ai.response.model"),
        &Value::StringValue("demo".into())
    );
    for name in &names[2..] {
        let part = &spans[*name];
        assert_eq!(part.parent_span_id, request.span_id, "{name}");
        assert!(part.start_time_unix_nano <= part.end_time_unix_nano, "{name}");
        assert!(
            request.start_time_unix_nano <= part.start_time_unix_nano,
            "{name}"
        );
        assert!(part.end_time_unix_nano <= request.end_time_unix_nano, "{name}");
    }
    assert_eq!(
        spans["queue"].end_time_unix_nano,
        spans["prefill"].start_time_unix_nano
    );
    assert_eq!(
        spans["prefill"].end_time_unix_nano,
        spans["decode"].start_time_unix_nano
    );

    let log = server.log_text();
    let lines: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    let of_request = |message: &str| {
        let found = lines.iter().filter(|line| {
            let id = line["fields"]["request_id"].as_str();
            line["fields"]["message"] == message && id.is_some_and(|id| id.contains("traced-1"))
        });
        found.count()
    };
    assert_eq!(
        (of_request("request ended"), of_request("answered")),
        (1, 1),
        "{log}"
    );
    assert!(!log.contains("secret word"), "a prompt was logged");
    assert!(server.stop().success());
}
