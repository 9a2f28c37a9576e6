//! Sampling parameters of a request: defaults filled in, every range checked, with vLLM's wording.

use std::ops::RangeInclusive;

use phalanx_proto::{
    ErrorKind, RpcError,
    limits::{MAX_LOGIT_BIAS, MAX_N, MAX_STOP_TOKEN_IDS},
    secret::random_u64,
    v1,
};

use super::{GenerationDefaults, StopMatcher, listed, repetition, token_ids, tokenizer::SpecialTokens};
use crate::engine::{Constraint, RepetitionDetection, SamplingParams, StopRules};

/// Smaller temperatures than this are raised to it, as in vLLM: dividing logits by less overflows.
const MIN_TEMPERATURE: f32 = 0.01;
/// Larger biases are lowered to it, as in vLLM: it forces or bans a token already.
const MOST_BIAS: f32 = 100.0;

/// What a model and its server allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelLimits {
    /// Prompt and completion together, in tokens.
    pub max_model_len: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Most alternatives per token.
    pub max_logprobs: u32,
}

/// What checking is done against.
#[derive(Clone, Copy)]
pub(crate) struct Rules<'a> {
    pub(crate) limits: &'a ModelLimits,
    pub(crate) defaults: &'a GenerationDefaults,
    pub(crate) special: &'a SpecialTokens,
}

/// Checked parameters; only the prompt's length is still unknown.
#[derive(Debug)]
pub(crate) struct CheckedParams {
    pub(crate) n: u32,
    pub(crate) sampling: SamplingParams,
    pub(crate) stop_strings: StopMatcher,
    pub(crate) skip_special_tokens: bool,
    /// None until it has been compiled, which takes its time.
    pub(crate) constraint: Constraint,
    /// What the request asked for.
    max_tokens: Option<u32>,
    /// The model's default cap.
    default_max_tokens: Option<u32>,
    min_tokens: u32,
    stop_token_ids: Vec<u32>,
    repetition: Option<RepetitionDetection>,
}

/// Errors: a default that no request might ask for.
pub(super) fn check_defaults(defaults: &GenerationDefaults) -> Result<(), RpcError> {
    Numbers::resolve(&v1::SamplingParams::default(), defaults).check()
}

/// Checks `params` and `output` and fills in defaults. Errors: `InvalidArgument` naming field, value and limit.
pub(crate) fn check(
    params: &v1::SamplingParams,
    output: &v1::OutputOptions,
    rules: Rules<'_>,
) -> Result<CheckedParams, RpcError> {
    let numbers = Numbers::resolve(params, rules.defaults);
    numbers.check()?;
    let greedy = numbers.temperature == 0.0;
    let n = checked_n(params.n.unwrap_or(1), greedy)?;
    check_alternatives(output, rules.limits.max_logprobs)?;
    if params.max_tokens == Some(0) && !output.echo {
        return Err(RpcError::invalid(
            "max_tokens",
            "max_tokens must be at least 1, got 0.",
        ));
    }
    let min_tokens = params.min_tokens.unwrap_or(0);
    if let Some(max_tokens) = params.max_tokens.filter(|&max| min_tokens > max) {
        let message =
            format!("min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}.");
        return Err(RpcError::invalid("min_tokens", message));
    }
    Ok(CheckedParams {
        n,
        sampling: SamplingParams {
            temperature: if greedy {
                0.0
            } else {
                numbers.temperature.max(MIN_TEMPERATURE)
            },
            // What greedy decoding does not look at must not cost anything.
            top_p: if greedy { 1.0 } else { numbers.top_p },
            top_k: if greedy { 0 } else { numbers.top_k },
            min_p: if greedy { 0.0 } else { numbers.min_p },
            repetition_penalty: numbers.repetition_penalty,
            presence_penalty: numbers.presence_penalty,
            frequency_penalty: numbers.frequency_penalty,
            seed: params.seed.unwrap_or_else(random_u64),
            logprobs: output.logprobs,
            logprob_token_ids: listed::checked(params, output, rules.limits)?,
            prompt_logprobs: prompt_alternatives(output),
            logit_bias: logit_bias(params, rules.limits)?,
        },
        stop_strings: StopMatcher::new(&params.stop, params.include_stop_str_in_output)?,
        skip_special_tokens: params.skip_special_tokens.unwrap_or(true),
        constraint: Constraint::default(),
        max_tokens: params.max_tokens,
        default_max_tokens: rules.defaults.max_new_tokens,
        min_tokens,
        stop_token_ids: stop_token_ids(params, rules)?,
        repetition: repetition::detection(params.repetition_detection)?,
    })
}

