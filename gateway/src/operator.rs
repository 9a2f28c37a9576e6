//! The routes for those who run the server: health, version, load, metrics.

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, StatusCode, Uri, header};
use phalanx_proto::{
    RpcError,
    v1::{GetStatusResponse, GroupState, Phase, RankStatus},
};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    exposition,
    openai::error::{ApiError, broken_reply},
    query,
    router::Overview,
    routes::Service,
};

/// `GET /health`, `/ping`: 200 when the coordinator's ranks are ready and this gateway is not draining; otherwise
/// 503, with how far each rank has come. Of several coordinators one that serves is enough.
pub(crate) async fn health(State(service): State<Service>) -> Response {
    let health = if service.lifecycle.is_draining() {
        Health::bare("draining", "the gateway is shutting down")
    } else {
        match service.backend.sole() {
            None => Health::of_backends(service.backend.overview()),
            Some(coordinator) => match coordinator.status().await {
                Ok(status) => Health::of(status),
                Err(error) => Health::bare("unreachable", error.message),
            },
        }
    };
    let status = if health.state == READY {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(health)).into_response()
}

/// `GET /version`.
pub(crate) async fn version() -> Response {
    #[derive(Serialize)]
    struct Version {
        version: &'static str,
    }
    let version = env!("CARGO_PKG_VERSION");
    Json(Version { version }).into_response()
}

/// `GET /server_info`: what the coordinator was started with, as text or, with `config_format=json`, as an object.
pub(crate) async fn server_info(State(service): State<Service>, uri: Uri) -> Result<Response, ApiError> {
    let reply = service.backend.server_info().await?;
    let config = match query::value(&uri, "config_format") {
        None | Some("text") => Value::String(reply.json),
        Some("json") => serde_json::from_str(&reply.json)
            .map_err(|error| broken_reply(&format!("the server info is not JSON: {error}")))?,
        Some(_) => {
            let message = "config_format must be text or json";
            return Err(RpcError::invalid("config_format", message).into());
        }
    };
    let system = json!({"os": std::env::consts::OS, "arch": std::env::consts::ARCH});
    Ok(Json(json!({"vllm_config": config, "system_env": system})).into_response())
}

/// `GET /load`: the number of completions requests this gateway has running.
pub(crate) async fn load(State(service): State<Service>) -> Response {
    #[derive(Serialize)]
    struct Load {
        server_load: usize,
    }
    let server_load = service.lifecycle.running();
    Json(Load { server_load }).into_response()
}

/// `GET /metrics`: the coordinators' metrics and the gateway's. Without a coordinator, the gateway's alone.
pub(crate) async fn metrics(State(service): State<Service>, headers: HeaderMap) -> Response {
    let theirs = service.backend.metrics().await;
    let text = service.metrics.exposition(theirs.as_deref());
    let (content_type, text) = exposition::negotiate(&headers, text);
    ([(header::CONTENT_TYPE, content_type)], text).into_response()
}

const READY: &str = "ready";

#[derive(Serialize)]
struct Health {
    state: &'static str,
    message: String,
    epoch: u32,
    version: String,
    /// An operator holds the engine still; that is no illness.
    paused: bool,
    ranks: Vec<Rank>,
    /// Of a router.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    backends: Vec<Overview>,
}

#[derive(Serialize)]
struct Rank {
    rank: u32,
    host: String,
    pid: u32,
    phase: &'static str,
    bytes_done: u64,
    bytes_total: u64,
    rss_bytes: u64,
}

impl Health {
    fn bare(state: &'static str, message: impl Into<String>) -> Self {
        Self {
            state,
            message: message.into(),
            epoch: 0,
            version: String::new(),
            paused: false,
            ranks: Vec::new(),
            backends: Vec::new(),
        }
    }

    fn of_backends(backends: Vec<Overview>) -> Self {
        let serving = backends.iter().filter(|backend| backend.is_serving()).count();
        let state = if serving > 0 { READY } else { "unavailable" };
        let message = format!("{serving} of {} backends serve", backends.len());
        Self {
            backends,
            ..Self::bare(state, message)
        }
    }

    fn of(status: GetStatusResponse) -> Self {
        let state = match status.state() {
            GroupState::Ready => READY,
            GroupState::Starting => "starting",
            GroupState::Draining => "draining",
            GroupState::Failed => "failed",
            GroupState::Unspecified => "unknown",
        };
        Self {
            state,
            message: status.message,
            epoch: status.epoch,
            version: status.version,
            paused: status.paused,
            ranks: status.ranks.into_iter().map(Rank::of).collect(),
            backends: Vec::new(),
        }
    }
}

impl Rank {
    fn of(rank: RankStatus) -> Self {
        Self {
            phase: phase_name(rank.phase()),
            rank: rank.rank,
            host: rank.host,
            pid: rank.pid,
            bytes_done: rank.bytes_done,
            bytes_total: rank.bytes_total,
            rss_bytes: rank.rss_bytes,
        }
    }
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Unspecified => "unknown",
        Phase::Starting => "starting",
        Phase::LoadingWeights => "loading_weights",
        Phase::AllocatingKv => "allocating_kv",
        Phase::JoiningGroup => "joining_group",
        Phase::WarmingUp => "warming_up",
        Phase::Serving => "serving",
    }
}
