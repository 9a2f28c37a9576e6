//! Keys, sockets and addresses.

use std::os::unix::net::UnixListener;

use phalanx_gateway::{Backends, Gateway, GatewayConfig, GatewayError};
use phalanx_proto::secret::ApiKeys;
use tokio::net::UnixStream;

use crate::support::{Connection, Coordinator, Script, Server, config, get, pair, post_with};

#[tokio::test]
async fn a_key_is_needed_everywhere_but_for_probes() {
    let coordinator = Coordinator::start(Script::Hello).await;
    let mut config = config(&coordinator);
    config.api_keys = ApiKeys::new(["first".to_owned(), "second".to_owned()]).expect("not empty");
    let server = Server::start(config).await;
    for path in ["/health", "/ping"] {
        assert_eq!(get(server.address, path).await.status, 200, "{path}");
    }
    for path in [
        "/v1/models",
        "/version",
        "/load",
        "/metrics",
        "/v1/nothing",
        "/health/",
        "//health",
    ] {
        let reply = get(server.address, path).await;
        assert_eq!(
            (reply.status, reply.header("www-authenticate")),
            (401, Some("Bearer")),
            "{path}"
        );
        assert_eq!(reply.json()["error"]["code"], "unauthenticated");
    }
    let complete = async |authorization: &str| {
        post_with(
            server.address,
            "/v1/completions",
            authorization,
            br#"{"prompt": "a"}"#,
        )
        .await
        .status
    };
    assert_eq!(complete("Authorization: Bearer first\r\n").await, 200);
    assert_eq!(complete("Authorization: Bearer second\r\n").await, 200);
    assert_eq!(complete("Authorization: Bearer third\r\n").await, 401);
    assert_eq!(complete("Authorization: Basic first\r\n").await, 401);
    assert_eq!(complete("").await, 401);
}

#[tokio::test]
async fn a_unix_socket_is_served_and_removed() {
    let coordinator = Coordinator::start(Script::Hello).await;
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("gateway.sock");
    // What a gateway leaves that was killed.
    drop(UnixListener::bind(&path).expect("bind"));
    let mut both = config(&coordinator);
    both.uds = Some(path.clone());
    let server = Server::start(both).await;
    let mut connection = Connection(UnixStream::connect(&path).await.expect("connect"));
    connection
        .send_post("/v1/completions", "", br#"{"prompt": "a"}"#)
        .await;
    assert_eq!(connection.reply().await.expect("a reply").status, 200);

    // A socket in use is left alone.
    let mut second = config(&coordinator);
    second.uds = Some(path.clone());
    assert!(matches!(
        Gateway::bind(second).await,
        Err(GatewayError::Bind { .. })
    ));
    server.ended().await;
    assert!(!path.exists());
}

#[tokio::test]
async fn refusals_to_start_name_what_is_wrong() {
    let (coordinator, server) = pair(Script::Hello).await;
    let refusal = async |config: GatewayConfig| match Gateway::bind(config).await {
        Ok(_) => panic!("not refused"),
        Err(error) => error.to_string(),
    };
    let taken = server.address.to_string();
    let message = refusal(GatewayConfig::new(
        taken.clone(),
        Backends::one(coordinator.address()),
    ))
    .await;
    assert!(
        message.contains(&taken) && message.contains("in use"),
        "{message}"
    );
    let message = refusal(GatewayConfig::new(
        "127.0.0.1:0",
        Backends::one("coordinator:50051"),
    ))
    .await;
    assert!(message.contains("\"coordinator:50051\""), "{message}");
    let mut nowhere = config(&coordinator);
    nowhere.listen.clear();
    assert!(refusal(nowhere).await.contains("no address"));
    let mut zero = config(&coordinator);
    zero.limits.body_bytes = 0;
    assert!(refusal(zero).await.contains("body_bytes"));
}
