//! TGI's error object, and the HTTP status it travels with.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::StatusCode;
use phalanx_proto::{ErrorKind, RpcError};
use serde::Serialize;

use crate::openai::error::ApiError;

/// A refusal or a failure as TGI's clients know them: by `error_type`.
#[derive(Debug)]
pub(crate) struct TgiError {
    status: StatusCode,
    body: ErrorBody,
}

/// `{"error": ..., "error_type": ...}`
#[derive(Debug, Serialize)]
pub(super) struct ErrorBody {
    error: String,
    error_type: &'static str,
}

impl From<RpcError> for TgiError {
    fn from(error: RpcError) -> Self {
        let (status, error_type) = match error.kind {
            ErrorKind::InvalidArgument
            | ErrorKind::ContextLengthExceeded
            | ErrorKind::NotFound
            | ErrorKind::PayloadTooLarge
            | ErrorKind::Unimplemented => (StatusCode::UNPROCESSABLE_ENTITY, "validation"),
            ErrorKind::QueueFull => (StatusCode::TOO_MANY_REQUESTS, "overloaded"),
            ErrorKind::Unavailable | ErrorKind::Unauthenticated | ErrorKind::PermissionDenied => {
                (StatusCode::SERVICE_UNAVAILABLE, "unhealthy")
            }
            ErrorKind::WorkerLost
            | ErrorKind::DeadlineExceeded
            | ErrorKind::Cancelled
            | ErrorKind::Internal => (StatusCode::FAILED_DEPENDENCY, "generation"),
        };
        Self {
            status,
            body: ErrorBody {
                error: error.message,
                error_type,
            },
        }
    }
}

/// What HTTP alone knows (size, type, time of a body) keeps its status, and so does what a stream says before it begins.
impl From<ApiError> for TgiError {
    fn from(error: ApiError) -> Self {
        let (status, message) = error.into_parts();
        let error_type = match status.as_u16() {
            429 => "overloaded",
            400..500 => "validation",
            _ => "generation",
        };
        Self {
            status,
            body: ErrorBody {
                error: message,
                error_type,
            },
        }
    }
}

impl TgiError {
    /// The error object alone, for an event of a stream whose status has been sent.
    pub(super) fn into_body(self) -> ErrorBody {
        self.body
    }
}

impl IntoResponse for TgiError {
    fn into_response(self) -> Response {
        (self.status, Json(self.body)).into_response()
    }
}
