//! A request of vLLM's in our terms.

use phalanx_proto::{
    RpcError,
    secret::random_u64,
    v1::{self, generate_request::Prompt, structured_outputs::Constraint},
    vllm::{
        self, CandidateTokens, DecodingParameters, GenerateRequest, KvCacheParameters, RandomSampling,
        ResponseOptions, StoppingCriteria, candidate_tokens::Select, decoding_parameters::StructuredOutput,
    },
};

/// What the replies shall hold beside counts and ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) prompt_token_ids: bool,
    /// Log-probabilities of the prompt, with so many candidates for each token.
    pub(super) prompt_logprobs: Option<u32>,
    pub(super) text: bool,
    pub(super) token_ids: bool,
    /// Log-probabilities, with so many candidates for each token.
    pub(super) logprobs: Option<u32>,
}

/// # Errors
/// `InvalidArgument` naming the first field that is not offered. Ranges are the text side's to judge.
pub(super) fn to_native(request: GenerateRequest) -> Result<(v1::GenerateRequest, Wanted), RpcError> {
    refuse_unoffered(&request)?;
    let response = request.response.unwrap_or_default();
    let wanted = wanted(&response)?;
    let decoding = request.decoding.unwrap_or_default();
    let stopping = request.stopping.unwrap_or_default();
    let sampling = sampling_params(
        request.temperature,
        request.sampling.unwrap_or_default(),
        decoding,
        v1::SamplingParams {
            skip_special_tokens: response.skip_special_tokens,
            ..stop_params(stopping)?
        },
    );
    let native = v1::GenerateRequest {
        request_id: request.request_id,
        model: request.model,
        prompt: request.prompt.map(|prompt| match prompt {
            vllm::generate_request::Prompt::Text(text) => Prompt::Text(text),
            vllm::generate_request::Prompt::TokenIds(ids) => Prompt::TokenIds(token_ids(ids)),
        }),
        sampling: Some(sampling),
        output: Some(v1::OutputOptions {
            logprobs: wanted.logprobs,
            prompt_logprobs: wanted.prompt_logprobs,
            return_prompt_token_ids: wanted.prompt_token_ids,
            // Every piece says how many prompt tokens were cached.
            continuous_usage: true,
            ..v1::OutputOptions::default()
        }),
        priority: request.priority,
        truncate_prompt_tokens: (request.truncate_prompt_tokens > 0)
            .then(|| i32::try_from(request.truncate_prompt_tokens).unwrap_or(i32::MAX)),
        cache_salt: cache_salt(request.kv.unwrap_or_default()),
        ..v1::GenerateRequest::default()
    };
    Ok((native, wanted))
}

/// Hints (`session_id`, `kv_hints`) may be ignored; everything else that is set and not offered is refused.
fn refuse_unoffered(request: &GenerateRequest) -> Result<(), RpcError> {
    let kv = request.kv.as_ref();
    let fields = [
        ("media", !request.media.is_empty()),
        ("lora_name", !request.lora_name.is_empty()),
        ("watermarking", request.watermarking == Some(true)),
        ("engine_reasoning_gate", request.engine_reasoning_gate.is_some()),
        (
            "kv.kv_transfer_params",
            kv.is_some_and(|it| it.kv_transfer_params.is_some()),
        ),
        (
            "kv.ec_transfer_params",
            kv.is_some_and(|it| it.ec_transfer_params.is_some()),
        ),
    ];
    match fields.iter().find(|(_, is_set)| *is_set) {
        Some((field, _)) => Err(not_offered(field)),
        None => Ok(()),
    }
}

fn not_offered(field: &str) -> RpcError {
    RpcError::invalid(field, format!("{field} is not offered by this server."))
}

fn wanted(response: &ResponseOptions) -> Result<Wanted, RpcError> {
    let prompt = candidates("response.prompt_candidates", response.prompt_candidates.as_ref())?;
    let output = candidates("response.output_candidates", response.output_candidates.as_ref())?;
    let asked =
        |flag: bool, candidates: Option<u32>| (flag || candidates.is_some()).then(|| candidates.unwrap_or(0));
    Ok(Wanted {
        prompt_token_ids: response.prompt_token_ids,
        prompt_logprobs: asked(response.prompt_logprobs, prompt),
        text: response.output_text.unwrap_or(true),
        token_ids: response.output_token_ids,
        logprobs: asked(response.output_logprobs, output),
    })
}