impl CheckedParams {
    /// When a sequence with `prompt_tokens` ends. Errors: `ContextLengthExceeded` naming the numbers; `min_tokens` that
    /// no longer fit.
    pub(crate) fn stop_rules(
        &self,
        prompt_tokens: usize,
        limits: &ModelLimits,
    ) -> Result<StopRules, RpcError> {
        let limit = limits.max_model_len;
        let left = (limit as usize).saturating_sub(prompt_tokens) as u32;
        if left == 0 {
            let message = format!(
                "This model's maximum context length is {limit} tokens. However, your request has {prompt_tokens} input \
                 tokens. Please reduce the length of the input messages."
            );
            return Err(RpcError::new(ErrorKind::ContextLengthExceeded, message).with_param("prompt"));
        }
        if let Some(max_tokens) = self.max_tokens.filter(|&max| max > left) {
            let message = format!(
                "This model's maximum context length is {limit} tokens. However, you requested {} tokens \
                 ({prompt_tokens} in the messages, {max_tokens} in the completion). Please reduce the length of the \
                 messages or completion.",
                prompt_tokens as u64 + u64::from(max_tokens)
            );
            return Err(RpcError::new(ErrorKind::ContextLengthExceeded, message).with_param("max_tokens"));
        }
        let max_tokens = self
            .max_tokens
            // A prompt that is only echoed is computed by sampling once; nobody sees the token.
            .map(|max| max.max(1))
            .unwrap_or_else(|| self.default_max_tokens.map_or(left, |max| max.min(left)));
        if self.min_tokens > max_tokens {
            let message = format!(
                "min_tokens must be less than or equal to max_tokens={max_tokens}, got {}.",
                self.min_tokens
            );
            return Err(RpcError::invalid("min_tokens", message));
        }
        Ok(StopRules {
            max_tokens,
            min_tokens: self.min_tokens,
            stop_token_ids: self.stop_token_ids.clone(),
            repetition: self.repetition,
        })
    }

    /// The sampling parameters of completion `index`. The first scores the prompt for all.
    pub(crate) fn sampling_of(&self, index: u32) -> SamplingParams {
        SamplingParams {
            seed: self.sampling.seed.wrapping_add(index.into()),
            prompt_logprobs: self.sampling.prompt_logprobs.filter(|_| index == 0),
            ..self.sampling.clone()
        }
    }

    /// Whether anything comes after the prompt.
    pub(crate) fn generates(&self) -> bool {
        self.max_tokens != Some(0)
    }

    /// The most tokens of a prompt that is cut to what fits beside its completion.
    pub(crate) fn room_for_prompt(&self, limits: &ModelLimits) -> usize {
        limits
            .max_model_len
            .saturating_sub(self.max_tokens.unwrap_or(1).max(1)) as usize
    }
}

/// Alternatives of prompt tokens, for whichever part of the reply has more of them.
fn prompt_alternatives(output: &v1::OutputOptions) -> Option<u32> {
    let echoed = output.logprobs.filter(|_| output.echo);
    output.prompt_logprobs.max(echoed)
}

fn check_alternatives(output: &v1::OutputOptions, limit: u32) -> Result<(), RpcError> {
    for (param, kind, count) in [
        ("logprobs", "sample", output.logprobs),
        ("prompt_logprobs", "prompt", output.prompt_logprobs),
    ] {
        if let Some(count) = count.filter(|&count| count > limit) {
            let message = format!(
                "Requested {kind} logprobs of {count}, which is greater than max allowed: {limit} (--max-logprobs)"
            );
            return Err(RpcError::invalid(param, message));
        }
    }
    Ok(())
}

