//! Anthropic's error object, and the HTTP status it travels with.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::StatusCode;
use phalanx_proto::RpcError;
use serde::Serialize;

use crate::openai::error::ApiError;

/// A refusal or a failure as Anthropic's clients know them.
#[derive(Debug)]
pub(crate) struct AnthropicError {
    status: StatusCode,
    message: String,
}

/// `{"type": "error", "error": {"type": ..., "message": ...}}`
#[derive(Serialize)]
pub(super) struct Envelope {
    r#type: &'static str,
    error: ErrorBody,
}

#[derive(Serialize)]
struct ErrorBody {
    r#type: &'static str,
    message: String,
}

impl From<RpcError> for AnthropicError {
    fn from(error: RpcError) -> Self {
        ApiError::from(error).into()
    }
}

impl From<ApiError> for AnthropicError {
    fn from(error: ApiError) -> Self {
        let (status, message) = error.into_parts();
        Self { status, message }
    }
}

impl AnthropicError {
    pub(super) fn envelope(self) -> Envelope {
        Envelope {
            r#type: "error",
            error: ErrorBody {
                r#type: kind(self.status),
                message: self.message,
            },
        }
    }
}

/// Anthropic's name of a status.
fn kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        408 => "timeout_error",
        400..500 => "invalid_request_error",
        _ => "api_error",
    }
}

impl IntoResponse for AnthropicError {
    fn into_response(self) -> Response {
        (self.status, Json(self.envelope())).into_response()
    }
}
