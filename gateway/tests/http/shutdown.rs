//! The way down: refuse at once, let running requests end, not for ever.

use std::{sync::Arc, time::Duration};

use tokio::sync::Semaphore;

use crate::support::{Connection, Coordinator, Script, Server, config, get, post};

const PATH: &str = "/v1/completions";
const BODY: &[u8] = br#"{"prompt": "a", "stream": true}"#;

/// A stream that has begun, on a gateway that was then told to shut down.
async fn draining(script: Script, drain_timeout: Duration) -> (Coordinator, Server, Connection) {
    let coordinator = Coordinator::start(script).await;
    let mut config = config(&coordinator);
    config.drain_timeout = drain_timeout;
    let mut server = Server::start(config).await;
    let mut running = Connection::open(server.address).await;
    running.send_post(PATH, "", BODY).await;
    running.read_until("Hello").await;
    server.shut_down();
    (coordinator, server, running)
}

#[tokio::test]
async fn running_streams_end_and_new_requests_are_refused() {
    let release = Arc::new(Semaphore::new(0));
    let script = Script::Wait(Arc::clone(&release));
    let (_coordinator, server, mut running) = draining(script, Duration::from_secs(60)).await;
    let mut health = get(server.address, "/health").await;
    while health.status == 200 {
        health = get(server.address, "/health").await;
    }
    assert_eq!(
        (health.status, health.json()["state"].as_str()),
        (503, Some("draining"))
    );
    let refused = post(server.address, PATH, r#"{"prompt": "a"}"#).await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    assert_eq!(get(server.address, "/load").await.json()["server_load"], 1);
    release.add_permits(1);
    let rest = running.read_until("[DONE]").await;
    assert!(rest.contains(" world") && !rest.contains("error"), "{rest}");
    server.ended().await;
}

#[tokio::test]
async fn a_stream_that_outlasts_the_drain_time_ends_with_an_error() {
    let script = Script::Wait(Arc::new(Semaphore::new(0)));
    let (_coordinator, server, mut running) = draining(script, Duration::from_millis(50)).await;
    let rest = running.read_until("[DONE]").await;
    assert!(rest.contains(r#""code":"unavailable""#), "{rest}");
    server.ended().await;
}

#[tokio::test]
async fn idle_connections_do_not_hold_up_the_end() {
    let coordinator = Coordinator::start(Script::Hello).await;
    let server = Server::start(config(&coordinator)).await;
    let mut idle = Connection::open(server.address).await;
    idle.send(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n").await;
    idle.read_until("version").await;
    server.ended().await;
    assert!(idle.reply().await.is_none());
}