/// The numeric fields with their defaults.
struct Numbers {
    temperature: f32,
    top_p: f32,
    top_k: u32,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
}

impl Numbers {
    fn resolve(params: &v1::SamplingParams, defaults: &GenerationDefaults) -> Self {
        let default_top_k = defaults.top_k.and_then(|k| u32::try_from(k).ok());
        Self {
            temperature: params.temperature.or(defaults.temperature).unwrap_or(1.0),
            top_p: params.top_p.or(defaults.top_p).unwrap_or(1.0),
            top_k: params.top_k.or(default_top_k).unwrap_or(0),
            min_p: params.min_p.or(defaults.min_p).unwrap_or(0.0),
            repetition_penalty: params
                .repetition_penalty
                .or(defaults.repetition_penalty)
                .unwrap_or(1.0),
            presence_penalty: params.presence_penalty.unwrap_or(0.0),
            frequency_penalty: params.frequency_penalty.unwrap_or(0.0),
        }
    }

    fn check(&self) -> Result<(), RpcError> {
        let invalid = |field: &str, rule: &str, value: f32| {
            Err(RpcError::invalid(
                field,
                format!("{field} must be {rule}, got {value}."),
            ))
        };
        // Comparisons are written so that NaN fails them.
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return invalid("temperature", "non-negative and finite", self.temperature);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return invalid("top_p", "in (0, 1]", self.top_p);
        }
        let within = |range: RangeInclusive<f32>, value: f32| range.contains(&value);
        if !within(0.0..=1.0, self.min_p) {
            return invalid("min_p", "in [0, 1]", self.min_p);
        }
        for (field, value) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            if !within(-2.0..=2.0, value) {
                return invalid(field, "in [-2, 2]", value);
            }
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return invalid(
                "repetition_penalty",
                "greater than zero and finite",
                self.repetition_penalty,
            );
        }
        Ok(())
    }
}

fn checked_n(n: u32, greedy: bool) -> Result<u32, RpcError> {
    let message = match n {
        0 => "n must be at least 1, got 0.".to_owned(),
        1 => return Ok(1),
        _ if n > MAX_N => format!("n must be at most {MAX_N}, got {n}."),
        _ if greedy => format!("n must be 1 when using greedy sampling, got {n}."),
        _ => return Ok(n),
    };
    Err(RpcError::invalid("n", message))
}

/// The request's bias by rising token id.
fn logit_bias(params: &v1::SamplingParams, limits: &ModelLimits) -> Result<Vec<(u32, f32)>, RpcError> {
    const PARAM: &str = "logit_bias";
    let count = params.logit_bias.len();
    if count > MAX_LOGIT_BIAS {
        let message = format!("logit_bias has {count} entries, at most {MAX_LOGIT_BIAS} are allowed.");
        return Err(RpcError::invalid(PARAM, message));
    }
    let mut bias: Vec<(u32, f32)> = params.logit_bias.iter().map(|(&id, &bias)| (id, bias)).collect();
    bias.sort_unstable_by_key(|&(id, _)| id);
    if let Some((id, _)) = bias.iter().find(|&&(id, _)| id >= limits.vocab_size) {
        let message = format!(
            "logit_bias holds token {id}, but token ids are below {}.",
            limits.vocab_size
        );
        return Err(RpcError::invalid(PARAM, message));
    }
    if let Some((id, value)) = bias.iter().find(|(_, value)| !value.is_finite()) {
        let message = format!("logit_bias of token {id} must be finite, got {value}.");
        return Err(RpcError::invalid(PARAM, message));
    }
    for (_, value) in &mut bias {
        *value = value.clamp(-MOST_BIAS, MOST_BIAS);
    }
    Ok(bias)
}

