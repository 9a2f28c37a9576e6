//! The fields that both completion routes share, and their gRPC form.

use std::fmt;

use phalanx_proto::{
    RpcError,
    limits::{MAX_N, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS},
    v1::{OutputOptions, RepetitionDetection, SamplingParams},
};
use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Visitor, value::SeqAccessDeserializer},
};

use super::{
    bias::LogitBias,
    body::{Bounded, Object},
    caller,
};

/// Sampling and streaming. `null` and absent are the same: the model's default.
#[derive(Debug, Deserialize)]
pub(crate) struct Params {
    pub(crate) model: Option<String>,
    pub(crate) stream: Option<bool>,
    stream_options: Option<Object<StreamOptions>>,
    n: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    /// -1 and 0: not limited.
    top_k: Option<i64>,
    min_p: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    seed: Option<Seed>,
    min_tokens: Option<u32>,
    stop: Option<StopStrings>,
    stop_token_ids: Option<Bounded<u32, MAX_STOP_TOKEN_IDS>>,
    ignore_eos: Option<bool>,
    include_stop_str_in_output: Option<bool>,
    skip_special_tokens: Option<bool>,
    logit_bias: Option<LogitBias>,
    repetition_detection: Option<Object<RepetitionFields>>,
    /// -1: none.
    thinking_token_budget: Option<i64>,
    priority: Option<i32>,
    pub(crate) cache_salt: Option<String>,
    /// Seconds that the client waits.
    timeout: Option<f64>,
    /// Names the session of a request that does not name one itself.
    pub(crate) user: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

/// What is left out is 0.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
struct RepetitionFields {
    max_pattern_size: u32,
    min_pattern_size: u32,
    min_count: u32,
}

impl Params {
    pub(crate) fn streams(&self) -> bool {
        self.stream == Some(true)
    }

    /// Completions per prompt, within its limit once [`Self::sampling`] has passed.
    pub(crate) fn n(&self) -> u32 {
        self.n.unwrap_or(1)
    }

    /// Smaller is more urgent.
    pub(crate) fn priority(&self) -> i32 {
        self.priority.unwrap_or(0)
    }

    /// Milliseconds after which the request ends with an error.
    ///
    /// # Errors
    /// `InvalidArgument` for what is no time to wait.
    pub(crate) fn timeout_ms(&self) -> Result<Option<u64>, RpcError> {
        caller::timeout_ms(self.timeout)
    }

    /// The sampling parameters with `max_tokens`, which the two routes read differently.
    ///
    /// # Errors
    /// `InvalidArgument` for what gRPC could not carry; ranges are the coordinator's to judge.
    pub(crate) fn sampling(&mut self, max_tokens: Option<u32>) -> Result<SamplingParams, RpcError> {
        if !(1..=MAX_N).contains(&self.n()) {
            return Err(RpcError::invalid(
                "n",
                format!("n must be 1 to {MAX_N}, not {}", self.n()),
            ));
        }
        Ok(SamplingParams {
            n: self.n,
            temperature: finite("temperature", self.temperature)?,
            top_p: finite("top_p", self.top_p)?,
            top_k: self.top_k.map(top_k).transpose()?,
            min_p: finite("min_p", self.min_p)?,
            presence_penalty: finite("presence_penalty", self.presence_penalty)?,
            frequency_penalty: finite("frequency_penalty", self.frequency_penalty)?,
            repetition_penalty: finite("repetition_penalty", self.repetition_penalty)?,
            seed: self.seed.map(|seed| seed.0),
            max_tokens,
            min_tokens: self.min_tokens,
            stop: self.stop.take().unwrap_or_default().0.0,
            stop_token_ids: self.stop_token_ids.take().unwrap_or_default().0,
            ignore_eos: self.ignore_eos.unwrap_or(false),
            include_stop_str_in_output: self.include_stop_str_in_output.unwrap_or(false),
            skip_special_tokens: self.skip_special_tokens,
            logit_bias: self.logit_bias.take().unwrap_or_default().0,
            repetition_detection: self.repetition_detection.as_ref().map(repetition_detection),
            thinking_token_budget: self
                .thinking_token_budget
                .map(thinking_token_budget)
                .transpose()?
                .flatten(),
            ..SamplingParams::default()
        })
    }

