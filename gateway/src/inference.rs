//! `POST /inference/v1/generate`: token ids in, token ids out, for callers that tokenize themselves; and
//! `POST /inference/v1/abort_requests`, which ends what they started.

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use http::StatusCode;
use phalanx_proto::{
    RpcError,
    limits::MAX_LOGPROB_TOKEN_IDS,
    v1::{self, Choice, GenerateRequest, TokenIds, TokenLogprob, generate_request::Prompt},
};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{
    control::AbortBody,
    lifecycle::Ticket,
    limits::MAX_REQUEST_ID,
    observe::{RequestId, is_usable},
    openai::{
        body::{self, Bounded, parse},
        caller::Caller,
        error::ApiError,
        output::ReplyOptions,
        params::Params,
        reply::{Head, Whole, finish_reason},
        sse::{self, Events, Piece, Streaming},
        structured, unoffered,
        usage::Usage,
    },
    router::Replicas,
    routes::Service,
};

const SAMPLING: &str = "sampling_params";
/// vLLM's default for this route.
const DEFAULT_MAX_TOKENS: u32 = 16;
/// JSON has no infinities. vLLM's floor for a token that cannot be drawn.
const FLOOR: f32 = -9999.0;

/// The fields beside those of a stream and of a place in the queue, which are [`Params`]'.
#[derive(Debug, Deserialize)]
pub(crate) struct GenerateBody {
    request_id: Option<String>,
    token_ids: Option<Vec<u32>>,
    sampling_params: Option<Box<RawValue>>,
}

/// What `sampling_params` has beside what [`Params`] has.
#[derive(Debug, Deserialize)]
pub(crate) struct SamplingFields {
    #[serde(default = "default_max_tokens")]
    max_tokens: Option<u32>,
    logprobs: Option<u32>,
    logprob_token_ids: Option<Bounded<u32, MAX_LOGPROB_TOKEN_IDS>>,
}

#[expect(clippy::unnecessary_wraps, reason = "serde wants the field's type")]
fn default_max_tokens() -> Option<u32> {
    Some(DEFAULT_MAX_TOKENS)
}

/// A checked request.
struct Call {
    request: GenerateRequest,
    streams: bool,
    n: u32,
    style: Style,
}

/// What the reply must contain beside the token ids.
#[derive(Clone, Copy)]
struct Style {
    logprobs: bool,
    include_usage: bool,
    prompt_tokens_details: bool,
}

fn prepare(body: &[u8], id: &RequestId, options: ReplyOptions) -> Result<Call, RpcError> {
    let mut params: Params = parse(body)?;
    let fields: GenerateBody = parse(body)?;
    unoffered::refuse_for_tokens(body)?;
    let sampling_json = fields
        .sampling_params
        .ok_or_else(|| RpcError::invalid(SAMPLING, format!("{SAMPLING} is needed")))?;
    let (sampling, logprobs) = sampling(sampling_json.get().as_bytes()).map_err(within_sampling)?;
    let token_ids = fields.token_ids.unwrap_or_default();
    if token_ids.is_empty() {
        return Err(RpcError::invalid(
            "token_ids",
            "token_ids: at least one is needed",
        ));
    }
    let output = params.output(logprobs, false, options.force_include_usage)?;
    let style = Style {
        logprobs: logprobs.is_some(),
        include_usage: output.include_usage,
        prompt_tokens_details: options.prompt_tokens_details,
    };
    let n = sampling.n.unwrap_or(1);
    let request = GenerateRequest {
        request_id: request_id(fields.request_id, id)?,
        model: params.model.take().unwrap_or_default(),
        prompt: Some(Prompt::TokenIds(TokenIds { ids: token_ids })),
        sampling: Some(sampling),
        output: Some(output),
        priority: params.priority(),
        cache_salt: params.cache_salt.take(),
        timeout_ms: params.timeout_ms()?,
        ..GenerateRequest::default()
    };
    Ok(Call {
        request,
        streams: params.streams(),
        n,
        style,
    })
}

/// The parameters, and how many alternatives per token are wanted.
fn sampling(json: &[u8]) -> Result<(v1::SamplingParams, Option<u32>), RpcError> {
    let mut params: Params = parse(json)?;
    let fields: SamplingFields = parse(json)?;
    unoffered::refuse_for_sampling(json)?;
    let mut sampling = params.sampling(fields.max_tokens)?;
    structured::restrict(json, &mut sampling)?;
    if let Some(structured) = &mut sampling.structured_outputs {
        structured.param = format!("{SAMPLING}.{}", structured.param);
    }
    sampling.logprob_token_ids = fields.logprob_token_ids.unwrap_or_default().0;
    let logprobs = alternatives(fields.logprobs, sampling.logprob_token_ids.len())?;
    Ok((sampling, logprobs))
}

