//! The OpenAPI document and its page, the root path, and that every documented route is there.

use http::StatusCode;
use phalanx_proto::secret::ApiKeys;
use serde_json::{Value, json};

use crate::support::{Coordinator, Script, Server, config, delete, get, get_with, pair, post, post_with};

#[tokio::test]
async fn every_documented_route_answers_and_no_other_method_does() {
    let (_coordinator, server) = pair(Script::Hello).await;
    let reply = get(server.address, "/openapi.json").await;
    assert_eq!(
        (reply.status, reply.header("content-type")),
        (200, Some("application/json"))
    );
    let document = reply.json();
    let paths = document["paths"].as_object().expect("paths");
    assert!(paths.len() > 20);
    for (path, methods) in paths {
        let methods = methods.as_object().expect("methods");
        // Nobody is told what there is for operators.
        let is_admin = |operation: &Value| operation["security"] == json!([{"bearer": []}]);
        let expected = if methods.values().all(is_admin) { 403 } else { 405 };
        for method in methods.keys() {
            let status = match method.as_str() {
                "get" => get(server.address, path).await.status,
                _ => post(server.address, path, "{}").await.status,
            };
            // What a path in braces stands for is found nowhere.
            let missing = if path.contains('{') { 405 } else { 404 };
            assert!(![missing, 405].contains(&status), "{method} {path}: {status}");
            assert!(status < 500, "{method} {path}: {status}");
        }
        let wrong = delete(server.address, path).await;
        assert_eq!(wrong.status, expected, "{path}");
        if !methods.contains_key("post") {
            assert_eq!(post(server.address, path, "{}").await.status, expected, "{path}");
        }
        if !methods.contains_key("get") {
            assert_eq!(get(server.address, path).await.status, expected, "{path}");
        }
    }
    let page = get(server.address, "/docs").await;
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(page.text().contains("/v1/chat/completions"));
}

#[tokio::test]
async fn a_key_is_needed_for_every_documented_route_that_does_not_say_otherwise() {
    let coordinator = Coordinator::start(Script::Hello).await;
    let mut config = config(&coordinator);
    config.api_keys = ApiKeys::new(["key".to_owned()]).expect("a key");
    config.admin_keys = ApiKeys::new(["admin".to_owned()]).expect("a key");
    config.routes.tokenizer_info = true;
    let server = Server::start(config).await;
    let document = get_with(server.address, "/openapi.json", "X-Api-Key: key\r\n")
        .await
        .json();
    for (path, methods) in document["paths"].as_object().expect("paths") {
        for (method, operation) in methods.as_object().expect("methods") {
            let ask = async |headers: &str| match method.as_str() {
                "get" => get_with(server.address, path, headers).await.status,
                _ => post_with(server.address, path, headers, b"{}").await.status,
            };
            let open = operation["security"] == json!([]);
            let expected = StatusCode::UNAUTHORIZED.as_u16();
            assert_eq!(ask("").await != expected, open, "{method} {path}");
            assert_ne!(
                operation["security"],
                Value::Null,
                "{method} {path} says who may ask"
            );
        }
        // What is not there is not told either, nor which methods there are.
        let open = ["/health", "/ping"].contains(&path.as_str());
        assert_eq!(
            delete(server.address, path).await.status,
            if open { 405 } else { 401 },
            "{path}"
        );
    }
}

#[tokio::test]
async fn a_root_path_is_served_with_and_without_it() {
    let coordinator = Coordinator::start(Script::Hello).await;
    let mut config = config(&coordinator);
    config.routes.root_path = "/llm/".to_owned();
    config.api_keys = ApiKeys::new(["key".to_owned()]).expect("a key");
    let server = Server::start(config).await;
    let key = "X-Api-Key: key\r\n";
    for prefix in ["", "/llm"] {
        let path = |path: &str| format!("{prefix}{path}");
        assert_eq!(get(server.address, &path("/health")).await.status, 200);
        assert_eq!(get(server.address, &path("/v1/models")).await.status, 401);
        assert_eq!(get(server.address, &path("/nowhere")).await.status, 401);
        assert_eq!(
            get_with(server.address, &path("/v1/models"), key).await.status,
            200
        );
        assert_eq!(get_with(server.address, &path("/nowhere"), key).await.status, 404);
        assert_eq!(
            get_with(server.address, &path("/v1/completions"), key)
                .await
                .status,
            405
        );
        let document = get_with(server.address, &path("/openapi.json"), key).await.json();
        assert_eq!(document["servers"], json!([{"url": "/llm"}]));
    }
    let label = r#"http_requests_total{method="GET",handler="/v1/models",status="2xx"} 2"#;
    let mut metrics = get_with(server.address, "/metrics", key).await;
    while !metrics.text().contains(label) {
        metrics = get_with(server.address, "/llm/metrics", key).await;
    }
}

#[tokio::test]
async fn the_documents_can_be_left_out() {
    let coordinator = Coordinator::start(Script::Hello).await;
    let mut config = config(&coordinator);
    config.routes.docs = false;
    let server = Server::start(config).await;
    for path in ["/openapi.json", "/docs"] {
        assert_eq!(get(server.address, path).await.status, 404);
    }
}

#[tokio::test]
async fn every_reply_names_its_request() {
    let (_coordinator, server) = pair(Script::Hello).await;
    for path in ["/health", "/nowhere", "/pause", "/v1/models", "/docs"] {
        let reply = get_with(server.address, path, "X-Request-Id: trace-9\r\n").await;
        assert_eq!(reply.header("x-request-id"), Some("trace-9"), "{path}");
        assert_eq!(
            get(server.address, path)
                .await
                .header("x-request-id")
                .map(str::len),
            Some(32)
        );
    }
}
