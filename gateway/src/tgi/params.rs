//! TGI's request, and its gRPC form.

use phalanx_proto::{
    RpcError,
    limits::MAX_STOP_STRINGS,
    v1::{
        GenerateRequest, OutputOptions, SamplingParams, StructuredOutputs, generate_request::Prompt,
        structured_outputs::Constraint,
    },
};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;

use crate::openai::{
    body::{Bounded, Object, parse},
    caller::Caller,
    params::finite,
    structured::text_of,
};

/// TGI's default.
const DEFAULT_MAX_NEW_TOKENS: u32 = 100;

/// `{"inputs": ..., "parameters": {...}}`; `stream` counts at `/` only.
#[derive(Debug, Deserialize)]
pub(crate) struct GenerateBody {
    inputs: Option<String>,
    parameters: Option<Object<Parameters>>,
    stream: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct Parameters {
    temperature: Option<f32>,
    repetition_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    top_k: Option<i64>,
    top_p: Option<f32>,
    do_sample: Option<bool>,
    #[serde(default = "default_max_new_tokens")]
    max_new_tokens: Option<u32>,
    return_full_text: Option<bool>,
    stop: Option<Bounded<String, MAX_STOP_STRINGS>>,
    details: Option<bool>,
    seed: Option<u64>,
    top_n_tokens: Option<u32>,
    grammar: Option<Object<Grammar>>,
    // Not offered unless they ask for nothing.
    adapter_id: Option<IgnoredAny>,
    best_of: Option<u32>,
    decoder_input_details: Option<bool>,
    truncate: Option<u32>,
    typical_p: Option<f32>,
    watermark: Option<bool>,
}

/// The language that the text is held to: `json`, whose value is a schema, or `regex`.
#[derive(Debug, Deserialize)]
struct Grammar {
    r#type: Option<String>,
    value: Option<Box<RawValue>>,
}

impl Grammar {
    fn into_grpc(self) -> Result<StructuredOutputs, RpcError> {
        let value = self.value.ok_or_else(|| refuse("grammar.value", "is needed"))?;
        let text = text_of("parameters.grammar.value", &value)?;
        let constraint = match self.r#type.as_deref() {
            Some("json") => Constraint::JsonSchema(text),
            Some("regex") if value.get().starts_with('"') => Constraint::Regex(text),
            Some("regex") => return Err(refuse("grammar.value", "must be a string")),
            _ => return Err(refuse("grammar.type", "must be json or regex")),
        };
        Ok(StructuredOutputs {
            constraint: Some(constraint),
            param: "parameters.grammar".to_owned(),
            ..StructuredOutputs::default()
        })
    }
}

#[expect(clippy::unnecessary_wraps, reason = "serde wants the field's type")]
fn default_max_new_tokens() -> Option<u32> {
    Some(DEFAULT_MAX_NEW_TOKENS)
}

/// A checked request.
pub(super) struct Call {
    caller: Caller,
    inputs: String,
    sampling: SamplingParams,
    /// The body's own wish.
    pub(super) streams: bool,
    pub(super) details: bool,
    /// Alternatives shown for each token.
    pub(super) top_n_tokens: Option<u32>,
    pub(super) seed: Option<u64>,
    /// Comes before the generated text.
    pub(super) prefix: String,
}

impl Call {
    /// # Errors
    /// `InvalidArgument` naming the field; ranges that TGI shares are the coordinator's to judge.
    pub(super) fn parse(body: &[u8], caller: Caller) -> Result<Self, RpcError> {
        let body: GenerateBody = parse(body)?;
        let inputs = body
            .inputs
            .ok_or_else(|| RpcError::invalid("inputs", "inputs is needed"))?;
        let mut parameters = match body.parameters {
            Some(Object(parameters)) => parameters,
            // What an empty object is.
            None => Parameters {
                max_new_tokens: default_max_new_tokens(),
                ..Parameters::default()
            },
        };
        parameters.refuse_unoffered()?;
        let full_text = parameters.return_full_text.unwrap_or(false);
        Ok(Self {
            caller,
            sampling: parameters.sampling()?,
            streams: body.stream.unwrap_or(false),
            details: parameters.details.unwrap_or(false),
            top_n_tokens: parameters.top_n_tokens.filter(|count| *count > 0),
            seed: parameters.seed,
            prefix: if full_text { inputs.clone() } else { String::new() },
            inputs,
        })
    }