/// As with vLLM, a list of tokens stands for their number.
fn alternatives(logprobs: Option<u32>, listed: usize) -> Result<Option<u32>, RpcError> {
    match logprobs {
        _ if listed == 0 => Ok(logprobs),
        None => Ok(Some(0)),
        Some(count) if count as usize == listed => Ok(logprobs),
        Some(count) => Err(RpcError::invalid(
            "logprob_token_ids",
            format!("logprobs must be the number of logprob_token_ids, which is {listed}, not {count}"),
        )),
    }
}

/// Names a field of the inner object as the client wrote it.
fn within_sampling(mut error: RpcError) -> RpcError {
    error.param = Some(match error.param {
        Some(field) => format!("{SAMPLING}.{field}"),
        None => SAMPLING.to_owned(),
    });
    error
}

/// The id in the body wins over the header's, as with vLLM, whose prefix it gets.
fn request_id(given: Option<String>, header: &RequestId) -> Result<String, RpcError> {
    let given = given.as_deref().unwrap_or(&header.0);
    if !is_usable(given) {
        let message = format!("request_id must have 1 to {MAX_REQUEST_ID} visible ASCII characters");
        return Err(RpcError::invalid("request_id", message));
    }
    Ok(format!("generate-tokens-{given}"))
}

/// `POST /inference/v1/generate`.
pub(crate) async fn generate(
    State(service): State<Service>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut ticket = service.lifecycle.admit()?;
    let replicas = service.replicas_for(request.headers());
    let caller = Caller::of(&request);
    let body = body::read(request, &service.limits).await?;
    let mut call = prepare(&body, &request_id, service.reply)?;
    caller.sign(&mut call.request.tenant, &mut call.request.timeout_ms);
    drop(body);
    ticket.start(1)?;
    if !call.streams {
        return whole(&replicas, call, ticket).await;
    }
    let id = call.request.request_id.clone();
    let chunks = replicas.generate_stream(call.request).await?;
    let streaming = Streaming {
        id,
        n: call.n,
        prompts: vec![chunks],
        events: TokenEvents { style: call.style },
        ticket,
    };
    streaming.respond().await
}

async fn whole(replicas: &Replicas, call: Call, mut ticket: Ticket) -> Result<Response, ApiError> {
    let id = call.request.request_id.clone();
    let reply = tokio::select! {
        reply = replicas.generate(call.request) => reply?,
        error = ticket.stopped() => return Err(error.into()),
    };
    let whole = Whole::join(id, call.n, vec![reply])?;
    let choices = whole
        .choices
        .iter()
        .map(|choice| TokenChoice::of(choice, call.style))
        .collect::<Result<Vec<_>, _>>()?;
    let reply = Generated {
        request_id: &whole.head.id,
        choices: &choices,
        prompt_logprobs: None,
        kv_transfer_params: None,
        usage: Usage::of(whole.usage, call.style.prompt_tokens_details),
    };
    Ok(Json(reply).into_response())
}

#[derive(Serialize)]
struct Generated<'a> {
    request_id: &'a str,
    choices: &'a [TokenChoice<'a>],
    prompt_logprobs: Option<()>,
    kv_transfer_params: Option<()>,
    usage: Usage,
}

#[derive(Serialize)]
struct GeneratedChunk<'a> {
    request_id: &'a str,
    choices: &'a [TokenChoice<'a>],
    usage: Option<Usage>,
}

/// A choice, or in a stream a piece of one.
#[derive(Serialize)]
struct TokenChoice<'a> {
    index: u32,
    logprobs: Option<TokenIdLogprobs>,
    finish_reason: Option<&'static str>,
    token_ids: &'a [u32],
}

impl<'a> TokenChoice<'a> {
    fn of(choice: &'a Choice, style: Style) -> Result<Self, RpcError> {
        Ok(Self {
            index: choice.index,
            logprobs: style.logprobs.then(|| TokenIdLogprobs::of(choice)),
            finish_reason: finish_reason(choice)?,
            token_ids: &choice.token_ids,
        })
    }
}

/// Chat's shape, with ids in the place of texts: callers of this route may have no text at all.
#[derive(Serialize)]
struct TokenIdLogprobs {
    content: Vec<TokenIdLogprob>,
}

#[derive(Serialize)]
struct TokenIdLogprob {
    token: String,
    logprob: f32,
    bytes: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<Vec<TokenIdLogprob>>,
}

impl TokenIdLogprobs {
    fn of(choice: &Choice) -> Self {
        let entry = |token: &TokenLogprob, top_logprobs| TokenIdLogprob {
            token: format!("token_id:{}", token.token_id),
            logprob: token.logprob.max(FLOOR),
            bytes: None,
            top_logprobs,
        };
        let content = choice.logprobs.iter().filter_map(|token| {
            let top = token.top.iter().map(|other| entry(other, None)).collect();
            Some(entry(token.chosen.as_ref()?, Some(top)))
        });
        Self {
            content: content.collect(),
        }
    }
}

struct TokenEvents {
    style: Style,
}

