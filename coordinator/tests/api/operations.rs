//! What operators, probes and other processes of the machine see.

use std::{
    fs,
    future::pending,
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
};

use phalanx_coordinator::api::{Api, EngineSlot, Listeners, StatusHandle, serve};
use phalanx_proto::{
    ErrorKind, RpcError,
    secret::ApiKeys,
    v1::{self, FinishReason, GroupState, admin_client::AdminClient, inference_client::InferenceClient},
};
use tokio::{sync::oneshot, time::timeout};
use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::{
    ranks::Permit,
    server::{DEADLINE, Server, Setup, api, connect, open, piece, request, rest},
};

#[tokio::test]
async fn health_and_status_follow_the_group() {
    let server = Server::start(Setup::default());
    let mut admin = AdminClient::new(server.channel().await);
    let mut health = HealthClient::new(server.channel().await);
    let check = HealthCheckRequest {
        service: "phalanx.v1.Inference".into(),
    };
    let mut watch = health.watch(check).await.expect("watches").into_inner();
    let mut seen = async || {
        let message = timeout(DEADLINE, watch.message()).await.expect("in time");
        message.expect("no error").expect("a status").status()
    };
    assert_eq!(seen().await, ServingStatus::NotServing);
    server.status.update(|status| {
        status.set_state(GroupState::Ready);
        status.epoch = 4;
    });
    assert_eq!(seen().await, ServingStatus::Serving);
    let status = admin.get_status(v1::GetStatusRequest {}).await;
    let status = status.expect("a reply").into_inner();
    assert_eq!((status.state(), status.epoch), (GroupState::Ready, 4));
    assert!(!status.version.is_empty());
    server
        .status
        .update(|status| status.set_state(GroupState::Draining));
    assert_eq!(seen().await, ServingStatus::NotServing);
}

#[tokio::test]
async fn metrics_and_models_are_served() {
    let server = Server::free(Setup::default());
    let mut client = server.inference().await;
    let ask = request(1, |sampling| sampling.max_tokens = Some(3));
    client.generate(ask).await.expect("a reply");
    let mut admin = AdminClient::new(server.channel().await);
    let metrics = admin.get_metrics(v1::GetMetricsRequest {}).await;
    let metrics = metrics.expect("a reply").into_inner();
    assert!(metrics.content_type.starts_with("application/openmetrics-text"));
    let body = String::from_utf8(metrics.body).expect("text");
    let tokens = body
        .lines()
        .find(|line| line.starts_with("vllm:generation_tokens_total"))
        .expect("counted");
    assert!(tokens.ends_with(" 3"), "{tokens}");

    let models = client.list_models(v1::ListModelsRequest {}).await;
    let models = models.expect("a reply").into_inner().models;
    let ids: Vec<&str> = models.iter().map(|model| model.id.as_str()).collect();
    assert_eq!(ids, ["demo", "alias"]);
    assert_eq!(models[0].max_model_len, 8192);
    assert_eq!(models[0].root, "/models/demo.gguf");
}

#[tokio::test]
async fn reflection_lists_the_services() {
    let server = Server::start(Setup::default());
    let mut client = ServerReflectionClient::new(server.channel().await);
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let replies = client
        .server_reflection_info(futures_util::stream::iter([ask]))
        .await;
    let reply = replies.expect("answers").into_inner().message().await;
    let reply = reply.expect("no error").expect("a reply").message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = reply else {
        panic!("a list of services: {reply:?}")
    };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in [
        "phalanx.v1.Inference",
        "phalanx.v1.Admin",
        "vllm.Inference",
        "vllm.Control",
        "grpc.health.v1.Health",
    ] {
        assert!(names.contains(&name), "{names:?}");
    }
}

#[tokio::test]
async fn running_requests_finish_after_shutdown_and_the_socket_goes() {
    let mut server = Server::start(Setup::default());
    let mode = fs::metadata(&server.socket).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = server.inference().await;
    let ask = request(1, |sampling| sampling.max_tokens = Some(3));
    let mut stream = open(&mut client, ask).await;
    server.permit(Permit::Step);
    piece(&mut stream).await;
    server.run_free();
    server.stop.send(()).expect("serving");
    let (end, _) = rest(&mut stream).await;
    assert_eq!(end.finish_reason(), FinishReason::Length);
    drop((stream, client));
    timeout(DEADLINE, server.serving)
        .await
        .expect("ends")
        .expect("no panic");
    assert!(!server.socket.exists());
}