    /// The output options with `logprobs` and `echo`, which the two routes spell differently. `force_usage`: a stream
    /// ends with its usage whatever it asks for.
    pub(crate) fn output(
        &self,
        logprobs: Option<u32>,
        echo: bool,
        force_usage: bool,
    ) -> Result<OutputOptions, RpcError> {
        if self.stream_options.is_some() && !self.streams() {
            let message = "stream_options can only be given together with stream: true";
            return Err(RpcError::invalid("stream_options", message));
        }
        let options = self
            .stream_options
            .as_ref()
            .map(|options| options.0)
            .unwrap_or_default();
        let forced = force_usage && self.streams();
        let include_usage = forced || options.include_usage.unwrap_or(false);
        Ok(OutputOptions {
            logprobs,
            echo,
            include_usage,
            continuous_usage: include_usage && options.continuous_usage_stats.unwrap_or(false),
            ..OutputOptions::default()
        })
    }
}

/// A number too large for 32 bits becomes an infinity on the way in.
pub(crate) fn finite(field: &str, value: Option<f32>) -> Result<Option<f32>, RpcError> {
    match value {
        Some(value) if !value.is_finite() => Err(RpcError::invalid(
            field,
            format!("{field} is not a finite 32-bit number"),
        )),
        _ => Ok(value),
    }
}

pub(crate) fn top_k(value: i64) -> Result<u32, RpcError> {
    match value {
        -1 => Ok(0),
        _ => u32::try_from(value).map_err(|_| {
            RpcError::invalid(
                "top_k",
                format!("top_k must be -1 (off) or positive, not {value}"),
            )
        }),
    }
}

fn repetition_detection(Object(fields): &Object<RepetitionFields>) -> RepetitionDetection {
    RepetitionDetection {
        max_pattern_size: fields.max_pattern_size,
        min_pattern_size: fields.min_pattern_size,
        min_count: fields.min_count,
    }
}

/// None for -1. More than gRPC can carry is more than any context has.
fn thinking_token_budget(value: i64) -> Result<Option<u32>, RpcError> {
    match value {
        -1 => Ok(None),
        0.. => Ok(Some(u32::try_from(value).unwrap_or(u32::MAX))),
        _ => Err(RpcError::invalid(
            "thinking_token_budget",
            format!("thinking_token_budget must be -1 (none) or at least 0, not {value}"),
        )),
    }
}

/// Any 64-bit integer. A negative one is its two's complement, so that different seeds stay different.
#[derive(Clone, Copy, Debug)]
struct Seed(u64);

impl<'de> Deserialize<'de> for Seed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SeedVisitor;

        impl Visitor<'_> for SeedVisitor {
            type Value = Seed;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("a 64-bit integer")
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Seed, E> {
                Ok(Seed(value))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Seed, E> {
                Ok(Seed(value.cast_unsigned()))
            }
        }

        deserializer.deserialize_i64(SeedVisitor)
    }
}

/// A string, or a list of strings.
#[derive(Debug, Default)]
struct StopStrings(Bounded<String, MAX_STOP_STRINGS>);

