//! `POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`: the coordinator's tokenizer by itself.

use axum::{
    Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use http::header;
use phalanx_proto::{
    RpcError,
    v1::{ChatRequest, DetokenizeRequest, TokenizeRequest, tokenize_request::Input},
};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{
    openai::{
        body,
        chat::raw,
        error::ApiError,
        messages::{self, Messages},
        unoffered,
    },
    routes::Service,
};

/// A text to tokenize, or a conversation to render and tokenize.
#[derive(Debug, Deserialize)]
pub(crate) struct TokenizeBody {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Messages>,
    add_special_tokens: Option<bool>,
    return_token_strs: Option<bool>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    chat_template: Option<String>,
    // Passed on as they are.
    chat_template_kwargs: Option<Box<RawValue>>,
    tools: Option<Box<RawValue>>,
}

impl TokenizeBody {
    fn into_grpc(self) -> Result<TokenizeRequest, RpcError> {
        let input = match (self.prompt, self.messages) {
            (Some(text), None) => Input::Text(text),
            (None, Some(messages)) => Input::Chat(ChatRequest {
                messages: messages::to_grpc(Some(messages))?,
                add_generation_prompt: self.add_generation_prompt,
                continue_final_message: self.continue_final_message.unwrap_or(false),
                template_kwargs_json: raw("chat_template_kwargs", '{', self.chat_template_kwargs)?,
                tools_json: raw("tools", '[', self.tools)?,
                chat_template: self.chat_template.unwrap_or_default(),
                ..ChatRequest::default()
            }),
            (None, None) => return Err(RpcError::invalid("prompt", "either prompt or messages is needed")),
            (Some(_), Some(_)) => {
                return Err(RpcError::invalid(
                    "messages",
                    "give either prompt or messages, not both",
                ));
            }
        };
        Ok(TokenizeRequest {
            model: self.model.unwrap_or_default(),
            input: Some(input),
            add_special_tokens: self.add_special_tokens,
            return_token_strs: self.return_token_strs.unwrap_or(false),
        })
    }
}

#[derive(Serialize)]
struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

/// `POST /tokenize`.
pub(crate) async fn tokenize(State(service): State<Service>, request: Request) -> Result<Response, ApiError> {
    let mut ticket = service.lifecycle.admit()?;
    let body = body::read(request, &service.limits).await?;
    let fields: TokenizeBody = body::parse(&body)?;
    unoffered::refuse_for_tokenize(&body)?;
    let request = fields.into_grpc()?;
    ticket.start(1)?;
    let spelled = request.return_token_strs;
    let reply = service.backend.tokenize(request).await?;
    let tokenized = Tokenized {
        count: reply.token_ids.len(),
        max_model_len: reply.max_model_len,
        tokens: reply.token_ids,
        token_strs: spelled.then_some(reply.token_strs),
    };
    Ok(Json(tokenized).into_response())
}

/// Token ids to turn into text.
#[derive(Debug, Deserialize)]
pub(crate) struct DetokenizeBody {
    model: Option<String>,
    tokens: Option<Vec<u32>>,
}

/// `POST /detokenize`.
pub(crate) async fn detokenize(
    State(service): State<Service>,
    request: Request,
) -> Result<Response, ApiError> {
    #[derive(Serialize)]
    struct Detokenized {
        prompt: String,
    }
    let mut ticket = service.lifecycle.admit()?;
    let body = body::read(request, &service.limits).await?;
    let fields: DetokenizeBody = body::parse(&body)?;
    let token_ids = fields
        .tokens
        .ok_or_else(|| RpcError::invalid("tokens", "tokens is needed"))?;
    ticket.start(1)?;
    let request = DetokenizeRequest {
        model: fields.model.unwrap_or_default(),
        token_ids,
    };
    let prompt = service.backend.detokenize(request).await?.text;
    Ok(Json(Detokenized { prompt }).into_response())
}

/// `GET /tokenizer_info`.
pub(crate) async fn info(State(service): State<Service>) -> Result<Response, ApiError> {
    let reply = service.backend.tokenizer_info().await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], reply.json).into_response())
}