impl TokenEvents {
    fn write(&self, out: &mut Vec<u8>, head: &Head, choices: &[TokenChoice<'_>], usage: Option<v1::Usage>) {
        let chunk = GeneratedChunk {
            request_id: &head.id,
            choices,
            usage: usage
                .filter(|_| self.style.include_usage)
                .map(|usage| Usage::of(usage, self.style.prompt_tokens_details)),
        };
        sse::event(out, &chunk);
    }
}

impl Events for TokenEvents {
    fn piece(&mut self, out: &mut Vec<u8>, head: &Head, piece: Piece<'_>) -> Result<(), RpcError> {
        let choice = TokenChoice::of(piece.choice, self.style)?;
        self.write(out, head, &[choice], piece.usage);
        Ok(())
    }

    fn usage(&mut self, out: &mut Vec<u8>, head: &Head, usage: v1::Usage) {
        self.write(out, head, &[], Some(usage));
    }
}

/// `POST /inference/v1/abort_requests`: ends the requests of the ids that replies carried. Unknown ones have ended.
pub(crate) async fn abort_requests(
    State(service): State<Service>,
    request: Request,
) -> Result<Response, ApiError> {
    const PARAM: &str = "request_ids";
    let body = body::read(request, &service.limits).await?;
    let ids = parse::<AbortBody>(&body)?.request_ids;
    let ids = ids.ok_or_else(|| RpcError::invalid(PARAM, format!("{PARAM} is needed")))?;
    for id in ids.0 {
        service.backend.abort_request(&id).await?;
    }
    Ok(StatusCode::OK.into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(body: &str) -> Result<Call, RpcError> {
        prepare(
            body.as_bytes(),
            &RequestId("trace".into()),
            ReplyOptions::default(),
        )
    }

    #[test]
    fn both_objects_are_carried() {
        let body = r#"{"token_ids": [1, 2], "sampling_params": {"n": 2, "temperature": 0, "logprobs": 1},
            "model": "m", "stream": true, "priority": 3, "cache_salt": "s", "request_id": "mine"}"#;
        let call = call(body).expect("valid");
        assert!(call.streams && call.style.logprobs && call.n == 2);
        let request = call.request;
        assert_eq!(
            (request.request_id.as_str(), request.model.as_str()),
            ("generate-tokens-mine", "m")
        );
        assert_eq!(
            request.prompt,
            Some(Prompt::TokenIds(TokenIds { ids: vec![1, 2] }))
        );
        assert_eq!((request.priority, request.cache_salt.as_deref()), (3, Some("s")));
        let sampling = request.sampling.expect("given");
        assert_eq!((sampling.max_tokens, sampling.temperature), (Some(16), Some(0.0)));
        assert_eq!(request.output.expect("given").logprobs, Some(1));
    }

    /// As in vLLM, their number is the only one that may be asked for beside them.
    #[test]
    fn a_list_of_tokens_asks_for_logprobs_itself() {
        let asked = |sampling: &str| {
            let call = call(&format!(
                r#"{{"token_ids": [1], "sampling_params": {{{sampling}}}}}"#
            ))?;
            let listed = call.request.sampling.expect("given").logprob_token_ids;
            let logprobs = call.request.output.expect("given").logprobs;
            Ok((call.style.logprobs, logprobs, listed))
        };
        let listed = vec![8, 5];
        assert_eq!(
            asked(r#""logprob_token_ids": [8, 5]"#),
            Ok((true, Some(0), listed.clone()))
        );
        assert_eq!(
            asked(r#""logprob_token_ids": [8, 5], "logprobs": 2"#),
            Ok((true, Some(2), listed))
        );
        assert_eq!(asked(r#""logprob_token_ids": []"#), Ok((false, None, vec![])));
        let refused: RpcError =
            asked(r#""logprob_token_ids": [8, 5], "logprobs": 1"#).expect_err("another number");
        assert_eq!(
            refused.param.as_deref(),
            Some("sampling_params.logprob_token_ids")
        );
    }

    #[test]
    fn refusals_name_the_field_within_its_object() {
        for (body, param) in [
            (r#"{"token_ids": [1]}"#, "sampling_params"),
            (r#"{"token_ids": [1], "sampling_params": 3}"#, "sampling_params"),
            (r#"{"sampling_params": {}}"#, "token_ids"),
            (r#"{"token_ids": [], "sampling_params": {}}"#, "token_ids"),
            (r#"{"token_ids": [-1], "sampling_params": {}}"#, "token_ids[0]"),
            (
                r#"{"token_ids": [1], "sampling_params": {"n": 0}}"#,
                "sampling_params.n",
            ),
            (
                r#"{"token_ids": [1], "sampling_params": {"best_of": 2}}"#,
                "sampling_params.best_of",
            ),
            (
                r#"{"token_ids": [1], "sampling_params": {"structured_outputs": {}}}"#,
                "sampling_params.structured_outputs",
            ),
            (
                r#"{"token_ids": [1], "sampling_params": {}, "features": {}}"#,
                "features",
            ),
            (
                r#"{"token_ids": [1], "sampling_params": {}, "request_id": "a b"}"#,
                "request_id",
            ),
        ] {
            let error = call(body).err().unwrap_or_else(|| panic!("{body} is accepted"));
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
        }
    }
}