/// How many there shall be for each token.
fn candidates(field: &'static str, given: Option<&CandidateTokens>) -> Result<Option<u32>, RpcError> {
    match given.and_then(|candidates| candidates.select.as_ref()) {
        None => Ok(None),
        Some(Select::TopN(count)) => Ok(Some(*count)),
        Some(_) => {
            let message = format!("{field} must be top_n; named ones and all of them are not offered.");
            Err(RpcError::invalid(field, message))
        }
    }
}

/// `rest` holds what the other messages say. Zero is unset for what the message has no other way to leave out.
fn sampling_params(
    temperature: Option<f32>,
    sampling: RandomSampling,
    decoding: DecodingParameters,
    rest: v1::SamplingParams,
) -> v1::SamplingParams {
    v1::SamplingParams {
        n: (sampling.num_sequences > 0).then_some(sampling.num_sequences),
        temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        presence_penalty: set(decoding.presence_penalty),
        frequency_penalty: set(decoding.frequency_penalty),
        repetition_penalty: set(decoding.repetition_penalty),
        seed: sampling.seed.map(i64::cast_unsigned),
        logit_bias: decoding.logit_bias,
        allowed_token_ids: decoding.allowed_token_ids,
        bad_words_token_ids: decoding.bad_words_token_ids.into_iter().map(token_ids).collect(),
        structured_outputs: decoding.structured_output.and_then(structured_outputs),
        ..rest
    }
}

fn token_ids(given: vllm::TokenIds) -> v1::TokenIds {
    v1::TokenIds { ids: given.ids }
}

/// None for a JSON object that is not asked for.
fn structured_outputs(given: StructuredOutput) -> Option<v1::StructuredOutputs> {
    let constraint = match given {
        StructuredOutput::Json(schema) => Constraint::JsonSchema(schema),
        StructuredOutput::Regex(regex) => Constraint::Regex(regex),
        StructuredOutput::Choice(choice) => Constraint::Choice(v1::structured_outputs::Choices {
            choices: choice.choices,
        }),
        StructuredOutput::Grammar(grammar) => Constraint::Grammar(grammar),
        StructuredOutput::JsonObject(true) => Constraint::JsonObject(true),
        StructuredOutput::JsonObject(false) => return None,
        StructuredOutput::StructuralTag(tag) => Constraint::StructuralTag(tag),
    };
    Some(v1::StructuredOutputs {
        constraint: Some(constraint),
        param: "decoding.structured_output".into(),
        ..v1::StructuredOutputs::default()
    })
}

fn stop_params(stopping: StoppingCriteria) -> Result<v1::SamplingParams, RpcError> {
    let budget = stopping.thinking_token_budget.map(thinking_token_budget);
    Ok(v1::SamplingParams {
        thinking_token_budget: budget.transpose()?.flatten(),
        max_tokens: (stopping.max_new_tokens > 0).then_some(stopping.max_new_tokens),
        min_tokens: (stopping.min_new_tokens > 0).then_some(stopping.min_new_tokens),
        stop: stopping.stop_strings,
        stop_token_ids: stopping.stop_token_ids,
        ignore_eos: stopping.ignore_eos,
        include_stop_str_in_output: stopping.include_stop_strings,
        ..v1::SamplingParams::default()
    })
}

/// None for -1, which asks for none.
fn thinking_token_budget(given: i64) -> Result<Option<u32>, RpcError> {
    match given {
        -1 => Ok(None),
        0.. => Ok(Some(u32::try_from(given).unwrap_or(u32::MAX))),
        _ => {
            const PARAM: &str = "stopping.thinking_token_budget";
            let message = format!("{PARAM} must be -1 (none) or at least 0, got {given}.");
            Err(RpcError::invalid(PARAM, message))
        }
    }
}

/// NaN is set: it has to be refused.
fn set(value: f32) -> Option<f32> {
    (value != 0.0).then_some(value)
}

/// A salt that nobody else has finds nothing in the prefix cache.
fn cache_salt(kv: KvCacheParameters) -> Option<String> {
    if kv.bypass_prefix_cache {
        return Some(format!("bypass-{:016x}", random_u64()));
    }
    (!kv.cache_salt.is_empty()).then_some(kv.cache_salt)
}