#[tokio::test]
async fn stale_sockets_are_replaced_and_live_ones_left_alone() {
    let server = Server::start(Setup::default());
    let mut listeners = Listeners::default();
    let error = listeners.bind_unix(&server.socket).expect_err("a live server");
    assert!(error.to_string().contains("another server listens"), "{error}");

    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("file");
    fs::write(&file, "data").expect("written");
    let error = listeners.bind_unix(&file).expect_err("not a socket");
    assert!(error.to_string().contains("not a socket"), "{error}");
    assert_eq!(fs::read(&file).expect("still there"), b"data");

    let stale = dir.path().join("stale");
    drop(UnixListener::bind(&stale).expect("binds"));
    listeners.bind_unix(&stale).expect("replaced");
    assert!(UnixStream::connect(&stale).is_ok());
    drop(listeners);
    assert!(!stale.exists());
}

#[tokio::test]
async fn the_services_answer_before_there_is_an_engine() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut listeners = Listeners::default();
    let address = listeners
        .bind_tcp("127.0.0.1:0".parse().expect("an address"))
        .await;
    let address = address.expect("binds");
    listeners.bind_unix(&dir.path().join("s")).expect("binds");
    let routes = api(EngineSlot::default(), StatusHandle::new()).routes();
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async { stopped.await.unwrap_or_default() };
    let serving = tokio::spawn(serve(routes, listeners, shutdown, DEADLINE));

    let over_tcp = InferenceClient::connect(format!("http://{address}")).await;
    let over_unix = InferenceClient::new(connect(&dir.path().join("s")).await);
    for mut client in [over_tcp.expect("connects"), over_unix] {
        let error = client.generate(request(1, |_| {})).await;
        let error = RpcError::from(&error.expect_err("no engine"));
        assert_eq!(error.kind, ErrorKind::Unavailable);
        assert!(error.message.contains("being loaded"), "{}", error.message);
    }
    stop.send(()).expect("serving");
    let served = timeout(DEADLINE, serving).await.expect("ends");
    served.expect("no panic").expect("no error");
}

#[tokio::test]
async fn keys_are_needed_over_tcp_by_all_but_probes_and_reflection() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut listeners = Listeners::default();
    let any = "127.0.0.1:0".parse().expect("an address");
    let address = listeners.bind_tcp(any).await.expect("binds");
    listeners.bind_unix(&dir.path().join("s")).expect("binds");
    let keyed = Api {
        api_keys: ApiKeys::new(["first".to_owned(), "second".to_owned()]).expect("keys"),
        ..api(EngineSlot::default(), StatusHandle::new())
    };
    let serving = tokio::spawn(serve(keyed.routes(), listeners, pending(), DEADLINE));
    let tcp = Endpoint::from_shared(format!("http://{address}")).expect("an endpoint");
    let tcp = tcp.connect().await.expect("connects");

    for (key, admitted) in [
        (None, false),
        (Some("Bearer third"), false),
        (Some("first"), false),
        (Some("Bearer second"), true),
    ] {
        let present = |mut request: tonic::Request<()>| {
            if let Some(key) = key {
                request
                    .metadata_mut()
                    .insert("authorization", key.parse().expect("ascii"));
            }
            Ok(request)
        };
        let kind = |error: tonic::Status| RpcError::from(&error).kind;
        let expected = (!admitted).then_some(ErrorKind::Unauthenticated);
        let mut inference = InferenceClient::with_interceptor(tcp.clone(), present);
        let models = inference.list_models(v1::ListModelsRequest {}).await;
        assert_eq!(models.err().map(kind), expected, "{key:?}");
        let mut admin = AdminClient::with_interceptor(tcp.clone(), present);
        let status = admin.get_status(v1::GetStatusRequest {}).await;
        assert_eq!(status.err().map(kind), expected, "{key:?}");
    }
    let mut health = HealthClient::new(tcp.clone());
    health
        .check(HealthCheckRequest::default())
        .await
        .expect("no key for probes");
    // The file's mode is the key of the socket.
    let mut local = InferenceClient::new(connect(&dir.path().join("s")).await);
    local
        .list_models(v1::ListModelsRequest {})
        .await
        .expect("no key for the own user");
    serving.abort();
}
