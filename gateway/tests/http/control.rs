//! What operators do, and that nobody else can.

use phalanx_proto::secret::ApiKeys;
use serde_json::json;

use crate::support::{Coordinator, Script, Server, config, get, get_with, pair, post, post_with};

const ADMIN: &str = "Authorization: Bearer admin\r\n";
const POSTS: [&str; 4] = ["/pause", "/resume", "/abort_requests", "/reset_prefix_cache"];

async fn keyed(clients: &[&str], admins: &[&str]) -> (Coordinator, Server) {
    let keys = |keys: &[&str]| ApiKeys::new(keys.iter().map(ToString::to_string)).expect("keys");
    let coordinator = Coordinator::start(Script::Hello).await;
    let mut config = config(&coordinator);
    (config.api_keys, config.admin_keys) = (keys(clients), keys(admins));
    let server = Server::start(config).await;
    (coordinator, server)
}

#[tokio::test]
async fn without_an_admin_key_nobody_controls_the_engine() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    for path in POSTS {
        let reply = post(server.address, path, "{}").await;
        assert_eq!(reply.status, 403, "{path}");
        let error = &reply.json()["error"];
        assert_eq!(
            (&error["code"], &error["type"]),
            (&json!("permission_denied"), &json!("PermissionDeniedError"))
        );
        assert!(
            error["message"]
                .as_str()
                .expect("text")
                .contains("--admin-api-key")
        );
    }
    assert_eq!(get(server.address, "/is_paused").await.status, 403);
    assert!(coordinator.received.try_recv().is_err(), "nothing got through");
}

#[tokio::test]
async fn only_the_admin_key_opens_them_and_it_opens_nothing_else() {
    let (_coordinator, server) = keyed(&["client"], &["admin"]).await;
    for path in POSTS {
        for header in ["", "Authorization: Bearer client\r\n", "X-Api-Key: client\r\n"] {
            let reply = post_with(server.address, path, header, b"").await;
            assert_eq!(
                (reply.status, reply.header("www-authenticate")),
                (401, Some("Bearer")),
                "{path}"
            );
        }
        assert_eq!(
            post_with(server.address, path, ADMIN, b"").await.status,
            200,
            "{path}"
        );
        assert_eq!(
            post_with(server.address, path, "X-Api-Key: admin\r\n", b"")
                .await
                .status,
            200
        );
        assert_eq!(get_with(server.address, path, ADMIN).await.status, 405, "{path}");
    }
    assert_eq!(get_with(server.address, "/v1/models", ADMIN).await.status, 401);
    let client = "X-Api-Key: client\r\n";
    assert_eq!(
        get_with(server.address, "/v1/models", client).await.status,
        200,
        "as Anthropic's clients"
    );
}

#[tokio::test]
async fn calls_carry_their_query_and_the_key() {
    let (mut coordinator, server) = keyed(&[], &["admin"]).await;
    let call = async |path: &str, body: &str| post_with(server.address, path, ADMIN, body.as_bytes()).await;
    let reply = call("/pause?mode=keep&clear_cache=false", "").await;
    assert_eq!((reply.status, reply.json()), (200, json!({"status": "paused"})));
    assert_eq!(
        coordinator.other().await,
        (
            "PauseRequest { mode: Keep, clear_cache: false }".to_owned(),
            Some("admin".to_owned())
        )
    );
    let reply = get_with(server.address, "/is_paused", ADMIN).await;
    assert_eq!(reply.json(), json!({"is_paused": true}));
    let health = get(server.address, "/health").await;
    assert_eq!((health.status, &health.json()["paused"]), (200, &json!(true)));

    assert_eq!(call("/resume", "").await.json(), json!({"status": "resumed"}));
    assert_eq!(coordinator.other().await.0, "ResumeRequest");
    let reply = call("/abort_requests", r#"{"request_ids": ["chatcmpl-1"]}"#).await;
    assert_eq!(reply.json(), json!({"status": "aborted", "aborted": 3}));
    assert_eq!(
        coordinator.other().await.0,
        r#"AbortRequestsRequest { request_ids: ["chatcmpl-1"] }"#
    );
    let reply = call(
        "/reset_prefix_cache?reset_running_requests=true&reset_external=1",
        "",
    )
    .await;
    assert_eq!((reply.status, reply.body.len()), (200, 0));
    assert_eq!(
        coordinator.other().await.0,
        "ResetPrefixCacheRequest { reset_running_requests: true }"
    );
    for (path, param) in [
        ("/pause?mode=sleep", "mode"),
        ("/pause?clear_cache=2", "clear_cache"),
        (
            "/reset_prefix_cache?reset_running_requests=maybe",
            "reset_running_requests",
        ),
    ] {
        let reply = call(path, "").await;
        assert_eq!(
            (reply.status, &reply.json()["error"]["param"]),
            (400, &json!(param))
        );
    }
    let many = format!(r#"{{"request_ids": [{}""]}}"#, r#""a","#.repeat(1024));
    assert_eq!(call("/abort_requests", &many).await.status, 400);
}