/// The request's stop tokens, and the model's unless they are to be ignored.
fn stop_token_ids(params: &v1::SamplingParams, rules: Rules<'_>) -> Result<Vec<u32>, RpcError> {
    const PARAM: &str = "stop_token_ids";
    let mut ids = params.stop_token_ids.clone();
    token_ids::check(PARAM, &ids, MAX_STOP_TOKEN_IDS, rules.limits.vocab_size)?;
    if !params.ignore_eos {
        ids.extend(&rules.special.end_of_generation);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: ModelLimits = ModelLimits {
        max_model_len: 100,
        vocab_size: 50,
        max_logprobs: 20,
    };

    fn check_with(
        params: &v1::SamplingParams,
        output: &v1::OutputOptions,
        defaults: &GenerationDefaults,
    ) -> Result<CheckedParams, RpcError> {
        let special = SpecialTokens {
            eos: Some(2),
            end_of_generation: vec![0, 2],
            ..SpecialTokens::default()
        };
        let rules = Rules {
            limits: &LIMITS,
            defaults,
            special: &special,
        };
        check(params, output, rules)
    }

    fn edited(edit: impl FnOnce(&mut v1::SamplingParams)) -> Result<CheckedParams, RpcError> {
        let mut params = v1::SamplingParams::default();
        edit(&mut params);
        check_with(
            &params,
            &v1::OutputOptions::default(),
            &GenerationDefaults::default(),
        )
    }

    /// Expects a refusal that names the field and ends with `message`.
    #[track_caller]
    fn refused(param: &str, message: &str, edit: impl FnOnce(&mut v1::SamplingParams)) {
        let error = edited(edit).expect_err("out of range");
        assert_eq!(
            (error.kind, error.param.as_deref()),
            (ErrorKind::InvalidArgument, Some(param))
        );
        assert!(error.message.ends_with(message), "{}", error.message);
    }

    #[test]
    fn every_range_is_checked_and_named() {
        refused("temperature", "finite, got -0.5.", |p| p.temperature = Some(-0.5));
        refused("temperature", "finite, got NaN.", |p| {
            p.temperature = Some(f32::NAN)
        });
        refused("temperature", "finite, got inf.", |p| {
            p.temperature = Some(f32::INFINITY);
        });
        refused("top_p", "in (0, 1], got 0.", |p| p.top_p = Some(0.0));
        refused("top_p", "in (0, 1], got 1.5.", |p| p.top_p = Some(1.5));
        refused("min_p", "in [0, 1], got -1.", |p| p.min_p = Some(-1.0));
        refused("presence_penalty", "in [-2, 2], got 3.", |p| {
            p.presence_penalty = Some(3.0);
        });
        refused("frequency_penalty", "in [-2, 2], got NaN.", |p| {
            p.frequency_penalty = Some(f32::NAN);
        });
        refused(
            "repetition_penalty",
            "greater than zero and finite, got 0.",
            |p| {
                p.repetition_penalty = Some(0.0);
            },
        );
        refused("n", "at least 1, got 0.", |p| p.n = Some(0));
        refused("n", "at most 128, got 129.", |p| p.n = Some(129));
        refused("n", "greedy sampling, got 2.", |p| {
            (p.n, p.temperature) = (Some(2), Some(0.0));
        });
        refused("max_tokens", "at least 1, got 0.", |p| p.max_tokens = Some(0));
        refused("min_tokens", "equal to max_tokens=3, got 4.", |p| {
            (p.max_tokens, p.min_tokens) = (Some(3), Some(4));
        });
        refused("stop", "empty string.", |p| p.stop = vec![String::new()]);
        refused("stop_token_ids", "holds 50, but token ids are below 50.", |p| {
            p.stop_token_ids = vec![49, 50];
        });
        refused("stop_token_ids", "at most 128 are allowed.", |p| {
            p.stop_token_ids = vec![1; 129];
        });
        refused("logit_bias", "token 50, but token ids are below 50.", |p| {
            p.logit_bias.insert(50, 1.0);
        });
        refused("logit_bias", "must be finite, got NaN.", |p| {
            p.logit_bias.insert(7, f32::NAN);
        });
        refused("logit_bias", "at most 512 are allowed.", |p| {
            p.logit_bias = (0..513).map(|id| (id, 1.0)).collect();
        });
        let output = v1::OutputOptions {
            logprobs: Some(21),
            ..Default::default()
        };
        let error = check_with(
            &v1::SamplingParams::default(),
            &output,
            &GenerationDefaults::default(),
        );
        assert_eq!(error.expect_err("over").param.as_deref(), Some("logprobs"));
    }

    #[test]
    fn requests_override_the_models_defaults_which_override_the_standard() {
        let json = serde_json::json!({
            "temperature": 0.6, "top_k": -1, "top_p": 0.9, "max_new_tokens": 7, "do_sample": true,
            "eos_token_id": [1, 2],
        });
        let defaults = GenerationDefaults::from_json(&json).expect("valid");
        let params = v1::SamplingParams {
            top_p: Some(0.5),
            ..Default::default()
        };
        let checked = check_with(&params, &v1::OutputOptions::default(), &defaults).expect("valid");
        assert_eq!((checked.sampling.temperature, checked.sampling.top_p), (0.6, 0.5));
        assert_eq!((checked.sampling.top_k, checked.sampling.min_p), (0, 0.0));
        let rules = checked.stop_rules(10, &LIMITS).expect("fits");
        assert_eq!((rules.max_tokens, rules.stop_token_ids), (7, vec![0, 2]));
        let bad = serde_json::json!({"top_p": 2.0});
        assert!(
            GenerationDefaults::from_json(&bad)
                .expect_err("out of range")
                .to_string()
                .contains("top_p")
        );
    }

    #[test]
    fn max_tokens_is_what_the_context_leaves() {
        let free = edited(|_| {}).expect("valid");
        assert_eq!(free.stop_rules(99, &LIMITS).map(|rules| rules.max_tokens), Ok(1));
        let full = free.stop_rules(100, &LIMITS).expect_err("no room");
        assert_eq!(full.kind, ErrorKind::ContextLengthExceeded);
        assert!(full.message.contains("100 tokens") && full.message.contains("100 input"));

        let fixed = edited(|p| p.max_tokens = Some(41)).expect("valid");
        let error = fixed.stop_rules(60, &LIMITS).expect_err("one too many");
        assert!(
            error
                .message
                .contains("you requested 101 tokens (60 in the messages, 41 in the completion)")
        );
        assert_eq!(
            fixed.stop_rules(59, &LIMITS).map(|rules| rules.max_tokens),
            Ok(41)
        );

        let patient = edited(|p| p.min_tokens = Some(50)).expect("valid");
        assert_eq!(
            patient
                .stop_rules(60, &LIMITS)
                .expect_err("no room")
                .param
                .as_deref(),
            Some("min_tokens")
        );
    }

    #[test]
    fn greedy_needs_no_filters_and_tiny_temperatures_are_raised() {
        let greedy = edited(|p| (p.temperature, p.top_k, p.top_p) = (Some(0.0), Some(5), Some(0.1)));
        let greedy = greedy.expect("valid").sampling;
        assert_eq!((greedy.temperature, greedy.top_k, greedy.top_p), (0.0, 0, 1.0));
        let tiny = edited(|p| p.temperature = Some(1e-30)).expect("valid");
        assert_eq!(tiny.sampling.temperature, 0.01);
    }

    #[test]
    fn bias_is_ordered_and_clamped() {
        let biased = edited(|p| p.logit_bias = [(9, 1e9), (3, -0.5), (4, -101.0)].into()).expect("valid");
        assert_eq!(biased.sampling.logit_bias, [(3, -0.5), (4, -100.0), (9, 100.0)]);
    }

    #[test]
    fn completions_are_drawn_with_consecutive_seeds() {
        let fixed = edited(|p| (p.n, p.seed) = (Some(3), Some(u64::MAX))).expect("valid");
        let seeds: Vec<u64> = (0..3).map(|index| fixed.sampling_of(index).seed).collect();
        assert_eq!(seeds, [u64::MAX, 0, 1]);
        let (a, b) = (edited(|_| {}), edited(|_| {}));
        assert_ne!(a.expect("valid").sampling.seed, b.expect("valid").sampling.seed);
    }

    #[test]
    fn ignore_eos_leaves_the_requests_own_stop_tokens() {
        let params = edited(|p| (p.ignore_eos, p.stop_token_ids) = (true, vec![9, 9])).expect("valid");
        assert_eq!(params.stop_token_ids, [9]);
    }
}