    /// The request, which takes prompt and parameters out; `tokens`: with each token's id, text and probability.
    pub(super) fn request(&mut self, id: &str, tokens: bool) -> GenerateRequest {
        let mut request = GenerateRequest {
            request_id: id.to_owned(),
            prompt: Some(Prompt::Text(std::mem::take(&mut self.inputs))),
            sampling: Some(std::mem::take(&mut self.sampling)),
            output: Some(OutputOptions {
                logprobs: tokens.then(|| self.top_n_tokens.unwrap_or(0)),
                // For the number of prompt tokens in a stream's details.
                include_usage: true,
                ..OutputOptions::default()
            }),
            ..GenerateRequest::default()
        };
        self.caller.sign(&mut request.tenant, &mut request.timeout_ms);
        request
    }
}

impl Parameters {
    fn refuse_unoffered(&self) -> Result<(), RpcError> {
        let asked = [
            ("adapter_id", self.adapter_id.is_some()),
            ("best_of", self.best_of.is_some_and(|count| count != 1)),
            ("decoder_input_details", self.decoder_input_details == Some(true)),
            ("truncate", self.truncate.is_some()),
            ("typical_p", self.typical_p.is_some_and(|p| p != 1.0)),
            ("watermark", self.watermark == Some(true)),
        ];
        match asked.into_iter().find(|(_, asked)| *asked) {
            Some((field, _)) => Err(refuse(field, "is not offered by this server")),
            None => Ok(()),
        }
    }

    /// Whether tokens are drawn at all: TGI is greedy unless something asks for more.
    fn draws(&self) -> bool {
        self.do_sample == Some(true)
            || self.temperature.is_some_and(|temperature| temperature != 1.0)
            || self.top_k.is_some()
            || self.top_p.is_some_and(|p| p < 1.0)
    }

    fn sampling(&mut self) -> Result<SamplingParams, RpcError> {
        let temperature = number("temperature", self.temperature)?;
        if temperature.is_some_and(|temperature| temperature <= 0.0) {
            return Err(refuse(
                "temperature",
                "must be above 0; leave it out for greedy decoding",
            ));
        }
        let top_k = self.top_k.map(|k| match u32::try_from(k) {
            Ok(k) if k > 0 => Ok(k),
            _ => Err(refuse("top_k", "must be above 0")),
        });
        let draws = self.draws();
        Ok(SamplingParams {
            temperature: Some(if draws { temperature.unwrap_or(1.0) } else { 0.0 }),
            top_p: number("top_p", self.top_p)?,
            top_k: top_k.transpose()?,
            repetition_penalty: number("repetition_penalty", self.repetition_penalty)?,
            frequency_penalty: number("frequency_penalty", self.frequency_penalty)?,
            seed: self.seed,
            max_tokens: self.max_new_tokens,
            stop: self.stop.take().unwrap_or_default().0,
            // TGI ends a text behind its stop sequence.
            include_stop_str_in_output: true,
            structured_outputs: self
                .grammar
                .take()
                .map(|Object(grammar)| grammar.into_grpc())
                .transpose()?,
            ..SamplingParams::default()
        })
    }
}

fn number(field: &str, value: Option<f32>) -> Result<Option<f32>, RpcError> {
    finite(field, value).map_err(|_| refuse(field, "is not a finite 32-bit number"))
}