#[cfg(test)]
mod tests {
    use phalanx_proto::vllm::{MediaItem, TokenIds};

    use super::*;

    fn refused(request: GenerateRequest) -> String {
        let error = to_native(request).expect_err("refused");
        error.param.expect("a field")
    }

    #[test]
    fn what_is_left_out_stays_unset() {
        let (native, wanted) = to_native(GenerateRequest::default()).expect("converts");
        let sampling = native.sampling.expect("sampling");
        assert_eq!(sampling, v1::SamplingParams::default());
        assert_eq!((native.prompt, native.cache_salt), (None, None));
        assert_eq!(native.output.expect("output").logprobs, None);
        assert!(wanted.text && !wanted.token_ids && wanted.logprobs.is_none());
    }

    #[test]
    fn what_is_set_keeps_its_meaning() {
        let request = GenerateRequest {
            temperature: Some(0.0),
            sampling: Some(RandomSampling {
                num_sequences: 2,
                top_k: Some(0),
                seed: Some(-1),
                ..RandomSampling::default()
            }),
            decoding: Some(DecodingParameters {
                repetition_penalty: 1.5,
                presence_penalty: f32::NAN,
                allowed_token_ids: vec![1, 2],
                bad_words_token_ids: vec![TokenIds { ids: vec![3, 4] }],
                structured_output: Some(StructuredOutput::Regex("a+".into())),
                ..DecodingParameters::default()
            }),
            stopping: Some(StoppingCriteria {
                max_new_tokens: 7,
                thinking_token_budget: Some(1 << 40),
                stop_strings: vec!["x".into()],
                include_stop_strings: true,
                ..StoppingCriteria::default()
            }),
            response: Some(ResponseOptions {
                output_logprobs: true,
                output_text: Some(false),
                skip_special_tokens: Some(false),
                ..ResponseOptions::default()
            }),
            kv: Some(KvCacheParameters {
                bypass_prefix_cache: true,
                cache_salt: "mine".into(),
                ..KvCacheParameters::default()
            }),
            ..GenerateRequest::default()
        };
        let (native, wanted) = to_native(request).expect("converts");
        let sampling = native.sampling.expect("sampling");
        assert_eq!((sampling.temperature, sampling.n), (Some(0.0), Some(2)));
        assert_eq!((sampling.top_k, sampling.seed), (Some(0), Some(u64::MAX)));
        assert_eq!((sampling.max_tokens, sampling.min_tokens), (Some(7), None));
        assert_eq!(sampling.thinking_token_budget, Some(u32::MAX));
        assert!(sampling.presence_penalty.is_some_and(f32::is_nan));
        assert_eq!(sampling.allowed_token_ids, [1, 2]);
        assert_eq!(sampling.bad_words_token_ids, [v1::TokenIds { ids: vec![3, 4] }]);
        let structured = sampling.structured_outputs.expect("a constraint");
        assert_eq!(structured.constraint, Some(Constraint::Regex("a+".into())));
        assert!(sampling.include_stop_str_in_output && sampling.skip_special_tokens == Some(false));
        assert!(native.cache_salt.is_some_and(|salt| salt != "mine"));
        assert_eq!((wanted.logprobs, wanted.text), (Some(0), false));
    }

    #[test]
    fn what_is_not_offered_is_named() {
        let media = vec![MediaItem::default()];
        let request = || GenerateRequest::default();
        assert_eq!(refused(GenerateRequest { media, ..request() }), "media");
        let response = Some(ResponseOptions {
            output_candidates: Some(CandidateTokens {
                select: Some(Select::TokenIds(TokenIds::default())),
            }),
            ..ResponseOptions::default()
        });
        assert_eq!(
            refused(GenerateRequest {
                response,
                ..request()
            }),
            "response.output_candidates"
        );
        let budget = |tokens| GenerateRequest {
            stopping: Some(StoppingCriteria {
                thinking_token_budget: Some(tokens),
                ..StoppingCriteria::default()
            }),
            ..request()
        };
        assert_eq!(refused(budget(-2)), "stopping.thinking_token_budget");
        let (none, _) = to_native(budget(-1)).expect("asks for nothing");
        assert_eq!(none.sampling.expect("sampling").thinking_token_budget, None);
        let hints = GenerateRequest {
            session_id: Some("s".into()),
            ..request()
        };
        assert!(to_native(hints).is_ok());
    }
}
