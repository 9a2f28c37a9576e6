//! One table from what went wrong to gRPC status, HTTP status and OpenAI error type.

use tonic::{Code, Status, metadata::MetadataValue};

/// What went wrong, as a client may act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A field is missing, malformed or out of range.
    InvalidArgument,
    /// Prompt and requested tokens do not fit the context, or could never fit the KV cache.
    ContextLengthExceeded,
    /// No such model, request or route.
    NotFound,
    /// The API key or the join token is missing or wrong.
    Unauthenticated,
    /// Whoever asks, this server does not allow it.
    PermissionDenied,
    /// A message or body over its limit.
    PayloadTooLarge,
    /// A queue is full; try again later.
    QueueFull,
    /// The server is starting, draining or has lost its ranks.
    Unavailable,
    /// A rank died while the request was running.
    WorkerLost,
    /// The deadline that the caller gave its request passed: no fault of the server, so no 5xx over HTTP.
    DeadlineExceeded,
    /// The caller went away or asked for an abort.
    Cancelled,
    /// Understood, but not offered by this server.
    Unimplemented,
    /// Our fault.
    Internal,
}

/// A row of the table.
struct Row {
    kind: ErrorKind,
    /// Name on the wire and OpenAI's `error.code`.
    name: &'static str,
    grpc: Code,
    http: u16,
    /// OpenAI's `error.type`.
    openai: &'static str,
}

const fn row(kind: ErrorKind, name: &'static str, grpc: Code, http: u16, openai: &'static str) -> Row {
    Row {
        kind,
        name,
        grpc,
        http,
        openai,
    }
}

#[rustfmt::skip]
const TABLE: &[Row] = &[
    row(ErrorKind::InvalidArgument,       "invalid_argument",        Code::InvalidArgument,   400, "BadRequestError"),
    row(ErrorKind::ContextLengthExceeded, "context_length_exceeded", Code::InvalidArgument,   400, "BadRequestError"),
    row(ErrorKind::NotFound,              "not_found",               Code::NotFound,          404, "NotFoundError"),
    row(ErrorKind::Unauthenticated,       "unauthenticated",         Code::Unauthenticated,   401, "AuthenticationError"),
    row(ErrorKind::PermissionDenied,      "permission_denied",       Code::PermissionDenied,  403, "PermissionDeniedError"),
    row(ErrorKind::PayloadTooLarge,       "payload_too_large",       Code::ResourceExhausted, 413, "BadRequestError"),
    row(ErrorKind::QueueFull,             "queue_full",              Code::ResourceExhausted, 429, "RateLimitError"),
    row(ErrorKind::Unavailable,           "unavailable",             Code::Unavailable,       503, "ServiceUnavailableError"),
    row(ErrorKind::WorkerLost,            "worker_lost",             Code::Unavailable,       503, "ServiceUnavailableError"),
    row(ErrorKind::DeadlineExceeded,      "deadline_exceeded",       Code::DeadlineExceeded,  408, "RequestTimeoutError"),
    row(ErrorKind::Cancelled,             "cancelled",               Code::Cancelled,         499, "ClientClosedRequest"),
    row(ErrorKind::Unimplemented,         "unimplemented",           Code::Unimplemented,     501, "NotImplementedError"),
    row(ErrorKind::Internal,              "internal",                Code::Internal,          500, "InternalServerError"),
];

impl ErrorKind {
    fn row(self) -> &'static Row {
        TABLE
            .iter()
            .find(|row| row.kind == self)
            .unwrap_or(&TABLE[TABLE.len() - 1])
    }
    /// Name on the wire and OpenAI's `error.code`.
    pub fn name(self) -> &'static str {
        self.row().name
    }
    pub fn grpc_code(self) -> Code {
        self.row().grpc
    }
    pub fn http_status(self) -> u16 {
        self.row().http
    }
    /// OpenAI's `error.type`, as vLLM spells it.
    pub fn openai_type(self) -> &'static str {
        self.row().openai
    }
    /// Whether the same request may succeed a little later; such replies carry `Retry-After`.
    pub fn is_retryable(self) -> bool {
        matches!(self, Self::QueueFull | Self::Unavailable | Self::WorkerLost)
    }
    fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.name == name).map(|row| row.kind)
    }
    /// The nearest kind for a status that carries no name (a proxy's, or tonic's own).
    fn from_code(code: Code) -> Self {
        match code {
            // tonic's own oversized-message reply; ours always carries its name.
            Code::OutOfRange => Self::PayloadTooLarge,
            _ => TABLE
                .iter()
                .find(|row| row.grpc == code)
                .map_or(Self::Internal, |row| row.kind),
        }
    }
}

/// An error on its way to a client: kind, sentence, and the request's field it is about.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RpcError {
    pub kind: ErrorKind,
    pub message: String,
    /// The request's field (OpenAI's `error.param`), when one is to blame.
    pub param: Option<String>,
}

const KIND_KEY: &str = "phalanx-error-kind";
const PARAM_KEY: &str = "phalanx-error-param";
/// A message is cut here: HTTP/2 peers refuse headers much larger than this.
const MAX_MESSAGE: usize = 2048;

impl RpcError {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            param: None,
        }
    }
    /// A bad request about one field.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            kind: ErrorKind::InvalidArgument,
            message: message.into(),
            param: Some(param.into()),
        }
    }
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }
}

impl From<RpcError> for Status {
    fn from(error: RpcError) -> Self {
        let mut message = error.message;
        if message.len() > MAX_MESSAGE {
            message.truncate(message.floor_char_boundary(MAX_MESSAGE));
            message.push('…');
        }
        let mut status = Status::new(error.kind.grpc_code(), message);
        status
            .metadata_mut()
            .insert(KIND_KEY, MetadataValue::from_static(error.kind.name()));
        if let Some(param) = error.param.and_then(|param| MetadataValue::try_from(param).ok()) {
            status.metadata_mut().insert(PARAM_KEY, param);
        }
        status
    }
}

impl From<&Status> for RpcError {
    fn from(status: &Status) -> Self {
        let text = |key| status.metadata().get(key).and_then(|value| value.to_str().ok());
        Self {
            kind: text(KIND_KEY)
                .and_then(ErrorKind::from_name)
                .unwrap_or_else(|| ErrorKind::from_code(status.code())),
            message: status.message().to_owned(),
            param: text(PARAM_KEY).map(str::to_owned),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_wire() {
        for row in TABLE {
            let error = RpcError::new(row.kind, "why").with_param("max_tokens");
            let status = Status::from(error.clone());
            assert_eq!(status.code(), row.grpc);
            assert_eq!(RpcError::from(&status), error);
        }
    }

    #[test]
    fn foreign_statuses_get_the_nearest_kind() {
        let kind = |code| RpcError::from(&Status::new(code, "x")).kind;
        assert_eq!(kind(Code::Unavailable), ErrorKind::Unavailable);
        assert_eq!(kind(Code::OutOfRange), ErrorKind::PayloadTooLarge);
        assert_eq!(kind(Code::DataLoss), ErrorKind::Internal);
    }

    #[test]
    fn long_messages_and_odd_params_are_cut_not_refused() {
        let error = RpcError::invalid("naïve\n", "é".repeat(4000));
        let status = Status::from(error);
        assert!(status.message().len() <= MAX_MESSAGE + '…'.len_utf8());
        assert_eq!(RpcError::from(&status).kind, ErrorKind::InvalidArgument);
    }
}