fn refuse(field: &str, why: &str) -> RpcError {
    RpcError::invalid(format!("parameters.{field}"), format!("parameters.{field} {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(parameters: &str) -> Result<SamplingParams, RpcError> {
        let body = format!(r#"{{"inputs": "hi", "parameters": {parameters}}}"#);
        Ok(Call::parse(body.as_bytes(), Caller::default())?.sampling)
    }

    #[test]
    fn greedy_unless_something_asks_for_more() {
        let temperature = |parameters: &str| sampling(parameters).expect("valid").temperature;
        for greedy in [
            "null",
            "{}",
            r#"{"temperature": 1.0}"#,
            r#"{"do_sample": false, "seed": 7}"#,
        ] {
            assert_eq!(temperature(greedy), Some(0.0), "{greedy}");
        }
        assert_eq!(temperature(r#"{"do_sample": true}"#), Some(1.0));
        assert_eq!(temperature(r#"{"top_k": 5}"#), Some(1.0));
        assert_eq!(temperature(r#"{"temperature": 0.5}"#), Some(0.5));
    }

    #[test]
    fn defaults_are_those_of_tgi() {
        let defaults = sampling("null").expect("valid");
        assert_eq!(
            (defaults.max_tokens, defaults.include_stop_str_in_output),
            (Some(100), true)
        );
        assert_eq!(sampling("{}").expect("valid"), defaults);
        let open = sampling(r#"{"max_new_tokens": null}"#).expect("valid");
        assert_eq!(open.max_tokens, None, "as many as fit");
    }

    #[test]
    fn grammars_are_schemas_and_regular_expressions() {
        let constraint = |parameters: &str| {
            let sampling = sampling(parameters).expect("valid");
            sampling
                .structured_outputs
                .and_then(|structured| structured.constraint)
        };
        let schema = || Some(Constraint::JsonSchema(r#"{"type": "null"}"#.into()));
        let object = r#"{"grammar": {"type": "json", "value": {"type": "null"}}}"#;
        let text = r#"{"grammar": {"type": "json", "value": "{\"type\": \"null\"}"}}"#;
        assert_eq!((constraint(object), constraint(text)), (schema(), schema()));
        let regex = r#"{"grammar": {"type": "regex", "value": "a+"}}"#;
        assert_eq!(constraint(regex), Some(Constraint::Regex("a+".into())));
    }

    #[test]
    fn refusals_name_the_parameter() {
        for (parameters, param) in [
            (r#"{"best_of": 2}"#, "parameters.best_of"),
            (
                r#"{"decoder_input_details": true}"#,
                "parameters.decoder_input_details",
            ),
            (
                r#"{"grammar": {"type": "yaml", "value": "a"}}"#,
                "parameters.grammar.type",
            ),
            (
                r#"{"grammar": {"type": "regex", "value": {}}}"#,
                "parameters.grammar.value",
            ),
            (r#"{"grammar": {"type": "json"}}"#, "parameters.grammar.value"),
            (r#"{"watermark": true}"#, "parameters.watermark"),
            (r#"{"typical_p": 0.9}"#, "parameters.typical_p"),
            (r#"{"truncate": 5}"#, "parameters.truncate"),
            (r#"{"temperature": 0}"#, "parameters.temperature"),
            (r#"{"temperature": 1e300}"#, "parameters.temperature"),
            (r#"{"top_k": 0}"#, "parameters.top_k"),
            (r#"{"max_new_tokens": -1}"#, "parameters.max_new_tokens"),
            (r#"{"stop": "a"}"#, "parameters.stop"),
            ("[]", "parameters"),
        ] {
            assert_eq!(
                sampling(parameters).expect_err(parameters).param.as_deref(),
                Some(param)
            );
        }
        let harmless = r#"{"best_of": 1, "decoder_input_details": false, "watermark": false, "typical_p": 1.0,
            "grammar": null, "truncate": null, "adapter_id": null}"#;
        assert!(sampling(harmless).is_ok());
        assert_eq!(
            Call::parse(b"{}", Caller::default())
                .err()
                .expect("refused")
                .param
                .as_deref(),
            Some("inputs")
        );
    }
}
