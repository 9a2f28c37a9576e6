//! The table of routes, and what answers beside it.
//!
//! A route is added in one place: a [`Route`] in [`table`], with its handler, who may call it, and what the OpenAPI
//! document says of it. Metrics, access and documentation follow from there.

use std::sync::Arc;

use axum::{
    Router,
    extract::{MatchedPath, Request},
    handler::Handler,
    middleware::from_fn_with_state,
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use http::{HeaderMap, Method, Uri};
use phalanx_proto::{ErrorKind, RpcError};

use crate::{
    anthropic,
    auth::{Access, Keys, guard},
    config::RouteOptions,
    control, inference,
    lifecycle::Lifecycle,
    limits::HttpLimits,
    metrics::HttpMetrics,
    observe::{Observer, observe},
    openai::{self, error::ApiError, output::ReplyOptions},
    openapi::{self, Document, Operation, operations as docs},
    operator, responses,
    router::{Replicas, X_SESSION_ID, session},
    sagemaker, tgi, tokenizer,
};

/// What the handlers share.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) backend: Replicas,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) metrics: Arc<HttpMetrics>,
    pub(crate) limits: HttpLimits,
    pub(crate) document: Arc<Document>,
    pub(crate) reply: ReplyOptions,
    /// None: nothing is stored.
    pub(crate) responses: Option<Arc<responses::Store>>,
    pub(crate) response_role: Arc<str>,
}

impl Service {
    /// The replicas for a request whose session only its header can name.
    pub(crate) fn replicas_for(&self, headers: &HeaderMap) -> Replicas {
        self.backend.for_session(session(headers.get(X_SESSION_ID), None))
    }
}

/// One path: what answers there, who may ask, and its documentation, one operation for each method.
pub(crate) struct Route {
    pub(crate) path: &'static str,
    pub(crate) access: Access,
    methods: MethodRouter<Service>,
    pub(crate) operations: Vec<(&'static str, Operation)>,
}

impl Route {
    fn new(path: &'static str) -> Self {
        Self {
            path,
            access: Access::Client,
            methods: MethodRouter::new(),
            operations: Vec::new(),
        }
    }

    /// `handler` answers GET.
    fn get<H: Handler<T, Service>, T: 'static>(path: &'static str, handler: H, operation: Operation) -> Self {
        Self::new(path).or("get", get(handler), operation)
    }

    /// `handler` answers POST.
    fn post<H: Handler<T, Service>, T: 'static>(
        path: &'static str,
        handler: H,
        operation: Operation,
    ) -> Self {
        Self::new(path).or("post", post(handler), operation)
    }

    /// One more method.
    fn or(mut self, method: &'static str, handler: MethodRouter<Service>, operation: Operation) -> Self {
        self.methods = self.methods.merge(handler);
        self.operations.push((method, operation));
        self
    }

    /// Nobody needs a key.
    fn open(mut self) -> Self {
        self.access = Access::Open;
        self
    }

    /// Only operators may ask.
    fn admin(mut self) -> Self {
        self.access = Access::Admin;
        self
    }
}

/// Every route that this configuration has.
pub(crate) fn table(options: &RouteOptions) -> Vec<Route> {
    let mut routes = vec![
        Route::post("/v1/chat/completions", openai::chat::handle, docs::chat()),
        Route::post(
            "/v1/completions",
            openai::completions::handle,
            docs::completions(),
        ),
        Route::get("/v1/models", openai::models::handle, docs::models()),
        Route::post("/v1/messages", anthropic::messages, docs::messages()),
        Route::post(
            "/v1/messages/count_tokens",
            anthropic::count_tokens,
            docs::count_tokens(),
        ),
        Route::post("/tokenize", tokenizer::tokenize, docs::tokenize()),
        Route::post("/detokenize", tokenizer::detokenize, docs::detokenize()),
        Route::post(
            "/inference/v1/generate",
            inference::generate,
            docs::generate_tokens(),
        ),
        Route::post(
            "/inference/v1/abort_requests",
            inference::abort_requests,
            docs::abort(),
        ),
        Route::post("/invocations", sagemaker::invocations, docs::invocations()),
        Route::post("/", tgi::compat_generate, docs::tgi_root()),
        Route::post("/generate", tgi::generate, docs::tgi_generate()),
        Route::post(
            "/generate_stream",
            tgi::generate_stream,
            docs::tgi_generate_stream(),
        ),
        Route::get("/info", tgi::info, docs::tgi_info()),
        Route::get("/health", operator::health, docs::health()).open(),
        Route::get("/ping", operator::health, docs::health())
            .or("post", post(operator::health), docs::health())
            .open(),
        Route::get("/metrics", operator::metrics, docs::metrics()),
        Route::get("/version", operator::version, docs::version()),
        Route::get("/load", operator::load, docs::load()),
        Route::get("/server_info", operator::server_info, docs::server_info()),
        Route::post("/pause", control::pause, docs::pause()).admin(),
        Route::post("/resume", control::resume, docs::resume()).admin(),
        Route::get("/is_paused", control::is_paused, docs::is_paused()).admin(),
        Route::post("/abort_requests", control::abort_requests, docs::abort_all()).admin(),
        Route::post("/reset_prefix_cache", control::reset_prefix_cache, docs::reset()).admin(),
    ];
    routes.extend(responses_api());
    if options.tokenizer_info {
        routes.push(Route::get(
            "/tokenizer_info",
            tokenizer::info,
            docs::tokenizer_info(),
        ));
    }
    if options.docs {
        routes.push(Route::get("/openapi.json", openapi::json, docs::openapi()));
        routes.push(Route::get("/docs", openapi::page, docs::page()));
    }
    routes
}

