//! OpenAI's error object, and the HTTP status it travels with.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, Method, StatusCode, header};
use phalanx_proto::{ErrorKind, RpcError};
use serde::Serialize;

/// Seconds after which to try again: about the time in which a lost rank is replaced or a queue moves on.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// A refusal or a failure, as a client sees it.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    retryable: bool,
    body: ErrorBody,
}

#[derive(Debug, Serialize)]
pub(crate) struct ErrorBody {
    message: String,
    r#type: &'static str,
    param: Option<String>,
    code: &'static str,
}

/// `{"error": {...}}`
#[derive(Serialize)]
struct Envelope {
    error: ErrorBody,
}

impl From<RpcError> for ApiError {
    fn from(error: RpcError) -> Self {
        let kind = error.kind;
        Self {
            // Every row of the table is a valid status.
            status: StatusCode::from_u16(kind.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            retryable: kind.is_retryable(),
            body: ErrorBody {
                message: error.message,
                r#type: kind.openai_type(),
                param: error.param,
                code: kind.name(),
            },
        }
    }
}

impl ApiError {
    /// What HTTP alone knows, so that it has no [`ErrorKind`].
    fn http(status: StatusCode, code: &'static str, message: String) -> Self {
        Self {
            status,
            retryable: false,
            body: ErrorBody {
                message,
                r#type: "BadRequestError",
                param: None,
                code,
            },
        }
    }

    pub(crate) fn method_not_allowed(method: &Method, path: &str) -> Self {
        let message = format!("{path} does not answer {method}");
        Self::http(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
    }

    pub(crate) fn unsupported_media_type(given: &str) -> Self {
        let message = format!("the body must be application/json, not {given}");
        Self::http(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            message,
        )
    }

    pub(crate) fn request_timeout() -> Self {
        let message = "the body did not arrive in time".to_owned();
        Self::http(StatusCode::REQUEST_TIMEOUT, "request_timeout", message)
    }

    /// Status and sentence, for routes whose errors have another shape.
    pub(crate) fn into_parts(self) -> (StatusCode, String) {
        (self.status, self.body.message)
    }

    /// The error object alone, for an event of a stream whose status has been sent.
    pub(crate) fn write_json(self, out: &mut Vec<u8>) {
        super::sse::write_json(out, &Envelope { error: self.body });
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(Envelope { error: self.body })).into_response();
        if self.retryable {
            response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
        }
        response
    }
}

/// The coordinator said something that its protocol does not allow.
pub(crate) fn broken_reply(message: &str) -> RpcError {
    RpcError::new(
        ErrorKind::Internal,
        format!("the coordinator's reply is broken: {message}"),
    )
}
