//! What operators do: hold the engine still, end requests, reset the prefix cache. Paths and replies are those of
//! vLLM's development server; none of them is ever open.

use axum::{
    Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use http::{StatusCode, Uri};
use phalanx_proto::{
    RpcError,
    v1::{PauseMode, PauseRequest, ResetPrefixCacheRequest},
};
use serde::Deserialize;
use serde_json::json;

use crate::{
    limits::MAX_ABORTED,
    openai::{
        body::{self, Bounded},
        error::ApiError,
    },
    query,
    routes::Service,
};

/// `POST /pause`: returns once the requests in flight are as `mode` says.
pub(crate) async fn pause(State(service): State<Service>, uri: Uri) -> Result<Response, ApiError> {
    let request = PauseRequest {
        mode: pause_mode(&uri)?.into(),
        clear_cache: query::flag(&uri, "clear_cache", true)?,
    };
    let paused = service.backend.pause(request).await?;
    // Somebody may have resumed while this one waited.
    let status = if paused { "paused" } else { "resumed" };
    Ok(Json(json!({"status": status})).into_response())
}

fn pause_mode(uri: &Uri) -> Result<PauseMode, RpcError> {
    // The name from before there were modes.
    let wait = query::flag(uri, "wait_for_inflight_requests", false)?;
    match query::value(uri, "mode") {
        None | Some("abort") if wait => Ok(PauseMode::Wait),
        None | Some("abort") => Ok(PauseMode::Abort),
        Some("wait") => Ok(PauseMode::Wait),
        Some("keep") => Ok(PauseMode::Keep),
        Some(_) => Err(RpcError::invalid("mode", "mode must be abort, wait or keep")),
    }
}

/// `POST /resume`.
pub(crate) async fn resume(State(service): State<Service>) -> Result<Response, ApiError> {
    service.backend.resume().await?;
    Ok(Json(json!({"status": "resumed"})).into_response())
}

/// `GET /is_paused`.
pub(crate) async fn is_paused(State(service): State<Service>) -> Result<Response, ApiError> {
    let is_paused = service.backend.is_paused().await?;
    Ok(Json(json!({"is_paused": is_paused})).into_response())
}

/// The ids to abort.
#[derive(Debug, Deserialize)]
pub(crate) struct AbortBody {
    pub(crate) request_ids: Option<Bounded<String, MAX_ABORTED>>,
}

/// `POST /abort_requests`: the requests named, or all.
pub(crate) async fn abort_requests(
    State(service): State<Service>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = body::read(request, &service.limits).await?;
    let request_ids = if body.is_empty() {
        Vec::new()
    } else {
        let ids = body::parse::<AbortBody>(&body)?.request_ids;
        ids.unwrap_or_default().0
    };
    let aborted = service.backend.abort_requests(request_ids).await?;
    Ok(Json(json!({"status": "aborted", "aborted": aborted})).into_response())
}

/// `POST /reset_prefix_cache`. There is no external cache, so nothing is to be done for `reset_external`.
pub(crate) async fn reset_prefix_cache(
    State(service): State<Service>,
    uri: Uri,
) -> Result<Response, ApiError> {
    query::flag(&uri, "reset_external", false)?;
    let request = ResetPrefixCacheRequest {
        reset_running_requests: query::flag(&uri, "reset_running_requests", false)?,
    };
    service.backend.reset_prefix_cache(request).await?;
    Ok(StatusCode::OK.into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_flag_is_one_of_the_modes() {
        let mode = |query: &str| pause_mode(&format!("/pause?{query}").parse().expect("a URI"));
        for (query, expected) in [
            ("", PauseMode::Abort),
            ("mode=abort", PauseMode::Abort),
            ("mode=wait", PauseMode::Wait),
            ("mode=keep", PauseMode::Keep),
            ("wait_for_inflight_requests=true", PauseMode::Wait),
            ("wait_for_inflight_requests=false&mode=keep", PauseMode::Keep),
        ] {
            assert_eq!(mode(query), Ok(expected), "{query}");
        }
        assert_eq!(
            mode("mode=sleep").expect_err("unknown").param.as_deref(),
            Some("mode")
        );
    }
}
