//! The gRPC side of a real cluster: TCP and unix socket, health, reflection, generation, and who may attach.

use std::time::Duration;

use hyper_util::rt::TokioIo;
use phalanx_proto::{
    ErrorKind, PROTOCOL_VERSION, RpcError,
    v1::{
        self, admin_client::AdminClient, cluster_client::ClusterClient, generate_request::Prompt,
        inference_client::InferenceClient, worker_event::Event,
    },
};
use phalanx_tests::{
    http,
    server::{Server, free_port},
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

async fn tcp(port: u16) -> Channel {
    Endpoint::from_shared(format!("http://127.0.0.1:{port}"))
        .expect("an endpoint")
        .connect()
        .await
        .expect("connected")
}

async fn unix(path: std::path::PathBuf) -> Channel {
    let connect = move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    };
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(connect))
        .await
        .expect("connected")
}

fn request(text: &str) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: Some(Prompt::Text(text.into())),
        sampling: Some(v1::SamplingParams {
            temperature: Some(0.0),
            max_tokens: Some(12),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_reach_it_over_tcp_and_unix_socket() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (port, socket) = (free_port(), directory.path().join("grpc.sock"));
    let arguments = [
        "-tp",
        "2",
        "--grpc-port",
        &port.to_string(),
        "--grpc-uds",
        &socket.to_string_lossy(),
    ];
    let server = tokio::task::block_in_place(|| Server::start(&arguments));

    let channel = tcp(port).await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let check = tonic_health::pb::HealthCheckRequest {
        service: "phalanx.v1.Inference".into(),
    };
    let serving = tonic_health::pb::health_check_response::ServingStatus::Serving;
    assert_eq!(
        health.check(check).await.expect("health").into_inner().status(),
        serving
    );

    let mut admin = AdminClient::new(channel.clone());
    let status = admin
        .get_status(v1::GetStatusRequest {})
        .await
        .expect("status")
        .into_inner();
    assert_eq!((status.state(), status.ranks.len()), (v1::GroupState::Ready, 2));
    assert!(
        status
            .ranks
            .iter()
            .all(|rank| rank.phase() == v1::Phase::Serving && rank.pid > 0)
    );

    let mut inference = InferenceClient::new(channel.clone());
    let whole = inference
        .generate(request("The sun rises in the"))
        .await
        .expect("a reply")
        .into_inner();
    assert!(
        !whole.choices[0].text.is_empty() && whole.usage.is_some_and(|usage| usage.completion_tokens > 0)
    );
    let mut inference = InferenceClient::new(unix(socket.clone()).await);
    let mut stream = inference
        .generate_stream(request("The sun rises in the"))
        .await
        .expect("a stream")
        .into_inner();
    let mut text = String::new();
    while let Some(chunk) = stream.message().await.expect("a chunk") {
        text.push_str(&chunk.choice.unwrap_or_default().text);
    }
    assert_eq!(text, whole.choices[0].text);

    let bad = v1::GenerateRequest {
        prompt: Some(Prompt::Text(String::new())),
        ..request("")
    };
    let error = RpcError::from(&inference.generate(bad).await.expect_err("refused"));
    assert_eq!(error.kind, ErrorKind::InvalidArgument);

    strangers_may_not_attach(channel).await;
    assert!(tokio::task::block_in_place(|| server.stop()).success());
    assert!(!socket.exists(), "the socket is removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_port_wants_a_key_and_the_gateway_still_works() {
    let arguments = ["--grpc-port", "0", "--api-key", "sesame"];
    let server = tokio::task::block_in_place(|| Server::start(&arguments));
    let log = server.log_text();
    let address = log.lines().find_map(|line| {
        let (_, rest) = line.split_once("gRPC listening address=")?;
        rest.trim().parse::<std::net::SocketAddr>().ok()
    });
    let address = address.expect("the port that was chosen is logged");
    assert!(address.ip().is_loopback(), "{address}");
    let mut inference = InferenceClient::new(tcp(address.port()).await);
    let error = inference.generate(request("Hello")).await.expect_err("no key");
    assert_eq!(RpcError::from(&error).kind, ErrorKind::Unauthenticated);
    let mut keyed = tonic::Request::new(request("Hello"));
    let value = "Bearer sesame".parse().expect("ascii");
    keyed.metadata_mut().insert("authorization", value);
    inference.generate(keyed).await.expect("a reply");
    let models = tokio::task::block_in_place(|| http::get(&server.address, "/v1/models"));
    assert_eq!(models.expect("a reply").status, 401);
    assert!(tokio::task::block_in_place(|| server.stop()).success());
}

async fn strangers_may_not_attach(channel: Channel) {
    let hello = |join_token: &str, rank| v1::WorkerEvent {
        event: Some(Event::Hello(v1::Hello {
            protocol_version: PROTOCOL_VERSION,
            join_token: join_token.into(),
            rank,
            ..Default::default()
        })),
    };
    let mut cluster = ClusterClient::new(channel);
    for rank in [0, 1, 7, u32::MAX] {
        let events = tokio_stream::iter([hello("guess", rank)]);
        let refused = tokio::time::timeout(Duration::from_secs(5), cluster.attach(events))
            .await
            .expect("at once");
        let error = RpcError::from(&refused.expect_err("refused"));
        assert_eq!(error.kind, ErrorKind::Unauthenticated);
    }
}