impl<'de> Deserialize<'de> for StopStrings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StopVisitor;

        impl<'de> Visitor<'de> for StopVisitor {
            type Value = StopStrings;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("a string or a list of strings")
            }

            fn visit_str<E: Error>(self, one: &str) -> Result<StopStrings, E> {
                Ok(StopStrings(Bounded(vec![one.to_owned()])))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, many: A) -> Result<StopStrings, A::Error> {
                Bounded::deserialize(SeqAccessDeserializer::new(many)).map(StopStrings)
            }
        }

        deserializer.deserialize_any(StopVisitor)
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::limits::MAX_LOGIT_BIAS;

    use super::{super::body::parse, *};

    fn sampling(body: &str) -> Result<SamplingParams, RpcError> {
        parse::<Params>(body.as_bytes())?.sampling(Some(7))
    }

    #[test]
    fn every_field_is_carried() {
        let body = r#"{"n": 2, "temperature": 1, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "presence_penalty": -2,
            "frequency_penalty": 0.25, "repetition_penalty": 1.5, "seed": -1, "min_tokens": 3, "stop": "a",
            "stop_token_ids": [5], "ignore_eos": true, "include_stop_str_in_output": true,
            "skip_special_tokens": false, "logit_bias": {"7": -100, "50256": 0.5},
            "repetition_detection": {"max_pattern_size": 8, "min_count": 3}, "thinking_token_budget": 9}"#;
        let expected = SamplingParams {
            n: Some(2),
            temperature: Some(1.0),
            top_p: Some(0.5),
            top_k: Some(0),
            min_p: Some(0.1),
            presence_penalty: Some(-2.0),
            frequency_penalty: Some(0.25),
            repetition_penalty: Some(1.5),
            seed: Some(u64::MAX),
            max_tokens: Some(7),
            min_tokens: Some(3),
            stop: vec!["a".to_owned()],
            stop_token_ids: vec![5],
            ignore_eos: true,
            include_stop_str_in_output: true,
            skip_special_tokens: Some(false),
            logit_bias: [(7, -100.0), (50_256, 0.5)].into(),
            repetition_detection: Some(RepetitionDetection {
                max_pattern_size: 8,
                min_pattern_size: 0,
                min_count: 3,
            }),
            thinking_token_budget: Some(9),
            ..SamplingParams::default()
        };
        assert_eq!(sampling(body).expect("valid"), expected);
    }

    #[test]
    fn null_is_absent() {
        let nulls =
            r#"{"n": null, "temperature": null, "top_k": null, "seed": null, "stop": null, "stream": null}"#;
        assert_eq!(sampling(nulls).expect("valid"), sampling("{}").expect("valid"));
        let none = r#"{"repetition_detection": null, "thinking_token_budget": -1}"#;
        assert_eq!(sampling(none).expect("valid"), sampling("{}").expect("valid"));
    }

    #[test]
    fn what_grpc_cannot_carry_is_refused_by_name() {
        for (body, param) in [
            (r#"{"n": 0}"#, "n"),
            (r#"{"n": 1000}"#, "n"),
            (r#"{"temperature": 1e300}"#, "temperature"),
            (r#"{"temperature": "hot"}"#, "temperature"),
            (r#"{"top_k": -2}"#, "top_k"),
            (r#"{"top_k": 5000000000}"#, "top_k"),
            (r#"{"seed": 1.5}"#, "seed"),
            (r#"{"stop": 3}"#, "stop"),
            (r#"{"stop": ["a", 3]}"#, "stop[1]"),
            (r#"{"stop_token_ids": [-1]}"#, "stop_token_ids[0]"),
            (r#"{"min_tokens": true}"#, "min_tokens"),
            (r#"{"repetition_detection": [8, 1, 3]}"#, "repetition_detection"),
            (
                r#"{"repetition_detection": {"max_pattern_size": -1}}"#,
                "repetition_detection.max_pattern_size",
            ),
            (r#"{"thinking_token_budget": -2}"#, "thinking_token_budget"),
            (r#"{"thinking_token_budget": 1.5}"#, "thinking_token_budget"),
            (r#"{"logit_bias": [1]}"#, "logit_bias"),
            (r#"{"logit_bias": {"the": 1}}"#, "logit_bias"),
            (r#"{"logit_bias": {"-1": 1}}"#, "logit_bias"),
            (r#"{"logit_bias": {"7": 1, "7": 2}}"#, "logit_bias"),
            (r#"{"logit_bias": {"7": 1e300}}"#, "logit_bias"),
            (r#"{"logit_bias": {"7": "much"}}"#, "logit_bias.7"),
            (r#"{"priority": 3000000000}"#, "priority"),
            (r#"{"cache_salt": 5}"#, "cache_salt"),
        ] {
            assert_eq!(
                sampling(body).expect_err(body).param.as_deref(),
                Some(param),
                "{body}"
            );
        }
        let many = format!(r#"{{"stop": [{}""]}}"#, r#""a","#.repeat(MAX_STOP_STRINGS));
        assert_eq!(
            sampling(&many).expect_err("too many").param.as_deref(),
            Some("stop")
        );
        let entries: Vec<String> = (0..=MAX_LOGIT_BIAS).map(|id| format!(r#""{id}": 1"#)).collect();
        let many = format!(r#"{{"logit_bias": {{{}}}}}"#, entries.join(","));
        assert_eq!(
            sampling(&many).expect_err("too many").param.as_deref(),
            Some("logit_bias")
        );
    }
}
