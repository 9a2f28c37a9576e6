//! `POST /invocations`: SageMaker's one route for everything.

use axum::{
    Extension,
    body::Body,
    extract::{Request, State},
    response::Response,
};
use phalanx_proto::{ErrorKind, RpcError};
use serde::{Deserialize, de::IgnoredAny};

use crate::{
    observe::RequestId,
    openai::{body, chat, completions, error::ApiError},
    routes::Service,
};

/// What tells the requests of the routes apart.
#[derive(Debug, Deserialize)]
struct Kind {
    messages: Option<IgnoredAny>,
    prompt: Option<IgnoredAny>,
}

/// A chat if the body has messages, a completion if it has a prompt.
pub(crate) async fn invocations(
    State(service): State<Service>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let (head, body) = request.into_parts();
    let bytes = body::read(Request::from_parts(head.clone(), body), &service.limits).await?;
    let kind: Kind = body::parse(&bytes)?;
    let request = Request::from_parts(head, Body::from(bytes));
    match (kind.messages, kind.prompt) {
        (Some(_), _) => chat::handle(State(service), Extension(request_id), request).await,
        (None, Some(_)) => completions::handle(State(service), Extension(request_id), request).await,
        (None, None) => {
            let message = "a request needs messages (a chat) or a prompt (a completion)";
            Err(RpcError::new(ErrorKind::InvalidArgument, message).into())
        }
    }
}