fn responses_api() -> [Route; 3] {
    [
        Route::post("/v1/responses", responses::create, docs::responses()),
        Route::get(
            "/v1/responses/{response_id}",
            responses::retrieve,
            docs::response(),
        ),
        Route::post(
            "/v1/responses/{response_id}/cancel",
            responses::cancel,
            docs::cancel_response(),
        ),
    ]
}

/// What is known of a request's route before its handler runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RouteInfo {
    /// As in the table: a label of bounded number.
    pub(crate) path: &'static str,
    pub(crate) access: Access,
}

/// Looks requests up.
#[derive(Clone, Debug)]
pub(crate) struct RouteTable {
    routes: Arc<[RouteInfo]>,
    root_path: Arc<str>,
}

impl RouteTable {
    /// The route that answers `request`; none for a path that is no route.
    pub(crate) fn find(&self, request: &Request) -> Option<RouteInfo> {
        let matched = request.extensions().get::<MatchedPath>()?.as_str();
        let path = match matched.strip_prefix(&*self.root_path) {
            Some("") => "/",
            Some(path) => path,
            None => matched,
        };
        self.routes.iter().find(|route| route.path == path).copied()
    }
}

/// Every route, behind the key check, behind the observer; under the root path, too, if there is one.
pub(crate) fn router(
    service: Service,
    routes: Vec<Route>,
    options: &RouteOptions,
    (keys, observer): (Keys, Observer),
) -> Router {
    let infos = routes.iter().map(|route| RouteInfo {
        path: route.path,
        access: route.access,
    });
    let table = RouteTable {
        routes: infos.collect(),
        root_path: options.root_path.as_str().into(),
    };
    let router = routes
        .into_iter()
        .fold(Router::new(), |router, route| {
            router.route(route.path, route.methods)
        })
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .with_state(service)
        .layer(from_fn_with_state((table.clone(), keys), guard))
        .layer(from_fn_with_state((table, observer), observe));
    if options.root_path.is_empty() {
        return router;
    }
    // A proxy may pass the prefix on or strip it.
    Router::new()
        .nest(&options.root_path, router.clone())
        .fallback_service(router)
}

async fn no_route(method: Method, uri: Uri) -> Response {
    let message = format!("no route {method} {}", uri.path());
    ApiError::from(RpcError::new(ErrorKind::NotFound, message)).into_response()
}

async fn wrong_method(request: Request) -> Response {
    ApiError::method_not_allowed(request.method(), request.uri().path()).into_response()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;

    #[test]
    fn the_document_has_the_routes_that_there_are() {
        let options = RouteOptions {
            tokenizer_info: true,
            ..RouteOptions::default()
        };
        let routes = table(&options);
        let offered: BTreeSet<(String, &str)> = routes
            .iter()
            .flat_map(|route| {
                route
                    .operations
                    .iter()
                    .map(|(method, _)| (method.to_uppercase(), route.path))
            })
            .collect();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/compatibility.md");
        let text = fs::read_to_string(path).expect("docs/compatibility.md");
        let (_, text) = text.split_once("## Routes").expect("the table");
        let (text, _) = text.split_once("\n## ").expect("a table after it");
        let mut told = BTreeSet::new();
        for line in text.lines().filter_map(|line| line.strip_prefix("| `")) {
            let (route, rest) = line.split_once("` | ").expect("a row");
            let (methods, path) = route.split_once(' ').expect("method and path");
            if !rest.starts_with("not offered |") {
                told.extend(methods.split('/').map(|method| (method.to_owned(), path)));
            }
        }
        let beside = text.split("Beside vLLM's").nth(1).expect("what is ours");
        let named = beside.split('`').skip(1).step_by(2);
        told.extend(named.filter_map(|route| {
            let (method, path) = route.split_once(' ')?;
            Some((method.to_owned(), path))
        }));
        assert_eq!(told, offered);
    }
}
